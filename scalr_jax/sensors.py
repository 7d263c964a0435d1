"""What a published file does not say: intensity statistics, field of view and grids, by sensor and kind of model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from scalr_jax.data.nuscenes import NuScenes
from scalr_jax.data.pandaset import SENSORS as PANDASET
from scalr_jax.data.scenes import InputError
from scalr_jax.data.semantic_kitti import SemanticKITTI
from scalr_jax.data.street_sensors import SENSORS as STREETS

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
