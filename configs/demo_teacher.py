"""The demo's teacher: a small ViT trained on generated streets without semantic labels.

python -m scalr_jax.main --config=configs/demo_teacher.py --workdir=runs/demo_teacher
"""

from ml_collections import ConfigDict

from scalr_jax import config as defaults


def get_config():
    config = defaults.get_config()
    config.task = "teacher"
    config.num_steps = 1500
    config.log_every_steps = 25
    config.data.update(dataset="streets", image_size=(112, 224), num_scenes=500)
    config.optimizer.update(
        learning_rate=3e-3, final_learning_rate=1e-5, weight_decay=0.03, beta2=0.99, warmup_share=0.05
    )
    config.optimizer.batch_size = 8
    with config.unlocked():
        config.teacher_training = ConfigDict(
            {
                "num_pixels": 768,  # with targets, in each image
                "max_gradient": 2.0,  # norm
                "vit": {
                    "patch_size": 8,
                    "width": 128,
                    "depth": 4,
                    "num_heads": 4,
                    "hidden": 512,
                    "layer_scale": False,
                    "position_grid": (14, 28),
                },
                "weights": {
                    **{"length": 1.0, "width": 1.0, "tallness": 1.0, "height": 0.5, "depth": 0.2},
                    **{"normal": 1.0, "albedo": 0.5, "offset": 0.2},
                    **{"mean": 2.0, "correlation": 1.0},
                },
            }
        )
    return config
