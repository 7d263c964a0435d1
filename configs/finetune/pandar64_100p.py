"""Fine-tuning on all labels of Pandar64. Published: 48.3 % mIoU with ScaLR, 50.7 % with ScaLR+.

    python -m scalr_jax.main --config=configs/finetune/pandar64_100p.py:scalr \\
        --workdir=runs/finetune_pandar64_100p --config.data.root=PANDASET --config.checkpoint=CHECKPOINT

CHECKPOINT is a pretraining's workdir or a published file (docs/weights.md); for ScaLR+ write :scalr_plus, for a
distilled VaViT :vavit_b or :vavit_l (ScaLR+'s settings; no figure yet).
"""

from scalr_jax import recipes


def get_config(method="scalr"):
    return recipes.finetuning("pandar64", method)
