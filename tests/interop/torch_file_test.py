"""Reading PyTorch's files runs nothing of them, and tells what is wrong with the bad ones in one sentence."""

import argparse
import collections
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from scalr_jax.interop import torch_file
from scalr_jax.runtime.errors import InputError
from tests.support.checks import mentions

GOLDEN = Path(__file__).parents[1] / "golden"

CONTENTS = {
    "net": {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.array([1.5, -2], np.float16),
        "bfloat16": np.array([[1.5], [3]], ml_dtypes.bfloat16),
        "count": np.array(7),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    },
    "epoch": 3,
    "rates": [1e-3, None, True, ("a", 2)],
}


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, np.ndarray):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    else:
        assert ours == theirs


def message(path):
    """The sentence with which `path` is refused; it begins with the file's name."""
    with pytest.raises(InputError) as error:
        torch_file.read_weights_file(path)
    text = str(error.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text


def outcome(path):
    """The sentence with which `path` is refused, or its name."""
    try:
        torch_file.read_weights_file(path)
    except InputError as error:
        return str(error)
    return str(path)


def write_zip(path, pickled, storages=(), **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in enumerate(storages):
            archive.writestr(f"archive/data/{key}", data)
    return path


def legacy_file(contents, *, machine=None, version=1001, sizes=()):
    """A file as PyTorch wrote it before 1.6; `sizes`: numbers of elements to write instead of the storages'."""
    storages = []
    text = torch_file._pickled(contents, storages).replace(b"tQ", b"NtQ")  # a storage's id ends with None: no view
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}} | (machine or {})
    head = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, version, machine))
    keys = pickle.dumps([str(key) for key in range(len(storages))], protocol=2)
    sizes = sizes or [array.size for array in storages]
    data = (struct.pack("<q", size) + array.tobytes() for size, array in zip(sizes, storages, strict=True))
    return head + pickle.PROTO + b"\x02" + text + pickle.STOP + keys + b"".join(data)


def tensor_pickle(*, size=6, offset=0, shape=(2, 3), strides=(3, 1), storage="FloatStorage", key="0"):
    """{"x": tensor} with the given view of a storage, as opcodes."""
    parts = torch_file._pickled

    def made_of(*items):
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    persistent = [torch_file._global("torch", storage), *(parts(item, []) for item in (key, "cpu", size))]
    tensor = made_of(
        made_of(parts("storage", []), *persistent) + pickle.BINPERSID,
        *(parts(item, []) for item in (offset, shape, strides, False, None)),
    )
    call = torch_file._global("torch._utils", "_rebuild_tensor_v2") + tensor + pickle.REDUCE
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + parts("x", []) + call + pickle.SETITEM + pickle.STOP


def test_what_is_written_is_read(tmp_path):
    torch_file.write_torch_file(tmp_path / "a.pth", CONTENTS)
    assert_same(torch_file.read_weights_file(tmp_path / "a.pth"), CONTENTS)
    torch_file.write_torch_file(tmp_path / "b.pth", CONTENTS)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_files_written_by_pytorch(golden):
    contents = torch_file.read_weights_file(GOLDEN / "student_scalr_ckpt.pth")
    weights = golden("student_scalr_full")
    assert contents["epoch"] >= 0
    for name, value in contents["model_point"].items():
        np.testing.assert_array_equal(value, weights["param/" + name.removeprefix("module.")])


def test_files_from_before_pytorch_1_6(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(legacy_file(CONTENTS))
    assert_same(torch_file.read_weights_file(path), CONTENTS)
    whole = path.read_bytes()
    for cut in range(3, len(whole), 7):
        path.write_bytes(whole[:cut])
        message(path)
    one = {"x": np.zeros(3, np.float32)}
    cases: tuple[tuple[dict, str], ...] = (
        ({"machine": {"little_endian": False}}, "big-endian"),
        ({"version": 1002}, "1002"),
        ({"sizes": [4]}, "4 elements where 3"),
    )
    for options, problem in cases:
        path.write_bytes(legacy_file(one, **options))
        assert problem in message(path)
    path.write_bytes(legacy_file(one).replace(b"torch._utils\n_rebuild_tensor_v2", b"os\nmkdir"))
    assert "os.mkdir" in message(path)


def test_safetensors_of_every_dtype(tmp_path):
    """Those that NumPy lacks are read by ml_dtypes; what is no weight's is refused, naming array and dtype."""
    path, values = tmp_path / "a.safetensors", [1.5, -2.0, 0.0, 448.0]
    dtypes = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
    for name, dtype in dtypes.items():
        array = np.array(values).astype(dtype)
        write_safetensors(path, name, array.tobytes())
        found = torch_file.read_weights_file(path)["w"]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(np.float32), array.astype(np.float32))
    for name, size in {"F4": 2, "F6_E2M3": 3, "F8_E8M0": 4, "C64": 32}.items():
        write_safetensors(path, name, bytes(size))
        assert name in message(path)


def write_safetensors(path, dtype, data):
    header = json.dumps({"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_safetensors(tmp_path):
    arrays = {name: value for name, value in CONTENTS["net"].items() if value.ndim}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    contents = torch_file.read_weights_file(tmp_path / "a.safetensors")
    assert_same({name: contents[name] for name in arrays}, arrays)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "a.safetensors").read_bytes()[:-3])
    assert "damaged" in message(cut)


def test_leftovers_of_training(tmp_path):
    """Schedulers computed with NumPy leave scalars (ScaLR's do), scripts their arguments, optimisers counters."""
    leftovers = {
        "rate": np.float64(0.25),
        "step": np.int64(3),
        "arguments": argparse.Namespace(lr=0.1, name="run"),
        "ordered": collections.OrderedDict(a=1),
        "counter": collections.Counter({"c": 3}),
    }
    contents = torch_file.read_weights_file(write_zip(tmp_path / "a.pth", pickle.dumps(leftovers, protocol=2)))
    plain = {"rate": 0.25, "step": 3, "arguments": {"lr": 0.1, "name": "run"}, "ordered": {"a": 1}, "counter": {"c": 3}}
    assert_same(contents, plain)
    deque = pickle.dumps({"x": collections.deque([1])}, protocol=2)
    assert "collections.deque" in message(write_zip(tmp_path / "b.pth", deque))


def test_views_of_a_storage(tmp_path):
    data = np.arange(12, dtype=np.float32)

    def read(**view):
        path = write_zip(tmp_path / "a.pth", tensor_pickle(size=12, **view), [data.tobytes()])
        return torch_file.read_weights_file(path)["x"]

    np.testing.assert_array_equal(read(shape=(3, 2), strides=(1, 3)), data[:6].reshape(2, 3).T)
    np.testing.assert_array_equal(read(offset=4, shape=(4,), strides=(2,)), data[4:12:2])
    np.testing.assert_array_equal(read(shape=(), strides=()), data[0])
    assert read(shape=(0, 5), strides=(5, 1)).shape == (0, 5)
    assert not read().flags.writeable


@pytest.mark.parametrize(
    ("view", "problem"),
    [
        ({"shape": (2, 4)}, "larger than its storage"),
        ({"offset": 1}, "larger than its storage"),
        ({"offset": -1}, "sizes that are no numbers"),
        ({"strides": (-3, 1)}, "sizes that are no numbers"),
        ({"shape": (10**9, 10**9), "strides": (0, 0)}, "larger than its storage"),
        ({"strides": (3,)}, "more sizes than strides"),
        ({"size": 7}, "is shorter than its tensors"),
        ({"size": 5, "shape": (5,), "strides": (1,)}, "bytes where at most 20 are expected"),
        ({"key": "1"}, "archive/data/1"),
        ({"key": "../0"}, "archive/data/../0"),
        ({"storage": "Size"}, "storage"),
    ],
)
def test_bad_views(tmp_path, view, problem):
    path = write_zip(tmp_path / "a.pth", tensor_pickle(**view), [bytes(24)])
    assert problem in message(path)


class Hostile:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda path: Hostile(os.mkdir, str(path)), f"{os.name}.mkdir"),
        (lambda path: Hostile(eval, f"__import__('os').mkdir({str(path)!r})"), "eval"),
        (lambda path: Hostile(open, str(path), "w"), "open"),
        (lambda path: Hostile(getattr, str(path), "lower"), "getattr"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_hostile_pickle_is_named_and_not_run(tmp_path, make, name, protocol):
    victim = tmp_path / "victim"
    path = write_zip(tmp_path / "a.pth", pickle.dumps({"x": make(victim)}, protocol=protocol))
    text = message(path)
    assert name in text
    assert not victim.exists()


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """BUILD on a stand-in class, or on an array's record, ends in a refusal or in nothing."""
    attribute = pickle.dumps((None, {"kind": "tuple", "args": ()}), protocol=2)[2:-1]
    for target in (
        torch_file._global("torch", "FloatStorage"),
        torch_file._global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    ):
        pickled = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + torch_file._pickled("x", []) + target
        pickled += attribute + pickle.BUILD + pickle.SETITEM + pickle.STOP
        path = write_zip(tmp_path / "a.pth", pickled)
        assert outcome(path).startswith(str(path))
        assert torch_file._STAND_INS["torch", "FloatStorage"].kind == "FloatStorage"
    torch_file.write_torch_file(tmp_path / "b.pth", CONTENTS)
    assert_same(torch_file.read_weights_file(tmp_path / "b.pth"), CONTENTS)


def test_not_a_checkpoint(tmp_path):
    assert "file" in message(tmp_path / "missing.pth")
    assert "file" in message(tmp_path)
    for name, data in {"empty": b"", "text": b"hello, world", "png": b"\x89PNG\r\n\x1a\n" * 9}.items():
        (tmp_path / name).write_bytes(data)
        assert re.search(mentions("checkpoint", "PyTorch", "safetensors"), message(tmp_path / name))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "data.pkl" in message(tmp_path / "other.zip")
    assert "list" in message(write_zip(tmp_path / "list.pth", pickle.dumps([1], protocol=2)))
    (tmp_path / "pointer.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "Git LFS" in message(tmp_path / "pointer.pth")


def test_bombs(tmp_path):
    """Neither compression, nor nesting, nor a cycle takes the memory or the stack."""
    path = write_zip(tmp_path / "a.pth", pickle.dumps({"x": "a" * 10**6}), compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in message(path)
    nested = pickle.EMPTY_LIST * 5000 + pickle.APPEND * 4999
    deep = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + torch_file._pickled("x", []) + nested
    assert "nested" in message(write_zip(tmp_path / "b.pth", deep + pickle.SETITEM + pickle.STOP))
    cycle: dict = {}
    cycle["self"] = cycle
    assert "nested" in message(write_zip(tmp_path / "c.pth", pickle.dumps(cycle, protocol=2)))
    shared: list = []
    for _ in range(60):  # 2^60 lists when written out, 60 when not
        shared = [shared, shared]
    assert torch_file.read_weights_file(write_zip(tmp_path / "d.pth", pickle.dumps({"x": shared}, protocol=2)))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "whole.pth"
    torch_file.write_torch_file(path, CONTENTS)
    return path


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_in_one_sentence(written, data):
    """Cut anywhere, or with any byte changed: read, or refused; never another exception."""
    whole = written.read_bytes() if data.draw(st.booleans()) else legacy_file(CONTENTS)
    position = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    damaged = whole[:position] if cut else whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :]
    path = written.with_name("damaged.pth")
    path.write_bytes(damaged)
    if cut:
        message(path)
        return
    assert outcome(path).startswith(str(path))


def test_dtypes_without_a_storage_are_refused(tmp_path):
    with pytest.raises(ValueError, match="complex64"):
        torch_file.write_torch_file(tmp_path / "a.pth", {"x": np.zeros(2, np.complex64)})


@pytest.mark.torch
def test_pytorch_reads_what_is_written_and_the_other_way(tmp_path):
    torch = pytest.importorskip("torch")
    torch_file.write_torch_file(tmp_path / "ours.pth", CONTENTS)
    contents = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert contents["rates"] == CONTENTS["rates"]
    for name, array in CONTENTS["net"].items():
        assert contents["net"][name].float().tolist() == array.astype(np.float32).tolist()
    model = torch.nn.Linear(3, 2)
    for zipped in (True, False):  # as PyTorch before 1.6
        saved = {"net": model.state_dict(), "view": torch.arange(12.0).view(3, 4).T[1:]}
        torch.save(saved, tmp_path / "theirs.pth", _use_new_zipfile_serialization=zipped)
        contents = torch_file.read_weights_file(tmp_path / "theirs.pth")
        np.testing.assert_array_equal(contents["net"]["weight"], model.weight.detach().numpy())
        np.testing.assert_array_equal(contents["view"], np.arange(12.0).reshape(3, 4).T[1:])
