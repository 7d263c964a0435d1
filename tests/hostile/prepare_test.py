"""`scalr_jax.prepare`: flags, raw datasets that are damaged, prepared folders that are half or of something else."""

import json

import numpy as np
import pytest

from tests.support import damages, hostile
from tests.support import raw_datasets as raw
from tests.support.hostile import Row

FOLDER = ("--dataset=folder", "--root=THINGS/folder", "--output=out", "--num_processes=1")


def flags(*given, words, base=FOLDER, **more):
    return Row(f"flags: {' '.join(given)[:80]}", (*base, *given), words, **more)


FLAGS = [
    flags(words=("--dataset, --root and --output are required",), base=()),
    flags("--output=x", words=("--dataset, --root and --output are required",), base=()),
    flags("--root=", words=("are required",)),
    flags("--output=", words=("are required",)),
    flags("--dataset=kitti", words=("dataset", "semantic_kitti")),
    flags("folder", words=("unexpected arguments: folder",)),
    flags("--wrong=1", words=("wrong",)),
    flags("--root=none", words=("none",)),
    flags("--root=THINGS/scan.bin", words=("scan.bin",)),
    flags("--split=val", words=("val", "train")),
    flags("--split=train,,validation", words=("split",)),
    flags("--image_size=224", words=("--image_size=224", "rows,columns")),
    flags("--image_size=a,b", words=("--image_size=a,b", "rows,columns")),
    flags("--image_size=0,224", words=("--image_size=0,224", "rows,columns")),
    flags("--image_size=-1,224", words=("--image_size=-1,224", "rows,columns")),
    flags("--image_size=1,2,3", words=("--image_size=1,2,3", "rows,columns")),
    flags("--image_size=1e3,5", words=("--image_size=1e3,5", "rows,columns")),
    flags("--image_size=1000000,1000000", words=("--image_size",)),
    flags("--image_size=4611686018427387904,4", words=("--image_size",)),
    flags("--image_size=1,2", "--image_format=original", words=("leave out --image_size",)),
    flags("--image_format=webp", words=("image_format", "jpeg")),
    flags("--num_processes=0", words=("num_processes",)),
    flags("--num_processes=-1", words=("num_processes",)),
    flags("--num_processes=1000000", words=("num_processes",)),
    flags("--frames_per_shard=0", words=("frames_per_shard",)),
    flags("--frames_per_shard=many", words=("frames_per_shard", "many")),
    flags("--num_scenes=0", words=("num_scenes",)),
    flags("--num_scenes=9999999999", "--dataset=streets", words=("num_scenes",)),
    flags("--labels=perhaps", words=("labels", "perhaps")),
    flags("--dataset=pandaset", "--root=THINGS/pandaset", "--sensor=beams32", words=("beams32", "pandar64")),
    flags("--dataset=streets", "--sensor=pandar64", words=("pandar64", "beams32")),
    flags("--dataset=nuscenes", words=("v1.0-mini: no such folder",)),
    flags("--dataset=pandaset", words=("no scene",)),
    flags("--dataset=semantic_kitti", words=("no frame to use",)),
    flags("--output=THINGS/scan.bin", words=("scan.bin",)),
    flags("--output=THINGS/scan.bin/a", words=("scan.bin",)),
    flags("--output=loop", words=("loop",), damage=lambda f: (f / "loop").symlink_to("loop")),
    flags(f"--output={'x' * 300}", words=("xxx",)),
    flags("--output=THINGS/folder", words=("folder", "--output")),
    flags("--output=THINGS/records", words=("records", "begun with other settings")),
    flags("--inspect", "--output=THINGS/scan.bin", words=("scan.bin",)),
    flags("--inspect", "--root=none", words=("none",)),
    flags("--inspect", "--split=val", words=("val", "train")),
    flags("--verify", "--output=none", words=("none: not prepared",)),
    flags("--teacher=demo", words=("--image_size=ROWS,COLUMNS",)),
    flags("--inspect", "--cache=none", words=("none holds no finished token cache",)),
    flags("--inspect", "--cache=", words=("--cache, --root and --output are required",)),
    flags("--teacher=", words=("--teacher, --root and --output are required",)),
    flags("--teacher=demo", "--image_size=8,9", words=("(8, 9)", "patch")),
    flags("--teacher=none.pth", "--image_size=8,8", words=("none.pth", "is not a file")),
    flags("--teacher=THINGS/scan.bin", "--image_size=14,14", words=("scan.bin",)),
    flags("--teacher=demo", "--image_size=8,8", "--tokens=int4", words=("tokens", "int8")),
    flags("--teacher=demo", "--image_size=8,8", "--feature=y", words=("feature", "x_pre_norm")),
    flags("--teacher=demo", "--image_size=8,8", "--output=THINGS/records", words=("records is not empty", "--output")),
    flags("--teacher=demo", "--image_size=8,8", "--output=THINGS/folder", words=("folder", "--output")),
    flags("--teacher=demo", "--image_size=8,8", "--root=none", "--dataset=nuscenes", words=("none",)),
    flags("--verify", "--output=THINGS/folder", words=("not prepared",)),
    flags("--verify", "--output=THINGS/scan.bin", words=("not prepared",)),
]


def dataset(name, damage, *words, labels=True, kind="folder"):
    """A row of a raw dataset that is damaged."""
    names = {"folder": "folder", "kitti": "semantic_kitti", "nuscenes": "nuscenes", "pandaset": "pandaset"}
    arguments = (f"--dataset={names[kind]}", f"--root={kind}", "--output=out", "--num_processes=1", "--split=train")
    more = ("--labels",) if labels else ()
    return Row(f"{kind}: {name}", (*arguments, *more), words, uses=(kind,), damage=damage)


def settings(key, value, *words):
    return dataset(f"{key} = {value!r}", damages.keys("folder/dataset.json", **{key: value}), "dataset.json", *words)


def every(pattern, change):
    """A damage of all files that match."""

    def damage(folder):
        for path in sorted(folder.glob(pattern)):
            change(path)

    return damage


def emptied(path):
    path.write_bytes(b"")


KITTI = "kitti/dataset/sequences/00"
MINI = "nuscenes/v1.0-mini"
ONE = "pandaset/001"
RAW = [
    *(
        dataset(f"dataset.json {name}", damage, "dataset.json")
        for name, damage in damages.every_way("folder/dataset.json").items()
        if name != "gone"
    ),
    settings("colums", 4, "columns"),
    settings("columns", 9, "columns"),
    settings("columns", 10**30, "columns"),
    settings("columns", True, "columns"),
    settings("intensity", [1, 0], "positive"),
    settings("intensity", [1]),
    settings("intensity", ["a", "b"]),
    settings("min_depth", -1),
    settings("sensor_height", 1730, "metres"),
    settings("sensor_height", "high"),
    settings("to_student", [[0] * 4] * 4, "to_student"),
    settings("to_student", "x"),
    settings("cameras", []),
    settings("cameras", {"scans": raw.FOLDER_CAMERA}, "scans"),
    settings("cameras", {"front": 1}, "camera front"),
    settings("cameras", {"../front": raw.FOLDER_CAMERA}),
    settings("classes", ["car", "car"]),
    settings("classes", "car"),
    settings("classes", [f"{k}" for k in range(300)], "300"),
    settings("classes", [1, 2]),
    settings("labels", {"ten": "car"}, "ten"),
    settings("labels", {"10": "bus"}, "bus"),
    settings("labels", [1]),
    settings("validation", "b"),
    settings("validation", ["c"], "c", "a, b"),
    settings("validation", [["b"]]),
    dataset("every scan is empty", every("folder/*/scans/*.bin", emptied), "scans", "the file is empty"),
    dataset("every scan is a pointer", every("folder/*/scans/*.bin", lambda p: p.write_bytes(damages.LFS)), "git lfs"),
    dataset("every scan is of doubles", every("folder/*/scans/*.bin", lambda p: raw_doubles(p)), "float64"),
    dataset("every label is of another class", every("folder/*/labels/*", lambda p: other_label(p)), "9"),
    dataset(
        "every label is too short", every("folder/*/labels/*", lambda p: p.write_bytes(b"\0" * 8)), "labels", ".label"
    ),
    dataset("no scan", lambda f: [damages.gone("folder/a/scans")(f), damages.gone("folder/b/scans")(f)], "scans"),
    dataset("every image is empty", every("folder/*/front/*", emptied), "front", ".png", labels=False),
    dataset(
        "every image is of another size",
        every("folder/*/front/*", lambda p: raw.write_image(p, (9, 9))),
        "front",
        ".png",
        labels=False,
    ),
    dataset(
        "no image",
        lambda f: [damages.gone("folder/a/front")(f), damages.gone("folder/b/front")(f)],
        "front",
        labels=False,
    ),
    dataset("two scans of one name", lambda f: (f / "folder/a/scans/000.pcd").touch(), "000.bin", "000.pcd"),
    dataset("no calibration", damages.gone(f"{KITTI}/calib.txt"), "calib", kind="kitti", labels=False),
    dataset("calibration is cut", damages.cut(f"{KITTI}/calib.txt"), "calib.txt", kind="kitti", labels=False),
    dataset(
        "calibration is not UTF-8",
        damages.written(f"{KITTI}/calib.txt", b"\xff\xfe"),
        "calib.txt",
        kind="kitti",
        labels=False,
    ),
    dataset(
        "calibration of words",
        damages.written(f"{KITTI}/calib.txt", "P2: a b c\nTr: d e f\n"),
        "calib.txt",
        kind="kitti",
        labels=False,
    ),
    dataset(
        "every scan is cut",
        every(f"{KITTI}/velodyne/*", lambda p: p.write_bytes(p.read_bytes()[:333])),
        "velodyne",
        ".bin",
        kind="kitti",
    ),
    dataset("no scan", damages.gone(f"{KITTI}/velodyne"), "no frame to use", kind="kitti"),
    dataset(
        "every label of floats",
        every(f"{KITTI}/labels/*", lambda p: p.write_bytes(np.ones(50, "f4").tobytes())),
        "labels",
        ".label",
        kind="kitti",
    ),
    dataset(
        "every label is cut",
        every(f"{KITTI}/labels/*", lambda p: p.write_bytes(b"\0" * 7)),
        "labels",
        ".label",
        kind="kitti",
    ),
    *(
        dataset(f"{table}.json {name}", damage, f"{table}.json", kind="nuscenes", labels=False)
        for table, names in (
            ("sample_data", None),
            ("scene", ("gone", "a number", "null", "a pointer of Git LFS")),
            ("ego_pose", ("gone", "a list", "cut")),
        )
        for name, damage in damages.every_way(f"{MINI}/{table}.json").items()
        if names is None or name in names
    ),
    dataset("no keyframe has its scan", damages.gone("nuscenes/samples/LIDAR_TOP"), "no frame to use", kind="nuscenes"),
    dataset(
        "every scan is cut",
        every("nuscenes/samples/LIDAR_TOP/*", lambda p: p.write_bytes(b"\0" * 33)),
        "pcd.bin",
        kind="nuscenes",
    ),
    dataset(
        "every label is short",
        every("nuscenes/lidarseg/*/*", lambda p: p.write_bytes(b"\0" * 3)),
        ".bin",
        kind="nuscenes",
    ),
    dataset("no lidar's poses", damages.gone(f"{ONE}/lidar/poses.json"), "poses.json", kind="pandaset"),
    *(
        dataset(f"poses.json {name}", damage, "poses.json", kind="pandaset")
        for name, damage in damages.every_way(f"{ONE}/lidar/poses.json").items()
        if name not in ("gone",)
    ),
    dataset("gps.json is cut", damages.cut(f"{ONE}/meta/gps.json"), "gps.json", kind="pandaset"),
    dataset(
        "every scan is cut",
        every(f"{ONE}/lidar/*.gz", lambda p: p.write_bytes(p.read_bytes()[:50])),
        "lidar",
        ".pkl.gz",
        kind="pandaset",
    ),
    dataset(
        "every scan is another pickle",
        every(f"{ONE}/lidar/*.gz", lambda p: raw.write_gzip(p, b"\x80\x04K\x03.")),
        "lidar",
        ".pkl.gz",
        kind="pandaset",
    ),
    dataset(
        "every scan runs code",
        every(f"{ONE}/lidar/*.gz", lambda p: raw.write_gzip(p, b"cos\nsystem\n(S'touch x'\ntR.")),
        "lidar",
        ".pkl.gz",
        kind="pandaset",
    ),
    dataset(
        "intrinsics.json is a list",
        damages.written(f"{ONE}/camera/front_camera/intrinsics.json", "[1]"),
        "intrinsics.json",
        kind="pandaset",
        labels=False,
    ),
]


def raw_doubles(path):
    path.write_bytes(np.fromfile(path, "f4").astype("f8").tobytes())


def other_label(path):
    path.write_bytes(np.full(200, 9, "<u4").tobytes())


def verify(name, damage, *words):
    """A row of prepared records that are damaged, which --verify finds."""
    return Row(f"verify: {name}", ("--verify", "--output=records"), words, uses=("records",), damage=damage)


def again(name, damage, *words):
    """A row of a prepared folder that is half, or of other settings, which the same command meets."""
    arguments = (*FOLDER[:2], "--output=records", FOLDER[3], "--labels")
    return Row(f"again: {name}", arguments, words, uses=("records",), damage=damage)


def begun(folder, change=None):
    """Prepared records as an interrupted command leaves them."""
    manifest = json.loads((folder / "records/records.json").read_text())
    (folder / "records/prepare.json").write_text(json.dumps(manifest["settings"]))
    (folder / "records/records.json").unlink()
    if change:
        change(folder)


RECORDS = [
    *(
        verify(f"records.json {name}", damage, "records")
        for name, damage in damages.every_way("records/records.json").items()
    ),
    *(
        verify(f"records.json {key} = {value!r}", damages.keys("records/records.json", **{key: value}), "records.json")
        for key, value in (
            ("format", 99),
            ("splits", 3),
            ("splits", {"train": 3}),
            ("splits", {"train": {"shards": [3]}}),
            ("splits", {"train": {"shards": [{"file": "../../x"}]}}),
            ("intensity", "x"),
            ("intensity", [1]),
            ("class_names", 3),
            ("cameras", None),
            ("points_dtype", "x"),
            ("points_dtype", "O"),
            ("image_size", [1]),
            ("labels", "no"),
            ("extra", 1),
        )
    ),
    verify("a file is gone", every("records/*train*", lambda p: p.unlink()), "records", "train"),
    verify("a file is cut", every("records/*train*", lambda p: p.write_bytes(p.read_bytes()[:-9])), "train"),
    verify("a flipped bit", damages.flipped("records/*train*"), "train"),
    again("complete", lambda f: None, "records", "overwritten"),
    *(
        again(f"prepare.json {name}", lambda f, damage=damage: begun(f, damage), "prepare.json")
        for name, damage in damages.every_way("records/prepare.json").items()
        if name not in ("gone", "other keys")
    ),
    again(
        "of other settings", lambda f: begun(f, damages.written("records/prepare.json", '{"key": 1}')), "records", "key"
    ),
]


@pytest.mark.parametrize("row", hostile.rows_of(FLAGS, RAW, RECORDS))
def test_the_law(row, things, tmp_path, capfd):
    hostile.check(row, hostile.run("prepare", row, things, tmp_path, capfd))
