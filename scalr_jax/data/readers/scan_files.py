"""One lidar scan from a file: .bin, .npy, .pcd or .ply -> x, y, z in metres and the raw intensity.

    .bin   headerless little-endian float32 rows of 3 to 6 columns: x, y, z, intensity, others (KITTI 4, nuScenes 5)
    .npy   [N, 3 or more] numbers, the fourth column is the intensity; or a structured array with named fields
    .pcd   ascii, binary, binary_compressed (pcd.py)
    .ply   ascii, binary of either byte order (plyfile); the element "vertex"

Named fields: x, y, z and one of `INTENSITY_NAMES`, in any case. Points come out as they are stored: NaN where the lidar
got no echo, coordinates in the file's frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import plyfile

from scalr_jax.data.headerless import COLUMNS
from scalr_jax.data.readers import files
from scalr_jax.data.readers.pcd import read_pcd
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.runtime.storage import reason

SUFFIXES = (".bin", ".npy", ".pcd", ".ply")
INTENSITY_NAMES = ("intensity", "i", "scalar_intensity", "remission", "reflectance", "reflectivity")  # the first wins
AGAIN = "write or copy the file again"


class Scan(NamedTuple):
    """The content of a scan's file."""

    points: np.ndarray  # [N, 4] float32: x, y, z (metres), raw intensity (0 when the file has none)
    has_intensity: bool  # tells a measured 0 from a missing column


def read_scan(path: str | Path, *, columns: int | None = None) -> Scan:
    """Reads one .bin, .npy, .pcd or .ply file of at least one point; points come in the file's order.

    columns: float32 columns of a .bin file, 3 to 6; None means 4, as in KITTI. Other formats say it themselves.

    Raises BadFrameError: missing, damaged, truncated or empty file, or one without x, y, z. Raises InputError: another
    ending, or other columns.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if columns is not None and columns not in COLUMNS:
        raise InputError(f"columns = {columns!r}: a .bin file has {', '.join(map(str, COLUMNS))} columns")
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: a scan is a file that ends in {', '.join(SUFFIXES)}; convert this one")
    if suffix == ".bin":
        table = _by_name(files.read_floats(path, columns or 4))
    else:
        table = {".npy": _read_npy, ".pcd": _read_pcd, ".ply": _read_ply}[suffix](path)
    scan = _assemble(path, table)
    if len(scan.points) == 0:
        raise BadFrameError(f"{path}: the scan has no points; {AGAIN}, or leave it out.")
    return scan


def load_array(path: Path) -> np.ndarray:
    """A .npy file's array, mapped. Raises BadFrameError."""
    try:
        with files.NUMPY_LOAD, np.errstate(over="ignore"):  # of a shape that no memory holds
            array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header that lies allocates nothing
    except files.UNREADABLE_ARRAYS as error:
        raise BadFrameError(f"{path}: unreadable .npy file ({reason(error, path)}); {AGAIN}.") from error
    if not isinstance(array, np.ndarray):
        raise BadFrameError(f"{path}: an archive of several arrays; save one array, with numpy.save.")
    return array


def _read_npy(path: Path) -> Mapping[str, np.ndarray]:
    array = load_array(path)
    if array.dtype.names:
        return {name: array[name] for name in _choose(path, list(array.dtype.names))}
    turned = array.ndim == 2 and array.shape[0] in COLUMNS and array.shape[1] not in COLUMNS
    if turned or array.ndim != 2 or array.shape[1] < 3 or array.dtype.kind not in "fiu":
        raise BadFrameError(
            f"{path}: an array of shape {array.shape} and dtype {array.dtype}, and numbers [N, 3 or more] are needed: "
            f"x, y, z, intensity{'; it looks transposed' if turned else ''}; save the scan again."
        )
    return _by_name(array)


def _by_name(rows: np.ndarray) -> Mapping[str, np.ndarray]:
    """The first columns of rows [N, 3 or more]."""
    return dict(zip(("x", "y", "z", "intensity"), rows.T, strict=False))


def _read_pcd(path: Path) -> Mapping[str, np.ndarray]:
    try:
        return read_pcd(files.read_bytes(path), lambda names: _choose(path, names))
    except (ValueError, IndexError) as error:
        raise BadFrameError(f"{path}: damaged .pcd file: {reason(error)}; {AGAIN}.") from error


def _read_ply(path: Path) -> Mapping[str, np.ndarray]:
    try:
        vertices = plyfile.PlyData.read(str(path))["vertex"].data
    except KeyError:
        raise BadFrameError(f'{path}: a .ply file without the element "vertex"; write the points as one.') from None
    except (plyfile.PlyParseError, *files.UNREADABLE_ARRAYS) as error:
        raise BadFrameError(f"{path}: unreadable .ply file ({reason(error, path)}); {AGAIN}.") from error
    numbers = [name for name in vertices.dtype.names or () if vertices.dtype[name].kind in "fiu"]
    return {name: vertices[name] for name in _choose(path, numbers)}


def _choose(path: Path, names: list[str]) -> list[str]:
    """The fields of x, y, z and, where there is one, of the intensity. Raises BadFrameError without x, y, z."""
    by_lower = {name.lower(): name for name in reversed(names)}
    if missing := [axis for axis in "xyz" if axis not in by_lower]:
        raise BadFrameError(
            f"{path}: no field {', '.join(missing)} among {', '.join(names) or 'none'}; name the coordinates x, y, z."
        )
    intensity = [by_lower[name] for name in INTENSITY_NAMES if name in by_lower]
    return [by_lower["x"], by_lower["y"], by_lower["z"], *intensity[:1]]


def _assemble(path: Path, table: Mapping[str, np.ndarray]) -> Scan:
    """Columns in the order x, y, z and perhaps intensity -> Scan."""
    columns = list(table.values())
    if any(column.ndim != 1 or column.dtype.kind not in "fiu" for column in columns):
        raise BadFrameError(f"{path}: its fields {', '.join(table)} are not one number a point each; {AGAIN}.")
    points = np.zeros((len(columns[0]), 4), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite, and is found later
        for k, column in enumerate(columns):
            points[:, k] = column
    return Scan(points, len(columns) == 4)
