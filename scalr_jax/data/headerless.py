"""Recognises the numbers of a file without a header by their values: another type or other columns than expected.

Coordinates are metres, so the bytes of another type show at once: their exponents are of any size. And every column has
its own distribution, so with the right number of columns a value's column tells much about the value v (in eighths):

    I(column; v) = sum of p(column, v) log(p(column, v) / (p(column) p(v)))        nats

Over scans of nuScenes, KITTI and PandaSet, also shuffled and without intensity, I is 0.45 to 1.1 with the right number
(or its double), 0.08 to 0.5 with one that shares a factor, and 0.003 at most with another (2026-11-28).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

COLUMNS = (3, 4, 5, 6)  # of a scan
TYPES = {"<f8": "float64", ">f4": "big-endian float32", ">f8": "big-endian float64"}  # a scan is little-endian float32
LABEL_TYPES = {
    **{"<u4": "uint32", "<f4": "float32", ">u4": "big-endian uint32", "|u1": "uint8", "<u2": "uint16"},
    **{"<i8": "int64", "<f8": "float64"},
}
PERIOD, STRETCHES = 60, 100  # looked at: stretches of 60 values, whole rows of 3, 4, 5 or 6 columns
MAX_STRANGE = 0.01  # the share of coordinates that may be none
SIZES = (1e-20, 2e7)  # metres: a coordinate is 0 or between these, also in a map's frame
CLEAR = (1.3, 0.1)  # times and nats by which another number of columns must tell more than the expected one


def other_reading(content: bytes, columns: int) -> str | None:
    """Half a sentence for a scan of float32 rows of `columns` numbers that reads as something else ("reads as float64",
    "reads as 5 columns"); None when it reads as expected, or as nothing else."""
    if len(content) < 4 * 4 * PERIOD:
        return None
    found = {("<f4", number): told for number, told in _readings(content, "<f4").items()}
    expected = found.get(("<f4", columns))
    if expected is None:
        found |= {(dtype, n): told for dtype in TYPES for n, told in _readings(content, dtype).items()}
    if not found:
        return None
    best, most = max(found.items(), key=lambda item: item[1])
    if best[1] == 6 and found.get((best[0], 3), 0.0) > 0.9 * most:
        best = best[0], 3  # rows of three look like rows of six, too
    if expected is not None:
        needed = CLEAR[1] if (columns, best[1]) == (6, 3) else CLEAR[0] * expected + CLEAR[1]
        if best[1] == columns or most < needed:
            return None
    number = "" if best[1] == columns else f"{best[1]} columns"
    return f"reads as {' of '.join(filter(None, (TYPES.get(best[0]), number)))}"


def _readings(content: bytes, dtype: str, bins: int = 8) -> dict[int, float]:
    """I(column; v) in nats for each number of columns that fits the size and gives plausible coordinates."""
    size = np.dtype(dtype).itemsize
    stretches = len(content) // (size * PERIOD)
    if not stretches:
        return {}
    values = np.frombuffer(content, dtype, stretches * PERIOD).reshape(stretches, PERIOD)
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = values[:: -(-stretches // STRETCHES)].astype(np.float64).ravel()
    place = np.flatnonzero(np.isfinite(values) & (values != 0))  # the others stand for no echo, or for no number
    eighths = np.searchsorted(np.quantile(values[place], np.arange(1, bins) / bins), values[place]) if len(place) else 0
    found = {}
    for number in COLUMNS:
        if len(content) % (size * number) or _share_strange(values.reshape(-1, number)[:, :3]) > MAX_STRANGE:
            continue
        counts = np.bincount(eighths * number + place % number, minlength=bins * number)
        joint = counts.reshape(bins, number) / max(len(place), 1)
        ratio = joint / (joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)).clip(1e-12)
        found[number] = float((joint * np.log(ratio, where=joint > 0, out=np.zeros_like(joint))).sum())
    return found


def _share_strange(xyz: np.ndarray) -> float:
    """The share of coordinates [n, 3] that are no metres; points that are NaN altogether are no echo."""
    size = np.abs(xyz[~np.isnan(xyz).all(axis=1)])
    return 1.0 - float(((size == 0) | ((size > SIZES[0]) & (size < SIZES[1]))).mean()) if len(size) else 0.0


def other_labels(content: bytes, dtype: np.dtype, num_points: int, known: Collection[int]) -> str | None:
    """Half a sentence for a file of labels that reads as numbers of another type ("reads as float32"), one a point and
    all `known`; None when there is no such type. Of integers of four bytes and more the lower half is the label."""
    for name, text in LABEL_TYPES.items():
        if np.dtype(name) == dtype or len(content) != num_points * np.dtype(name).itemsize:
            continue
        values = np.frombuffer(content, name)
        if values.dtype.kind == "u" and values.dtype.itemsize > 2:
            values = values & 0xFFFF
        found = {float(value) for value in np.unique(values)}
        if found != {0.0} and found <= {float(number) for number in known}:
            return f"reads as {text}"
    return None
