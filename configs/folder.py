"""Distils a teacher into a student on one's own lidar: a folder of scans, camera images and their calibration.

    python -m scalr_jax.prepare --dataset=folder --root=DIR --output=inspection --inspect
    python -m scalr_jax.main --config=configs/folder.py --workdir=runs/folder --config.data.root=DIR

docs/data.md, "Your own lidar", says how the folder is laid out; the first command draws the points over the images and
prints the field of view, grids and point limits that fit the sensor: put them below. The packaged teacher and small
student let the second command run on a CPU (100 steps take about 2 minutes on 2 cores); no figure is published for
data of one's own. For a real result give DINOv2 as the teacher, `--config.teacher.checkpoint=PATH` with
dinov2_vits14_pretrain.pth, and the sizes of configs/pretrain/.
"""

from scalr_jax import config as defaults


def get_config():
    config = defaults.get_config()
    config.task = "distill"
    config.num_steps = 100
    config.log_every_steps = 5
    config.checkpoint_every_steps = 50
    config.data.update(
        dataset="folder",
        image_size=(112, 224),  # rows, columns; multiples of the teacher's patch, near the camera's proportions
        max_points=6_000,  # of one camera's view after 0.1 m voxels
        points_per_shard=24_576,
        scenes_per_shard=6,
    )
    config.model.update(
        channels=64,
        depth=6,
        head_hidden=256,
        field_of_view=((-64.0, -64.0, -8.0), (64.0, 64.0, 8.0)),  # metres; as published, for cars
        grids=((256, 256), (256, 32), (256, 32)),  # cells of 0.5 m
    )
    config.teacher.checkpoint = "demo"
    config.optimizer.update(learning_rate=1.5e-2, beta2=0.99, warmup_share=0.1)  # large: the run is short
    return config
