"""`scalr_jax.predict`: flags, scans, models and output folders that are wrong."""

import numpy as np
import pytest

from tests.support import damages, hostile
from tests.support import scan_writers as writers
from tests.support.hostile import Row
from tests.support.predict_runs import EXPLICIT, make_points

MODEL = ("--model=THINGS/distilled.pth", *EXPLICIT, "--output=out.npz")
SCAN = "--input=THINGS/scan.bin"


def flags(*given, words, base=(*MODEL, SCAN), **more):
    return Row(f"flags: {' '.join(given)[:60]}", (*base, *given), words, **more)


FLAGS = [
    flags(words=("--model and --input are required",), base=()),
    flags("--model=", words=("--model and --input are required",)),
    flags("--input=", words=("--model and --input are required",)),
    flags("extra", words=("unexpected arguments: extra",)),
    flags("--outptu=x", words=("outptu",)),
    flags("--input=none.bin", words=("none.bin: no such file or folder",)),
    flags("--input=/dev/null", words=("/dev/null",)),
    flags("--input=THINGS/", words=("scan.bin and scan.npy would write to the same output",)),
    flags("--input=THINGS/folder/a", words=("no scan in this folder", "scans")),
    flags("--input=THINGS/folder/dataset.json", words=("dataset.json", ".bin, .npy")),
    flags("--input=THINGS/folder/a/front/000.png", words=("000.png", ".bin, .npy")),
    flags("--output=a.csv", words=(".csv", ".npz, .npy, .label")),
    flags("--output=THINGS/scan.bin/a.npz", words=("scan.bin is no folder",)),
    flags("--output=THINGS/folder/a/scans", "--input=THINGS/folder/a/scans", "--formats=bin", words=("bin",)),
    flags("--formats=npz,xyz", words=(".xyz",)),
    flags("--formats=mp4", words=("--formats=mp4", "scan.bin", "folder")),
    flags("--output=a.mp4", words=("a.mp4", "folder")),
    flags(
        "--output=points.npy",
        "--input=points.npy",
        words=("points.npy", "input and would be overwritten"),
        damage=lambda f: np.save(f / "points.npy", make_points()),
    ),
    flags("--output=a.npz", "--input=THINGS/folder/a/scans", words=("a.npz names one file", "folder")),
    flags("--output=THINGS/scan.npy", "--input=THINGS/folder/a/scans", words=("scan.npy is a file", "folder")),
    flags("--what=labels", words=("distilled", "--what=features")),
    flags("--what=colors", words=("what", "features")),
    flags("--what=distilled", "--model=THINGS/probed.pth", words=("--what=features or labels",)),
    flags("--output=a.label", words=(".label", "features")),
    flags("--sector=1", words=("--sector=1", "2 numbers")),
    flags("--sector=nan,40", words=("--sector=nan,40", "2 numbers")),
    flags("--sector=inf,40", words=("--sector=inf,40", "2 numbers")),
    flags("--sector=10,10", words=("10 and 10 degrees",)),
    flags("--columns=5", words=("scan.bin", "columns")),
    flags("--columns=7", words=("columns", "3, 4, 5, 6")),
    flags("--columns=-1", words=("columns",)),
    flags("--columns=many", words=("columns", "many")),
    flags("--dtype=float64", words=("dtype", "float32")),
    flags("--overwrite=perhaps", words=("overwrite", "perhaps")),
    flags("--intensity=1,2,3", words=("--intensity=1,2,3", "2 numbers")),
    flags("--intensity=1,0", words=("intensity",)),
    flags("--intensity=1,-2", words=("intensity",)),
    flags("--intensity=1,1e300", words=("intensity",)),
    flags("--intensity=nan,1", words=("--intensity=nan,1",)),
    flags("--intensity=a,b", words=("--intensity=a,b",)),
    flags("--field_of_view=0,0,0,1,1", words=("--field_of_view=0,0,0,1,1", "6 numbers")),
    flags("--field_of_view=1,1,1,0,0,0", words=("field_of_view",)),
    flags("--field_of_view=0,0,0,1,1,0", words=("field_of_view",)),
    flags("--field_of_view=100,100,100,101,101,101", words=("field of view",)),
    flags("--field_of_view=-1e300,-1,-1,1e300,1,1", words=("field_of_view",)),
    flags("--grids=1,2,3", words=("--grids=1,2,3", "6 numbers")),
    flags("--grids=0,16,16,8,16,8", words=("grids",)),
    flags("--grids=-1,16,16,8,16,8", words=("grids",)),
    flags("--grids=16.5,16,16,8,16,8", words=("grids",)),
    flags("--grids=1000000,1000000,16,8,16,8", words=("grids",)),
    flags("--grids=1e300,16,16,8,16,8", words=("grids",)),
    flags("--sensor=velodyne", words=("velodyne", "nuscenes")),
    flags("--activation=tanh", words=("activation", "relu")),
    flags("--model=none.pth", words=("none.pth does not exist", "exported")),
    flags("--model=/dev/null", words=("/dev/null",)),
    flags("--model=THINGS/scan.bin", words=("scan.bin",)),
    flags("--model=THINGS/folder", words=("folder is no workdir", "give a workdir of")),
    flags(
        "--model=model.onnx", words=("model.onnx is a program", "README.md"), damage=damages.written("model.onnx", "")
    ),
    flags(
        "--input=dir",
        "--output=o",
        words=("0.bin and 0.npy would write to the same output",),
        damage=lambda f: [(f / "dir").mkdir(), (f / "dir/0.bin").touch(), (f / "dir/0.npy").touch()],
    ),
    Row(
        "flags: of no sensor",
        ("--model=THINGS/probed.pth", "--activation=relu", "--cache=none", SCAN),
        ("probed.pth", "sensor="),
    ),
    Row(
        "flags: of no activation",
        ("--model=THINGS/probed.pth", "--cache=none", "--sensor=nuscenes", SCAN),
        ("probed.pth", "activation="),
    ),
]


def scan(name, data, *words, given=()):
    """A row of a scan that is damaged: bytes, an array, or what is made of a table of 50 points."""

    def write(folder):
        content = data() if callable(data) else data
        if isinstance(content, np.ndarray):
            return np.save(folder / name, content, allow_pickle=content.dtype == object)
        return (folder / name).write_bytes(content)

    return Row(f"scan: {name}", (*MODEL, f"--input={name}", *given), (name, *words), damage=write)


def of(suffix, change, encoding):
    """The bytes of a .pcd or .ply file, changed."""

    def make(folder):
        path = folder / f"x{suffix}"
        (writers.write_pcd if suffix == ".pcd" else writers.write_ply)(path, writers.make_table(), encoding)
        data = change(path.read_bytes())
        path.write_bytes(data)

    return make


def pcd(name, old, new, *words, suffix=".pcd", encoding="ascii"):
    return Row(
        f"scan: {suffix} {name}",
        (*MODEL, f"--input=x{suffix}"),
        (f"x{suffix}", *words),
        damage=of(suffix, lambda data: data.replace(old, new) if isinstance(old, bytes) else old(data), encoding),
    )


POINTS = make_points(301)
SCANS = [
    scan("empty.bin", b"", "no points"),
    scan("odd.bin", POINTS.tobytes()[:-3], "bytes"),
    scan("doubles.bin", POINTS.astype("f8").tobytes(), "float64"),
    scan("big-endian.bin", POINTS.astype(">f4").tobytes()),
    scan("five.bin", np.column_stack([POINTS, np.arange(301) % 32]).astype("f4").tobytes()[: 300 * 20], "columns"),
    scan("nan.bin", np.full((301, 4), np.nan, "f4").tobytes(), "301 of 301"),
    scan("inf.bin", np.full((301, 4), np.inf, "f4").tobytes(), "301 of 301"),
    scan("zeros.bin", np.zeros((301, 4), "f4").tobytes()),
    scan("far.bin", (POINTS + np.array([5000, 0, 0, 0], "f4")).tobytes(), "map"),
    scan("map.bin", (POINTS + np.array([5e5, 4.6e6, 0, 0], "f4")).tobytes(), "map"),
    scan("few.bin", POINTS[:2].tobytes()),
    scan("pointer.bin", damages.LFS, "git lfs pull"),
    scan("page.bin", b"<html>not found</html>  ", "page.bin"),
    scan("noise.bin", np.random.default_rng(0).bytes(1600)),
    scan("empty.npy", b""),
    scan("cut.npy", b"\x93NUMPY\x01\x00"),
    scan("magic.npy", b"NUMPY" * 20),
    scan("pointer.npy", damages.LFS, "git lfs pull"),
    scan("objects.npy", np.array([{"x": 1}], object)),
    scan("complex.npy", np.zeros((50, 4), complex), "complex"),
    scan("text.npy", np.full((50, 4), "x")),
    scan("dates.npy", np.zeros((50, 4), "M8[s]")),
    scan("flat.npy", np.zeros(200, "f4"), "shape"),
    scan("three.npy", np.zeros((5, 5, 5), "f4"), "shape"),
    scan("scalar.npy", np.ones((), "f4"), "shape"),
    scan("transposed.npy", POINTS.T.copy(), "transposed"),
    scan("two.npy", POINTS[:, :2].copy(), "shape"),
    scan("none.npy", POINTS[:0], "no points"),
    scan("infinite.npy", np.full((50, 4), 1e300)),
    *(
        scan(
            f"shape{number}.npy",
            b"\x93NUMPY\x01\x00\x76\x00"
            + f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode()
            + b"\n"
            + bytes(64),
        )
        for number, shape in enumerate(
            (
                "(18446744073709551616, 4)",
                "(4611686018427387904, 4)",
                "(-1, 4)",
                "(4, 4.0)",
                "(True, 4)",
                "'x'",
                "(4,) * 99",
                "(1099511627776, 4)",
            )
        )
    ),
    scan("archive.npz", b"PK\x03\x04", ".bin, .npy"),
    scan("a.las", b"LASF", ".bin, .npy"),
    scan("a.txt", b"1 2 3 4\n", ".bin, .npy"),
    scan("00.pkl.gz", b"", "PandaSet's <scene>/lidar/NN.pkl.gz"),
    pcd("without points", b"POINTS 50", b"POINTS 0"),
    pcd("of 2^64 points", b"POINTS 50", b"POINTS 18446744073709551616"),
    pcd("of -1 points", b"POINTS 50", b"POINTS -1"),
    pcd("of many points", b" 50\n", b" 9999999999999\n"),
    pcd("without x", b"FIELDS x", b"FIELDS u", "no field x"),
    pcd("of unknown data", b"DATA ascii", b"DATA packed"),
    pcd("without data", b"DATA ascii", b"DATUM ascii"),
    pcd("with words", b"POINTS 50", b"POINTS many"),
    pcd("of size 3", b"SIZE 4", b"SIZE 3"),
    pcd("of type Q", b"TYPE F", b"TYPE Q"),
    pcd("empty", lambda data: b"", None),
    pcd("noise", lambda data: bytes(range(256)) * 9, None),
    pcd("cut", lambda data: data[:-40], None),
    pcd("cut", lambda data: data[:-40], None, encoding="binary_compressed"),
    pcd(
        "bomb",
        lambda data: data[: data.index(b"compressed\n") + 11] + b"\x04\0\0\0\xff\xff\xff\xff" + b"\xff" * 4,
        None,
        encoding="binary_compressed",
    ),
    pcd("without vertex", b"element vertex", b"element point", suffix=".ply"),
    pcd("of 2^64 points", b"vertex 50", b"vertex 18446744073709551616", suffix=".ply"),
    pcd("of -1 points", b"vertex 50", b"vertex -1", suffix=".ply"),
    pcd("of another type", b"property float x", b"property half x", suffix=".ply"),
    pcd("without x", b"property float x", b"property float u", "no field x", suffix=".ply"),
    pcd("empty", lambda data: b"", None, suffix=".ply"),
    pcd("pointer", lambda data: damages.LFS, None, "git lfs pull", suffix=".ply"),
    pcd("cut", lambda data: data[:-9], None, suffix=".ply", encoding="binary_little_endian"),
]


def output(name, damage, *words):
    """A row of an output folder that is something else."""
    arguments = (*MODEL[:-1], "--input=THINGS/folder/a/scans", "--output=o")
    return Row(f"output: {name}", arguments, words, damage=damage)


def made(*steps):
    def run(folder):
        (folder / "o").mkdir()
        (folder / "o" / "000.npz").write_bytes(b"kept")
        (folder / "o" / "predict.json").write_text("{}")
        for step in steps:
            step(folder)

    return run


OUTPUTS = [
    *(
        output(f"predict.json {name}", made(damage), "o/predict.json" if name != "other keys" else "o", "--output")
        for name, damage in damages.every_way("o/predict.json").items()
        if name != "gone"
    ),
    output(
        "of another model",
        made(damages.written("o/predict.json", '{"what": "labels", "weights": "0"}')),
        "o holds predictions of another model",
        "--overwrite",
    ),
    output("the lock is a folder", made(lambda f: (f / "o/.predict.lock").mkdir()), "o/.predict.lock"),
    output("a link to itself", lambda f: (f / "o").symlink_to("o"), "o"),
]


@pytest.mark.parametrize("row", hostile.rows_of(FLAGS, SCANS, OUTPUTS))
def test_the_law(row, things, loaded_once, tmp_path, capfd):
    hostile.check(row, hostile.run("predict", row, things, tmp_path, capfd))
