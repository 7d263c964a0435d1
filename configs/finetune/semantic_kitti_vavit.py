"""VaViT-B from scratch on SemanticKITTI, all labels. Published: 67.6 % mIoU (the best epoch: 68.0 %).

    python -m scalr_jax.main --config=configs/finetune/semantic_kitti_vavit.py \\
        --workdir=runs/semantic_kitti_vavit --config.data.root=SEMANTIC_KITTI

Whole scans with PillarMix, raw intensities, no field of view, as published.
PillarMix draws its other scans from all frames (published: from eight earlier ones), so that a resume is exact.
With instance cut-mix of bicycles, motorcycles, other vehicles, people and bicyclists, whose instances are cut out of
the training scans once, at the start, into the workdir.
"""

from scalr_jax import recipes


def get_config():
    return recipes.vavit("semantic_kitti", 0.5)
