"""What the readers share: files that may be damaged, label maps, rigid transforms, tables of what was found.

Every function that reads names the file and the remedy when it fails, as `BadFrameError`: one bad frame is skipped and
counted by the pipeline, it does not end a run.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from scalr_jax.data.scenes import IGNORE, RANDOM, Frame
from scalr_jax.runtime.errors import BadFrameError, InputError

MAX_BAD_FRACTION = 0.03  # of a scan's points that may be NaN or infinite; they are dropped, more is a bad frame
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for bad files
LABEL_MAPS = Path(__file__).parents[1] / "label_maps"
# Held around `numpy.load`, which several threads of the pipeline call: it reads headers with `ast.literal_eval`, and in
# CPython before 3.11.8 and 3.12.2 that raises SystemError now and then when two threads do so (python/cpython#106905).
NUMPY_LOAD = threading.Lock()


class LabelMap(NamedTuple):
    """One of the readable files in `label_maps/`."""

    class_names: tuple[str, ...]
    class_of_name: dict[str, int]  # the dataset's own name of a label -> class, or 255
    class_of_id: dict[int, int]  # the dataset's own number of a label -> class, or 255


def read_label_map(dataset: str) -> LabelMap:
    """Reads `label_maps/<dataset>.json`: {"classes": [...], "labels": {id: [name, class or null for ignored]}}."""
    content = json.loads((LABEL_MAPS / f"{dataset}.json").read_text())
    number = {name: i for i, name in enumerate(content["classes"])} | {None: IGNORE}
    labels = {int(i): (name, number[class_name]) for i, (name, class_name) in content["labels"].items()}
    return LabelMap(tuple(content["classes"]), dict(labels.values()), {i: c for i, (_, c) in labels.items()})


def map_labels(labels: np.ndarray, class_of_id: dict[int, int], num_points: int, path: Path) -> np.ndarray:
    """A dataset's label numbers [N] -> classes [N] uint8, 255 where ignored.

    Raises BadFrameError: another number of labels than points, or a label that the map does not know.
    """
    if len(labels) != num_points:
        raise BadFrameError(
            f"{path}: {len(labels)} labels for a scan of {num_points} points; copy both files again, from one release."
        )
    values, inverse = np.unique(labels, return_inverse=True)
    if unknown := [int(value) for value in values if int(value) not in class_of_id]:
        raise BadFrameError(f"{path}: labels {unknown[:5]} are in no class of the label map; copy the file again.")
    return np.array([class_of_id[int(value)] for value in values], np.uint8)[inverse]


def read_bytes(path: Path) -> bytes:
    """A file's content. Raises BadFrameError when it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFrameError(f"{path}: cannot be read ({error.strerror}).") from error


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises BadFrameError when it is missing or damaged."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:  # also UnicodeDecodeError
        raise BadFrameError(f"{path}: not valid JSON ({error}); copy the file again.") from error


def read_floats(path: Path, columns: int) -> np.ndarray:
    """A headerless file of little-endian float32 rows -> [N, columns].

    Raises BadFrameError: missing, empty, or not a whole number of rows.
    """
    raw = read_array(path, np.dtype("<f4"))
    if len(raw) == 0 or len(raw) % columns:
        raise BadFrameError(
            f"{path}: {4 * len(raw)} bytes are not a whole scan of {4 * columns} bytes a point; copy the file again."
        )
    return raw.reshape(-1, columns)


def read_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """A headerless file of numbers -> [n]. Raises BadFrameError when it is missing or cut within a number."""
    raw = read_bytes(path)
    if len(raw) % dtype.itemsize:
        raise BadFrameError(f"{path}: {len(raw)} bytes are not whole {dtype} values; copy the file again.")
    return np.frombuffer(raw, dtype)


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file -> [h, w, 3] uint8. Raises BadFrameError: missing, unreadable, cut short, or of another size.

    size: (width, height) in pixels that the calibration was made for, when it is known.
    """
    try:
        with Image.open(path) as file:
            if size is not None and file.size != tuple(size):
                raise BadFrameError(
                    f"{path}: the image is {file.width} x {file.height} pixels, its calibration is for "
                    f"{size[0]} x {size[1]}; use the dataset's original images."
                )
            return np.asarray(file if file.mode == "RGB" else file.convert("RGB"))
    except FileNotFoundError as error:
        raise BadFrameError(f"{path}: no such image; copy it, or leave this camera out.") from error
    except UNREADABLE as error:
        raise BadFrameError(f"{path}: unreadable image ({error}); copy the file again.") from error


def decode_image(content: bytes, name: str, *, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """An image file's bytes -> [h, w, 3] uint8. Raises BadFrameError, which calls it `name`.

    A JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size (averaged over blocks, several times faster) as long as no
    side gets shorter than `at_least` (rows, columns). None: whole.
    """
    try:
        with Image.open(io.BytesIO(content)) as file:
            if at_least is not None:
                file.draft("RGB", (at_least[1], at_least[0]))
            return np.asarray(file if file.mode == "RGB" else file.convert("RGB"))
    except UNREADABLE as error:
        raise BadFrameError(f"{name}: unreadable image ({error}); prepare the dataset again.") from error


def finite_points(points: np.ndarray, path: Path) -> np.ndarray:
    """Which points [N, 4] have finite coordinates and intensity, as [N] bool.

    Raises BadFrameError: more than 3 % have not.
    """
    good = np.asarray(np.isfinite(points).all(axis=1))
    num_bad = len(points) - int(good.sum())
    if num_bad > MAX_BAD_FRACTION * len(points):
        raise BadFrameError(
            f"{path}: {num_bad} of {len(points)} points are NaN or infinite (at most {MAX_BAD_FRACTION:.0%} may be); "
            "copy the file again."
        )
    return good


def without_bad(frame: Frame, path: Path) -> Frame:
    """The frame without points that have no finite coordinates or intensity. Raises BadFrameError as above."""
    good = finite_points(frame.points, path)
    arrays = {key: getattr(frame, key) for key in ("points", "labels", "instances", "beams")}
    kept = {key: array[good] for key, array in arrays.items() if array is not None}
    return frame._replace(**kept, num_dropped=frame.num_dropped + len(good) - int(good.sum()))


def rotation(quaternion: Sequence[float] | np.ndarray) -> np.ndarray:
    """Quaternion w, x, y, z (of any length but 0) -> rotation matrix [3, 3] float64."""
    w, x, y, z = quaternion
    s = 2.0 / (w * w + x * x + y * y + z * z)
    return np.array([[1.0 - s * (y * y + z * z), s * (x * y - w * z), s * (x * z + w * y)],
                     [s * (x * y + w * z), 1.0 - s * (x * x + z * z), s * (y * z - w * x)],
                     [s * (x * z - w * y), s * (y * z + w * x), 1.0 - s * (x * x + y * y)]])  # fmt: skip


def pick_camera(
    camera: str | None, available: Sequence[str], known: Iterable[str], rng: np.random.Generator | None
) -> str | None:
    """The camera of a frame: the one that was asked for, none, or one of `available` drawn with `rng`.

    Raises InputError: a camera that the dataset does not have, or a draw without `rng`.
    """
    if camera != RANDOM:
        if camera is not None and camera not in known:
            raise InputError(f"camera {camera!r} is not one of {', '.join(known)}.")
        return camera
    if len(available) < 2:
        return available[0] if available else None
    if rng is None:
        raise InputError("frame() draws one of several cameras: give rng, or name the camera.")
    return available[int(rng.integers(len(available)))]


def check_choice(what: str, given: str, choices: Iterable[str]) -> None:
    """Raises InputError unless `given` is one of `choices`."""
    if given not in choices:
        raise InputError(f"{what}={given!r} is not one of {', '.join(choices)}.")


def check_all_in(what: str, given: Iterable[str] | None, found: Iterable[str], where: Path) -> None:
    """Raises InputError that names those of `given` (None: none) that are not in `found`."""
    if missing := sorted(set(given or ()) - set(found)):
        raise InputError(f"{where}: no {what} {', '.join(missing)}; found {', '.join(sorted(found)) or 'none'}.")


def check_folder(root: Path, expected: str) -> None:
    """Raises InputError unless `root` is a folder; `expected` says in the message what it should hold."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected {expected}.")


def listing(folder: Path) -> frozenset[str]:
    """The names of a folder's files; empty when there is no such folder."""
    return frozenset(entry.name for entry in folder.iterdir()) if folder.is_dir() else frozenset()


def format_table(title: str, rows: Sequence[tuple[str, object]]) -> str:
    """A title line and one aligned line a row."""
    width = max(len(label) for label, _ in rows)
    return "\n".join([title, *(f"  {label:<{width}}  {value}" for label, value in rows)])
