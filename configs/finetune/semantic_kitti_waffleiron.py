"""WaffleIron 48 x 256 from scratch on SemanticKITTI, all labels. Published: 68.0 % mIoU.

    python -m scalr_jax.main --config=configs/finetune/semantic_kitti_waffleiron.py \\
        --workdir=runs/semantic_kitti_waffleiron --config.data.root=SEMANTIC_KITTI

With polar-mix and instance cut-mix of bicycles, motorcycles, other vehicles, people and bicyclists. The instances are
cut out of the training scans once, at the start, into the workdir.
"""

from scalr_jax import recipes


def get_config():
    return recipes.waffleiron("semantic_kitti", 256)
