"""Distils the packaged teacher into a small student on real PandaSet frames, in PandaSet's raw layout, on a CPU.

    python -m scalr_jax.main --config=configs/pandaset_mini.py --workdir=runs/pandaset_mini --config.data.root=PANDASET

Both sensors, all scenes and frames that are there; `--config.data.scenes="('002',)"` and
`--config.data.frames="(45, 48)"` take a subset. On one scene of 20 frames, 100 steps take about 2 minutes on 2 cores
(2026-11-22) and end at a loss of 0.77 where the best constant prediction reaches 0.96 (means of the last 25 steps);
the teacher has only seen generated streets. For a real result give DINOv2 as the teacher:
`--config.teacher.checkpoint=dinov2_vits14_pretrain.pth --config.data.image_size="(224, 448)"`. As they are its features
make so small a student collapse at this rate; docs/measurements/small_runs.md says what helped, a rate of 4e-3 and
features whose components are alike (`teacher.normalize`).
"""

from scalr_jax import config as defaults


def get_config():
    config = defaults.get_config()
    config.task = "distill"
    config.num_steps = 100
    config.log_every_steps = 5
    config.checkpoint_every_steps = 50
    config.data.update(
        dataset="pandaset",
        sensors=("pandar64", "pandargt"),
        image_size=(112, 224),
        max_points=6_000,
        points_per_shard=24_576,
        scenes_per_shard=6,
    )
    config.model.update(channels=64, depth=6, head_hidden=256)
    config.teacher.checkpoint = "demo"
    config.optimizer.update(learning_rate=1.5e-2, beta2=0.99, warmup_share=0.1)  # large: the run is short
    return config
