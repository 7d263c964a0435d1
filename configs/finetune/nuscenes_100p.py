"""Fine-tuning on all labels of nuScenes. Published: 78.4 % mIoU with ScaLR, 78.4 % with ScaLR+.

    python -m scalr_jax.main --config=configs/finetune/nuscenes_100p.py:scalr \\
        --workdir=runs/finetune_nuscenes_100p --config.data.root=NUSCENES --config.checkpoint=CHECKPOINT

CHECKPOINT is a pretraining's workdir or a published file (docs/weights.md); for ScaLR+ write :scalr_plus, for a
distilled VaViT :vavit_b or :vavit_l (ScaLR+'s settings; no figure yet).
"""

from scalr_jax import recipes


def get_config(method="scalr"):
    return recipes.finetuning("nuscenes", method)
