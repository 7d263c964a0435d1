"""Readers, on damaged files and wrong arguments: each is one sentence that names the file and the remedy."""

import numpy as np
import pytest

from scalr_jax.data.readers.nuscenes import CAMERAS, NuScenes
from scalr_jax.data.readers.pandaset import PandaSet
from scalr_jax.data.readers.semantic_kitti import SemanticKITTI
from scalr_jax.data.scenes import IGNORE
from scalr_jax.runtime.errors import BadFrameError, InputError
from tests.support import raw_datasets as raw
from tests.support.checks import mentions, present


@pytest.fixture
def pandaset(tmp_path):
    raw.write_pandaset(tmp_path)
    return tmp_path


@pytest.fixture
def kitti(tmp_path):
    raw.write_semantic_kitti(tmp_path)
    return tmp_path


@pytest.fixture
def nuscenes(tmp_path):
    raw.write_nuscenes(tmp_path)
    return tmp_path


def spoil_point(path, row, columns, count=1):
    points = np.fromfile(path, np.float32).reshape(-1, columns)
    points[row : row + count, 0] = np.nan
    path.write_bytes(points.tobytes())


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


KITTI_00 = "dataset/sequences/00/"
DAMAGE = [
    ("pandaset", "001/lidar/02.pkl.gz", lambda p: cut(p, 100), "cut short or damaged gzip"),
    ("pandaset", "001/lidar/02.pkl.gz", lambda p: cut(p, 0), "empty file"),
    ("pandaset", "001/lidar/poses.json", lambda p: raw.write_json(p, [raw.pandaset_pose(0)]), "none for frame 2"),
    ("pandaset", "001/lidar/poses.json", lambda p: raw.write_json(p, [{"position": {}}]), "entry 0 is no pose"),
    ("pandaset", "001/lidar/poses.json", lambda p: p.unlink(), "cannot be read"),
    ("pandaset", "001/lidar/timestamps.json", lambda p: raw.write_json(p, ["now"]), "no list of seconds"),
    ("pandaset", "001/camera/front_camera/poses.json", lambda p: cut(p, 50), "not valid JSON"),
    ("pandaset", "001/camera/front_camera/intrinsics.json", lambda p: raw.write_json(p, {"fx": 1}), "no numbers fx"),
    ("pandaset", "001/camera/front_camera/02.jpg", lambda p: cut(p, 3000), "unreadable image"),
    ("pandaset", "001/camera/front_camera/02.jpg", lambda p: cut(p, 0), "unreadable image"),
    ("pandaset", "001/camera/front_camera/02.jpg", lambda p: p.unlink(), "no such image"),
    ("pandaset", "001/camera/front_camera/02.jpg", lambda p: raw.write_image(p, (960, 540)), "960 x 540"),
    ("kitti", KITTI_00 + "velodyne/000000.bin", lambda p: cut(p, 0), "no points"),
    ("kitti", KITTI_00 + "velodyne/000000.bin", lambda p: cut(p, 333), "bytes are not whole"),
    ("kitti", KITTI_00 + "velodyne/000000.bin", lambda p: cut(p, 320 + 4), "not whole points"),
    ("kitti", KITTI_00 + "velodyne/000000.bin", lambda p: spoil_point(p, 0, 4, 3), "3 of 50 points are NaN"),
    ("kitti", KITTI_00 + "calib.txt", lambda p: p.unlink(), "no calibration"),
    ("kitti", KITTI_00 + "calib.txt", lambda p: cut(p, 100), "no 12 numbers"),
    ("kitti", KITTI_00 + "image_2/000000.png", lambda p: raw.write_image(p, (605, 182)), "605 x 182"),
    ("kitti", KITTI_00 + "image_2/000000.png", lambda p: cut(p, 60), "unreadable image"),
    ("nuscenes", "samples/LIDAR_TOP/scene-0061.pcd.bin", lambda p: cut(p, 0), "no points"),
    ("nuscenes", "samples/LIDAR_TOP/scene-0061.pcd.bin", lambda p: spoil_point(p, 9, 5, 30), "30 of 50 points are NaN"),
    ("nuscenes", "samples/CAM_FRONT/scene-0061.jpg", lambda p: raw.write_image(p, (400, 225)), "for 800 x 450"),
    ("nuscenes", "samples/CAM_FRONT/scene-0061.jpg", lambda p: p.write_text("<html>"), "unreadable image"),
]
READERS = {"pandaset": PandaSet, "kitti": SemanticKITTI, "nuscenes": NuScenes}


@pytest.mark.parametrize(("name", "file", "damage", "message"), DAMAGE)
def test_a_damaged_file_is_named_in_one_sentence(request, name, file, damage, message):
    root = request.getfixturevalue(name)
    dataset = READERS[name](root)
    damage(root / file)
    with pytest.raises(BadFrameError, match=message) as error:
        dataset.frame(0)
    text = str(error.value)
    assert file.rsplit("/", 1)[-1] in text
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("pandaset", "001/annotations/semseg/02.pkl.gz"),
        ("kitti", KITTI_00 + "labels/000000.label"),
        ("nuscenes", "lidarseg/v1.0-mini/scene-0061.bin"),
    ],
)
def test_wrong_labels_are_named(request, name, file, count):
    """One label too few; or as many as points, of a class that nobody knows."""
    root = request.getfixturevalue(name)
    dataset = READERS[name](root, labels=True)
    if name == "pandaset":
        raw.write_gzip(root / file, raw.table_pickle({"class": np.full(2 * count, 77)}))
    else:
        (root / file).write_bytes(np.full(count, 77, "<u4" if name == "kitti" else "u1").tobytes())
    with pytest.raises(BadFrameError, match=r"\[77\]" if count == 50 else r"\d+ labels .*\d+"):
        dataset.frame(0)


def test_a_few_bad_points_are_dropped_with_their_labels(kitti):
    spoil_point(kitti / KITTI_00 / "velodyne/000000.bin", row=1, columns=4)
    frame = SemanticKITTI(kitti, cameras=["image_2"], labels=True).frame(0)
    labels = present(frame.labels)
    np.testing.assert_array_equal(frame.points, np.delete(raw.points_ahead(50), 1, axis=0))
    np.testing.assert_array_equal(labels[:3], [IGNORE, 8, 0])
    assert len(labels) == 49


def test_a_calibration_that_projects_nothing_is_named(kitti):
    calib = kitti / KITTI_00 / "calib.txt"
    calib.write_text(calib.read_text().replace("Tr: 0.0 -1.0", "Tr: 0.0 -90000.0"))
    points = raw.points_ahead(50)
    points[:, 1] = 1.0
    (kitti / KITTI_00 / "velodyne/000000.bin").write_bytes(points.tobytes())
    with pytest.raises(BadFrameError, match=mentions("50 points", "calib.txt")):
        SemanticKITTI(kitti).frame(0)


@pytest.mark.parametrize(
    ("reader", "arguments", "message"),
    [
        (PandaSet, {}, "no scene"),
        (SemanticKITTI, {}, "no frame to use"),
        (NuScenes, {}, "no such folder"),
        (PandaSet, {"sensor": "pandar128"}, "pandar64, pandargt"),
        (PandaSet, {"split": "val"}, "train, validation, all"),
        (SemanticKITTI, {"cameras": ["image_3"]}, "image_2"),
        (NuScenes, {"version": "v1.0"}, "v1.0-trainval"),
    ],
)
def test_what_the_user_gave_wrong_is_said(tmp_path, reader, arguments, message):
    with pytest.raises(InputError, match=message):
        reader(tmp_path, **arguments)
    with pytest.raises(InputError):
        reader(tmp_path / "gone", **arguments)


def test_what_is_not_there_is_listed(pandaset):
    with pytest.raises(InputError, match=mentions("003, 007", "001")):
        PandaSet(pandaset, scenes=["001", "007", "003"])
    with pytest.raises(InputError, match=mentions("no frame", "2 scans")):
        PandaSet(pandaset, cameras=["left_camera"])
    with pytest.raises(InputError, match="back_camera"):
        PandaSet(pandaset).frame(0, camera="CAM_FRONT")
    (pandaset / "001/meta/gps.json").unlink()
    with pytest.raises(InputError, match=r"gps\.json.*split='all'"):
        PandaSet(pandaset)
    assert len(PandaSet(pandaset, split="all")) == 2


@pytest.mark.parametrize(
    ("table", "damage", "message"),
    [
        ("sample_data", lambda p: p.unlink(), "cannot be read"),
        ("sample_data", lambda p: cut(p, 500), "cut short or not JSON"),
        ("sample_data", lambda p: raw.write_json(p, [{"token": "x"}]), "lacks 'is_key_frame'"),
        ("ego_pose", lambda p: raw.write_json(p, []), "poses are missing"),
        ("ego_pose", lambda p: p.write_text(p.read_text().replace("1600.0", '"east"')), "not a table of nuScenes"),
        ("scene", lambda p: raw.write_json(p, {}), "no JSON list"),
    ],
)
def test_a_damaged_table_is_named(nuscenes, table, damage, message):
    path = nuscenes / "v1.0-mini" / f"{table}.json"
    damage(path)
    with pytest.raises(InputError, match=rf"{table}\.json: .*{message}"):
        NuScenes(nuscenes)


def test_a_keyframe_without_its_scan_is_counted(nuscenes):
    (nuscenes / "samples/LIDAR_TOP/scene-0103.pcd.bin").unlink()
    dataset = NuScenes(nuscenes, split="all")
    assert len(dataset) == 1
    assert "1 keyframes without scan" in dataset.describe()
    with pytest.raises(BadFrameError, match="CAM_BACK"):
        dataset.frame(0, camera=CAMERAS[3])
