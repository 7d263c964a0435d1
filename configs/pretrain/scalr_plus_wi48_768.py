"""ScaLR+'s distillation of DINOv2 ViT-L/14 into a WaffleIron of 48 x 768, on four datasets.

    python -m scalr_jax.main --config=configs/pretrain/scalr_plus_wi48_768.py \\
        --workdir=runs/scalr_plus_wi48_768 --config.data.root=DATASETS \\
        --config.teacher.checkpoint=vit_large_patch14_dinov2.safetensors

59.4 M parameters without the head. DATASETS holds the folders nuscenes, semantic_kitti and pandaset.
Probed, the published model reaches 70.4 % mIoU on nuScenes, 61.0 SemanticKITTI, 43.5 Pandar64, 40.7 PandarGT.
The published teacher comes from timm, so positions are resampled as there; Meta's file serves as well.
"""

from scalr_jax import recipes


def get_config():
    return recipes.pretraining("scalr_plus")
