"""Fine-tuning on 1 % of the labels of nuScenes. Published: 50.7 % mIoU with ScaLR, 54.1 % with ScaLR+.

    python -m scalr_jax.main --config=configs/finetune/nuscenes_1p.py:scalr \\
        --workdir=runs/finetune_nuscenes_1p --config.data.root=NUSCENES --config.checkpoint=CHECKPOINT

CHECKPOINT is a pretraining's workdir or a published file (docs/weights.md); for ScaLR+ write :scalr_plus, for a
distilled VaViT :vavit_b or :vavit_l (ScaLR+'s settings; no figure yet).
The published 1 % is a list of keyframes; here it is every 100th keyframe, another subset of that size.
"""

from scalr_jax import recipes


def get_config(method="scalr"):
    return recipes.finetuning("nuscenes", method, 1)
