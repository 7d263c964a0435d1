"""The demo, on generated streets, with nothing to download: distil, probe, compare with full supervision.

python -m scalr_jax.main --config=configs/demo.py --workdir=runs/demo
"""

from scalr_jax import config as defaults


def get_config():
    config = defaults.get_config()
    config.task = "demo"
    config.num_steps = 240
    config.log_every_steps = 10
    config.checkpoint_every_steps = 60
    config.data.update(
        dataset="streets",
        sensors=("beams32",),
        num_scenes=192,
        num_validation_scenes=48,
        image_size=(112, 224),
        points_per_shard=16_384,
        scenes_per_shard=8,
    )
    config.model.update(channels=64, depth=6, grids=((128, 128), (128, 16), (128, 16)))
    config.teacher.checkpoint = "demo"
    config.optimizer.update(learning_rate=3e-3, warmup_share=0.1)
    return config
