"""A scan without a header whose type or columns are not as expected is recognised by its numbers, and no other is."""

import numpy as np
import pytest

from scalr_jax.data.headerless import COLUMNS, other_labels, other_reading
from scalr_jax.data.readers.scan_files import read_scan
from scalr_jax.runtime.errors import BadFrameError
from tests.support.checks import mentions
from tests.support.paths import SAMPLES

TYPES = {"<f8": "float64", ">f4": "big-endian float32", ">f8": "big-endian float64"}
ROWS = 1200  # 1200 rows of any number of columns are rows of any other


def make_rows(columns, rows=ROWS, seed=0):
    """Points around a lidar, in its order or shuffled: x, y, z, intensity, ring, time."""
    rng = np.random.default_rng(seed)
    turn, ring = np.divmod(np.arange(rows), 32)
    distance = rng.uniform(3, 60, rows)
    x, y = distance * np.cos(turn), distance * np.sin(turn)
    table = np.stack([x, y, distance * (ring - 20) / 60, rng.gamma(2, 10, rows), ring, turn / 1000], axis=1)
    return (rng.permutation(table) if seed % 2 else table)[:, :columns].astype(np.float32)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("columns", COLUMNS)
def test_what_is_as_expected_is_never_another(columns, seed):
    rows = make_rows(columns, seed=seed)
    echoless = rows.copy()
    echoless[::2, :3] = np.nan
    map_frame = rows + np.array([5e5, 4.6e6, 300, 0, 0, 0][:columns], np.float32)
    for table in (rows, echoless, map_frame, rows[:7], np.zeros_like(rows), rows * 1000):
        assert other_reading(table.astype("<f4").tobytes(), columns) is None


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("expected", COLUMNS)
def test_another_number_of_columns(columns, expected, seed):
    if columns == expected or (columns, expected) == (4, 6):  # these share two, and the intensity says little more
        return
    content = make_rows(columns, seed=seed).astype("<f4").tobytes()
    assert other_reading(content, expected) == f"reads as {columns} columns"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rounded", [True, False])
def test_another_type(dtype, columns, rounded):
    rows = make_rows(columns).astype(np.float64)
    content = (rows if rounded else rows + np.random.default_rng(1).normal(0, 1e-9, rows.shape)).astype(dtype).tobytes()
    assert other_reading(content, columns) == f"reads as {TYPES[dtype]}"
    other = 5 if columns != 5 else 4
    assert other_reading(content, other) == f"reads as {TYPES[dtype]} of {columns} columns"


def test_the_reader_says_what_it_reads_as(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(make_rows(5).tobytes())
    with pytest.raises(BadFrameError, match=mentions("a.bin", "reads as 5 columns", 4)):
        read_scan(path)
    assert len(read_scan(path, columns=5).points) == ROWS
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")
    for name in ("a.bin", "a.npy", "a.pcd", "a.ply"):
        path.rename(tmp_path / name)
        path = tmp_path / name
        with pytest.raises(BadFrameError, match=mentions(name, "Git LFS", "git lfs pull")):
            read_scan(path)


@pytest.mark.parametrize("dtype", ["<f4", ">u4", "|u1", "<u2", "<i8", "<f8"])
def test_labels_of_another_type(dtype):
    labels, known = np.arange(300) % 3 * 10, {0, 10, 20, 255}
    text = other_labels(labels.astype(dtype).tobytes(), np.dtype("<u4"), 300, known)
    assert text is not None
    assert text.startswith("reads as ")
    assert other_labels(labels.astype(dtype).tobytes(), np.dtype("<u4"), 299, known) is None
    assert other_labels((labels + 1).astype(dtype).tobytes(), np.dtype("<u4"), 300, known) is None


@pytest.mark.samples
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared/samples is not there")
@pytest.mark.parametrize(("folder", "columns"), [("semantic_kitti", 4), ("nuscenes", 5)])
def test_real_scans(folder, columns):
    for path in [path for path in (SAMPLES / folder).rglob("*.bin") if "lidarseg" not in str(path)][:8]:
        content = path.read_bytes()
        rows = np.frombuffer(content, "<f4").reshape(-1, columns)[: 99_960 // 60 * 60 // columns]
        rows = rows[: len(rows) // 60 * 60]
        for expected in COLUMNS:
            found = other_reading(rows.tobytes(), expected)
            assert found == (None if expected == columns else f"reads as {columns} columns")
            found = other_reading(rows.astype("<f8").tobytes(), expected)
            assert found == "reads as float64" + (f" of {columns} columns" if expected != columns else "")
