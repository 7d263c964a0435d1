"""Every config key with its default. A config file starts from `get_config()` and sets what differs.

The config is locked: a misspelt key is an error that names the nearest one. Keys that are shares (`warmup_share`, ...)
are fractions of the whole schedule, so that shortening a run keeps its shape.
"""

from __future__ import annotations

from typing import Any

import ml_collections
from ml_collections import config_dict

from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import flatten

ConfigDict = ml_collections.ConfigDict


def get_config() -> Any:  # a ConfigDict: its attributes have no static types
    """The defaults: ScaLR's 48 x 768 student, 8 scenes a step."""
    config = ConfigDict()
    config.task = "distill"  # distill, probe, finetune, evaluate, robustness, demo, teacher
    config.seed = 0
    config.num_steps = 1000
    config.log_every_steps = 10
    config.checkpoint_every_steps = 500
    config.keep_checkpoints = 2  # the newest
    config.keep_every_steps = 0  # and besides every so many steps; 0: none
    config.deterministic = (
        False  # GPU: only operations whose result is the same every time (slower); elsewhere always so
    )
    config.checkpoint = ""  # probe, finetune, evaluate, robustness: a workdir or a published .pth to start from
    config.data = _data()
    config.model = _model()
    config.teacher = _teacher()
    config.optimizer = _optimizer()
    config.probe = _probe()
    config.evaluate = _evaluate()
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})
    config.demo = ConfigDict(
        {
            "probe_steps": 120,
            "probe_learning_rate": 0.02,
            "supervised_learning_rates": (8e-3, 1.5e-2, 2.5e-2),
            "segment_max_points": 4_000,
            "segment_points_per_shard": 8_192,
            "segment_scenes_per_shard": 4,
        }
    )
    config.lock()
    return config


def _data() -> ConfigDict:
    return ConfigDict(
        {
            # streets, pandaset (with `sensors`; or pandar64, pandargt), nuscenes, semantic_kitti; to distil also
            # several, joined by "+", or "merged", the published four
            "dataset": "streets",
            "weights": (),  # of several: the proportions of their scenes; (): an epoch has every frame once
            "root": "",  # the raw dataset, or the folder of several, by name; for streets the cache (default: workdir)
            "sensors": ("beams32",),  # of streets or pandaset; refused for other datasets
            "num_scenes": 64,  # streets: scenes to render
            "num_validation_scenes": 32,
            "scenes": (),  # subset of the dataset's scenes, () for all
            "frames": (),  # subset of the frames, () for all
            "validation_frames": (),  # PandaSet: validate on these frames of the same scenes; (): the split's scenes
            "split": "train",
            "frame_list": "",  # a text file that names the training frames to use, one a line
            "label_fraction": 1.0,  # probe, finetune: 0.01 trains on every 100th frame of the list, 0.1 on every 10th
            "voxel_size": 0.1,  # metres
            # (mean, standard deviation) by which raw intensities are normalised; (): those of each sensor
            "intensity": (),
            "max_points": 20_000,  # the nearest to a random point
            "image_size": (224, 448),
            "antialias": True,  # False: torchvision 0.12's resize, as ScaLR pinned
            "scaled_decode": False,  # prepared records: decode JPEG files at 1/2, 1/4 or 1/8 where that is large enough
            "augmentation": "published",  # published, consistent, none
            # probe, finetune: classes, as ("person", "car"), of what is mixed into training scans; (): nothing
            "polarmix": (),  # half turns are swapped with another scan, and its objects of these classes added
            "cutmix": (),  # instances of these classes are added,
            "cutmix_ground": (),  # on points of these classes
            "points_per_shard": 65_536,
            "scenes_per_shard": 10,
            "scenes_per_step": 0,  # 0: as many as fit; 8: the published batch, exactly
            "cells_per_shard": (),  # (): derived from the first scenes
            "halo_per_shard": (),
            "voxels_per_shard": (),  # minkunet: of each level, likewise
            "pairs_per_shard": (),
            "num_workers": 2,  # worker processes of each process
            "prefetch": 2,
        }
    )


def _model() -> ConfigDict:
    return ConfigDict(
        {
            # waffleiron; minkunet14, minkunet18 or minkunet34: sparse voxels, which `minkunet` is about, and channels,
            # depth, num_neighbors, norm, activation, drop_path, grids, implementation and remat are not
            "name": "waffleiron",
            "channels": 768,
            "depth": 48,
            "num_neighbors": 16,
            "norm": "layer",  # layer, batch
            "activation": "relu",  # relu, gelu
            "head_hidden": 0,  # ScaLR+: 2048
            "segmentation_head": "segment",  # segment (batch norm + linear), linear (WaffleIron's own)
            "drop_path": 0.0,
            "field_of_view": ((-64.0, -64.0, -8.0), (64.0, 64.0, 8.0)),  # metres
            "grids": ((256, 256), (256, 32), (256, 32)),
            "implementation": "auto",  # auto, cells, windows, dense
            "remat": "none",  # none, layer, group
            "dtype": "auto",  # auto: bfloat16 on accelerators, float32 on CPU
            "minkunet": ConfigDict(
                {
                    "voxel_size": 0.1,  # metres
                    "width": 1.0,  # times the published channels, 32 to 256, of which a point gets 96
                    "stem_convolutions": 1,  # 2 as SPVNAS's
                    "reading": "nearest",  # nearest (a point reads its voxel), trilinear
                }
            ),
            "num_classes": config_dict.placeholder(int),  # default: the dataset's
        }
    )


def _teacher() -> ConfigDict:
    return ConfigDict(
        {
            "checkpoint": "",  # path of a DINOv2 file; "demo": the small ViT that comes with the package
            "feature": "x_pre_norm",  # x_pre_norm, x
            "position_interpolation": "auto",  # dinov2, size, antialias (ops/positions.py); auto: as the file's project
            "num_heads": config_dict.placeholder(int),
        }
    )


def _optimizer() -> ConfigDict:
    return ConfigDict(
        {
            "name": "adamw",  # adamw; lamb: for batches many times the published one
            "learning_rate": 2e-3,  # 0 with schedule constant: only batch norms see the data
            "final_learning_rate": 1e-5,
            "weight_decay": 0.03,
            "ema": 0.0,  # moving average of the weights: what it keeps of itself at each step, as 0.999; 0: none
            "layer_decay": 1.0,  # learning rate x layer_decay^(depth + 1 - layer): embedding 0, head depth + 1
            "beta1": 0.9,
            "beta2": 0.999,
            "schedule": "cosine",  # cosine, rsqrt, constant
            "warmup_share": 0.02,
            "cooldown_start_share": 63 / 65,
            "timescale_share": 0.45 / 65,
            "batch_size": 8,  # the schedule's unit: progress = scenes seen / batch_size
            "total_updates": 0,  # 0: num_steps x the expected scenes a step / batch_size
        }
    )


def _probe() -> ConfigDict:
    return ConfigDict(
        {
            "method": "head",  # head (trained), knn (nearest neighbours), zero_shot (image prototypes)
            "head": "linear",  # linear (as published), mlp (with a hidden layer)
            # augmented: other scenes every epoch, as published; fixed: the same scenes, not augmented; cached: the
            # same as fixed, with the backbone computed once
            "features": "augmented",
            "cache_dtype": "float32",  # float16: half the space, features rounded to 11 bits
            "bank_per_class": 500,  # knn: points of each class to compare with
            "num_neighbors": 20,
            "temperature": 0.07,  # of a neighbour's vote exp(cosine / temperature)
            "prototypes": "",  # zero_shot: a folder of images by class; "": regions of the training images
            "inverse_regularization": 1.0,  # C of the logistic regression
        }
    )


def _evaluate() -> ConfigDict:
    return ConfigDict(
        {
            "rings": (10.0, 20.0, 30.0, 40.0, 50.0),  # metres from the lidar: results of 0 to 10, ..., beyond 50
            # test-time augmentation: the mean probability over so many turned, flipped and scaled copies of each scan,
            # by data.augmentation (published, consistent); 1: the scan as it is, alone
            "votes": 1,
            "submission": False,  # nuscenes, semantic_kitti: write the benchmark's files, also of data.split = "test"
            # what nuScenes is told that the model uses: some of camera, lidar, radar, map, external (data, weights)
            "submission_uses": ("lidar",),
            # robustness
            "corruptions": (  # of Robo3D
                *("fog", "wet_ground", "snow", "motion_blur", "beam_missing", "crosstalk"),
                *("incomplete_echo", "cross_sensor"),
            ),
            "severities": ("light", "moderate", "heavy"),
            "corrupted_root": "",  # the folder of the released nuScenes-C or SemanticKITTI-C; "": own generators
            # of mCE: nuscenes_c, semantic_kitti_c (MinkUNet-18, published) or the workdir of another robustness run;
            # auto: the published one of a released set, else none
            "baseline": "auto",
        }
    )


def check_keys(config: Any) -> None:
    """Raises `InputError` that lists every key a config lacks; one built on `get_config()` has them all."""
    found = flatten(config)
    missing = [key for key in flatten(get_config()) if key not in found]
    if missing:
        raise InputError(f"the config lacks {', '.join(missing)}; begin it with scalr_jax.config.get_config()")
