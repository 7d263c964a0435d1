"""Linear probing on Pandar64. Published: 37.9 % mIoU with ScaLR, 43.5 % with ScaLR+.

    python -m scalr_jax.main --config=configs/probe/pandar64.py:scalr \\
        --workdir=runs/probe_pandar64 --config.data.root=PANDASET --config.checkpoint=CHECKPOINT

CHECKPOINT is a pretraining's workdir or a published file (docs/weights.md); for ScaLR+ write :scalr_plus, for a
distilled VaViT :vavit_b or :vavit_l (ScaLR+'s settings; no figure yet).
"""

from scalr_jax import recipes


def get_config(method="scalr"):
    return recipes.probing("pandar64", method)
