"""`dataset.json` of a folder of your own scans: every key, its check, its default. docs/data.md explains them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalr_jax.data.readers import calibration, scan_files
from scalr_jax.data.readers.calibration import Camera, is_number
from scalr_jax.data.scenes import IGNORE
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import read_json

FILE = "dataset.json"
KEYS = (
    *("columns", "intensity", "to_student", "sensor_height", "min_depth"),
    *("cameras", "classes", "labels", "validation"),
)
STUDENT_HEIGHT = 1.7  # metres of the student's origin above the ground, as KITTI's and nuScenes' lidars have it
HELP = 'docs/data.md, "Your own lidar", explains every key.'
REMEDY = f"correct it there. {HELP}"


class Settings(NamedTuple):
    """The content of `dataset.json`, with its defaults."""

    columns: int | None = None  # of .bin files
    intensity: tuple[float, float] | None = None  # mean, standard deviation; None: measured
    to_student: np.ndarray = np.eye(4)  # [4, 4]: lidar -> student's frame
    min_depth: float = 1.0  # metres before the camera, of a visible point
    cameras: Mapping[str, Camera] = {}
    classes: tuple[str, ...] = ()
    class_of_id: Mapping[int, int] = {}
    validation: tuple[str, ...] = ()  # scenes


def read_settings(path: Path) -> Settings:
    """Reads and checks the file; the defaults when there is none. Raises InputError that lists all problems."""
    if not path.exists():
        return Settings()
    entry, problems = read_json(path, REMEDY), []
    calibration.check_keys("the file", entry, KEYS, problems)
    columns, min_depth = entry.get("columns"), entry.get("min_depth", 1.0)
    if columns is not None and (type(columns) is not int or columns not in scan_files.COLUMNS):
        problems.append(f"columns must be one of {', '.join(map(str, scan_files.COLUMNS))}")
        columns = None
    given = entry.get("intensity", [0, 1])
    intensity = calibration.read_numbers("intensity [mean, standard deviation]", given, 2, problems)
    if intensity is not None and intensity[1] <= 0:
        problems.append("intensity: the standard deviation must be positive")
    if not is_number(min_depth) or not 0 < min_depth < 100:
        problems.append("min_depth must be metres between 0 and 100")
        min_depth = 1.0
    classes, class_of_id = _read_classes(entry, problems)
    settings = Settings(
        columns=columns,
        intensity=(intensity[0], intensity[1]) if intensity and "intensity" in entry else None,
        to_student=_read_to_student(entry, problems),
        min_depth=min_depth,
        cameras=_read_cameras(entry.get("cameras", {}), problems),
        classes=classes,
        class_of_id=class_of_id,
        validation=_read_names("validation", entry, problems),
    )
    _raise(path, problems)
    return settings


def read_cameras(path: Path) -> dict[str, Camera]:
    """A scene's own `cameras.json`: the content of "cameras". Raises InputError that lists all problems."""
    problems: list[str] = []
    cameras = _read_cameras(read_json(path, REMEDY), problems)
    _raise(path, problems)
    return cameras


def _raise(path: Path, problems: list[str]) -> None:
    if problems:
        number = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(f"{path}: {number}: {'; '.join(problems)}. {HELP}")


def _read_cameras(entry: object, problems: list[str]) -> dict[str, Camera]:
    if not isinstance(entry, dict):
        problems.append('cameras must be an object, {"front": {...}}')
        return {}
    if bad := [name for name in entry if not name or "/" in name or name in ("scans", "labels", ".", "..")]:
        problems.append(f"cameras are named like their folders, and {', '.join(map(repr, bad))} cannot be one")
    found = {name: calibration.read_camera(name, value, problems) for name, value in entry.items()}
    return {name: camera for name, camera in found.items() if camera is not None}


def _read_to_student(entry: Mapping[str, object], problems: list[str]) -> np.ndarray:
    height, matrix = entry.get("sensor_height"), np.eye(4)
    if height is not None and "to_student" in entry:
        problems.append("give to_student or sensor_height, not both")
    if "to_student" in entry:
        given = calibration.read_rigid("to_student", entry["to_student"], problems)
        return matrix if given is None else given
    if height is not None and (not is_number(height) or not -1 <= height <= 20):
        problems.append("sensor_height must be the lidar's metres above the ground, -1 to 20")
    elif height is not None:
        matrix[2, 3] = height - STUDENT_HEIGHT
    return matrix


def _read_names(key: str, entry: Mapping[str, object], problems: list[str]) -> tuple[str, ...]:
    names = entry.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        problems.append(f"{key} must be a list of different names")
        return ()
    return tuple(names)


def _read_classes(entry: Mapping[str, object], problems: list[str]) -> tuple[tuple[str, ...], dict[int, int]]:
    """The classes, and the class of every number that may stand in a label file."""
    classes = _read_names("classes", entry, problems)
    if len(classes) > IGNORE:
        problems.append(f"{len(classes)} classes, and {IGNORE} are possible")
    labels = entry.get("labels")
    if labels is None:
        return classes, {**{k: k for k in range(len(classes))}, IGNORE: IGNORE}
    if not isinstance(labels, dict):
        problems.append('labels must be an object from numbers to classes, {"10": "car", "0": null}')
        return classes, {}
    if bad := [key for key in labels if not re.fullmatch("-1|[0-9]{1,9}", key)]:
        problems.append(f"labels: {', '.join(map(repr, bad[:5]))} must be whole numbers, or -1")
    named = {json.dumps(name) for name in labels.values() if name is not None and name not in classes}
    if named:
        problems.append(f"labels: {', '.join(sorted(named)[:5])} must be null or one of classes")
    if bad or named:
        return classes, {}
    return classes, {int(key): IGNORE if name is None else classes.index(name) for key, name in labels.items()}
