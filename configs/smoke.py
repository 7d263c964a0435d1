"""The smallest distillation, on generated streets: 20 steps in well under a minute on 2 cores, start-up included.

python -m scalr_jax.main --config=configs/smoke.py --workdir=runs/smoke
"""

from scalr_jax import config as defaults


def get_config():
    config = defaults.get_config()
    config.task = "distill"
    config.num_steps = 20
    config.log_every_steps = 1
    config.checkpoint_every_steps = 10
    config.data.update(
        dataset="streets",
        num_scenes=16,
        image_size=(112, 224),
        points_per_shard=8_192,
        scenes_per_shard=4,
        num_workers=0,
    )
    config.model.update(channels=32, depth=4, grids=((128, 128), (128, 16), (128, 16)))
    config.teacher.checkpoint = "demo"
    config.optimizer.update(learning_rate=3e-3, warmup_share=0.1)
    return config
