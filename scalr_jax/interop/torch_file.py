"""PyTorch's checkpoint files (`.pth`, `.pt`) and `.safetensors`, as nested dicts of NumPy arrays, without PyTorch.

A `.pth` is a zip: `NAME/data.pkl`, a pickle that describes the contents, and `NAME/data/KEY`, the raw storages that its
tensors are views of. Before PyTorch 1.6 it was pickles one after the other (a magic number, a version, the machine, the
contents, the keys of the storages), then each storage: its number of elements in eight bytes, and they. Loading runs
nothing (runtime/unpickler.py): every name that weights and the usual leftovers of training need stands in `_STAND_INS`
and becomes a record; the records are turned into arrays afterwards.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from scalr_jax.interop.safetensors_file import read_safetensors
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import LFS_SENTENCE, is_lfs_pointer
from scalr_jax.runtime.unpickler import ForbiddenError, MalformedError, Record, RecordingUnpickler, need, stand_ins

MAX_PICKLE_BYTES = 1 << 28  # the description of the largest published checkpoint takes a few MB
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before PyTorch 1.6
_LEGACY_VERSION = 1001

# PyTorch's storage classes and their dtypes; all files are little-endian.
_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

_LIGHTNING = tuple(f"{name}.utilities.parsing" for name in ("pytorch_lightning", "lightning.pytorch"))
_LIGHTNING += tuple(f"{name}.utilities.data" for name in ("lightning_fabric", "lightning.fabric"))

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32")

# Every (module, name) that a checkpoint may mention. Learning rates computed with NumPy leave NumPy scalars behind
# (ScaLR's do), hence its names.
_STAND_INS = stand_ins(
    {
        **{("torch", name): name for name in _STORAGES},
        ("collections", "OrderedDict"): "dict",
        ("collections", "Counter"): "dict",
        ("torch._utils", "_rebuild_tensor_v2"): "tensor",
        ("torch._utils", "_rebuild_tensor"): "tensor",  # of PyTorch 0.3
        ("torch._utils", "_rebuild_parameter"): "parameter",
        ("torch", "Size"): "tuple",
        ("torch", "device"): "device",
        ("argparse", "Namespace"): "namespace",
        **{(module, "AttributeDict"): "dict" for module in _LIGHTNING},
        **{("torch", name): f"torch.{name}" for name in _DTYPES},
        **{(f"numpy.{core}.multiarray", "scalar"): "scalar" for core in ("core", "_core")},
        ("numpy", "dtype"): "dtype",
        ("_codecs", "encode"): "bytes",
    }
)


def read_weights_file(path: str | Path) -> dict:
    """The contents of a checkpoint: nested dicts with NumPy arrays (read-only) for tensors, plain Python for the rest.

    Args:
      path: a `.pth` or `.pt` of any PyTorch from 0.2 on, or a `.safetensors`; told apart by their contents.

    Raises:
      InputError: no such file, not a checkpoint, damaged, or a pickle that names what no weights need. One sentence
        that begins with the file's name; nothing of the file has been run.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the path of a .pth, .pt or .safetensors checkpoint")
    if is_lfs_pointer(path):
        raise InputError(f"{path}: {LFS_SENTENCE}")
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"PK\x03\x04"):
        return _refused(path, _read_zip)
    if head[8:9] == b"{":  # after eight bytes of length
        return read_safetensors(path)[0]
    if head.startswith(_LEGACY_MAGIC[: len(head)]) and len(head) > 2:
        return _refused(path, _read_legacy)
    raise InputError(f"{path} is not a checkpoint: neither PyTorch's nor safetensors")


def _refused(path: Path, read: Callable[[Path], dict]) -> dict:
    """The content that `read` reads from a file. Anything wrong with the file becomes one InputError."""
    try:
        return read(path)
    except ForbiddenError as error:
        problem = f"is refused: its pickle names {error}, which no weights need; nothing of it was run"
    except MalformedError as error:
        problem = f"is not a PyTorch checkpoint: {error}"
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        problem = f"is truncated or damaged ({error}); copy it again"
    except Exception as error:  # what a malformed zip or pickle raises cannot be listed
        problem = f"is not a PyTorch checkpoint, or is damaged ({type(error).__name__}: {error})"
    raise InputError(f"{path} {problem}")


def _read_zip(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        need(len(pickles) == 1, "the zip holds no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist():
            need(_entry(archive, f"{root}byteorder", limit=16) == b"little", "it is big-endian")
        text = _entry(archive, pickles[0], limit=MAX_PICKLE_BYTES)
        records = _Unpickler(io.BytesIO(text)).load()
        storages = f"{root}data"
        return _Converter(lambda found: _entry(archive, f"{storages}/{found.key}", limit=found.bytes)).file(records)


def _entry(archive: zipfile.ZipFile, name: str, *, limit: int) -> bytes:
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise MalformedError(f"the zip lacks {name}") from None
    need(entry.compress_type == zipfile.ZIP_STORED, f"{name} is compressed, which PyTorch never does")
    need(entry.file_size <= limit, f"{name} has {entry.file_size} bytes where at most {limit} are expected")
    return archive.read(entry)


def _read_legacy(path: Path) -> dict:
    content = memoryview(path.read_bytes())
    file = io.BytesIO(content[:MAX_PICKLE_BYTES])
    _, version, machine = (_Unpickler(file).load() for _ in range(3))
    need(version == _LEGACY_VERSION, f"it is of version {version!r}")
    need(isinstance(machine, dict) and machine.get("little_endian") is True, "it is big-endian")
    unpickler = _Unpickler(file)
    records, keys = unpickler.load(), _Unpickler(file).load()
    start, data = file.tell(), {}
    need(isinstance(keys, list) and set(keys) == set(unpickler.storages), "its storages are not those of its tensors")
    for storage in (unpickler.storages[key] for key in keys):
        need(start + 8 + storage.bytes <= len(content), "it is truncated; copy it again")
        number, start = int.from_bytes(content[start : start + 8], "little"), start + 8
        need(number == storage.size, f"storage {storage.key} has {number} elements where {storage.size} are expected")
        data[storage.key], start = content[start : start + storage.bytes], start + storage.bytes
    return _Converter(lambda storage: data[storage.key]).file(records)


class _Storage:
    """A storage named by the pickle, read when a tensor needs it."""

    def __init__(self, key: str, dtype: np.dtype, size: int) -> None:
        self.key, self.dtype, self.size, self.bytes = key, dtype, size, size * dtype.itemsize


class _Unpickler(RecordingUnpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, _STAND_INS)
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, pid: Any) -> _Storage:
        need(isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage", "an unknown persistent id")
        _, storage, key, _, size, *view = pid
        need(view in ([], [None]), "a storage that is a view of another")
        kind = getattr(storage, "kind", None)
        need(isinstance(storage, type) and kind in _STORAGES, "a storage of unknown type")
        need(isinstance(key, str) and isinstance(size, int) and size >= 0, "a storage without key or size")
        found = _Storage(key, _STORAGES[str(kind)], size)
        first = self.storages.setdefault(key, found)
        need((first.dtype, first.size) == (found.dtype, size), f"two storages are called {key}")
        return first


class _Converter:
    """Turns a pickle's records into arrays; `read` gives the bytes of a storage."""

    def __init__(self, read: Callable[[_Storage], bytes | memoryview]) -> None:
        self.read = read
        self.data: dict[str, bytes | memoryview] = {}
        self.done: dict[int, Any] = {}

    def file(self, records: Any) -> dict:
        """A file's contents."""
        value = self.plain(records, depth=0)
        need(isinstance(value, dict), f"it holds a {type(value).__name__} where a dict of weights is needed")
        return value

    def plain(self, value: Any, depth: int) -> Any:
        """Records to arrays and plain containers. Shared objects are turned once; cycles are too deep."""
        need(depth < 100, "its contents are nested too deeply")
        if isinstance(value, str | bytes | int | float | None):
            return value
        if id(value) not in self.done:
            # `value` is kept beside its result: while it lives, nothing else has its id
            self.done[id(value)] = value, self.convert(value, depth + 1)
        return self.done[id(value)][1]

    def convert(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            return {self.plain(k, depth): self.plain(v, depth) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.plain(item, depth) for item in value)
        if isinstance(value, Record):
            return self.convert_record(value, depth)
        if isinstance(value, type) and issubclass(value, Record):
            return value.kind  # torch.float32 and the like
        raise MalformedError(f"a {type(value).__name__} where weights or settings are expected")

    def convert_record(self, record: Record, depth: int) -> Any:
        kind, args = record.kind, record.args
        if kind == "tensor":
            return self.tensor(*args[:4])
        if kind == "parameter":
            return self.plain(args[0], depth)
        if kind == "scalar":
            return _scalar(*args)
        if kind == "dict":
            return self.convert({**dict(*args), **record.items}, depth)
        if kind == "namespace":  # the command line of a training script
            return self.plain(record.state, depth)
        if kind == "tuple":
            return self.plain(tuple(args[0]), depth)
        need(kind == "device", f"a bare {kind}")
        return ":".join(str(arg) for arg in args)

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
        """A view of its storage, as `torch.as_strided` makes it; strides and offset count elements."""
        need(isinstance(storage, _Storage), "a tensor without storage")
        need(isinstance(shape, tuple) and isinstance(strides, tuple), "a tensor without shape")
        need(len(shape) == len(strides), "a tensor with more sizes than strides")
        sizes = (offset, *shape, *strides)
        need(all(type(size) is int and size >= 0 for size in sizes), "a tensor with sizes that are no numbers")
        count = math.prod(shape)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        need(count <= storage.size and (count == 0 or last < storage.size), "a tensor larger than its storage")
        dtype = storage.dtype
        if storage.key not in self.data:
            self.data[storage.key] = self.read(storage)
        data = self.data[storage.key]
        need(len(data) == storage.bytes, f"data/{storage.key} is shorter than its tensors")
        if count == 0:
            return np.zeros(shape, dtype)
        flat = np.frombuffer(data, dtype)[offset:]
        step = tuple(stride * dtype.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(flat, shape, step, writeable=False)


def _scalar(dtype: Any, data: Any) -> bool | int | float:
    """A NumPy scalar of a pickle: its dtype record and its bytes, which protocol 2 holds as Latin-1 text."""
    need(isinstance(dtype, Record) and dtype.kind == "dtype", "a scalar without dtype")
    code = str(dtype.args[0])
    need(code in ("f8", "f4", "f2", "i8", "i4", "b1"), f"a scalar of dtype {code!r}")
    if isinstance(data, Record):
        data = str(data.args[0]).encode("latin-1")
    need(isinstance(data, bytes) and len(data) == np.dtype(code).itemsize, "a scalar of another size")
    return np.frombuffer(data, "<" + code)[0].item()


def write_torch_file(path: str | Path, contents: dict) -> None:
    """Writes a `.pth` that `torch.load(path, weights_only=True)` takes, without PyTorch.

    `contents` are nested dicts and lists of arrays, which become CPU tensors, and plain Python; the same contents give
    the same bytes. Raises `ValueError` when an array's dtype has no PyTorch storage here.
    """
    with zipfile.ZipFile(path, "w") as archive:

        def save(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)  # ZipInfo: no date of today, not compressed

        storages: list[np.ndarray] = []
        save("data.pkl", pickle.PROTO + b"\x02" + _pickled(contents, storages) + pickle.STOP)
        save("byteorder", b"little")
        for key, array in enumerate(storages):
            save(f"data/{key}", array.tobytes())
        save("version", b"3\n")


def _pickled(value: Any, storages: list[np.ndarray]) -> bytes:
    """Opcodes of protocol 2 that build `value`; arrays are appended to `storages`."""
    if isinstance(value, np.ndarray | np.generic):
        return _pickled_tensor(np.asarray(value), storages)
    if isinstance(value, dict):
        items = b"".join(_pickled(item, storages) for pair in value.items() for item in pair)
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, list | tuple):
        items = b"".join(_pickled(item, storages) for item in value)
        if isinstance(value, tuple):
            return pickle.MARK + items + pickle.TUPLE
        return pickle.EMPTY_LIST + pickle.MARK + items + pickle.APPENDS
    return pickle.dumps(value, protocol=2)[2:-1]  # without its own PROTO and STOP


def _pickled_tensor(array: np.ndarray, storages: list[np.ndarray]) -> bytes:
    """`_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`, contiguous."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    names = [name for name, dtype in _STORAGES.items() if dtype == array.dtype]
    if not names:
        raise ValueError(f"an array of dtype {array.dtype} cannot be written; PyTorch storages are {list(_STORAGES)}")
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    storage = [_pickled("storage", []), _global("torch", names[0])]
    storage += [_pickled(item, []) for item in (str(len(storages)), "cpu", array.size)]
    storages.append(array)
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    function = _global("torch._utils", "_rebuild_tensor_v2") + pickle.MARK
    values = b"".join(_pickled(item, []) for item in (0, array.shape, strides, False))
    identity = pickle.MARK + b"".join(storage) + pickle.TUPLE + pickle.BINPERSID
    return function + identity + values + hooks + pickle.TUPLE + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
