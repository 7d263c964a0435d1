"""What a published file does not say: intensity statistics, field of view and grids, by sensor and kind of model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scalr_jax.data.readers import files
from scalr_jax.data.readers.files import read_label_map
from scalr_jax.data.readers.nuscenes import NuScenes
from scalr_jax.data.readers.pandaset import SENSORS as PANDASET
from scalr_jax.data.readers.semantic_kitti import SemanticKITTI
from scalr_jax.data.scenes import IGNORE
from scalr_jax.data.streets.layout import CLASSES as STREET_CLASSES
from scalr_jax.data.streets.sensors import SENSORS as STREETS
from scalr_jax.runtime.errors import InputError

LABEL_MAPS = ("semantic_kitti", "nuscenes", "pandaset")

Corner = tuple[float, float, float]


class View(NamedTuple):
    """The space a student sees, and how its planes divide it."""

    field_of_view: tuple[Corner, Corner]  # min and max corner, metres
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
    "nuscenes": NuScenes.intensity,
    "semantic_kitti": SemanticKITTI.intensity,
    **{name: sensor.intensity for name, sensor in PANDASET.items()},
}
STREETS_INTENSITY = {name: sensor.intensity for name, sensor in STREETS.items()}  # generated


def published_view(sensor: str, model: Mapping[str, Any]) -> View:
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


MERGED = ("nuscenes", "semantic_kitti", "pandar64", "pandargt")  # what `data.dataset = "merged"` joins


def trained_sensors(data: Mapping[str, Any]) -> list[str]:
    """The sensors that `config.data` names, in order."""
    found = []
    for name in MERGED if data["dataset"] == "merged" else data["dataset"].split("+"):
        table = {"streets": STREETS, "pandaset": PANDASET}.get(name)
        found += [name] if table is None else [sensor for sensor in data["sensors"] if sensor in table]
    return found


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


def known_classes(dataset: str, number: int, found: Sequence[str] = ()) -> tuple[str, ...]:
    """A dataset's classes where it has so many, else those `found` elsewhere; () when neither are so many."""
    name = "pandaset" if dataset in PANDASET else dataset
    names = {"streets": STREET_CLASSES, **{known: read_label_map(known).class_names for known in LABEL_MAPS}}
    fitting = (tuple(given) for given in (names.get(name, ()), found) if len(given) == number)
    return next(fitting, ())


def evaluated_classes(path: Path) -> list[str]:
    """The classes whose IoU a run's results.json has, in order; none without one."""
    try:
        return [str(name) for name in json.loads((path / "results.json").read_text())["iou"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
