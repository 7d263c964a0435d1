"""ScaLR's distillation of DINOv2 ViT-L/14 into a WaffleIron of 48 x 768, on four datasets.

    python -m scalr_jax.main --config=configs/pretrain/scalr_wi48_768.py \\
        --workdir=runs/scalr_wi48_768 --config.data.root=DATASETS \\
        --config.teacher.checkpoint=dinov2_vitl14_pretrain.pth

59.4 M parameters without the head. DATASETS holds the folders nuscenes, semantic_kitti and pandaset.
Probed, the published model reaches 67.8 % mIoU on nuScenes, 55.8 SemanticKITTI, 37.9 Pandar64, 34.5 PandarGT.
Published in float16; here bfloat16 on accelerators.
"""

from scalr_jax import recipes


def get_config():
    return recipes.pretraining("scalr")
