"""Pickled pandas tables, read without pandas and without trusting the file.

PandaSet stores each scan as a pickled `pandas.DataFrame`. Loading runs nothing (runtime/unpickler.py): every name that
a table may use stands in `_STAND_INS` and becomes a record, of which the numbers are taken afterwards. A table is its
column names, and blocks of equal dtype, each with the columns it fills.
"""

from __future__ import annotations

import gzip
import io
import itertools
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from scalr_jax.runtime.errors import BadFrameError
from scalr_jax.runtime.storage import LFS, LFS_SENTENCE
from scalr_jax.runtime.unpickler import ForbiddenError, MalformedError, RecordingUnpickler, is_record, need, stand_ins

MAX_BYTES = 1 << 30  # a PandaSet scan is about 10 MB unpacked; more than this is not a scan but an attack on memory

# Every name that a table may mention and what it stands for, over the versions of pandas (0.2x to 3) and NumPy (1, 2).
_NAMES = {
    "frame": "pandas.DataFrame pandas.core.frame.DataFrame",
    "manager": "pandas.core.internals.BlockManager pandas.core.internals.managers.BlockManager",
    "block": "pandas._libs.internals._unpickle_block pandas.core.internals.blocks.new_block",
    "index": "pandas.core.indexes.base._new_Index",
    "index class": "pandas.Index pandas.core.indexes.base.Index pandas.RangeIndex pandas.core.indexes.range.RangeIndex "
    "pandas.core.indexes.numeric.Int64Index pandas.core.indexes.numeric.UInt64Index "
    "pandas.core.indexes.numeric.Float64Index",
    "dtype": "pandas.StringDtype pandas.core.arrays.string_.StringDtype numpy.dtype",
    "strings": "pandas.arrays.StringArray pandas.core.arrays.string_.StringArray pandas.arrays.ArrowStringArray "
    "pandas.core.arrays.string_arrow.ArrowStringArray pandas._libs.arrays.__pyx_unpickle_NDArrayBacked",
    "arrow": "pyarrow.lib._restore_array",
    "arrow type": "pyarrow.lib.type_for_alias",
    "bytes": "pyarrow.lib.py_buffer builtins.bytearray __builtin__.bytearray _codecs.encode",
    "array": "numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct",
    "array class": "numpy.ndarray",
    "buffer": "numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer",
    "scalar": "numpy.core.multiarray.scalar numpy._core.multiarray.scalar",
    "slice": "builtins.slice __builtin__.slice",
}
_STAND_INS = stand_ins(
    {(n.rpartition(".")[0], n.rpartition(".")[2]): kind for kind, names in _NAMES.items() for n in names.split()}
)


def read_dataframe(path: str | Path) -> dict[str, np.ndarray]:
    """A pickled `pandas.DataFrame` of numbers (`.pkl`, or `.pkl.gz`: told apart by content, not by name), of pickle
    protocols 2 to 5 and pandas 0.2x to 3: column name -> values [rows], in the table's order and the file's dtypes.

    Values are read-only views of the file's bytes; the row index is not read. Raises BadFrameError: the file is gone,
    cut short, no table of numbers, or names anything but parts of one (nothing in it is executed).
    """
    data = _read_bytes(Path(path))
    try:
        return _columns(RecordingUnpickler(io.BytesIO(data), _STAND_INS).load())
    except ForbiddenError as error:
        raise BadFrameError(
            f"{path}: the pickle asks for {error}, which no table of numbers needs; nothing was executed. "
            "Replace the file with the dataset's own."
        ) from None
    except MalformedError as error:
        raise BadFrameError(f"{path}: not a pickled table of numbers ({error}); copy the file again.") from None
    except Exception as error:  # a damaged pickle can raise nearly anything, from EOFError to UnicodeDecodeError
        raise BadFrameError(
            f"{path}: not a whole pickled table ({type(error).__name__}: {error}); copy the file again."
        ) from error


def _read_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = (gzip.GzipFile(fileobj=file) if packed else file).read(MAX_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadFrameError(f"{path}: cut short or damaged gzip ({error}); copy the file again.") from error
    except OSError as error:
        raise BadFrameError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if not data:
        raise BadFrameError(f"{path}: empty file; copy it again.")
    if len(data) > MAX_BYTES:
        raise BadFrameError(f"{path}: more than {MAX_BYTES} bytes unpacked, which is no scan.")
    if data.startswith(LFS):
        raise BadFrameError(f"{path}: {LFS_SENTENCE}.")
    if data[:1] != b"\x80":  # protocols 2 and newer say so in their first byte
        raise BadFrameError(f"{path}: neither gzip nor a pickle of protocol 2 to 5; copy the file again.")
    return data


def _columns(frame: Any) -> dict[str, np.ndarray]:
    need(is_record(frame, "frame") and isinstance(frame.state, dict), "no DataFrame")
    manager: Any = frame.state.get("_mgr", frame.state.get("_data"))  # `_data` before pandas 1.1
    need(is_record(manager, "manager"), "no block manager")
    if manager.state is not None:  # until pandas 1.2: (..., {"0.14.1": {"axes", "blocks": [{"values", "mgr_locs"}]}})
        layout = manager.state[3]["0.14.1"]
        axes, blocks = layout["axes"], [(block["values"], block["mgr_locs"]) for block in layout["blocks"]]
    else:  # since pandas 1.3: BlockManager(blocks, axes), where a block is (values, placement, dimensions)
        records, axes = manager.args[:2]
        need(all(is_record(block, "block") for block in records), "a block of unknown kind")
        blocks = [block.args[:2] for block in records]
    names = _names(axes[0])
    table: dict[str, np.ndarray | None] = dict.fromkeys(names)
    need(len(table) == len(names), "a column name occurs twice")
    for block, placement in blocks:
        rows, columns = _array(block), _placement(placement)  # [k, rows] fill the k columns
        need(rows.ndim == 2 and len(columns) == len(rows), "a block of another shape")
        for column, values in zip(columns, rows, strict=True):
            need(0 <= column < len(names), f"column {column} of {len(names)}")
            table[names[column]] = values
    columns = {name: values for name, values in table.items() if values is not None}
    need(len(columns) == len(names), "a column without values")
    need(len({len(values) for values in columns.values()}) <= 1, "columns of unequal length")
    return columns


def _placement(record: Any) -> np.ndarray:
    """Which columns a block fills [k]: a slice, or an array of indices."""
    if not is_record(record, "slice"):
        return _array(record)
    start, stop, step = record.args
    return np.arange(start or 0, min(stop, 1 << 16), step or 1)


def _names(axis: Any) -> list[str]:
    need(is_record(axis, "index") and len(axis.args) == 2, "no column names")
    data = axis.args[1]["data"]
    names = _strings(data) if is_record(data, "strings") else _objects(data)
    need(all(isinstance(name, str) for name in names), "column names that are no strings")
    return names


def _objects(record: Any) -> list[Any]:
    """An object array as a plain list: column names only, numbers never travel so."""
    need(is_record(record, "array") and isinstance(record.state[4], list), "column names in an unknown form")
    return record.state[4]


def _strings(record: Any) -> list[Any]:
    """A column of strings as pandas 3 has it: an object array, or Arrow's offsets and bytes."""
    state = record.state
    data: Any = state.get("_pa_array", state.get("_ndarray")) if isinstance(state, dict) else state[1]
    data = data[0] if isinstance(data, tuple) else data
    if not is_record(data, "arrow"):
        return _objects(data)
    form, count, _, first, (_, offsets, text) = data.args[0][:5]
    width = {"large_string": "<i8", "string": "<i4"}[form.args[0]]
    ends = np.frombuffer(_bytes(offsets), width)[first : first + count + 1]
    return [bytes(_bytes(text))[a:b].decode() for a, b in itertools.pairwise(ends)]


def _array(record: Any) -> np.ndarray:
    """A NumPy array from what the pickle says of it, checked against its bytes."""
    if is_record(record, "array"):  # state: version, shape, dtype, in Fortran order?, bytes
        _, shape, dtype, fortran, data = record.state
    else:
        need(is_record(record, "buffer"), "values that are no NumPy array")
        data, dtype, shape, order = record.args
        fortran = order == "F"
    values = np.frombuffer(_bytes(data), _dtype(dtype))
    return values.reshape(shape, order="F" if fortran else "C")


def _dtype(record: Any) -> np.dtype:
    need(is_record(record, "dtype") and bool(record.args), "no dtype")
    code = str(record.args[0])
    need(re.fullmatch(r"[iufb][1248]", code) is not None, f"values of dtype {code!r}, which are no numbers")
    order = record.state[1] if record.state else "="
    need(order in ("<", ">", "=", "|"), "a dtype without byte order")
    return np.dtype(order + code)


def _bytes(data: Any) -> bytes | bytearray:
    """The raw bytes: themselves, wrapped (`bytearray`, `py_buffer`), or as Latin-1 text (protocol 2)."""
    while is_record(data, "bytes"):
        data = data.args[0] if data.args else b""
    if isinstance(data, str):
        return data.encode("latin-1")
    need(isinstance(data, bytes | bytearray), "values without bytes")
    return data
