"""nuScenes' relational JSON tables, joined into keyframes.

scene <- sample <- sample_data -> ego_pose, calibrated_sensor -> sensor; lidarseg -> sample_data. sample_data and
ego_pose have millions of rows for the sweeps between keyframes (1 GB each in v1.0-trainval), so they are read a block
at a time and only the keyframes' rows are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from scalr_jax.data.readers.files import LabelMap, rotation
from scalr_jax.runtime.errors import InputError

T = TypeVar("T")

Row = dict[str, Any]  # of a JSON table
_BLOCK = 1 << 20  # characters read at a time; a row has about 700


class Pose(NamedTuple):
    """p -> rotation @ p + translation: a sensor on the car, or the car in the world."""

    rotation: np.ndarray  # [3, 3]
    translation: np.ndarray  # [3] metres


class Sensor(NamedTuple):
    """A row of calibrated_sensor, with its channel."""

    channel: str  # "CAM_FRONT"
    pose: Pose  # sensor -> ego
    intrinsics: np.ndarray  # [3, 3]; empty for a lidar


class Shot(NamedTuple):
    """A row of sample_data, its links resolved."""

    token: str
    file: str  # relative to the dataset's root
    sensor: Sensor
    ego: np.ndarray  # [7]: quaternion w, x, y, z and translation (metres), ego -> global; see `pose`
    size: tuple[int, int]  # width, height (pixels)


class Keyframe(NamedTuple):
    """One sample: its shots by channel."""

    scene: str  # "scene-0061"
    shots: dict[str, Shot]
    timestamp: int  # microseconds


def pose(numbers: np.ndarray) -> Pose:
    """Quaternion and translation [7] -> pose."""
    return Pose(rotation(numbers[:4]), numbers[4:])


def read_scenes(folder: Path) -> dict[str, str]:
    """The table scene: token -> name."""
    return _read(folder, "scene", lambda rows: {row["token"]: row["name"] for row in rows})


def read_keyframes(folder: Path, scenes: dict[str, str], channels: Collection[str]) -> list[Keyframe]:
    """The keyframes of some scenes (token -> name), by scene name and time, with the shots of some channels.

    Raises InputError: a table is missing or damaged, or a row's link leads nowhere.
    """
    samples = _read(folder, "sample", lambda rows: {r["token"]: (r["scene_token"], r["timestamp"]) for r in rows})
    samples = {token: sample for token, sample in samples.items() if sample[0] in scenes}
    channel_of = _read(folder, "sensor", lambda rows: {row["token"]: row["channel"] for row in rows})
    sensors = _read(folder, "calibrated_sensor", lambda rows: {r["token"]: _sensor(r, channel_of) for r in rows})

    def wanted(row: Row) -> bool:
        there = row["is_key_frame"] and row["sample_token"] in samples
        return there and sensors[row["calibrated_sensor_token"]].channel in channels

    shots = _read(folder, "sample_data", lambda rows: [row for row in rows if wanted(row)])
    needed = {row["ego_pose_token"] for row in shots}
    egos = _read(folder, "ego_pose", lambda rows: {r["token"]: _numbers(r) for r in rows if r["token"] in needed})
    if lost := needed - egos.keys():
        raise InputError(f"{folder / 'ego_pose.json'}: {len(lost)} poses are missing; unpack the tables again.")
    keyframes = {token: Keyframe(scenes[scene], {}, timestamp) for token, (scene, timestamp) in samples.items()}
    for row in shots:
        sensor, ego = sensors[row["calibrated_sensor_token"]], egos[row["ego_pose_token"]]
        shot = Shot(row["token"], row["filename"], sensor, ego, (row["width"], row["height"]))
        keyframes[row["sample_token"]].shots[sensor.channel] = shot
    return sorted(keyframes.values(), key=lambda keyframe: (keyframe.scene, keyframe.timestamp))


def read_lidarseg(folder: Path) -> dict[str, str]:
    """The table lidarseg: token of the scan in sample_data -> label file. Empty where there is no such table."""
    if not (folder / "lidarseg.json").is_file():
        return {}
    return _read(folder, "lidarseg", lambda rows: {row["sample_data_token"]: row["filename"] for row in rows})


def read_class_of_id(folder: Path, label_map: LabelMap) -> dict[int, int]:
    """Label number in lidarseg files -> class: by the table category where it has numbers, else by `label_map`.

    The table came without its column `index` before lidarseg was released.
    """
    named = _read(folder, "category", lambda rows: {r["index"]: r["name"] for r in rows if "index" in r})
    of_name = label_map.class_of_name
    return {i: of_name[name] for i, name in named.items() if name in of_name} or label_map.class_of_id


def _sensor(row: Row, channel_of: dict[str, str]) -> Sensor:
    intrinsics = np.array(row["camera_intrinsic"], np.float64)
    return Sensor(channel_of[row["sensor_token"]], pose(_numbers(row)), intrinsics)


def _numbers(row: Row) -> np.ndarray:
    numbers = np.array([*row["rotation"], *row["translation"]], np.float64)
    if numbers.shape != (7,) or not np.isfinite(numbers).all() or not numbers[:4].any():
        raise ValueError(f"no pose in row {row['token']}")
    return numbers


def _read(folder: Path, table: str, collect: Callable[[Iterator[Row]], T]) -> T:
    """`collect` over a table's rows; whatever is wrong with the table becomes one InputError."""
    path = folder / f"{table}.json"
    try:
        return collect(_rows(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); unpack the tables again.") from error
    except KeyError as error:
        raise InputError(f"{path}: a row lacks {error}, or links to a missing one; unpack the tables again.") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a table of nuScenes ({error}); unpack the tables again.") from error


def _rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON array, one by one. Raises ValueError where the file is not one or is cut short."""
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8") as file:
        rest = file.read(_BLOCK).lstrip()
        if not rest.startswith("["):
            raise ValueError("no JSON list")
        rest = rest[1:]
        while True:
            done = 0
            while (start := rest.find("{", done)) >= 0:
                try:
                    row, done = decode(rest, start)
                except json.JSONDecodeError:  # the row goes on in the next block
                    break
                yield row
            rest, block = rest[done:], file.read(_BLOCK)
            if not block or len(rest) > 4 * _BLOCK:
                break
            rest += block
    if rest.strip() != "]":
        raise ValueError("cut short or not JSON")
