"""Tiny datasets prepared as records, and what the tests of records compare."""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np

from scalr_jax.config import get_config
from scalr_jax.data import transforms
from scalr_jax.data.readers.folder import Folder
from scalr_jax.data.readers.nuscenes import NuScenes
from scalr_jax.data.readers.pandaset import PandaSet
from scalr_jax.data.readers.semantic_kitti import SemanticKITTI
from scalr_jax.data.scenes import SceneNeeds
from scalr_jax.data.transforms import SceneSettings
from scalr_jax.prepare import run as prepare
from tests.support import raw_datasets as raw

SETTINGS = SceneSettings(
    task="distill",
    train=True,
    needs=SceneNeeds(((-64.0, -64.0, -8.0), (64.0, 64.0, 8.0)), 4, ((256, 256), (256, 32), (256, 32))),
    max_points=100_000,
    image_size=(56, 112),
    augmentation="none",
)
SEGMENTATION = dataclasses.replace(SETTINGS, task="segment", train=False)
CAMERAS = ("front_camera", "left_camera", "back_camera")


class First:
    """Draws the first of everything."""

    def random(self, number):
        return np.zeros(number)

    def integers(self, number):
        return 0


def write_raw(root):
    raw.write_pandaset(root / "pandaset", numbers=(2, 5, 7), cameras=CAMERAS)
    raw.write_pandaset(root / "pandaset", "002", numbers=(1,), latitude=37.0)
    raw.write_semantic_kitti(root / "semantic_kitti", num_scans=5)
    raw.write_semantic_kitti(root / "semantic_kitti", "08")
    raw.write_nuscenes(root / "nuscenes")
    raw.write_folder(root / "folder", classes=["car", "road"], validation=["b"], sensor_height=2.0)


def make(dataset, root, output, *more):
    paths = [f"--dataset={dataset}", f"--root={root / dataset}", f"--output={output / dataset}"]
    prepare.run(["prepare", *paths, "--num_processes=1", *more])
    return output / dataset / ("pandar64" if dataset == "pandaset" else "")


READERS = {"pandaset": PandaSet, "semantic_kitti": SemanticKITTI, "nuscenes": NuScenes, "folder": Folder}


def assert_equal(one, other, path=""):
    """Scenes or frames, field by field, exactly."""
    if isinstance(one, tuple):
        names = getattr(one, "_fields", range(len(one)))
        for name, a, b in zip(names, one, other, strict=True):
            assert_equal(a, b, f"{path}.{name}")
    else:
        np.testing.assert_array_equal(one, other, err_msg=path)


def scenes(dataset, index, camera, settings=SETTINGS):
    frame = dataset.frame(index, camera=camera)
    statistics = dataset.intensity(index)
    return transforms.make_scene(frame, 0, statistics, settings, cast(np.random.Generator, First()))


def make_config(root, **data):
    config = get_config()
    with config.data.unlocked():
        config.data.update({"root": str(root), "image_size": (56, 112), **data})
    return config
