"""Shared by the readers: files that may be damaged, label maps, rigid transforms, tables of what was found.

Every function that reads names the file and the remedy when it fails, as `BadFrameError`: one bad frame is skipped and
counted by the pipeline, it does not end a run.
"""

from __future__ import annotations

import io
import json
import threading
import tokenize
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from scalr_jax.data.headerless import COLUMNS, other_labels, other_reading
from scalr_jax.data.scan_checks import check_place, count_unusable, find_usable
from scalr_jax.data.scenes import IGNORE, RANDOM, Frame
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.runtime.storage import LFS, LFS_SENTENCE, reason

MAX_BAD_FRACTION = 0.03  # of a scan's points that may be unusable; they are dropped, more is a bad frame
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for bad files
UNREADABLE_ARRAYS = (  # what NumPy raises for bad .npy and .npz files, and plyfile
    *(OSError, ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError, zipfile.BadZipFile),
    *(MemoryError, OverflowError, RecursionError),  # sizes that no memory or integer holds
)
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


def map_labels(
    labels: np.ndarray, class_of_id: Mapping[int, int], num_points: int, path: Path, remedy: str = "copy the file again"
) -> np.ndarray:
    """A dataset's label numbers [N] -> classes [N] uint8, 255 where ignored.

    Raises BadFrameError: another number of labels than points, or a label that the map does not know (then with the
    `remedy`).
    """
    if len(labels) != num_points:
        raise BadFrameError(
            f"{path}: {len(labels)} labels for a scan of {num_points} points; copy both files again, from one release."
        )
    values, inverse = np.unique(labels, return_inverse=True)
    if unknown := [int(value) for value in values if int(value) not in class_of_id]:
        raise BadFrameError(f"{path}: labels {unknown[:5]} are in no class of the label map; {remedy}.")
    return np.array([class_of_id[int(value)] for value in values], np.uint8)[inverse]


def read_labels(
    path: Path, dtype: str, class_of_id: Mapping[int, int], num_points: int, remedy: str = "copy the file again"
) -> tuple[np.ndarray, np.ndarray]:
    """A headerless file of labels -> classes [N] uint8, and its numbers [N]: of "<u4" the lower half is the label, the
    upper one counts instances; of "u1" all. Raises BadFrameError as `map_labels`, also for numbers of another type."""
    content, width = read_bytes(path), np.dtype(dtype).itemsize
    raw = np.frombuffer(content, dtype, len(content) // width)
    labels = raw & 0xFFFF if width == 4 else raw
    classes, problem = np.empty(0, np.uint8), None
    try:
        if len(content) % width:
            raise BadFrameError(f"{path}: {len(content)} bytes are not whole labels of {width}; copy the file again.")
        classes = map_labels(labels, class_of_id, num_points, path, remedy)
        if width < 4 or labels.any() or not raw.any():  # else floats or big-endian numbers, that look like label 0
            return classes, raw
    except BadFrameError as error:
        problem = error
    if other := other_labels(content, np.dtype(dtype), num_points, class_of_id):
        problem = BadFrameError(f"{path}: the file {other}; labels are little-endian uint{8 * width}, write them so.")
    if problem is not None:
        raise problem
    return classes, raw


def read_bytes(path: Path) -> bytes:
    """A file's content. Raises BadFrameError when it is missing or cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadFrameError(f"{path}: cannot be read ({error.strerror}).") from error
    if content.startswith(LFS):
        raise BadFrameError(f"{path}: {LFS_SENTENCE}.")
    return content


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises BadFrameError when it is missing or damaged."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise BadFrameError(f"{path}: not valid JSON ({reason(error)}); copy the file again.") from error


def read_floats(path: Path, columns: int) -> np.ndarray:
    """A headerless scan of little-endian float32 rows -> [N, columns].

    Raises BadFrameError: missing, empty, not a whole number of rows, or numbers that are plausible as another type or
    in other columns only.
    """
    content = read_bytes(path)
    if not content:
        raise BadFrameError(f"{path}: the scan has no points, the file is empty; copy it again, or leave it out.")
    other = other_reading(content, columns)
    if other or len(content) % (4 * columns):
        fitting = ", ".join(str(number) for number in COLUMNS if len(content) % (4 * number) == 0) or "no other number"
        what = f"the scan {other}" if other else f"{len(content)} bytes are not whole points ({fitting} would fit)"
        raise BadFrameError(
            f"{path}: {what}, and {columns} columns of little-endian float32 are expected; set the number of columns "
            "where there is a setting, or write or copy the file again."
        )
    return np.frombuffer(content, "<f4").reshape(-1, columns)


def read_image(path: Path, size: tuple[int, int] | None = None, *, decode: bool = True) -> np.ndarray:
    """An image file -> [h, w, 3] uint8. Raises BadFrameError: missing, unreadable, cut short, or of another size.

    size: (width, height) in pixels that the calibration was made for, when it is known. decode: False for zeros, and
    only the file's header is read.
    """
    try:
        with Image.open(path) as file:
            if size is not None and file.size != tuple(size):
                raise BadFrameError(
                    f"{path}: the image is {file.width} x {file.height} pixels, its calibration is for "
                    f"{size[0]} x {size[1]}; use the dataset's original images."
                )
            if not decode:
                return undecoded(file.height, file.width)
            return np.asarray(file if file.mode == "RGB" else file.convert("RGB"))
    except FileNotFoundError as error:
        raise BadFrameError(f"{path}: no such image; copy it, or leave this camera out.") from error
    except UNREADABLE as error:
        raise BadFrameError(f"{path}: unreadable image ({reason(error, path)}); copy the file again.") from error


def undecoded(height: int, width: int) -> np.ndarray:
    """Zeros [h, w, 3] uint8 that take no memory, in place of an image of which only the shape counts."""
    return np.broadcast_to(np.zeros((), np.uint8), (height, width, 3))


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


def usable_points(points: np.ndarray, path: Path) -> np.ndarray:
    """Which points [N, 4] have finite coordinates within 10 km and a finite intensity, as [N] bool.

    Raises BadFrameError: more than 3 % have not.
    """
    good = find_usable(points)[1]
    if len(points) - good.sum() > MAX_BAD_FRACTION * len(points):
        raise BadFrameError(
            f"{path}: {count_unusable(points)} (at most {MAX_BAD_FRACTION:.0%} may be so); copy the file again."
        )
    return good


def without_bad(frame: Frame, path: Path) -> Frame:
    """A lidar's frame without unusable points. Raises BadFrameError as above, and in another frame than a lidar's."""
    if problem := check_place(frame.points)[0]:
        raise BadFrameError(f"{path}: {problem}.")
    good = usable_points(frame.points, path)
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
