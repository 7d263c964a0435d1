"""Fine-tuning on all labels of SemanticKITTI. Published: 65.8 % mIoU with ScaLR, 65.2 % with ScaLR+.

    python -m scalr_jax.main --config=configs/finetune/semantic_kitti_100p.py:scalr \\
        --workdir=runs/finetune_semantic_kitti_100p --config.data.root=SEMANTIC_KITTI --config.checkpoint=CHECKPOINT

CHECKPOINT is a pretraining's workdir or a published file (docs/weights.md); for ScaLR+ write :scalr_plus, for a
distilled VaViT :vavit_b or :vavit_l (ScaLR+'s settings; no figure yet).
"""

from scalr_jax import recipes


def get_config(method="scalr"):
    return recipes.finetuning("semantic_kitti", method)
