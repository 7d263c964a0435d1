"""ScaLR's distillation of DINOv2 ViT-L/14 into a WaffleIron of 48 x 256, on four datasets.

    python -m scalr_jax.main --config=configs/pretrain/scalr_wi48_256.py \\
        --workdir=runs/scalr_wi48_256 --config.data.root=DATASETS \\
        --config.teacher.checkpoint=dinov2_vitl14_pretrain.pth

6.84 M parameters without the head. DATASETS holds the folders nuscenes, semantic_kitti and pandaset.
A narrower student with the settings of the published 768; no figure for it is at hand.
Published in float16; here bfloat16 on accelerators.
"""

from scalr_jax import recipes


def get_config():
    return recipes.pretraining("scalr", 256)
