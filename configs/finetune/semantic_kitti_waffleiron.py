"""WaffleIron 48 x 256 from scratch on SemanticKITTI, all labels. Published: 68.0 % mIoU.

    python -m scalr_jax.main --config=configs/finetune/semantic_kitti_waffleiron.py \\
        --workdir=runs/semantic_kitti_waffleiron --config.data.root=SEMANTIC_KITTI

The published figure needs instance cut-mix and polar-mix, which do not exist here: expect less.
"""

from scalr_jax import recipes


def get_config():
    return recipes.waffleiron("semantic_kitti", 256)
