"""Linear probing on PandarGT. Published: 34.5 % mIoU with ScaLR, 40.7 % with ScaLR+.

    python -m scalr_jax.main --config=configs/probe/pandargt.py:scalr \\
        --workdir=runs/probe_pandargt --config.data.root=PANDASET --config.checkpoint=CHECKPOINT

CHECKPOINT is a pretraining's workdir or a published file (docs/weights.md); for ScaLR+ write :scalr_plus, for a
distilled VaViT :vavit_b or :vavit_l (ScaLR+'s settings; no figure yet).
"""

from scalr_jax import recipes


def get_config(method="scalr"):
    return recipes.probing("pandargt", method)
