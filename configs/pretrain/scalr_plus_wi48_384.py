"""ScaLR+'s distillation of DINOv2 ViT-L/14 into a WaffleIron of 48 x 384, on four datasets.

    python -m scalr_jax.main --config=configs/pretrain/scalr_plus_wi48_384.py \\
        --workdir=runs/scalr_plus_wi48_384 --config.data.root=DATASETS \\
        --config.teacher.checkpoint=vit_large_patch14_dinov2.safetensors

15.1 M parameters without the head. DATASETS holds the folders nuscenes, semantic_kitti and pandaset.
A narrower student with the settings of the published 768; no figure for it is at hand.
The published teacher comes from timm, so positions are resampled as there; Meta's file serves as well.
"""

from scalr_jax import recipes


def get_config():
    return recipes.pretraining("scalr_plus", 384)
