"""One's own data: pixels, splits, labels, intensity. What is wrong or damaged: folder_bad_input_test.py."""

import pickle

import numpy as np
import pytest

from scalr_jax import config as defaults
from scalr_jax.data.readers import calibration
from scalr_jax.data.readers.calibration import Camera
from scalr_jax.data.readers.folder import Folder
from scalr_jax.data.readers.semantic_kitti import SemanticKITTI
from scalr_jax.data.scenes import IGNORE
from scalr_jax.runtime.errors import BadFrameError
from tests.support import raw_datasets as raw
from tests.support import scan_writers as writers
from tests.support.checks import present
from tests.support.paths import SAMPLES
from tests.support.runs import open_split


@pytest.fixture
def root(tmp_path):
    raw.write_folder(tmp_path, classes=["car", "road"], validation=["b"])
    return tmp_path


# -------------------------------------------------------------------------------------------------------------- pixels


def test_pixels_by_hand(root):
    raw.change_camera(root, intrinsics=[[900, 0, 201], [0, 905, 99], [0, 0, 1]])
    frame, points = Folder(root).frame(1), raw.points_ahead(200, seed=1).astype(np.float64)
    np.testing.assert_array_equal(frame.points, points)
    assert frame.name == "folder/a/001/front"
    depth = points[:, 0] - 0.5
    column, row = 201 - 900 * points[:, 1] / depth, 99 - 905 * (points[:, 2] - 0.2) / depth
    visible = (depth > 1) & (column > 0) & (column < 399) & (row > 0) & (row < 199)
    assert 0 < visible.sum() < 200
    np.testing.assert_array_equal(frame.visible, visible)
    np.testing.assert_allclose(present(frame.pixels)[visible], np.stack([row, column], axis=1)[visible], atol=1e-9)
    assert (present(frame.image) == 60).all()


def test_fx_and_a_skew(root):
    raw.change_camera(root, intrinsics=None, fx=210, fy=205, cx=201, cy=99)
    named = Folder(root).frame(0)
    raw.change_camera(root, intrinsics=[[210, 3, 201], [0, 205, 99], [0, 0, 1]])
    skewed = Folder(root).frame(0)
    points = named.points
    shift = -3 * (points[:, 2] - 0.2) / (points[:, 0] - 0.5)
    np.testing.assert_allclose(present(skewed.pixels)[:, 1] - present(named.pixels)[:, 1], shift, atol=1e-5)


def test_opencv_distortion_by_hand():
    """One point at a = 0.2, b = -0.1: r^2 = 0.05, each term written out."""
    lens = np.array([[100.0, 0, 50], [0, 100.0, 40], [0, 0, 1]])
    camera = Camera("c", lens, (100, 80), np.eye(4), (0.1, -0.2, 0.01, 0.02, 0.3))
    pixels, visible = calibration.project(np.array([[0.4, -0.2, 2.0]]), camera, 1.0)
    k = 1 + 0.1 * 0.05 - 0.2 * 0.05**2 + 0.3 * 0.05**3
    a = 0.2 * k + 2 * 0.01 * 0.2 * -0.1 + 0.02 * (0.05 + 2 * 0.04)
    b = -0.1 * k + 0.01 * (0.05 + 2 * 0.01) + 2 * 0.02 * 0.2 * -0.1
    np.testing.assert_allclose(pixels, [[100 * b + 40, 100 * a + 50]], rtol=1e-12)
    assert visible.all()
    rational = camera._replace(distortion=(0.1, -0.2, 0.0, 0.0, 0.3, 0.05, 0.0, 0.0))
    pixels, _ = calibration.project(np.array([[0.4, -0.2, 2.0]]), rational, 1.0)
    np.testing.assert_allclose(pixels, [[40 - 10 * k / 1.0025, 50 + 20 * k / 1.0025]], rtol=1e-12)


def test_what_lies_beyond_the_distortion_is_not_visible():
    """With k1 = -0.3 the radius grows up to r = 1.054 and comes back: a point at 60 degrees would land in the image."""
    lens = np.array([[100.0, 0, 100], [0, 100.0, 100], [0, 0, 1]])
    camera = Camera("c", lens, (200, 200), np.eye(4), (-0.3, 0.0, 0.0, 0.0))
    points = np.array([[0.9, 0, 1], [1.04, 0, 1], [1.07, 0, 1], [1.75, 0, 1]]) * 2
    pixels, visible = calibration.project(points, camera, 1.0)
    assert visible.tolist() == [True, True, False, False]
    assert (pixels[:, 1] < 199).all()


def test_visible_begins_behind_min_depth_and_inside_the_border():
    lens = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1]])
    camera = Camera("c", lens, (3, 3), np.eye(4))
    points = np.array([[1, 1, 1.0], [1.01, 1.01, 1.01], [0, 2, 2], [4, 2, 2], [3.98, 2, 2], [-1, -1, -2]])
    assert calibration.project(points, camera, 1.0)[1].tolist() == [False, True, False, False, True, False]


@pytest.mark.samples
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real frames are not here")
@pytest.mark.parametrize("sequence", ["00", "01", "02"])
def test_kitti_as_a_folder_has_the_same_pixels(tmp_path, sequence):
    """As docs/data.md says: P2 = K [I | t], t added to the translation of Tr."""
    source = SAMPLES / "semantic_kitti" / "dataset" / "sequences" / sequence
    kitti = SemanticKITTI(SAMPLES / "semantic_kitti", sequences=[sequence]).frame(0)
    lines = (line.split(":", 1) for line in (source / "calib.txt").read_text().splitlines() if ":" in line)
    rows = {key: np.array(value.split(), float) for key, value in lines}
    projection, matrix = rows["P2"].reshape(3, 4), np.vstack([rows["Tr"].reshape(3, 4), [0, 0, 0, 1]])
    matrix[:3, 3] += np.linalg.inv(projection[:, :3]) @ projection[:, 3]
    height, width = present(kitti.image).shape[:2]
    camera = {"size": [width, height], "intrinsics": projection[:, :3].tolist(), "lidar_to_camera": matrix.tolist()}
    raw.write_json(tmp_path / "dataset.json", {"cameras": {"left": camera}, "sensor_height": 1.73})
    for name, link in (("scans", "velodyne"), ("left", "image_2")):
        (tmp_path / name).symlink_to(source / link)
    dataset = Folder(tmp_path)
    assert dataset.warnings == ()
    frame = dataset.frame(0)
    np.testing.assert_array_equal(frame.points, kitti.points)
    np.testing.assert_array_equal(frame.image, kitti.image)
    both = present(frame.visible) & present(kitti.visible)
    assert both.sum() > 0.999 * present(kitti.visible).sum()  # KITTI's rule: 1 m ahead of the lidar, not of the camera
    np.testing.assert_allclose(present(frame.pixels)[both], present(kitti.pixels)[both], atol=1e-9)
    np.testing.assert_allclose(frame.to_ego[2], [0, 0, 1, 0.03])


# ---------------------------------------------------------------------------------------------- layout, splits, labels


def test_splits_and_names(root):
    names = {split: [Folder(root, split=split).name(i) for i in range(2)] for split in ("train", "validation")}
    assert names == {"train": ["folder/a/000", "folder/a/001"], "validation": ["folder/b/000", "folder/b/001"]}
    assert len(Folder(root, split="all")) == 4
    assert Folder(root, split="all", scenes=["b"]).scan_file(1) == "b/scans/001.bin"


def test_one_scene_without_a_folder(tmp_path):
    raw.write_folder(tmp_path, scenes=("",))
    assert Folder(tmp_path).name(0) == f"folder/{tmp_path.name}/000"
    assert Folder(tmp_path).frame(0).image is not None


@pytest.mark.parametrize("suffix", [".npy", ".pcd", ".ply"])
def test_every_format_is_a_scan(root, suffix):
    points = raw.points_ahead(200)
    path = root / "a" / "scans" / f"000{suffix}"
    (root / "a" / "scans" / "000.bin").unlink()
    table = np.zeros(200, [(name, "<f4") for name in ("x", "y", "z", "intensity")])
    for k, name in enumerate(table.dtype.names or ()):
        table[name] = points[:, k]
    {".npy": np.save, ".pcd": writers.write_pcd, ".ply": writers.write_ply}[suffix](path, table)
    np.testing.assert_array_equal(Folder(root).frame(0).points, points)


@pytest.mark.parametrize("kind", [".label", ".npy", ".bin"])
def test_labels_follow_the_points_that_stay(root, kind):
    raw.rewrite_settings(root, labels={"0": "road", "1": None, "7": "car"})
    points = raw.points_ahead(200)
    points[1, :3] = np.nan  # no echo, in two ways
    points[2, :3] = 0
    writers.write_bin(root / "a/scans/000.bin", points)
    (root / "a/labels/000.label").unlink()
    labels = np.resize([0, 1, 7, 7], 200)
    path = root / f"a/labels/000{kind}"
    if kind == ".npy":
        np.save(path, labels)
    else:
        path.write_bytes(
            ((5 << 16) + labels).astype("<u4").tobytes() if kind == ".label" else labels.astype("u1").tobytes()
        )
    dataset = Folder(root, labels=True)
    frame = dataset.frame(0)
    assert dataset.class_names == ("car", "road")
    assert frame.image is None
    assert len(frame.points) == 198
    np.testing.assert_array_equal(frame.labels, np.delete(np.resize([1, IGNORE, 0, 0], 200), [1, 2]))


def test_a_scan_without_image_or_labels_is_left_out_and_counted(root):
    (root / "a/front/000.png").unlink()
    (root / "a/labels/001.label").unlink()
    assert [Folder(root).name(0), len(Folder(root))] == ["folder/a/001", 1]
    assert [Folder(root, labels=True).name(0), len(Folder(root, labels=True))] == ["folder/a/000", 1]
    table = Folder(root, cameras=()).describe()
    assert "2 of 2 scans" in table
    assert "images of front  1 of 2" in table
    assert "labelled scans   1 of 2" in table
    with pytest.raises(BadFrameError, match="image of front"):
        Folder(root, cameras=()).frame(0, camera="front")


def test_a_scene_may_have_its_own_calibration(root):
    camera = {**raw.FOLDER_CAMERA, "intrinsics": [[400.0, 0, 201], [0, 400, 99], [0, 0, 1]]}
    raw.write_json(root / "b/cameras.json", {"front": camera})
    frames = [Folder(root, split="all").frame(i) for i in (0, 2)]
    offsets = [present(frame.pixels)[:, 1] - 201 for frame in frames]
    points = [frame.points for frame in frames]
    for focal, offset, xyz in zip((210, 400), offsets, points, strict=True):
        np.testing.assert_allclose(offset, -focal * xyz[:, 1] / (xyz[:, 0] - 0.5), atol=1e-4)


def test_cameras_are_drawn(root):
    raw.rewrite_settings(root, cameras={"front": raw.FOLDER_CAMERA, "other": raw.FOLDER_CAMERA})
    raw.write_image(root / "a/other/000.jpg", (400, 200))
    dataset = Folder(root)
    drawn = {dataset.frame(0, np.random.default_rng(seed)).name for seed in range(12)}
    assert drawn == {"folder/a/000/front", "folder/a/000/other"}
    assert dataset.frame(0, camera=None).image is None
    assert Folder(root, cameras=["other"]).frame(0).name.endswith("other")
    again = pickle.loads(pickle.dumps(dataset)).frame(0, camera="front")
    np.testing.assert_array_equal(again.points, dataset.frame(0, camera=None).points)


# ----------------------------------------------------------------------------------------------------------- intensity


def test_intensity_is_measured_or_given(root):
    values = np.concatenate([raw.points_ahead(200, seed)[:, 3] for seed in (0, 1, 10, 11)]).astype(np.float64)
    for split in ("train", "validation"):
        np.testing.assert_allclose(Folder(root, split=split).statistics, (values.mean(), values.std()))
    assert "measured" in Folder(root).describe()
    raw.rewrite_settings(root, intensity=[3, 4.5])
    assert Folder(root).statistics == (3, 4.5)


def test_scans_without_intensity(root):
    for path in root.glob("*/scans/*.bin"):
        writers.write_bin(path, np.fromfile(path, np.float32).reshape(-1, 4)[:, :3])
    raw.rewrite_settings(root, columns=3)
    dataset = Folder(root)
    assert dataset.statistics == (0.0, 1.0)
    assert "none in the files" in dataset.describe()
    assert (dataset.frame(0).points[:, 3] == 0).all()


def test_build_makes_it(root):
    config = defaults.get_config()
    config.data.update(dataset="folder", root=str(root), scenes=("a",))
    assert open_split(config, "train", cache=root).name(1) == "folder/a/001"
    config.task, config.data.scenes = "probe", ()
    dataset = open_split(config, "validation", cache=root)
    assert dataset.frame(0).labels is not None
