"""VaViT-B from scratch on nuScenes, all labels. Published: 81.3 % mIoU.

    python -m scalr_jax.main --config=configs/finetune/nuscenes_vavit.py \\
        --workdir=runs/nuscenes_vavit --config.data.root=NUSCENES

Whole scans with PillarMix, raw intensities, no field of view, as published.
PillarMix draws its other scans from all frames (published: from eight earlier ones), so that a resume is exact.
"""

from scalr_jax import recipes


def get_config():
    return recipes.vavit("nuscenes", 0.3)
