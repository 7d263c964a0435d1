"""From a config to its dataset: readers, records, generated streets, several of them, a share of their labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scalr_jax.config import get_config
from scalr_jax.data.instances import open_bank, write_bank
from scalr_jax.data.joined import Joined, every_nth, listed
from scalr_jax.data.mixing import Mixing
from scalr_jax.data.readers.records import Records, is_begun
from scalr_jax.data.scenes import IGNORE, SceneNeeds, SceneView
from scalr_jax.data.sensors import MERGED
from scalr_jax.data.transforms import SceneSettings
from scalr_jax.ops.voxels import extent_of
from scalr_jax.runtime import distributed
from scalr_jax.runtime.errors import BadFrameError, InputError

DATASETS = ("streets", "pandaset", "pandar64", "pandargt", "nuscenes", "semantic_kitti", "folder")


def make_dataset(config: Any, split: str, *, cache: Path) -> Any:
    """The dataset of `config.data` for `split`: has `__len__`, `frame(index, rng)`, `intensity`, `class_names`.

    `cache`: where generated streets are rendered to when `data.root` is empty. Raises `InputError`.
    """
    data = config.data
    names = MERGED if data.dataset == "merged" else data.dataset.split("+")
    labelled = config.task in ("probe", "finetune", "evaluate", "robustness")
    if not 0 < data.label_fraction <= 1 or (data.label_fraction < 1 and not labelled):
        raise InputError(
            f"data.label_fraction = {data.label_fraction} with task {config.task!r}: it is the share in (0, 1] of the "
            "training frames whose labels a probe or fine-tuning uses, and 1 elsewhere"
        )
    if len(names) > 1 and config.task != "distill":
        raise InputError(f"data.dataset = {data.dataset!r}: several datasets have several classes; give one of them")
    _check_sensors(data, names)
    if data.frame_list and data.label_fraction < 1:
        raise InputError("data.frame_list and data.label_fraction both choose training frames; give one of them")
    roots = [_root(data.root, name) if len(names) > 1 else data.root for name in names]
    datasets: list[Any] = [_make_one(config, split, name, root, cache) for name, root in zip(names, roots, strict=True)]
    if data.intensity:
        for dataset in datasets:
            dataset.intensity = given_intensity(data)
    dataset = datasets[0] if len(datasets) == 1 and not data.weights else Joined(datasets, data.weights or None)
    if split == "train" and data.label_fraction < 1:
        n = round(1 / data.label_fraction)
        if abs(n * data.label_fraction - 1) > 0.01 or n > 2 * len(dataset):
            raise InputError(
                f"data.label_fraction = {data.label_fraction} of {len(dataset)} frames: it is 1/n, as 0.01, 0.05, 0.1 "
                "or 0.25, and leaves at least one frame"
            )
        return every_nth(dataset, n)
    if split == "train" and data.frame_list:
        return listed(dataset, Path(data.frame_list))
    if split == "validation" and config.task in ("probe", "finetune"):
        check_labelled(dataset)
    return dataset


def check_labelled(dataset: Any) -> None:
    """Raises `InputError` when no frame of up to 32, from all over a validation set, has a labelled point, which would
    be found out after training. Reads until one has."""
    number, last = min(32, len(dataset)), len(dataset) - 1
    for k in range(number):
        try:
            labels = dataset.frame(last * k // max(number - 1, 1), np.random.default_rng(0)).labels
        except BadFrameError:
            continue
        if labels is not None and (labels != IGNORE).any():
            return
    raise InputError(
        f"none of {number} validation scans looked at ({len(dataset)} in all) has a labelled point; check the label "
        "files, data.root and data.validation_frames"
    )


def _check_sensors(data: Any, names: Sequence[str]) -> None:
    """Raises `InputError` for `data.sensors` that nothing would read: only streets and pandaset have several."""
    chosen = tuple(data.sensors)
    if {"streets", "pandaset"} & set(names) or chosen == tuple(get_config().data.sensors) or set(chosen) <= set(names):
        return
    remedy = f"data.dataset = {chosen[0]!r}" if chosen[0] in ("pandar64", "pandargt") else "a dataset that has them"
    raise InputError(
        f"data.sensors = {chosen} with data.dataset = {data.dataset!r}: sensors are chosen of streets and pandaset "
        f"alone; give {remedy}, or leave data.sensors out"
    )


def given_intensity(data: Any) -> tuple[float, float]:
    """`data.intensity`, where it is given. Raises `InputError` when it is no mean and deviation."""
    given = tuple(data["intensity"])
    if len(given) != 2 or not all(isinstance(number, int | float) for number in given) or not 0 < given[1] < np.inf:
        raise InputError(
            f"data.intensity = {given} is no (mean, standard deviation) of the raw intensity; give two numbers, the "
            "second above 0, or leave it out for the sensor's own"
        )
    return float(given[0]), float(given[1])


def _root(root: str, name: str) -> str | Path:
    """The folder of one of several datasets; PandaSet's two lidars share theirs."""
    return Path(root) / ("pandaset" if name in ("pandar64", "pandargt") else name) if root else ""


def _make_one(config: Any, split: str, name: str, root: str | Path, cache: Path) -> Any:
    data = config.data
    if root and is_begun(root):
        return _records(config, split, name, Path(root))
    if name == "streets":
        from scalr_jax.data.streets.streets import Streets

        number = data.num_scenes if split == "train" else data.num_validation_scenes
        streets = Streets(
            Path(root) if root else cache,
            split=split,
            num_scenes=number,
            sensors=tuple(data.sensors),
            image_size=tuple(data.image_size),
            seed=config.seed,
        )
        if jax.process_count() > 1:
            streets.render_missing(part=(jax.process_index(), jax.process_count()))
            distributed.barrier(f"streets {split}")
        streets.render_missing()
        return streets
    if name not in DATASETS:
        raise InputError(f"data.dataset = {data.dataset!r}: {name!r} is none of {', '.join(DATASETS)}")
    if not root:
        raise InputError(f"data.root is empty; give the folder that holds {data.dataset}: --config.data.root=DIR")
    if not Path(root).is_dir():
        raise InputError(f"{root} is not a folder; data.root = {data.root} must lead to {name}")
    labels = config.task != "distill" and split != "test"
    cameras = None if config.task == "distill" or labels else ()
    if name in ("pandaset", "pandar64", "pandargt"):
        from scalr_jax.data.readers.pandaset import SENSORS, PandaSet

        sensors = data.sensors if name == "pandaset" else (name,)
        if any(is_begun(Path(root) / sensor) for sensor in SENSORS):
            return Joined([_records(config, split, sensor, Path(root) / sensor) for sensor in sensors])
        split, frames = _split_and_frames(data, split)
        subset = {"scenes": tuple(data.scenes) or None, "frames": frames}
        return Joined([PandaSet(root, sensor=s, split=split, labels=labels, **subset) for s in sensors])
    if name == "semantic_kitti":
        from scalr_jax.data.readers.semantic_kitti import SemanticKITTI

        return SemanticKITTI(root, split=split, labels=labels, cameras=cameras)
    if name == "folder":
        from scalr_jax.data.readers.folder import Folder

        folder = Folder(root, split=split, scenes=tuple(data.scenes) or None, labels=labels)
        if not labels:
            folder.check_distillable()
        return folder
    from scalr_jax.data.readers.nuscenes import NuScenes

    if split == "test":
        return NuScenes(root, version="v1.0-test", split="all", labels=labels, cameras=cameras)
    version = "v1.0-trainval" if (Path(root) / "v1.0-trainval").is_dir() else "v1.0-mini"
    return NuScenes(root, version=version, split=split, labels=labels, cameras=cameras)


def _records(config: Any, split: str, name: str, folder: Path) -> Records:
    """Prepared records of dataset (or PandaSet's lidar) `name`. Raises `InputError` when they hold something else."""
    data = config.data
    split, frames = _split_and_frames(data, split)
    dataset = Records(
        folder,
        split=split,
        labels=config.task != "distill",
        image_size=tuple(data.image_size),
        scaled_decode=data.scaled_decode,
        scenes=tuple(data.scenes) or None,
        frames=frames,
    )
    found = dataset.metadata
    if name not in (found["dataset"], found["sensor"]):
        raise InputError(
            f"{folder} holds records of {found['dataset']} {found['sensor']}, not of {name}; correct data.root"
        )
    if found["image_size"] and not data.antialias:
        raise InputError(
            f"{folder}: images were resized with antialiasing, and data.antialias = False; prepare originals"
        )
    return dataset


def _split_and_frames(data: Any, split: str) -> tuple[str, tuple[int, ...] | None]:
    """The dataset's split and the frame numbers (None: all) to read for `split`.

    With `data.validation_frames` every scene is in both, and the frames tell them apart.
    """
    train, validation = _frame_numbers(data, "frames"), _frame_numbers(data, "validation_frames")
    if not validation:
        return split, train or None
    if not train or set(train) & set(validation):
        raise InputError(
            f"data.validation_frames = {validation} needs data.frames to train on other frames of the same scenes, and "
            f"they are {train or 'all'}"
        )
    return "all", validation if split == "validation" else train


def _frame_numbers(data: Any, key: str) -> tuple[int, ...]:
    """`data.frames` or `data.validation_frames` as numbers, however they were written."""
    frames = tuple(data[key])
    if not all(str(frame).isdecimal() for frame in frames):
        raise InputError(f"data.{key} = {frames} must be frame numbers, as in --config.data.{key}='(45, 48)'")
    return tuple(int(frame) for frame in frames)


def make_settings(config: Any, needs: SceneNeeds, *, task: str, train: bool) -> SceneSettings:
    """`needs`: the student's; `task`: "distill", "segment" or "features"."""
    data = config.data
    fixed = train and config.task == "probe" and config.probe.features != "augmented"
    if needs.voxel_size is not None:
        _check_keys_fit(data, needs.field_of_view, needs.voxel_size)
    return SceneSettings(
        task=task,
        train=train,
        needs=needs,
        voxel_size=data.voxel_size,
        max_points=data.max_points,
        image_size=tuple(data.image_size),
        antialias=data.antialias,
        augmentation="none" if fixed else data.augmentation,
        fixed=fixed,
    )


def _check_keys_fit(data: Any, field_of_view: tuple, size: float) -> None:
    """Raises `InputError` when a pack has more places for voxels than 32-bit keys tell apart (`ops.sparse_conv`)."""
    x, y, z = extent_of(field_of_view, size)
    if data.scenes_per_shard * (x + 2) * (y + 2) >= 2**31 or data.points_per_shard * (z + 2) >= 2**31:
        raise InputError(
            f"the student's voxel_size = {size} makes {x} x {y} x {z} voxels of model.field_of_view, and "
            f"data.scenes_per_shard = {data.scenes_per_shard} of these are too many for 32-bit keys; take larger "
            "voxels or a smaller field of view"
        )


def make_mixing(config: Any, dataset: Any, folder: Path) -> Mixing | None:
    """What is mixed into the training scans of a probe or fine-tuning; None when nothing is.

    `folder`: of the instance bank, which is written when it is missing. Raises `InputError`.
    """
    data = config.data
    if not data.polarmix and not data.cutmix:
        return None
    if config.task == "probe" and config.probe.features != "augmented":
        raise InputError(
            f"data.polarmix and data.cutmix change scans every epoch, and probe.features = {config.probe.features!r} "
            "keeps them; use 'augmented'"
        )
    if bool(data.cutmix) != bool(data.cutmix_ground):
        raise InputError(
            f"data.cutmix = {tuple(data.cutmix)} and data.cutmix_ground = {tuple(data.cutmix_ground)}: instances need "
            "both their classes and the classes that they stand on"
        )
    polar, instances, ground = (
        _class_numbers(key, data[key], dataset) for key in ("polarmix", "cutmix", "cutmix_ground")
    )
    bank = None
    if instances:
        if jax.process_index() == 0:
            write_bank(folder, dataset, instances)
        distributed.barrier(f"instances {folder}")
        bank = open_bank(folder, dataset, instances)
    return Mixing(polar, bank, ground)


def _class_numbers(key: str, names: Any, dataset: Any) -> tuple[int, ...]:
    known = tuple(dataset.class_names)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"data.{key}: {', '.join(map(str, unknown))} are none of the classes {', '.join(known)}")
    return tuple(known.index(name) for name in names)


def check_labels(sample: list[SceneView], class_names: Sequence[str], num_classes: int) -> None:
    """Says which classes the first training scenes lack. Raises `InputError`: no labels, or one outside the classes."""
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
