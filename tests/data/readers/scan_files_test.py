"""Scans in every format come back as they were written; a damaged file is one sentence that names it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalr_jax.data.readers import pcd
from scalr_jax.data.readers.scan_files import INTENSITY_NAMES, read_scan
from scalr_jax.runtime.errors import BadFrameError, InputError
from tests.support import scan_writers as writers
from tests.support.checks import mentions, present


def write(path, table, encoding):
    if path.suffix == ".npy":
        np.save(path, table if encoding == "named" else writers.expected_points(table))
    elif path.suffix == ".pcd":
        writers.write_pcd(path, table, encoding)
    elif path.suffix.lower() == ".ply":
        writers.write_ply(path, table, encoding)
    else:
        writers.write_bin(path, writers.expected_points(table))


FORMATS = [
    ("a.bin", ""),
    ("a.npy", "named"),
    ("a.npy", "plain"),
    ("a.pcd", "ascii"),
    ("a.pcd", "binary"),
    ("a.pcd", "binary_compressed"),
    ("a.ply", "ascii"),
    ("a.ply", "binary_little_endian"),
    ("A.PLY", "binary_big_endian"),
]


@pytest.mark.parametrize(("name", "encoding"), FORMATS)
def test_what_was_written_is_read(tmp_path, name, encoding):
    table, path = writers.make_table(), tmp_path / name
    write(path, table, encoding)
    scan = read_scan(path)
    assert scan.has_intensity
    assert scan.points.dtype == np.float32
    np.testing.assert_array_equal(scan.points, writers.expected_points(table))


@pytest.mark.parametrize("columns", [3, 4, 5, 6])
def test_columns_of_bin_files(tmp_path, columns):
    rows = np.random.default_rng(0).normal(size=(7, columns)).astype(np.float32)
    writers.write_bin(tmp_path / "a.bin", rows)
    scan = read_scan(tmp_path / "a.bin", columns=columns)
    assert scan.has_intensity == (columns > 3)
    np.testing.assert_array_equal(scan.points[:, :3], rows[:, :3])
    np.testing.assert_array_equal(scan.points[:, 3], rows[:, 3] if columns > 3 else 0)


@pytest.mark.parametrize("suffix", [".npy", ".pcd", ".ply"])
@pytest.mark.parametrize("intensity", ["Intensity", "scalar_Intensity", "reflectivity", "i", None])
def test_names_of_the_intensity(tmp_path, suffix, intensity):
    table, path = writers.make_table(intensity=intensity), tmp_path / f"a{suffix}"
    write(path, table, {".npy": "named", ".pcd": "binary", ".ply": "binary_little_endian"}[suffix])
    scan = read_scan(path)
    assert scan.has_intensity == (intensity is not None)
    np.testing.assert_array_equal(scan.points, writers.expected_points(table, intensity))


def test_the_first_name_wins(tmp_path):
    table = np.ones(3, [(name, "<f4") for name in ("x", "y", "z", *reversed(INTENSITY_NAMES))])
    table["intensity"] = 7
    np.save(tmp_path / "a.npy", table)
    assert (read_scan(tmp_path / "a.npy").points[:, 3] == 7).all()


@pytest.mark.parametrize("encoding", ["ascii", "binary", "binary_compressed"])
def test_pcd_fields_of_several_values_and_padding(tmp_path, encoding):
    """PCL's own writer pads rows with fields named "_"."""
    table, path = writers.make_table(9), tmp_path / "a.pcd"
    writers.write_pcd(path, table, encoding)
    content = path.read_bytes().replace(b"FIELDS x y ring z", b"FIELDS x y _ z")
    path.write_bytes(content)
    np.testing.assert_array_equal(read_scan(path).points, writers.expected_points(table))
    names = present(table.dtype.names)
    wide = np.zeros(9, [("normal", "<f4", 3), *[(name, table.dtype[name]) for name in names]])
    for name in names:
        wide[name] = table[name]
    writers.write_pcd(path, wide, encoding)
    assert b"COUNT 3 1" in path.read_bytes()
    np.testing.assert_array_equal(read_scan(path).points, writers.expected_points(table))


def test_points_without_an_echo_stay(tmp_path):
    """An organised cloud keeps its rows, so that labels still fit."""
    table = writers.make_table(6)
    table["x"][2] = table["y"][2] = table["z"][2] = np.nan
    for encoding in ("ascii", "binary"):
        writers.write_pcd(tmp_path / "a.pcd", table, encoding)
        points = read_scan(tmp_path / "a.pcd").points
        assert np.isnan(points[2, :3]).all()
        np.testing.assert_array_equal(points, writers.expected_points(table))


@given(st.binary(max_size=3000) | st.lists(st.sampled_from([b"abc", b"abcd" * 90, b"\0" * 300])).map(b"".join))
def test_lzf_round_trip(data):
    assert pcd.lzf_decompress(writers.lzf_compress(data), len(data)) == data


def test_lzf_as_liblzf_writes_it():
    """Packed by liblzf: eight times b"lidar " and the numbers 0 to 39."""
    packed = bytes.fromhex("066c69646172206ce020051f") + bytes(range(32)) + bytes([7]) + bytes(range(32, 40))
    assert pcd.lzf_decompress(packed, 88) == b"lidar " * 8 + bytes(range(40))


@given(st.binary(max_size=60), st.integers(0, 200))
def test_lzf_of_anything_ends(data, size):
    try:
        content = pcd.lzf_decompress(data, size)
    except ValueError:
        return
    assert len(content) == size


# ------------------------------------------------------------------------------------------------------- damaged files


def replace(old, new):
    return lambda content: content.replace(old, new)


PCD = [
    ("binary", lambda c: c[:-1], r"50 points need 900 bytes .* 899 are there"),
    ("binary", replace(b"POINTS 50", b"POINTS 60"), "60 POINTS and 50 x 1"),
    ("binary", lambda c: c.replace(b" 50\n", b" 999999999999\n"), "need 17999999999982 bytes"),
    ("binary", replace(b"POINTS 50", b"POINTS 99999999999999999999"), "no whole number"),
    ("binary", replace(b"POINTS 50", b"POINTS -50"), "no whole number"),
    ("binary", replace(b"SIZE 4 4 2", b"SIZE 4 3 2"), "type F of 3 bytes"),
    ("binary", replace(b"TYPE F F", b"TYPE F"), "5 FIELDS, 5 SIZE, 4 TYPE and 5 COUNT"),
    ("binary", replace(b"COUNT 1 1", b"COUNT 1 0"), "COUNT 0"),
    ("binary", replace(b"FIELDS x y ring z", b"FIELDS a y ring b"), "no field x, z among a, y, ring, b"),
    ("binary", replace(b"DATA binary", b"DATA zip"), "DATA zip"),
    ("binary", replace(b"DATA binary", b""), "no DATA line"),
    ("binary", lambda c: b"", "no FIELDS, SIZE, TYPE, DATA line"),
    ("binary", lambda c: b"\xff\x00" * 200_000, "no FIELDS"),
    ("binary", lambda c: c.replace(b" 50\n", b" 0\n"), "no points"),
    ("ascii", lambda c: c[: c.rindex(b"\n", 0, -1)], "50 points and 49 lines follow"),
    ("ascii", lambda c: c[: c.rindex(b" ")] + b"\n", "damaged .pcd"),
    ("ascii", lambda c: c[: c.rindex(b" ")] + b" 1.0x\n", "damaged .pcd"),
    ("ascii", lambda c: c.replace(b" 50\n", b" 0\n").split(b"ascii\n")[0] + b"ascii\n", "no points"),
    ("binary_compressed", lambda c: c[:-5], "compressed bytes are announced"),
    ("binary_compressed", lambda c: c[: c.index(b"compressed\n") + 15], "ends before"),
    ("binary_compressed", replace(b" 50\n", b" 49\n"), "holds 900 bytes of points .* describes 882"),
    ("binary_compressed", lambda c: c[:-40] + b"\xff" * 40, "compressed data"),
]
PLY = [
    ("binary_little_endian", lambda c: c[:-1], "unreadable .ply .*early end"),
    ("ascii", lambda c: c[:-30], "unreadable .ply"),
    ("ascii", lambda c: c[: c.rindex(b" ")] + b" 1.0x\n", "unreadable .ply"),
    ("binary_little_endian", replace(b"vertex 50", b"vertex 9999999999999999999999"), "unreadable .ply"),
    ("ascii", replace(b"vertex 50", b"vertex 9999999999999999"), "unreadable .ply"),
    ("ascii", replace(b"vertex 50", b"vertex -1"), "unreadable .ply"),
    ("ascii", replace(b"property float x", b"property float u"), "no field x among u, y, ring"),
    ("ascii", replace(b"property float x", b"property half x"), "unreadable .ply"),
    ("ascii", replace(b"element vertex", b"element point"), 'without the element "vertex"'),
    ("ascii", lambda c: c.split(b"end_header")[0].replace(b" 50", b" 0") + b"end_header\n", "no points"),
    ("ascii", lambda c: b"", "unreadable .ply"),
    ("ascii", lambda c: b"\x00\xff" * 999, "unreadable .ply"),
]
NPY = [
    ("plain", lambda c: c[:-1], "unreadable .npy"),
    ("plain", lambda c: c[:40], "unreadable .npy"),
    ("plain", lambda c: b"", "unreadable .npy"),
    ("plain", lambda c: c.replace(b"(50, 4)", b"(5000000000000000, 4)"), "unreadable .npy"),
    ("plain", lambda c: c.replace(b"(50, 4), }", b"(4, 50), }"), "transposed"),
    ("plain", lambda c: c.replace(b"(50, 4), }", b"(200,), } "), r"shape \(200,\)"),
    ("plain", lambda c: c.replace(b"<f4", b"|O8"), "unreadable .npy"),
    ("named", lambda c: c.replace(b"'x'", b"'a'"), "no field x among a, y, ring"),
]


@pytest.mark.parametrize(
    ("suffix", "encoding", "damage", "message"),
    [(suffix, *case) for suffix, cases in ((".pcd", PCD), (".ply", PLY), (".npy", NPY)) for case in cases],
)
def test_a_damaged_file_is_named_in_one_sentence(tmp_path, suffix, encoding, damage, message):
    path = tmp_path / f"broken{suffix}"
    write(path, writers.make_table(), encoding)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadFrameError, match=message) as error:
        read_scan(path)
    text = str(error.value)
    assert path.name in text
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 500


def test_wrong_columns(tmp_path):
    path = tmp_path / "a.bin"
    writers.write_bin(path, np.zeros((5, 3)))
    with pytest.raises(BadFrameError, match=mentions("60 bytes", "4 ", "3, 5")):
        read_scan(path)
    path.write_bytes(b"\0" * 61)
    with pytest.raises(BadFrameError, match="61 bytes"):
        read_scan(path)
    path.write_bytes(b"")
    with pytest.raises(BadFrameError, match="no points"):
        read_scan(path)
    with pytest.raises(InputError, match=r"columns = 7"):
        read_scan(path, columns=7)


@pytest.mark.parametrize("name", ["gone.bin", "gone.npy", "gone.pcd", "gone.ply"])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(BadFrameError, match=name):
        read_scan(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(BadFrameError, match=name):
        read_scan(tmp_path / name)


def test_other_formats_and_pickles(tmp_path):
    with pytest.raises(InputError, match=mentions("a.las", ".bin")):
        read_scan(tmp_path / "a.las")
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], object), allow_pickle=True)
    with pytest.raises(BadFrameError, match="unreadable"):
        read_scan(tmp_path / "a.npy")
    with open(tmp_path / "b.npy", "wb") as file:
        np.savez(file, a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(BadFrameError, match="archive"):
        read_scan(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.zeros((5, 4), complex))
    with pytest.raises(BadFrameError, match="complex"):
        read_scan(tmp_path / "c.npy")


def test_numbers_beyond_float32(tmp_path):
    np.save(tmp_path / "a.npy", np.full((5, 4), 1e300))
    assert np.isinf(read_scan(tmp_path / "a.npy").points).all()
