"""Intensity statistics, field of view and grids by sensor and kind of model, which no published file contains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from scalr_jax.config import MERGED, DataSettings
from scalr_jax.data.joined import Derived, Joined
from scalr_jax.data.readers import files, nuscenes, semantic_kitti
from scalr_jax.data.readers.files import read_label_map
from scalr_jax.data.readers.folder import Folder
from scalr_jax.data.readers.pandaset import SENSORS as PANDASET
from scalr_jax.data.scenes import IGNORE, Dataset, FieldOfView
from scalr_jax.data.streets.sensors import SENSORS as STREETS
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import dataset_names

LABEL_MAPS = ("semantic_kitti", "nuscenes", "pandaset")


class View(NamedTuple):
    """The space a student sees, and how its planes divide it."""

    field_of_view: FieldOfView
    grids: tuple[tuple[int, int], ...]  # of the planes xy, xz, yz


def _square(half_width: float, size: int) -> View:
    low, high = (-half_width, -half_width, -8.0), (half_width, half_width, 8.0)
    return View((low, high), ((size, size), (size, 32), (size, 32)))


PRETRAINING = _square(64.0, 256)  # ScaLR and ScaLR+, on every dataset; downstream on nuScenes and SemanticKITTI
PANDASET_DOWNSTREAM = _square(128.0, 512)
PANDARGT_FINETUNING = _square(96.0, 384)
WAFFLEIRON = {
    "nuscenes": View(((-50.0, -50.0, -5.0), (50.0, 50.0, 5.0)), ((166, 166), (166, 16), (166, 16))),
    "semantic_kitti": View(((-50.0, -50.0, -3.0), (50.0, 50.0, 2.0)), ((250, 250), (250, 12), (250, 12))),
}

# Mean and standard deviation of the raw intensity.
INTENSITY: dict[str, tuple[float, float]] = {
    "nuscenes": nuscenes.INTENSITY,
    "semantic_kitti": semantic_kitti.INTENSITY,
    **{name: sensor.intensity for name, sensor in PANDASET.items()},
}
STREETS_INTENSITY = {name: sensor.intensity for name, sensor in STREETS.items()}  # generated


def published_view(sensor: str, model: Mapping[str, object]) -> View:
    """The view of a published file of `sensor`, by its model config.

    Distilled ScaLR and ScaLR+ models: +-64 m, 256 cells. Segmentation on PandaSet: +-128 m, 512 cells (a model
    fine-tuned on PandarGT: `PANDARGT_FINETUNING`, which the file does not say). Batch norm: the original WaffleIron.
    """
    if model["norm"] == "batch" and model["head"] != "distill":
        if sensor not in WAFFLEIRON:
            raise InputError(f"no WaffleIron was published for {sensor}; give field_of_view= and grids=")
        return WAFFLEIRON[sensor]
    if sensor in PANDASET and model["head"] == "segment":
        return PANDASET_DOWNSTREAM
    return PRETRAINING


def intensity_of(sensor: str) -> tuple[float, float]:
    """Mean and standard deviation of a sensor's raw intensity. Raises `InputError` for an unknown one."""
    known = {**INTENSITY, **STREETS_INTENSITY}
    if sensor not in known:
        raise InputError(f"sensor = {sensor!r} is none of {', '.join(known)}")
    return known[sensor]


def trained_sensors(dataset: str, chosen: Sequence[str]) -> list[str]:
    """The sensors that `data.dataset` and `data.sensors` name, in order; "folder" for one's own."""
    found = []
    for name in MERGED if dataset == "merged" else dataset.split("+"):
        table = {"streets": STREETS, "pandaset": PANDASET}.get(name)
        found += [name] if table is None else [sensor for sensor in chosen if sensor in table]
    return found


def trained_intensities(data: DataSettings, dataset: Dataset) -> dict[str, tuple[float, float]]:
    """Statistics by sensor that a run on `dataset` normalises raw intensities by."""
    names = () if data.intensity else dataset_names(data)
    parts = dataset.datasets if isinstance(dataset, Joined) and len(names) > 1 else (dataset,)
    own = {name: part.intensity(0) for name, part in zip(names, parts, strict=False) if name == "folder"}
    known = {**INTENSITY, **STREETS_INTENSITY, **own}
    found = {name: data.intensity or known[name] for name in trained_sensors(data.dataset, data.sensors)}
    return {name: (mean, deviation) for name, (mean, deviation) in found.items()}


def label_map_of(data: DataSettings, dataset: Dataset) -> dict[str, str | None] | None:
    """The class (None: ignored) of each label number of the dataset's files; None for generated streets."""
    names = dataset.class_names
    while isinstance(dataset, Derived):
        dataset = dataset.datasets[0]
    name = "pandaset" if data.dataset in PANDASET else data.dataset
    if name not in LABEL_MAPS and not isinstance(dataset, Folder):
        return None
    known = dataset.settings if isinstance(dataset, Folder) else read_label_map(name)
    numbers = sorted(known.class_of_id.items())
    return {str(number): names[label] if label < len(names) else None for number, label in numbers}


def raw_labels(labels: np.ndarray, class_names: Sequence[str]) -> tuple[np.ndarray, str | None]:
    """A dataset's own label numbers [N] uint32 for class ids [N], and whose they are; None: the ids themselves."""
    for dataset in LABEL_MAPS:
        content = files.read_json(files.LABEL_MAPS / f"{dataset}.json")
        if tuple(content["classes"]) != tuple(class_names):
            continue
        known = sorted((int(number), name, of) for number, (name, of) in content["labels"].items())
        table = np.zeros(IGNORE + 1, np.uint32)
        for k, wanted in (*enumerate(class_names), (IGNORE, None)):
            own = [number for number, name, _ in known if name == wanted]
            table[k] = (own + [number for number, _, of in known if of == wanted])[0]
        return table[labels], dataset
    return labels.astype(np.uint32), None


def known_classes(sensor: str, number: int) -> tuple[str, ...]:
    """The classes of a sensor's dataset, where they are so many; else ()."""
    name = "pandaset" if sensor in PANDASET else sensor
    names = read_label_map(name).class_names if name in LABEL_MAPS else ()
    return tuple(names) if len(names) == number else ()
