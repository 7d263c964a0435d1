"""Fine-tuning on any share of nuScenes' labels: 1, 5, 10, 25 or 100 %, or any 100/n.

    python -m scalr_jax.main --config=configs/finetune/nuscenes.py:scalr_plus,5 \\
        --workdir=runs/finetune_nuscenes_5p --config.data.root=NUSCENES --config.checkpoint=CHECKPOINT

CHECKPOINT is a pretraining's workdir or a published file (docs/weights.md). Methods: scalr, scalr_plus, vavit_b and
vavit_l (ScaLR+'s settings for a distilled VaViT; no figure yet). There are published figures for 1, 10 and
100 % (nuscenes_1p.py, nuscenes_10p.py, nuscenes_100p.py); the others take the settings of 10 %: 45 epochs, layer decay
0.95 for ScaLR. 5 % is every 20th keyframe of the list.
"""

from scalr_jax import recipes


def get_config(method="scalr,100"):
    return recipes.finetuning_share("nuscenes", method)
