"""Does a large batch learn as much from the same scenes? A small distillation on generated streets.

    python -m scalr_jax.main --config=configs/large_batch_streets.py:16 --workdir=runs/batch_16

The number after the colon is the batch in units of the smallest, two scenes: 1, 4, 16. Every run sees the same 1,024
scenes (eight times 128 streets) in the same proportion of warm-up; `recipes.large_batch` says what else changes.
What came out is in docs/measurements/scaling.md.
"""

from scalr_jax import config as defaults
from scalr_jax import recipes

SCENES, BATCH = 1_024, 2


def get_config(times: str = "1"):
    batch = BATCH * int(times)
    config = defaults.get_config()
    config.num_steps = SCENES // batch
    config.log_every_steps = max(1, 4 // int(times))
    config.checkpoint_every_steps = 200
    config.data.update(
        dataset="streets",
        num_scenes=128,
        image_size=(112, 224),
        max_points=1_000,
        scenes_per_step=batch,
        scenes_per_shard=batch,
        points_per_shard=batch * 1_000,
        cells_per_shard=tuple(batch * n for n in (400, 200, 200)),
        halo_per_shard=tuple(batch * n for n in (400, 200, 200)),
        num_workers=0,
    )
    config.model.update(channels=32, depth=6, grids=((128, 128), (128, 16), (128, 16)))
    config.teacher.checkpoint = "demo"
    config.optimizer.update(learning_rate=5e-3, warmup_share=0.05, batch_size=BATCH)
    return recipes.large_batch(config, int(times))
