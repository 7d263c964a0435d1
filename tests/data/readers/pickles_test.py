"""Pickled tables: any pandas wrote them, nothing in them runs."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest

from scalr_jax.data.readers.pickles import read_dataframe
from scalr_jax.runtime.errors import BadFrameError
from tests.support.paths import SAMPLES
from tests.support.raw_datasets import array_opcodes, global_name, plain, table_pickle

COLUMNS = {
    "x": np.linspace(-3.0, 9.0, 7),
    "y": np.linspace(0.0, 1.0, 7),
    "i": np.arange(7, dtype=np.float32),
    "d": np.arange(7) % 2,
}


def assert_same(table, columns):
    assert list(table) == list(columns)
    for name, values in columns.items():
        np.testing.assert_array_equal(table[name], values)
        assert table[name].dtype == values.dtype


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_reads_pandasets_layout_packed_or_not(tmp_path, core, pack):
    path = tmp_path / "00.pkl.gz"
    path.write_bytes(pack(table_pickle(COLUMNS, core)))
    assert_same(read_dataframe(path), COLUMNS)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("names", ["object", "python", "pyarrow"])
@pytest.mark.parametrize("change", ["none", "filtered", "picked", "one block", "Fortran"])
def test_reads_what_the_installed_pandas_writes(tmp_path, protocol, names, change):
    pandas = pytest.importorskip("pandas")
    if names == "pyarrow":
        pytest.importorskip("pyarrow")
    with pandas.option_context("mode.string_storage", "python" if names == "object" else names):
        frame = pandas.DataFrame(COLUMNS)
        if change == "filtered":
            frame = frame[frame["d"] == 1]
        elif change == "picked":
            frame = frame[["y", "x"]]
        elif change == "one block":
            frame = frame.astype(np.float64).copy()
        elif change == "Fortran":
            frame = pandas.DataFrame(np.asfortranarray(np.arange(12.0).reshape(4, 3)), columns=list("xyz"))
        frame.columns = frame.columns.astype(object if names == "object" else "str")
        path = tmp_path / "table.pkl"
        path.write_bytes(pickle.dumps(frame, protocol))
    assert_same(read_dataframe(path), {name: frame[name].to_numpy() for name in frame.columns})


@pytest.mark.samples
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real frames are not here")
@pytest.mark.parametrize("folder", ["lidar", "annotations/semseg"])
def test_reads_a_real_file_as_pandas_does(folder):
    pandas = pytest.importorskip("pandas")
    path = SAMPLES / "pandaset/002" / folder / "45.pkl.gz"
    frame = pandas.read_pickle(path)
    assert_same(read_dataframe(path), {name: frame[name].to_numpy() for name in frame.columns})


class Call:
    """Pickles into a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("where", ["alone", "in the frame's state"])
def test_a_hostile_pickle_runs_nothing(tmp_path, protocol, where):
    victim, path = tmp_path / "victim", tmp_path / "00.pkl.gz"
    call = Call(Path.touch, Call(Path, str(victim)))
    data = pickle.dumps(call, protocol)
    if where != "alone" and protocol < 4:  # later protocols frame their opcodes
        frame = global_name("pandas.core.frame", "DataFrame") + b")\x81("
        data = data[:2] + frame + plain("_data") + data[2:-1] + b"db."
    path.write_bytes(gzip.compress(data))
    with pytest.raises(BadFrameError, match=r"00\.pkl\.gz: .*pickle"):
        read_dataframe(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    "name",
    ["os system", "builtins eval", "numpy load", "pandas.io.pickle read_pickle", "numpy.core.multiarray scalars"],
)
def test_names_outside_the_table_are_refused(tmp_path, name):
    path = tmp_path / "00.pkl"
    path.write_bytes(b"\x80\x03" + global_name(*name.split()) + plain(("true",)) + b"R.")
    with pytest.raises(BadFrameError, match=name.replace(" ", r"\.")):
        read_dataframe(path)


@pytest.mark.parametrize("state", [{"kind": "frame"}, (None, {"__setstate__": None}), {"state": {}}])
def test_a_pickle_changes_nothing_that_stands_in(tmp_path, state):
    bad, good = tmp_path / "bad.pkl", tmp_path / "good.pkl"
    bad.write_bytes(b"\x80\x03" + global_name("pandas.core.frame", "DataFrame") + plain(state) + b"b.")
    good.write_bytes(table_pickle(COLUMNS))
    with pytest.raises(BadFrameError):
        read_dataframe(bad)
    assert_same(read_dataframe(good), COLUMNS)


WHOLE = table_pickle(COLUMNS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "empty file", id="empty"),
        pytest.param(gzip.compress(b""), "empty file", id="empty gzip"),
        pytest.param(gzip.compress(WHOLE)[:-20], "cut short or damaged gzip", id="gzip without its end"),
        pytest.param(gzip.compress(WHOLE)[:40], "cut short or damaged gzip", id="start of a gzip"),
        pytest.param(b"\x1f\x8b" + b"junk" * 20, "cut short or damaged gzip", id="junk as gzip"),
        pytest.param(WHOLE[:-30], "not a whole pickled table", id="without its end"),
        pytest.param(gzip.compress(WHOLE[:-30]), "not a whole pickled table", id="without its end, gzip"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1", "git lfs pull", id="LFS pointer"),
        pytest.param(pickle.dumps([1, 2]), "no DataFrame", id="list"),
        pytest.param(b"\x80\x03" + array_opcodes(np.arange(3)) + b".", "no DataFrame", id="array"),
        pytest.param(table_pickle({"x": np.array(["a", "b"], dtype="S1")}), "dtype 'S1'", id="bytes column"),
        pytest.param(WHOLE.replace(plain((1, 7)), plain((1, 8))), "not a whole pickled table", id="wrong shape"),
    ],  # gzip writes the time: without ids, two workers could collect different names
)
def test_damaged_files_are_named(tmp_path, content, message):
    path = tmp_path / "damaged.pkl.gz"
    path.write_bytes(content)
    with pytest.raises(BadFrameError, match=rf"damaged\.pkl\.gz: .*{message}"):
        read_dataframe(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadFrameError, match=r"gone\.pkl"):
        read_dataframe(tmp_path / "gone.pkl")
