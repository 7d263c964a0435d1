"""ScaLR's student, 48 x 768, on nuScenes without pretraining, all labels. Published: 78.7 % mIoU.

    python -m scalr_jax.main --config=configs/finetune/nuscenes_scratch.py --workdir=runs/nuscenes_scratch \\
        --config.data.root=NUSCENES

Only the figure is published in what was at hand; the settings are those of fine-tuning, without layer decay.
"""

from scalr_jax import recipes


def get_config():
    config = recipes.finetuning("nuscenes", "scalr")
    config.checkpoint = ""
    config.optimizer.layer_decay = 1.0
    return config
