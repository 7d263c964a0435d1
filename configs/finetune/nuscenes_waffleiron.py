"""WaffleIron 48 x 384 from scratch on nuScenes, all labels. Published: 77.6 % mIoU.

    python -m scalr_jax.main --config=configs/finetune/nuscenes_waffleiron.py \\
        --workdir=runs/nuscenes_waffleiron --config.data.root=NUSCENES
"""

from scalr_jax import recipes


def get_config():
    return recipes.waffleiron("nuscenes", 384)
