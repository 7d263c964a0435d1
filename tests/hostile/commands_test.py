"""`scalr_jax.export`, `visualize`, `compile` and `bench`: flags, models, calibrations and batches that are wrong."""

import json

import numpy as np
import pytest

from tests.support import damages, hostile
from tests.support.hostile import Row

MODEL = ("--model=THINGS/run", "--cache=none")


def flags(command, *given, words, **more):
    return Row(f"{command} {' '.join(given)[:70]}", given, words, **more)


def export(*given, words, **more):
    return flags("export", *MODEL, "--format=torch", "--output=out", *given, words=words, **more)


EXPORT = [
    Row("export: nothing", (), ("--model, --format and --output are required",)),
    export("--model=", words=("are required",)),
    export("--output=", words=("are required",)),
    export("--output=  ", words=("are required",)),
    export("--format=keras", words=("format", "torch", "onnx")),
    export("--format=", words=("format", "torch")),
    export("again", words=("unexpected arguments: again",)),
    export("--fould", words=("fould",)),
    export("--fold=perhaps", words=("fold", "perhaps")),
    export("--grids=3,4", words=("--grids=3,4", "6 numbers")),
    export("--grids=0,1,1,1,1,1", words=("grids",)),
    export("--intensity=1,0", words=("intensity",)),
    export("--field_of_view=1,1,1,0,0,0", words=("field_of_view",)),
    export("--model=none", words=("none does not exist",)),
    export("--model=THINGS/folder", words=("folder is no workdir",)),
    export("--model=THINGS/scan.bin", words=("scan.bin",)),
    export("--model=THINGS/probed.pth", words=("probed.pth", "activation=")),
    export("--model=THINGS/distilled.pth", words=("distilled.pth", "sensor=")),
    export("--output=out.pth", words=("model.pth", "leave out .pth")),
    export("--output=out.onnx", "--format=onnx", words=("model.onnx", "leave out .onnx")),
    export("--output=there", words=("there exists", "--overwrite"), damage=lambda f: (f / "there").mkdir()),
    export(
        "--output=there",
        "--overwrite",
        words=("there exists", "no exported folder"),
        damage=lambda f: (f / "there").mkdir(),
    ),
    export("--output=file", words=("file exists", "--output"), damage=damages.written("file", "")),
    export(
        "--output=file", "--overwrite", words=("file exists", "no exported folder"), damage=damages.written("file", "")
    ),
    export("--output=file/a/b", words=("file", "give another --output"), damage=damages.written("file", "")),
    export("--output=loop", words=("loop exists",), damage=lambda f: (f / "loop").symlink_to("loop")),
    export("--output=loop/a", words=("loop",), damage=lambda f: (f / "loop").symlink_to("loop")),
    export(f"--output={'x' * 300}", words=("xxx",)),
    export("--output=THINGS/run", words=("run exists", "--overwrite")),
    export("--output=THINGS/run", "--overwrite", words=("run exists", "no exported folder")),
    export("--output=/proc/a", words=("/proc/a cannot be written",)),
    *(
        export("--model=run", f"--licence={name}", words=("run/settings.json",), uses=("run",), damage=damage)
        for name, damage in damages.every_way("run/settings.json").items()
    ),
    *(
        export("--model=run", f"--licence=config {name}", words=("run/config.json",), uses=("run",), damage=damage)
        for name, damage in damages.every_way("run/config.json").items()
        if name != "gone"
    ),
    *(
        export(
            "--model=run",
            f"--licence={key} {value}",
            words=("run/config.json",),
            uses=("run",),
            damage=damages.keys("run/config.json", **{key: value}),
        )
        for key, value in (
            ("data", 3),
            ("data__dataset", None),
            ("data__sensors", 3),
            ("task", ...),
            ("teacher", []),
            ("num_steps", ...),
        )
    ),
    *(
        export(
            "--model=run",
            f"--licence=results {name}",
            words=("run/results.json",),
            uses=("run",),
            damage=damages.written("run/results.json", data),
        )
        for name, data in damages.JSON.items()
        if name != "other keys"
    ),
]


def visualize(*given, words, **more):
    return flags("visualize", *MODEL, "--output=out", *given, words=words, **more)


PAIR = ("--input=THINGS/folder/a/scans/000.bin", "--image=THINGS/folder/a/front/000.png", "--calibration=cameras.json")
FRONT = {"size": [400, 200], "intrinsics": [[210, 0, 201], [0, 205, 99], [0, 0, 1]]}
FRONT |= {"lidar_to_camera": [[0, -1, 0, 0], [0, 0, -1, 0.2], [1, 0, 0, -0.5], [0, 0, 0, 1]]}
CAMERA = json.dumps({"front": FRONT})


def calibration(name, data, *words):
    return visualize(
        *PAIR, f"--camera={name}", words=("cameras.json", *words), damage=damages.written("cameras.json", data)
    )


def camera(key, value, *words):
    def write(folder):
        (folder / "cameras.json").write_text(CAMERA)
        damages.keys("cameras.json", **{f"front__{key}": value})(folder)

    return visualize(
        *PAIR, "--camera=front", f"--index={len(words)}", words=("cameras.json", key, *words), damage=write
    )


VISUALIZE = [
    Row("visualize: nothing", (), ("--model and --output are required",)),
    visualize("--output=", words=("--model and --output are required",)),
    visualize("--model=none.pth", words=("none.pth does not exist",)),
    visualize("extra", words=("unexpected arguments: extra",)),
    visualize("--query=nan,1,2", words=("--query=nan,1,2", "3 numbers")),
    visualize("--query=1,2", words=("--query=1,2", "3 numbers")),
    visualize("--query=a,b,c", words=("--query=a,b,c", "3 numbers")),
    visualize("--num_queries=0", words=("--num_queries=0", "1")),
    visualize("--num_queries=21", words=("--num_queries=21", "20")),
    visualize("--max_points=99", words=("--max_points=99", "100")),
    visualize("--index=x", words=("index", "x")),
    visualize("--labels=perhaps", words=("labels", "perhaps")),
    visualize("--what=classes", words=("what", "features")),
    visualize("--model=THINGS/distilled.pth", "--sensor=semantic_kitti", words=("distilled.pth", "--input=SCAN")),
    visualize("--input=none.npy", words=("none.npy",)),
    visualize("--input=THINGS/folder", words=("folder is a folder", "--dataset=folder")),
    visualize("--input=THINGS/scan.npy", "--dataset=nuscenes", words=("--input and --dataset",)),
    visualize("--input=THINGS/scan.npy", "--image=a.jpg", words=("--image, --calibration and --input",)),
    visualize("--image=a.jpg", "--calibration=c.json", words=("--image, --calibration and --input",)),
    visualize("--input=THINGS/scan.npy", "--image=a.jpg", "--calibration=c.json", words=("c.json: cannot be read",)),
    visualize("--input=THINGS/scan.npy", "--output=THINGS/scan.npy/x", words=("scan.npy is no folder",)),
    visualize("--input=THINGS/scan.bin", "--columns=7", words=("columns",)),
    visualize("--dataset=nuscenes", words=("--root is required",)),
    visualize("--dataset=kitti", "--root=THINGS/kitti", words=("kitti", "semantic_kitti")),
    visualize("--dataset=semantic_kitti", "--root=THINGS/folder", words=("no frame to use",)),
    visualize("--dataset=pandaset", "--root=THINGS/kitti", words=("no scene",)),
    visualize("--dataset=folder", "--root=none", words=("none",)),
    visualize("--dataset=folder", "--root=THINGS/folder", "--index=99", words=("99", "0 to 3")),
    visualize("--dataset=folder", "--root=THINGS/folder", "--index=-1", words=("-1", "0 to 3")),
    visualize("--dataset=folder", "--root=THINGS/folder", "--camera=back", words=("back", "front")),
    visualize("--dataset=folder", "--root=THINGS/folder", "--split=val", words=("val", "train")),
    visualize("--dataset=streets", "--index=-1", words=("--index=-1",)),
    visualize("--dataset=streets", "--index=9999999999", words=("scene 9999999999",)),
    visualize("--dataset=streets", "--split=val", words=("val", "validation")),
    *(
        visualize(
            "--model=run",
            f"--camera={name}",
            words=("run is not the workdir of a run", "--input=SCAN"),
            uses=("run",),
            damage=damage,
        )
        for name, damage in damages.every_way("run/config.json").items()
    ),
    *(
        visualize(
            "--model=run",
            f"--camera={key} {value}",
            words=("run",),
            uses=("run",),
            damage=damages.keys("run/config.json", **{key: value}),
        )
        for key, value in (
            ("data__dataset", 3),
            ("data__root", 3),
            ("data__sensors", 3),
            ("data__sensors", []),
            ("data__image_size", [0, 0]),
            ("data__image_size", "x"),
            ("seed", "x"),
        )
    ),
    *(calibration(name, data) for name, data in damages.JSON.items()),
    visualize(*PAIR, "--camera=back", words=("back", "front"), damage=damages.written("cameras.json", CAMERA)),
    camera("size", [400], "must be"),
    camera("size", ...),
    camera("intrinsics", ...),
    camera("intrinsics", [[1, 2], [3, 4]]),
    camera("intrinsics", [[210, 0, 201], [0, 205, 99], [0, 0, 2]]),
    camera("intrinsics", "x"),
    camera("lidar_to_camera", [[1, 2], [3, 4]], "4 rows of 4 numbers"),
    camera("lidar_to_camera", [["a"] * 4] * 4, "4 rows of 4 numbers"),
    camera("lidar_to_camera", [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]], "rotation"),
    camera("distortion", "none", "list"),
    camera("distortion", [1, 2, 3], "3 numbers"),
    visualize(
        *PAIR[:1],
        "--image=cut.png",
        PAIR[2],
        words=("cut.png", "unreadable image"),
        damage=lambda f: [damages.written("cameras.json", CAMERA)(f), damages.written("cut.png", b"\x89PNG")(f)],
    ),
]


def compiled(*given, words, **more):
    return flags("compile", "--config=CONFIGS/smoke.py", *given, words=words, **more)


HERE = "--topology=v5e:2x2"
COMPILE = [
    Row("compile: nothing", (), ("--config and --topology are required",)),
    compiled(words=("--config and --topology are required",)),
    compiled("--topology=", words=("are required",)),
    compiled("--topology=v9:2x2", words=("--topology=v9:2x2", "v4: 2x2x1", "tpu7x")),
    compiled("--topology=v5p:8x8", words=("v5p has chips along 3 axes",)),
    compiled("--topology=v5e:4x0", words=("--topology=v5e:4x0",)),
    compiled("--topology=v5e", words=("--topology=v5e",)),
    compiled("--topology=v5e:axb", words=("--topology=v5e:axb",)),
    compiled("--topology=v5e:999999999999x1", words=("--topology=v5e:999999999999x1",)),
    compiled(HERE, "--slices=0", words=("--slices=0",)),
    compiled(HERE, "--slices=-1", words=("--slices=-1",)),
    compiled(HERE, "--slices=many", words=("slices", "many")),
    compiled(HERE, "--save=file/a", words=("file/a cannot be written", "--save"), damage=damages.written("file", "")),
    compiled(HERE, "left.over", words=("unexpected arguments: left.over",)),
    compiled(HERE, "--slizes=2", words=("slizes",)),
    compiled(HERE, "--config.num_stepz=2", words=("num_stepz",)),
    compiled(HERE, "--config.model.depth=0", words=("model.depth", "1")),
    compiled(HERE, "--config.task=dist", words=("task", "dist")),
    Row("compile: no config file", ("--config=none.py", HERE), ("none.py does not exist",)),
    Row(
        "compile: a config that raises",
        ("--config=bad.py", HERE),
        ("bad.py raises RuntimeError",),
        damage=damages.written("bad.py", "def get_config():\n    raise RuntimeError\n"),
    ),
    Row(
        "compile: a config that leaves",
        ("--config=bad.py", HERE),
        ("bad.py raises SystemExit",),
        damage=damages.written("bad.py", "import sys\nsys.exit(0)\n"),
    ),
    Row(
        "compile: a config of nothing",
        ("--config=bad.py", HERE),
        ("bad.py", "ConfigDict"),
        damage=damages.written("bad.py", "def get_config():\n    pass\n"),
    ),
]


def bench(*given, words, **more):
    return flags("bench", *given, words=words, **more)


def batch(name, change):
    def write(folder):
        np.savez(folder / "batch.npz", **change)

    return bench("student", "--batch=batch.npz", f"--runs={name}", words=("batch.npz",), damage=write)


BENCH = [
    bench("nothing", words=("'nothing'", "student, step, teacher")),
    bench("student", "--channels=0", words=("--channels", "'0' is not a number from 1")),
    bench("student", "--channels=-1", words=("--channels",)),
    bench("student", "--channels=many", words=("--channels", "many")),
    bench("student", "--depth=0", words=("--depth",)),
    bench("student", "--scenes=many", words=("--scenes", "many")),
    bench("student", "--num_scenes=0", words=("--num_scenes",)),
    bench("student", "--unknown=1", words=("--unknown",)),
    bench("student", "--max_points=0", words=("--max_points",)),
    bench("student", "--compile=12", words=("--compile=12", "two depths")),
    bench("student", "--compile=a,b", words=("--compile=a,b", "two depths")),
    bench("student", "--compile=0,1", words=("--compile=0,1", "two depths")),
    bench("student", "--head=hat", words=("--head", "hat")),
    bench("student", "--dtype=float8", words=("--dtype", "float8")),
    bench("student", "--remat=all", words=("--remat", "all")),
    bench("student", "--image_size=28", words=("--image_size", "28")),
    bench("student", "--batch=none.npz", words=("none.npz does not exist", "--save_batch")),
    bench("student", "--batch=THINGS/scan.npy", words=("scan.npy is not a batch",)),
    bench("student", "--batch=THINGS/folder", words=("folder",)),
    bench("student", "--batch=THINGS/folder/dataset.json", words=("dataset.json is not a batch",)),
    bench("student", "--batch=x.npz", "--scenes=padded", words=("--batch already holds packed scenes",)),
    bench("student", "--batch=x.npz", "--root=y", words=("--batch already holds packed scenes",)),
    bench("student", "--batch=empty.npz", words=("empty.npz",), damage=damages.written("empty.npz", b"")),
    bench("student", "--batch=cut.npz", words=("cut.npz",), damage=damages.written("cut.npz", b"PK\x03\x04")),
    bench("student", "--root=none", words=("none",)),
    batch("1", {"a": np.zeros(3)}),
    batch("2", {"feats": np.array([{"x": 1}], object)}),
    bench("step", "--registers=-1", "--batch=none.npz", words=("none.npz",)),
    bench("step", "--cache=int4", words=("--cache", "int4", "bfloat16")),
    bench("step", "--teacher=resnet", words=("--teacher", "resnet")),
    bench("device", words=("--prepare=FOLDER", "--prepared=FOLDER")),
    bench("device", "--prepare=a", "--prepared=b", words=("--prepare=FOLDER", "--prepared=FOLDER")),
    bench("device", "--prepared=THINGS/folder", words=("--output=FOLDER",)),
    bench("device", "--prepared=none", "--output=out", words=("--prepared=none is no folder", "--prepare=none")),
    bench(
        "device",
        "--prepared=THINGS/folder",
        "--output=file/a",
        words=("file/a cannot be written",),
        damage=damages.written("file", ""),
    ),
    bench("device", "--prepare=file/a", words=("file/a cannot", "--prepare"), damage=damages.written("file", "")),
    bench("device", "--prepared=THINGS/folder", "--output=out", "--only=vit", words=("--only=vit", "goldens")),
    bench("teacher", "--teacher=resnet", words=("--teacher", "resnet")),
    bench("teacher", "--images=0", words=("--images",)),
    bench("teacher", "--registers=-1", words=("--registers=-1",)),
    bench("teacher", "--image_size=28", words=("--image_size", "rows,columns")),
    bench("teacher", "--image_size=0,28", words=("--image_size", "rows,columns")),
    bench("teacher", "--image_size=30,30", words=("--image_size", "14")),
    bench("teacher", "--image_size=1400000,1400000", words=("--image_size",)),
    bench("teacher", "--images=999999999", words=("--images",)),
    bench("pipeline", words=("--dataset", "--root")),
    bench("pipeline", "--dataset=kitty", "--root=x", words=("--dataset=kitty", "nuscenes")),
    bench("pipeline", "--dataset=semantic_kitti", "--root=none", words=("none",)),
    bench(
        "pipeline",
        "--dataset=semantic_kitti",
        "--root=THINGS/kitti",
        "--image_size=28",
        words=("--image_size=28", "224,448"),
    ),
    bench(
        "pipeline",
        "--dataset=semantic_kitti",
        "--root=THINGS/kitti",
        "--image_size=0,28",
        words=("--image_size=0,28", "positive"),
    ),
    bench("pipeline", "--dataset=semantic_kitti", "--root=THINGS/kitti", "--samples=0", words=("--samples",)),
    bench("pipeline", "--dataset=semantic_kitti", "--root=THINGS/kitti", "--runs=-1", words=("--runs",)),
    bench("pipeline", "--dataset=semantic_kitti", "--root=THINGS/kitti", "--soak=-1", words=("--soak",)),
    bench(
        "pipeline",
        "--dataset=semantic_kitti",
        "--root=THINGS/kitti",
        "--soak=1",
        "--num_workers=-1",
        words=("--num_workers",),
    ),
    bench(
        "pipeline", "--dataset=pandaset", "--root=THINGS/pandaset", "--sensor=beams32", words=("beams32", "pandar64")
    ),
    bench("predict", "--root=THINGS/folder", words=("folder has no semantic_kitti",)),
    bench("predict", "--dataset=streets", words=("--dataset", "streets")),
    bench("predict", "--runs=0", words=("--runs",)),
    bench("predict", "--channels=0", words=("--channels",)),
    bench("published", words=("--clone",)),
    bench("published", "--clone=none", words=("none holds no waffleiron/segmenter.py",)),
    bench("published", "--clone=THINGS/folder", "--head=mlp", words=("--head",)),
]


@pytest.mark.parametrize("row", hostile.rows_of(EXPORT, fast=5))
def test_export(row, things, loaded_once, tmp_path, capfd):
    hostile.check(row, hostile.run("export", row, things, tmp_path, capfd))


@pytest.mark.parametrize("row", hostile.rows_of(VISUALIZE, fast=3))
def test_visualize(row, things, loaded_once, tmp_path, capfd):
    hostile.check(row, hostile.run("visualize", row, things, tmp_path, capfd))


@pytest.mark.parametrize("row", hostile.rows_of(COMPILE))
def test_compile(row, things, tmp_path, capfd):
    hostile.check(row, hostile.run("compile", row, things, tmp_path, capfd))


@pytest.mark.parametrize("row", hostile.rows_of(BENCH))
def test_bench(row, things, tmp_path, capfd):
    hostile.check(row, hostile.run("bench", row, things, tmp_path, capfd))
