"""Distillation of DINOv2 ViT-L/14 into VaViT-B (12 blocks, 768 wide), on four datasets, packed.

    python -m scalr_jax.main --config=configs/pretrain/vavit_b.py:4 \\
        --workdir=runs/vavit_b --config.data.root=DATASETS \\
        --config.teacher.checkpoint=vit_large_patch14_dinov2.safetensors

The number after the colon is that of the devices: each trains on as many scenes as fit into 65,536 points, 7.3 on
average. 85.9 M parameters without the head. DATASETS holds the folders nuscenes, semantic_kitti and pandaset.
ScaLR+'s recipe with another student, whose points have 768 features instead of the published 128, and no field of view
is cut. The schedule counts scenes, so it is ScaLR+'s. No distillation into a VaViT is published, and there is no figure
for this run yet.
"""

from scalr_jax import recipes


def get_config(num_shards: str = "1"):
    return recipes.packed(recipes.pretraining("vavit_b"), int(num_shards))
