"""Fine-tuning on 1 % of the labels of SemanticKITTI. Published: 55.8 % mIoU with ScaLR, 57.4 % with ScaLR+.

    python -m scalr_jax.main --config=configs/finetune/semantic_kitti_1p.py:scalr \\
        --workdir=runs/finetune_semantic_kitti_1p --config.data.root=SEMANTIC_KITTI --config.checkpoint=CHECKPOINT

CHECKPOINT is a pretraining's workdir or a published file (docs/weights.md); for ScaLR+ write :scalr_plus, for a
distilled VaViT :vavit_b or :vavit_l (ScaLR+'s settings; no figure yet).
"""

from scalr_jax import recipes


def get_config(method="scalr"):
    return recipes.finetuning("semantic_kitti", method, 1)
