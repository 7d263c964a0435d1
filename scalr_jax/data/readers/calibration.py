"""Cameras of your own data: a pinhole with OpenCV's distortion, fixed to the lidar, with its checks.

p = lidar_to_camera * point           camera axes: x right, y down, z forward (OpenCV); metres
a, b = p_x / p_z, p_y / p_z           r^2 = a^2 + b^2
k = (1 + k1 r^2 + k2 r^4 + k3 r^6) / (1 + k4 r^2 + k5 r^4 + k6 r^6)
a' = k a + 2 p1 a b + p2 (r^2 + 2 a^2)        b' = k b + p1 (r^2 + 2 b^2) + 2 p2 a b
column = fx a' + cx,  row = fy b' + cy        the middle of the first pixel is (0, 0)
visible: p_z > min_depth, strictly between 0 and the image's size - 1
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeGuard

import numpy as np

CAMERA_KEYS = ("intrinsics", "fx", "fy", "cx", "cy", "size", "distortion", "lidar_to_camera")
DISTORTIONS = (4, 5, 8)  # k1 k2 p1 p2 [k3 [k4 k5 k6]]
MAX_CENTRE_SHIFT = 0.25  # of the principal point from the image's middle, as a share of its size
VIEW_ANGLES = (5.0, 160.0)  # degrees that a pinhole camera may see across
MAX_DISTANCE, NOTABLE_DISTANCE = 30.0, 6.0  # metres between lidar and camera: refused, asked about
BACKWARDS = -0.5  # cosine between a camera's view and the student's x axis, below which it looks backwards
REAR_NAMES = ("back", "rear")  # in the names of cameras that should
UPRIGHT = 0.5  # cosine between the image's up and the world's, below which a camera is asked about
BODY_TO_CAMERA = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])  # x forward, y left, z up ->


class Camera(NamedTuple):
    """One camera of the calibration."""

    name: str
    intrinsics: np.ndarray  # [3, 3] pixels
    size: tuple[int, int]  # width, height of its images
    lidar_to_camera: np.ndarray  # [4, 4] metres
    distortion: tuple[float, ...] = ()  # k1 k2 p1 p2 [k3 [k4 k5 k6]]


def project(points: np.ndarray, camera: Camera, min_depth: float) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 3+] of the lidar's frame (metres) -> pixels [N, 2] float64 (row, column) and visible [N] bool.

    Beyond the angle at which the distortion turns back into the image nothing is visible.
    """
    matrix = camera.lidar_to_camera
    local = points[:, :3].astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]  # [N, 3]
    ahead = local[:, 2] > min_depth
    a, b = local[:, :2].T / np.where(ahead, local[:, 2], 1.0)  # [N] each
    if camera.distortion:
        ahead &= np.hypot(a, b) < _turning_radius(camera.distortion)
        a, b = _distort(np.where(ahead, a, 0.0), np.where(ahead, b, 0.0), camera.distortion)
    lens = camera.intrinsics
    x, y = lens[0, 0] * a + lens[0, 1] * b + lens[0, 2], lens[1, 1] * b + lens[1, 2]
    width, height = camera.size
    visible = ahead & (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
    return np.stack([y, x], axis=1), visible


def _radial(squared: np.ndarray, distortion: tuple[float, ...]) -> np.ndarray:
    k1, k2, _, _, k3, k4, k5, k6 = (*distortion, *(0.0,) * (8 - len(distortion)))
    r2, r4, r6 = squared, squared**2, squared**3
    return (1 + k1 * r2 + k2 * r4 + k3 * r6) / (1 + k4 * r2 + k5 * r4 + k6 * r6)


def _distort(a: np.ndarray, b: np.ndarray, distortion: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    p1, p2 = distortion[2:4]
    squared = a * a + b * b
    k = _radial(squared, distortion)
    return k * a + 2 * p1 * a * b + p2 * (squared + 2 * a * a), k * b + p1 * (squared + 2 * b * b) + 2 * p2 * a * b


def _turning_radius(distortion: tuple[float, ...]) -> float:
    """The undistorted radius up to which the distorted one grows; 10 (84 degrees off the axis) when it always does."""
    radius = np.linspace(0.0, 10.0, 4001)
    with np.errstate(divide="ignore", invalid="ignore"):
        growth = np.diff(radius * _radial(radius**2, distortion))
    shrinks = np.flatnonzero(~(growth > 0))
    return float(radius[shrinks[0]]) if len(shrinks) else float(radius[-1])


# -------------------------------------------------------------------------------------- what may be wrong with a matrix


def other_readings(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """The usual mistakes: what the matrix [4, 4] may be -> the matrix that was meant."""
    turned, inverse = BODY_TO_CAMERA @ matrix, np.linalg.inv(matrix)
    return {
        "it looks like the inverse, camera to lidar": inverse,
        "its camera axes look like x forward, y left, z up, and must be x right, y down, z forward": turned,
        "it looks like the inverse, from camera axes x forward, y left, z up": BODY_TO_CAMERA @ inverse,
    }


def explain_nothing_visible(points: np.ndarray, camera: Camera, min_depth: float) -> str:
    """Half a sentence for a camera that sees none of points [N, 3+]: which other reading would see many."""
    counts = {
        reading: int(project(points, camera._replace(lidar_to_camera=matrix), min_depth)[1].sum())
        for reading, matrix in other_readings(camera.lidar_to_camera).items()
    }
    most = max(counts.values())
    if most < max(10, 0.005 * len(points)):
        return "check lidar_to_camera (lidar's frame to camera's, metres) and the intrinsics"
    reading, count = next(item for item in counts.items() if item[1] > 0.8 * most)  # the simplest of several
    return f"read another way, lidar_to_camera would show {count} points: {reading}"


def check_mounting(camera: Camera, to_student: np.ndarray, *, alone: bool) -> list[str]:
    """Sentences about a mounting that looks wrong but may be meant. `alone`: there is no other camera."""
    texts = [text] if (text := check_upright(camera, to_student)) else []
    distance, name = float(np.linalg.norm(camera.lidar_to_camera[:3, 3])), camera.name.lower()
    if distance > NOTABLE_DISTANCE:
        texts.append(
            f"camera {camera.name}: lidar_to_camera puts it {distance:.1f} m from the lidar; is its translation in "
            "metres, not centimetres?"
        )
    ahead = float((to_student[:3, :3] @ camera.lidar_to_camera[2, :3])[0])  # of its viewing direction, along x
    rear = any(word in name for word in REAR_NAMES)
    if not texts and (alone or rear or "front" in name) and (-ahead if rear else ahead) < BACKWARDS:
        way = "forwards, along +x" if rear else "backwards, along -x"
        texts.append(
            f"camera {camera.name}: by lidar_to_camera it looks {way} of the student's frame; check its rotation, and "
            "to_student if the lidar's x axis does not point forward, unless it really is mounted like that"
        )
    return texts


def check_upright(camera: Camera, to_student: np.ndarray) -> str | None:
    """None, or a sentence when the world's up is not up in the image, as it is in a camera that stands upright."""
    up = to_student[2, :3]  # the student's z axis in the lidar's frame
    shown = camera.lidar_to_camera[:3, :3] @ up  # x right, y down, z forward
    if -shown[1] > UPRIGHT:
        return None
    axis = int(np.argmax(np.abs(shown)))
    ways = (("left", "right"), ("up", "down"), ("towards the viewer", "into the image"))
    direction = ways[axis][int(shown[axis] > 0)]
    text = f"camera {camera.name}: by lidar_to_camera the lidar's up points {direction} in its image"
    for reading, matrix in other_readings(camera.lidar_to_camera).items():
        if -(matrix[:3, :3] @ up)[1] > UPRIGHT:
            return f"{text}; {reading}"
    return f"{text}; check its rotation, unless the camera really is mounted like that"


# ------------------------------------------------------------------------------------ from JSON, with all that is wrong


def read_camera(name: str, entry: object, problems: list[str]) -> Camera | None:
    """A camera's entry of the JSON file; appends to `problems` what is wrong with it, and returns None then."""
    before, where = len(problems), f"camera {name}"
    if not isinstance(entry, Mapping):
        problems.append(f"{where} must be an object with {', '.join(CAMERA_KEYS)}")
        return None
    check_keys(where, entry, CAMERA_KEYS, problems)
    size = _read_size(where, entry.get("size"), problems)
    lens = _read_intrinsics(where, entry, problems)
    matrix = read_rigid(f"{where}: lidar_to_camera", entry.get("lidar_to_camera"), problems)
    distortion = read_numbers(f"{where}: distortion (k1 k2 p1 p2 k3)", entry.get("distortion", []), None, problems)
    if distortion is not None and len(distortion) not in (0, *DISTORTIONS):
        problems.append(f"{where}: distortion has {len(distortion)} numbers; k1 k2 p1 p2 [k3 [k4 k5 k6]] are 4, 5, 8")
    if size is not None and lens is not None:
        _check_lens(where, lens, size, problems)
    if matrix is not None and (distance := np.linalg.norm(matrix[:3, 3])) > MAX_DISTANCE:
        problems.append(
            f"{where}: lidar_to_camera puts the camera {distance:.0f} m from the lidar; give metres, not centimetres"
        )
    if len(problems) > before or size is None or lens is None or matrix is None or distortion is None:
        return None
    return Camera(name, lens, size, matrix, tuple(distortion))


def check_keys(where: str, entry: Mapping[str, object], known: Iterable[str], problems: list[str]) -> None:
    """Appends the keys that are not `known`, each with the nearest one that is."""
    for key in sorted(set(entry) - set(known)):
        near = difflib.get_close_matches(key, list(known), n=1)
        problems.append(f"{where}: unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def read_numbers(where: str, value: object, count: int | None, problems: list[str]) -> list[float] | None:
    """A list of finite numbers, `count` of them unless that is None."""
    if not isinstance(value, list) or not all(map(is_number, value)) or count not in (None, len(value)):
        problems.append(f"{where} must be a list of {'' if count is None else f'{count} '}numbers")
        return None
    return [float(number) for number in value]


def read_matrix(where: str, value: object, size: int, problems: list[str]) -> np.ndarray | None:
    """A square matrix, as a list of rows."""
    if value is None:
        problems.append(f"{where} is missing")
        return None
    rows = value if isinstance(value, list) else []
    if len(rows) != size or not all(isinstance(r, list) and len(r) == size and all(map(is_number, r)) for r in rows):
        problems.append(f"{where} must be {size} rows of {size} numbers")
        return None
    return np.array(rows, np.float64)


def read_rigid(where: str, value: object, problems: list[str]) -> np.ndarray | None:
    """A rotation and a translation, [4, 4]."""
    matrix = read_matrix(where, value, 4, problems)
    if matrix is None:
        return None
    rotation, bottom = matrix[:3, :3], np.array([0.0, 0, 0, 1])
    if not np.array_equal(matrix[3], bottom):
        turned = "; it looks transposed" if np.array_equal(matrix[:, 3], bottom) else ""
        problems.append(f"{where} must have the last row 0 0 0 1{turned}")
    elif np.abs(rotation @ rotation.T - np.eye(3)).max() > 2e-3:
        lengths = ", ".join(f"{length:.3f}" for length in np.sqrt((rotation**2).sum(axis=1)))
        problems.append(f"{where} is no rotation: its rows must be orthonormal, and have lengths {lengths}")
    elif np.linalg.det(rotation) < 0:
        problems.append(f"{where} mirrors (determinant -1); one axis has the wrong sign")
    else:
        return matrix
    return None


def _read_size(where: str, value: object, problems: list[str]) -> tuple[int, int] | None:
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 1 for n in value):
        problems.append(f"{where}: size must be [width, height] of its images in pixels")
        return None
    return value[0], value[1]


def _read_intrinsics(where: str, entry: Mapping[str, object], problems: list[str]) -> np.ndarray | None:
    """The 3x3 matrix, however it was given."""
    named = [key for key in ("fx", "fy", "cx", "cy") if key in entry]
    if ("intrinsics" in entry) == bool(named):
        problems.append(f"{where}: give either intrinsics (3x3) or fx, fy, cx, cy")
        return None
    if named:
        if bad := [key for key in ("fx", "fy", "cx", "cy") if not is_number(entry.get(key))]:
            problems.append(f"{where}: {', '.join(bad)} must be a number of pixels")
            return None
        return np.array([[entry["fx"], 0, entry["cx"]], [0, entry["fy"], entry["cy"]], [0, 0, 1]], np.float64)
    lens = read_matrix(f"{where}: intrinsics", entry["intrinsics"], 3, problems)
    if lens is None:
        return None
    if lens[1, 0] or not np.array_equal(lens[2], [0, 0, 1]):
        turned = "; it looks transposed" if not lens[0, 2] and not lens[1, 2] else ""
        problems.append(f"{where}: intrinsics must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]]{turned}")
        return None
    return lens


def _check_lens(where: str, lens: np.ndarray, size: tuple[int, int], problems: list[str]) -> None:
    for focal, centre, pixels, axis in zip(lens.diagonal()[:2], lens[:2, 2], size, "xy", strict=True):
        if focal <= 0:
            problems.append(f"{where}: the focal length f{axis} = {focal:g} must be positive, in pixels")
            continue
        angle = 2 * math.degrees(math.atan(pixels / (2 * focal)))
        if not VIEW_ANGLES[0] < angle < VIEW_ANGLES[1]:
            problems.append(
                f"{where}: f{axis} = {focal:g} pixels on {pixels} pixels sees {angle:.0f} degrees; give pixels of "
                "images of this size, not millimetres"
            )
        if abs(centre / pixels - 0.5) > MAX_CENTRE_SHIFT:
            problems.append(
                f"{where}: c{axis} = {centre:g} is far from the middle of {pixels} pixels; are the intrinsics for "
                "another image size?"
            )
