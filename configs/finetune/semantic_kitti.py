"""Fine-tuning on any share of SemanticKITTI's labels: 1, 5, 10, 25 or 100 %, or any 100/n.

    python -m scalr_jax.main --config=configs/finetune/semantic_kitti.py:scalr_plus,5 \\
        --workdir=runs/finetune_semantic_kitti_5p --config.data.root=SEMANTIC_KITTI --config.checkpoint=CHECKPOINT

CHECKPOINT is a pretraining's workdir or a published file (docs/weights.md). Methods: scalr, scalr_plus, vavit_b and
vavit_l (ScaLR+'s settings for a distilled VaViT; no figure yet). There are published figures for 1 and
100 % (semantic_kitti_1p.py, semantic_kitti_100p.py); the others take the settings of 1 %: 45 epochs, layer decay 0.95
for ScaLR. 5 % is every 20th scan of the sorted list.
"""

from scalr_jax import recipes


def get_config(method="scalr,100"):
    return recipes.finetuning_share("semantic_kitti", method)
