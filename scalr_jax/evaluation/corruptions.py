"""The eight corruptions of Robo3D (Kong et al., ICCV 2023) at three severities, made while scans are read.

Written from the papers' descriptions and from physics (`weather.py`); the released generators' numbers are not
reproduced, so figures on them compare models here and are no figures on nuScenes-C or SemanticKITTI-C. Labels follow
their points, lost points are lost, and what the corruption adds has the label 255. A frame's name seeds what happens to
it, so every run, process and model sees the same scans. NumPy only: data workers run this.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scalr_jax.config import CORRUPTIONS, SEVERITIES
from scalr_jax.data.joined import Derived
from scalr_jax.data.readers import pandaset
from scalr_jax.data.scenes import IGNORE, RANDOM, Dataset, Frame
from scalr_jax.data.streets.sensors import SENSORS as STREETS
from scalr_jax.evaluation import weather
from scalr_jax.evaluation.weather import LabelledPoints
from scalr_jax.runtime.errors import BadFrameError, InputError

BLUR = (0.20, 0.25, 0.30)  # metres
MISSING = (0.25, 0.50, 0.75)  # of the beams: 8, 16, 24 of 32
CROSSTALK = (0.006, 0.008, 0.010)  # of the points
CROSSTALK_NUSCENES = 0.03
CROSSTALK_NOISE = 3.0  # metres
MISSING_ECHO = (0.75, 0.85, 0.95)  # of the points of vehicles
OTHER_SENSOR = (0.75, 0.50, 0.25)  # of the beams are left
VEHICLES = ("car", "van", "truck", "bus", "trailer", "vehicle", "bicycle", "motorcycle")
NEAREST = 0.1  # metres: a point at the sensor has no direction
UNKNOWN_BEAMS = 64


# Elevation of each beam, degrees, ascending.
ELEVATIONS = {
    **{name: np.linspace(*sensor.elevation, sensor.num_beams) for name, sensor in STREETS.items()},
    "nuscenes": np.linspace(-30.67, 10.67, 32),  # HDL-32E
    "semantic_kitti": np.concatenate([np.linspace(-24.33, -8.83, 32), np.linspace(-8.33, 2.0, 32)]),  # HDL-64E
    "pandar64": pandaset.ELEVATIONS,
}


class Scan(NamedTuple):
    """A scan to corrupt, with what a corruption needs to know."""

    points: np.ndarray  # [N, 4] float64: x, y, z in metres from the sensor (z up), raw intensity
    labels: np.ndarray  # [N] uint8
    sensor: str
    beam: np.ndarray  # [N], 0 the lowest
    class_names: Sequence[str]

    @property
    def num_beams(self) -> int:
        return len(ELEVATIONS.get(self.sensor, range(UNKNOWN_BEAMS)))


def check_corruption(corruption: str, severity: str) -> None:
    """Raises `InputError` for an unknown corruption or severity."""
    if corruption not in CORRUPTIONS:
        raise InputError(f"corruption {corruption!r} is none of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise InputError(f"severity {severity!r} is none of {', '.join(SEVERITIES)}")


def beams_of(xyz: np.ndarray, sensor: str) -> np.ndarray:
    """The beam [N] of each point [N, 3] (sensor's frame): the one of the nearest elevation.

    Of an unknown sensor: 64 layers of elevation with as many points each.
    """
    elevation = np.degrees(np.arctan2(xyz[:, 2], np.hypot(xyz[:, 0], xyz[:, 1])))
    known = ELEVATIONS.get(sensor)
    if known is None:
        edges = np.quantile(elevation, np.linspace(0, 1, UNKNOWN_BEAMS + 1)[1:-1])
        return np.searchsorted(edges, elevation)
    return np.searchsorted((known[1:] + known[:-1]) / 2, elevation)


def motion_blur(scan: Scan, level: int, rng: np.random.Generator) -> LabelledPoints:
    """p + s + e: one shift s ~ N(0, sigma^2) of the whole scan along each axis, and for each point e ~
    N(0, (sigma/10)^2) along x and y, N(0, (sigma/20)^2) along z; sigma = 0.20, 0.25, 0.30 m (Robo3D)."""
    sigma = BLUR[level]
    points = scan.points.copy()
    points[:, :3] += rng.normal(0, sigma, 3) + rng.normal(0, 1, (len(points), 3)) * sigma / np.array([10, 10, 20])
    return points, scan.labels


def beam_missing(scan: Scan, level: int, rng: np.random.Generator) -> LabelledPoints:
    """A quarter, half or three quarters of the beams, drawn at random, return nothing (8, 16, 24 of 32)."""
    lost = rng.choice(scan.num_beams, round(MISSING[level] * scan.num_beams), replace=False)
    kept = ~np.isin(scan.beam, lost)
    return scan.points[kept], scan.labels[kept]


def crosstalk(scan: Scan, level: int, rng: np.random.Generator) -> LabelledPoints:
    """0.6, 0.8 or 1 % of the points (3 % on nuScenes) answer another sensor's pulse: p + N(0, (3 m)^2), label 255."""
    share = CROSSTALK_NUSCENES if scan.sensor == "nuscenes" else CROSSTALK[level]
    moved = rng.choice(len(scan.points), round(share * len(scan.points)), replace=False)
    points, labels = scan.points.copy(), scan.labels.copy()
    points[moved, :3] += rng.normal(0, CROSSTALK_NOISE, (len(moved), 3))
    labels[moved] = IGNORE
    return points, labels


def is_vehicle(class_name: str) -> bool:
    """Whether one of the name's words ("oth. vehicle", "PickupTruck", "cars") is a vehicle: no bush, no carriageway."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", class_name)]
    return any({word, word.removesuffix("s"), word.removesuffix("es")} & set(VEHICLES) for word in words)


def incomplete_echo(scan: Scan, level: int, rng: np.random.Generator) -> LabelledPoints:
    """75, 85 or 95 % of the points of vehicles return nothing, as dark paint does."""
    vehicles = [k for k, name in enumerate(scan.class_names) if is_vehicle(name)]
    kept = ~np.isin(scan.labels, vehicles) | (rng.random(len(scan.labels)) >= MISSING_ECHO[level])
    return scan.points[kept], scan.labels[kept]


def cross_sensor(scan: Scan, level: int, rng: np.random.Generator) -> LabelledPoints:
    """A sensor with 3/4, 1/2 or 1/4 of the beams, evenly spread, of which every second point is kept."""
    del rng
    share = OTHER_SENSOR[level]
    left = np.floor((np.arange(round(share * scan.num_beams)) + 0.5) / share).astype(int)
    order = np.lexsort((np.arctan2(scan.points[:, 1], scan.points[:, 0]), scan.beam))
    turn = np.empty(len(scan.points), np.int64)
    turn[order] = np.arange(len(scan.points))  # along the beams
    kept = np.isin(scan.beam, left) & (turn % 2 == 0)
    return scan.points[kept], scan.labels[kept]


WEATHER = {f.__name__: f for f in (weather.fog, weather.wet_ground, weather.snow)}
OTHERS = {f.__name__: f for f in (motion_blur, beam_missing, crosstalk, incomplete_echo, cross_sensor)}


def corrupt(
    points: np.ndarray,
    labels: np.ndarray,
    corruption: str,
    severity: str,
    *,
    name: str,
    sensor: str = "",
    beams: np.ndarray | None = None,
    class_names: Sequence[str] = (),
) -> LabelledPoints:
    """A corrupted scan: points [M, 4] float64 and their labels [M] uint8.

    Args:
      points, labels: as `Scan` has them.
      name: the frame's; with the corruption and the severity it seeds what is random.
      sensor: which beams there are, a key of `ELEVATIONS`; others are guessed from the scan.
      beams: [N], the beam of each point, 0 the lowest; None: the one of the nearest elevation.
      class_names: of the labels; says which are vehicles.
    """
    check_corruption(corruption, severity)
    points = points.astype(np.float64)
    near = (points[:, :3] ** 2).sum(axis=1) < NEAREST**2
    points, labels = points[~near], labels[~near]
    if len(points) == 0:
        raise BadFrameError(f"{name}: no point of the scan is farther than {NEAREST} m from the sensor")
    rng = np.random.default_rng(zlib.crc32(f"{name}/{corruption}/{severity}".encode()))
    beam = beams_of(points[:, :3], sensor) if beams is None else beams[~near]
    level = SEVERITIES.index(severity)
    if corruption in WEATHER:
        return WEATHER[corruption](points, labels, level, rng)
    return OTHERS[corruption](Scan(points, labels, sensor, beam, class_names), level, rng)


class Corrupted(Derived):
    """The scans of a dataset with a corruption, without images; their intensity statistics are the clear scans'."""

    def __init__(self, dataset: Dataset, corruption: str, severity: str):
        check_corruption(corruption, severity)
        super().__init__([dataset])
        self.dataset, self.corruption, self.severity = dataset, corruption, severity

    def __len__(self) -> int:
        return len(self.dataset)

    def locate(self, index: int) -> tuple[Dataset, int]:
        return self.dataset, index

    def name(self, index: int) -> str:
        return f"{self.dataset.name(index)} ({self.corruption}, {self.severity})"

    def describe(self) -> str:
        return f"{self.dataset.describe()}\nwith {self.corruption}, {self.severity}"

    def frame(self, index: int, rng: np.random.Generator | None = None, *, camera: str | None = RANDOM) -> Frame:
        """The corrupted scan, in the reader's own coordinates. Raises `BadFrameError`."""
        del camera
        clear = self.dataset.frame(index, rng)
        to_sensor = clear.to_ego if clear.to_sensor is None else clear.to_sensor
        turn, shift = to_sensor[:3, :3], to_sensor[:3, 3]
        points = clear.points.astype(np.float64)
        points[:, :3] = points[:, :3] @ turn.T + shift
        labels = clear.labels if clear.labels is not None else np.full(len(points), IGNORE, np.uint8)
        about: dict = {"name": self.dataset.name(index), "sensor": self.dataset.sensor(index), "beams": clear.beams}
        points, labels = corrupt(points, labels, self.corruption, self.severity, class_names=self.class_names, **about)
        points[:, :3] = (points[:, :3] - shift) @ np.linalg.inv(turn).T
        return Frame(self.name(index), points.astype(clear.points.dtype), clear.to_ego, labels=labels)
