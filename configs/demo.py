"""The demo, on generated streets, with nothing to download: distil, probe, compare with full supervision.

python -m scalr_jax.main --config=configs/demo.py --workdir=runs/demo
"""

from scalr_jax import config as defaults


def get_config():
    config = defaults.get_config()
    config.task = "demo"
    config.num_steps = 330
    config.log_every_steps = 10
    config.checkpoint_every_steps = 110
    config.data.update(
        dataset="streets",
        sensors=("beams32",),
        num_scenes=192,
        num_validation_scenes=48,
        image_size=(112, 224),
        points_per_shard=9_600,
        scenes_per_shard=4,
        num_workers=1,
    )
    config.model.update(channels=64, depth=6, grids=((128, 128), (128, 16), (128, 16)))
    config.model.update(num_neighbors=8, head_hidden=256)
    config.teacher.checkpoint = "demo"
    config.optimizer.update(learning_rate=2.5e-2, beta2=0.99, warmup_share=0.1)  # large: the run is short
    return config
