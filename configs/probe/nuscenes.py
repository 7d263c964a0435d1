"""Linear probing on nuScenes. Published: 67.8 % mIoU with ScaLR, 70.4 % with ScaLR+.

    python -m scalr_jax.main --config=configs/probe/nuscenes.py:scalr \\
        --workdir=runs/probe_nuscenes --config.data.root=NUSCENES --config.checkpoint=CHECKPOINT

CHECKPOINT is a pretraining's workdir or a published file (docs/weights.md); for ScaLR+ write :scalr_plus, for a
distilled VaViT :vavit_b or :vavit_l (ScaLR+'s settings; no figure yet).
"""

from scalr_jax import recipes


def get_config(method="scalr"):
    return recipes.probing("nuscenes", method)
