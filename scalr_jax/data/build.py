"""From `config.data` to its dataset and scenes: readers, records, generated streets, several of them, their mixing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from scalr_jax.config import DataSettings
from scalr_jax.data.instances import open_bank, write_bank
from scalr_jax.data.joined import Joined, every_nth, listed
from scalr_jax.data.mixing import Mixing
from scalr_jax.data.readers.folder import Folder
from scalr_jax.data.readers.pandaset import SENSORS as PANDASET
from scalr_jax.data.readers.records import Records, is_begun
from scalr_jax.data.readers.scan_inputs import open_reader
from scalr_jax.data.scenes import IGNORE, Dataset, SceneNeeds, SceneView
from scalr_jax.data.streets.streets import Streets
from scalr_jax.data.tokens.dataset import WithTokens
from scalr_jax.data.tokens.store import TokenStore
from scalr_jax.data.transforms import SceneSettings
from scalr_jax.ops.voxels import extent_of
from scalr_jax.runtime import distributed
from scalr_jax.runtime.chips import check_room
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.settings import dataset_names


def make_dataset(
    data: DataSettings,
    split: str,
    *,
    task: str,
    seed: int,
    cache: Path,
    tokens: Sequence[TokenStore] = (),
    images: bool = False,
) -> Dataset:
    """The dataset of `config.data` for a split ("train", "validation", "test" or "all", as the dataset has them).

    `task`, of the config, says whether labels, images or both are read. Generated streets have a `seed`, and are
    rendered to `cache` when `data.root` is empty. With `tokens`, frames have these in place of images, or
    beside `images`. Raises InputError: a folder that is missing or holds something else, or frames that cannot be
    chosen.
    """
    _check_sizes(data, images=task in ("distill", "demo"))
    names, datasets = dataset_names(data), []
    for name in names:  # each of several has a folder in data.root; PandaSet's two lidars share theirs
        folder = "" if len(names) == 1 else "pandaset" if name in PANDASET else name
        root = Path(data.root, folder) if data.root else None
        opened = _open(data, split, name, root, task=task, seed=seed, cache=cache)
        datasets.append(WithTokens(opened, *tokens, images=images) if tokens else opened)
    dataset = datasets[0]
    if len(datasets) > 1 or data.weights or data.intensity:
        intensity = (data.intensity[0], data.intensity[1]) if data.intensity else None
        dataset = Joined(datasets, data.weights or None, intensity)
    if split == "train" and data.label_fraction < 1:
        n = round(1 / data.label_fraction)
        if n > 2 * len(dataset):
            raise InputError(f"data.label_fraction = {data.label_fraction} leaves none of {len(dataset)} frames")
        return every_nth(dataset, n)
    if split == "train" and data.frame_list:
        return listed(dataset, Path(data.frame_list))
    if split == "validation" and task in ("probe", "finetune"):
        check_labelled(dataset)
    return dataset


def _check_sizes(data: DataSettings, *, images: bool) -> None:
    """Raises `InputError` when no memory holds a pack: its points with 16 neighbours, and its images."""
    (rows, columns), scenes = data.image_size, data.scenes_per_shard
    views = max(1, data.cameras_per_scan)
    with_images = f", with images of data.image_size = {rows, columns}," if images else ""
    check_room(
        4 * 24 * data.points_per_shard + (3 * scenes * views * rows * columns if images else 0),
        f"a pack of data.points_per_shard = {data.points_per_shard} and data.scenes_per_shard = {scenes}{with_images}",
        "lower these",
    )


def check_labelled(dataset: Dataset) -> None:
    """Raises `InputError` when no frame of up to 32, from all over a validation set, has a labelled point,
    which would show only after training. Reads until one has."""
    number, last = min(32, len(dataset)), len(dataset) - 1
    for k in range(number):
        with contextlib.suppress(BadFrameError):
            labels = dataset.frame(last * k // max(number - 1, 1), np.random.default_rng(0)).labels
            if labels is not None and (labels != IGNORE).any():
                return
    raise InputError(
        f"none of {number} validation scans looked at ({len(dataset)} in all) has a labelled point; check the label "
        "files, data.root and data.validation_frames"
    )


def check_labels(sample: list[SceneView], class_names: Sequence[str], num_classes: int) -> None:
    """Prints the classes that the first training scenes lack. Raises `InputError`: no labels, or other ones."""
    counts = np.bincount(np.concatenate([np.asarray(scene.labels) for scene in sample]), minlength=IGNORE + 1)[:IGNORE]
    if not counts.any():
        raise InputError(
            f"none of the first {len(sample)} training scenes has a labelled point; check the label files, data.root "
            "and data.split"
        )
    most = int(np.flatnonzero(counts).max())
    if most >= num_classes:
        raise InputError(f"the training scenes have labels up to {most}, and the classes are 0 to {num_classes - 1}")
    missing = [name for name, count in zip(class_names, counts, strict=False) if count == 0]
    if missing and jax.process_index() == 0:
        print(f"no point of {', '.join(missing)} in the first {len(sample)} training scenes", flush=True)


def scene_settings(
    data: DataSettings, needs: SceneNeeds, *, task: str, train: bool, fixed: bool = False
) -> SceneSettings:
    """How frames become scenes; `needs` are the backbone's, the others as in `SceneSettings`.

    Raises InputError when a pack has more places for voxels than 32-bit keys tell apart (`ops.sparse_conv`).
    """
    if needs.voxel_size is not None:
        x, y, z = extent_of(needs.field_of_view, needs.voxel_size)
        if data.scenes_per_shard * (x + 2) * (y + 2) >= 2**31 or data.points_per_shard * (z + 2) >= 2**31:
            raise InputError(
                f"model.minkunet.voxel_size = {needs.voxel_size} makes {x} x {y} x {z} voxels of model.field_of_view, "
                f"and data.scenes_per_shard = {data.scenes_per_shard} of these are too many for 32-bit keys; use "
                "larger voxels or a smaller field of view"
            )
    augmentation, size = "none" if fixed else data.augmentation, data.image_size
    return SceneSettings(
        *(task, train, needs, data.voxel_size, data.max_points, size),
        *(data.antialias, data.image_dtype, augmentation, fixed),
    )


def with_views(settings: SceneSettings, data: DataSettings, dataset: Dataset) -> SceneSettings:
    """The scene settings of a distillation with as many views a scene as `data` says and a frame of `dataset` has."""
    if data.cameras_per_scan == 1:
        return settings
    most = max(1, *(len(dataset.cameras_of(index)) for index in range(len(dataset))))
    return dataclasses.replace(settings, views=min(data.cameras_per_scan or most, most), pairs=data.pairs_per_point)


def make_mixing(data: DataSettings, dataset: Dataset, folder: Path) -> Mixing | None:
    """The mixing of training scans in a probe or fine-tuning; None for none.

    `folder`: of the instance bank, which is written when it is missing. Raises `InputError` for unknown classes.
    """
    if not data.polarmix and not data.cutmix and not data.pillarmix:
        return None
    known, numbers = dataset.class_names, []
    for key in ("polarmix", "cutmix", "cutmix_ground"):
        names = getattr(data, key)
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"data.{key}: {', '.join(unknown)} are none of the classes {', '.join(known)}")
        numbers.append(tuple(known.index(name) for name in names))
    polar, instances, ground = numbers
    bank = None
    if instances:
        if jax.process_index() == 0:
            write_bank(folder, dataset, instances)
        distributed.barrier(f"instances {folder}")
        bank = open_bank(folder, dataset, instances)
    return Mixing(polar, bank, ground, pillar_size=data.pillarmix)


def _open(
    data: DataSettings, split: str, name: str, root: Path | None, *, task: str, seed: int, cache: Path
) -> Dataset:
    """One dataset: prepared records, generated streets, or the files as they were downloaded."""
    if root and is_begun(root):
        return _records(data, split, name, root, labels=task != "distill")
    if name == "streets":
        return _streets(data, split, root or cache, seed)
    if root is None:
        raise InputError(f"data.root is empty; give the folder that holds {data.dataset}: --config.data.root=DIR")
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; data.root = {data.root} must be the folder of {name}")
    return _raw(data, split, name, root, task)


def _streets(data: DataSettings, split: str, root: Path, seed: int) -> Dataset:
    """Generated streets; scenes that are not in `root` yet are rendered, by all processes together."""
    number = data.num_scenes if split == "train" else data.num_validation_scenes
    streets = Streets(root, split=split, num_scenes=number, sensors=data.sensors, image_size=data.image_size, seed=seed)
    if jax.process_count() > 1:
        streets.render_missing(part=(jax.process_index(), jax.process_count()))
        distributed.barrier(f"streets {split}")
    streets.render_missing()
    return streets


def _raw(data: DataSettings, split: str, name: str, root: Path, task: str) -> Dataset:
    """A dataset as it was downloaded."""
    labels = task != "distill" and split != "test"
    if name in ("pandaset", *PANDASET):
        sensors = data.sensors if name == "pandaset" else (name,)
        if not sensors or not set(sensors) <= set(PANDASET):
            raise InputError(f"data.sensors = {data.sensors}: those of PandaSet are {', '.join(PANDASET)}; give some")
        if any(is_begun(root / sensor) for sensor in PANDASET):
            return Joined([_records(data, split, s, root / s, labels=task != "distill") for s in sensors])
        split, frames = _split_and_frames(data, split)
        options = {"split": split, "labels": labels, "scenes": data.scenes or None, "frames": frames}
        return Joined([open_reader(sensor, root, **options) for sensor in sensors])
    if name == "folder":
        folder = Folder(root, split=split, scenes=data.scenes or None, labels=labels)
        if not labels:
            folder.check_distillable()
        return folder
    options = {"split": split, "labels": labels, "cameras": None if task == "distill" or labels else ()}
    if name == "nuscenes" and split == "test":
        options |= {"split": "all", "version": "v1.0-test"}
    return open_reader(name, root, **options)


def _records(data: DataSettings, split: str, name: str, folder: Path, *, labels: bool) -> Records:
    """Prepared records of dataset (or PandaSet's lidar) `name`. Raises `InputError` when they hold something else."""
    split, frames = _split_and_frames(data, split)
    size, scaled, scenes = data.image_size, data.scaled_decode, data.scenes or None
    dataset = Records(
        folder, split=split, labels=labels, image_size=size, scaled_decode=scaled, scenes=scenes, frames=frames
    )
    found = dataset.metadata
    if name not in (found["dataset"], found["sensor"]):
        held = f"{found['dataset']} {found['sensor']}"
        raise InputError(f"{folder} holds records of {held}, not of {name}; correct data.root")
    if found["image_size"] and not (data.antialias and data.image_dtype == "uint8"):
        key = f"data.image_dtype = {data.image_dtype!r}" if data.antialias else "data.antialias = False"
        raise InputError(f"{folder}: images were resized with antialiasing and rounded, and {key}; prepare originals")
    return dataset


def _split_and_frames(data: DataSettings, split: str) -> tuple[str, tuple[int, ...] | None]:
    """The dataset's split and the frame numbers (None: all) to read for `split`.

    With `data.validation_frames` every scene is in both, and the frames tell them apart.
    """
    train, validation = (tuple(map(int, frames)) for frames in (data.frames, data.validation_frames))
    if not validation:
        return split, train or None
    return "all", validation if split == "validation" else train
