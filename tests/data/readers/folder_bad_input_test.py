"""One's own data: every mistake in dataset.json is said, damaged frames are named, a wrong matrix is recognised."""

import re

import numpy as np
import pytest

from scalr_jax import config as defaults
from scalr_jax.data.readers import calibration
from scalr_jax.data.readers.folder import Folder
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.runtime.storage import LFS
from tests.support import raw_datasets as raw
from tests.support import scan_writers as writers
from tests.support.checks import mentions
from tests.support.runs import open_split

MATRIX = np.array(raw.FOLDER_CAMERA["lidar_to_camera"])
TURN = np.array([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])


@pytest.fixture
def root(tmp_path):
    raw.write_folder(tmp_path, classes=["car", "road"], validation=["b"])
    return tmp_path


# ------------------------------------------------------------------------------------------------- wrong calibrations


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.linalg.inv(MATRIX), "the inverse, camera to lidar"),
        (np.linalg.inv(calibration.BODY_TO_CAMERA) @ MATRIX, "axes look like x forward, y left, z up"),
    ],
)
def test_a_matrix_read_the_wrong_way_is_warned_about(root, matrix, message):
    raw.change_camera(root, lidar_to_camera=matrix.tolist())
    (warning,) = Folder(root).warnings
    assert message in warning
    assert message in Folder(root).describe()
    with pytest.raises(BadFrameError, match=rf"200 points .* \d+ points.*{message}"):
        Folder(root).frame(0)


HALF_TURN = np.diag([-1.0, -1, 1, 1])  # about the lidar's z axis


@pytest.mark.parametrize(
    ("name", "matrix", "message"),
    [
        ("front", MATRIX @ HALF_TURN, "looks backwards"),
        ("cam0", MATRIX @ HALF_TURN, "looks backwards"),
        ("rear_left", MATRIX, "looks forwards"),
        ("rear_left", MATRIX @ HALF_TURN, None),
        ("front", MATRIX + 9 * np.eye(4, k=3), mentions("9", "centimetres")),
    ],
)
def test_a_camera_that_looks_the_other_way_or_is_far_off(root, name, matrix, message):
    for path in root.glob("*/front"):
        path.rename(path.with_name(name))
    raw.rewrite_settings(root, cameras={name: {**raw.FOLDER_CAMERA, "lidar_to_camera": matrix.tolist()}})
    warnings = Folder(root).warnings
    assert len(warnings) == (message is not None)
    assert all(re.search(message, text) for text in warnings)
    raw.rewrite_settings(root, cameras={k: {**raw.FOLDER_CAMERA, "lidar_to_camera": matrix.tolist()} for k in "ab"})
    assert any("looks" in text for text in Folder(root, cameras=()).warnings) is False


def test_an_upright_camera_is_not_warned_about(root):
    assert Folder(root).warnings == ()
    for degrees in (-40, 40):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        tilt = np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]])
        raw.change_camera(root, lidar_to_camera=(tilt @ MATRIX).tolist())
        assert Folder(root).warnings == ()


def test_a_lidar_on_its_side_is_fine_when_to_student_says_so(root):
    raw.change_camera(root, lidar_to_camera=(MATRIX @ np.linalg.inv(TURN)).tolist())
    assert len(Folder(root).warnings) == 1
    raw.rewrite_settings(root, to_student=np.linalg.inv(TURN).tolist())
    assert Folder(root).warnings == ()


def scaled(matrix, factor):
    return (np.diag([factor, factor, factor, 1]) @ np.array(matrix)).tolist()


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"lidar_to_camera": MATRIX.T.tolist()}, ["last row 0 0 0 1; it looks transposed"]),
        ({"lidar_to_camera": (np.diag([-1, 1, 1, 1]) @ MATRIX).tolist()}, ["mirrors"]),
        ({"lidar_to_camera": scaled(MATRIX, 1.1)}, ["no rotation", "lengths 1.100"]),
        ({"lidar_to_camera": (MATRIX + 1000 * np.eye(4, k=3)).tolist()}, ["1000 m from the lidar; give metres"]),
        ({"lidar_to_camera": [[1, 2], [3, 4]]}, ["4 rows of 4 numbers"]),
        ({"lidar_to_camera": [[float("nan")] * 4] * 4}, ["4 rows of 4 numbers"]),
        ({"lidar_to_camera": None}, ["lidar_to_camera is missing"]),
        ({"intrinsics": np.array(raw.FOLDER_CAMERA["intrinsics"]).T.tolist()}, ["intrinsics", "transposed"]),
        ({"intrinsics": None}, ["give either intrinsics"]),
        ({"fx": 3}, ["give either intrinsics"]),
        ({"intrinsics": None, "fx": 3}, ["fy, cx, cy must be a number"]),
        ({"intrinsics": [[-210, 0, 201], [0, 205, 99], [0, 0, 1]]}, ["fx = -210 must be positive"]),
        ({"intrinsics": [[4.5, 0, 201], [0, 205, 99], [0, 0, 1]]}, ["sees 177 degrees", "millimetres"]),
        ({"intrinsics": [[210, 0, 402], [0, 205, 99], [0, 0, 1]]}, ["cx = 402", "another image size"]),
        ({"size": [400]}, ["size must be"]),
        ({"size": [400, 200.5]}, ["size must be"]),
        ({"distortion": [0.1, 0.2, 0.3]}, ["has 3 numbers"]),
        ({"distortion": "none"}, ["distortion", "must be a list"]),
        ({"lidar_to_cam": 1, "focus": 2}, ["'lidar_to_cam' (did you mean 'lidar_to_camera'?)", "unknown key 'focus'"]),
    ],
)
def test_what_is_wrong_with_a_camera(root, changes, messages):
    raw.change_camera(root, **changes)
    with pytest.raises(InputError) as error:
        Folder(root)
    text = str(error.value)
    assert all(message in text for message in ["dataset.json", "camera front", "docs/data.md", *messages]), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colums": 4}, r"'colums' \(did you mean 'columns'\?\)"),
        ({"columns": 9}, "columns must be one of 3, 4, 5, 6"),
        ({"columns": True}, "columns must be one of"),
        ({"intensity": [1, 0]}, "must be positive"),
        ({"intensity": [1]}, "must be a list of 2 numbers"),
        ({"min_depth": -1}, "min_depth"),
        ({"sensor_height": 1730}, "metres above the ground"),
        ({"sensor_height": 2, "to_student": np.eye(4).tolist()}, "not both"),
        ({"to_student": np.zeros((4, 4)).tolist()}, "to_student must have the last row"),
        ({"cameras": []}, "cameras must be an object"),
        ({"cameras": {"scans": raw.FOLDER_CAMERA}}, "'scans' cannot be one"),
        ({"cameras": {"front": 1}}, "camera front must be an object"),
        ({"classes": ["car", "car"]}, "different names"),
        ({"classes": [f"{k}" for k in range(300)]}, "300 classes"),
        ({"labels": {"ten": "car"}}, "'ten' must be whole numbers"),
        ({"labels": {"10": "bus"}}, '"bus" must be null or one of classes'),
        ({"labels": [1]}, "labels must be an object"),
        ({"validation": "b"}, "validation must be a list"),
        ({"validation": ["c"]}, mentions("validation", "scene c", "a, b")),
    ],
)
def test_what_is_wrong_with_the_settings(root, changes, message):
    raw.rewrite_settings(root, **changes)
    with pytest.raises(InputError, match=message) as error:
        Folder(root)
    assert "dataset.json" in str(error.value)


def test_all_problems_at_once(root):
    raw.change_camera(root, size=None, distortion=[1])
    raw.rewrite_settings(root, columns=0)
    with pytest.raises(InputError, match=mentions(3, "columns", "camera front: size", "camera front: distortion")):
        Folder(root)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "\ud800", "[" * 100_000, '{"sensor_height": 1e999}', '{"columns": 9e99}']
)
def test_damaged_json(root, content):
    (root / "dataset.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=r"dataset\.json"):
        Folder(root)


# ----------------------------------------------------------------------------------------------------- damaged files


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def spoil(path, rows, columns):
    points = np.fromfile(path, np.float32).reshape(-1, 4)
    points[:rows, :columns] = np.nan
    path.write_bytes(points.tobytes())


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("scans/000.bin", lambda p: cut(p, 1001), "bytes are not whole"),
        ("scans/000.bin", lambda p: cut(p, 1004), "would fit"),
        ("scans/000.bin", lambda p: cut(p, 0), "no points"),
        ("scans/000.bin", lambda p: p.unlink(), "cannot be read"),
        ("scans/000.bin", lambda p: spoil(p, 20, 1), "20 of 200 points are NaN"),
        ("scans/000.bin", lambda p: spoil(p, 200, 3), "no point of the scan has an echo"),
        ("scans/000.bin", lambda p: writers.write_bin(p, raw.points_ahead(200) + 5e6), "map"),
        ("labels/000.label", lambda p: cut(p, 796), "199 .* 200"),
        (
            "labels/000.label",
            lambda p: p.write_bytes(b"\x09\0\0\0" * 200),
            mentions("labels [9]", "add it to labels", "dataset.json"),
        ),
        ("labels/000.label", lambda p: (np.arange(200) % 2).astype("<f4").tofile(p), "reads as float32"),
        ("labels/000.label", lambda p: (np.arange(200) % 2).astype(">u4").tofile(p), "reads as big-endian uint32"),
        ("labels/000.label", lambda p: (np.arange(200) % 2).astype("u1").tofile(p), "reads as uint8"),
        ("scans/000.bin", lambda p: raw.points_ahead(200).astype("<f8").tofile(p), "reads as float64"),
        ("scans/000.bin", lambda p: writers.write_bin(p, 1000 * raw.points_ahead(200)), "millimetres"),
        ("scans/000.bin", lambda p: p.write_bytes(LFS + b"v1\noid sha256:0\n"), "Git LFS"),
        ("front/000.png", lambda p: cut(p, 60), "unreadable image"),
        ("front/000.png", lambda p: raw.write_image(p, (200, 100)), "for 400 x 200"),
        ("front/000.png", lambda p: p.unlink(), "no such image"),
    ],
)
def test_a_damaged_file_is_named_in_one_sentence(root, file, damage, message):
    raw.rewrite_settings(root, intensity=[50, 30])
    dataset = Folder(root, labels=True, cameras=["front"])
    damage(root / "a" / file)
    with pytest.raises(BadFrameError, match=message) as error:
        dataset.frame(0)
    text = str(error.value)
    assert file in text
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize("ending", [".label", ".bin", ".npy"])
def test_minus_one_can_be_mapped(root, ending):
    """As uint32, as uint8, and signed or not in a .npy file."""
    raw.rewrite_settings(root, labels={"0": "car", "1": "road", "-1": None})
    numbers = np.arange(200) % 3 - 1
    for dtype in {".label": ["<i4"], ".bin": ["i1"], ".npy": ["i4", "u2"]}[ending]:
        for path in root.glob("a/labels/*"):
            path.unlink()
        path = root / "a/labels" / f"000{ending}"
        np.save(path, numbers.astype(dtype)) if ending == ".npy" else numbers.astype(dtype).tofile(path)
        np.testing.assert_array_equal(Folder(root, labels=True).frame(0).labels, np.where(numbers < 0, 255, numbers))


def test_scans_without_intensity_are_named_and_do_not_decide(root):
    points = raw.points_ahead(200)
    for k, path in enumerate(sorted(root.glob("*/scans/*.bin"))):
        np.save(path.with_suffix(".npy"), points[:, :3] if k == 0 else points * np.float32(k != 1))
        path.unlink()
    dataset = Folder(root, cameras=())
    np.testing.assert_allclose(dataset.statistics, (points[:, 3].mean(), points[:, 3].std()), rtol=1e-5)
    (warning,) = dataset.warnings
    assert re.search(mentions("2 of 4 scans", "a/scans/000.npy", "a/scans/001.npy"), warning)


def test_wrong_label_files(root):
    (root / "a/labels/000.label").unlink()
    np.save(root / "a/labels/000.npy", np.zeros((200, 2), int))
    with pytest.raises(BadFrameError, match="shape"):
        Folder(root, labels=True).frame(0)
    (root / "a/labels/000.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(BadFrameError, match="unreadable"):
        Folder(root, labels=True).frame(0)


def test_what_is_not_there(root, tmp_path_factory):
    with pytest.raises(InputError, match="gone"):
        Folder(root / "gone")
    with pytest.raises(InputError, match="scans/"):
        Folder(tmp_path_factory.mktemp("empty"))
    with pytest.raises(InputError, match="split='val'"):
        Folder(root, split="val")
    with pytest.raises(InputError, match=mentions("back", "front")):
        Folder(root, cameras=["back"])
    with pytest.raises(InputError, match=mentions("train", "scene c", "a")):
        Folder(root, scenes=["c"])
    for path in root.glob("*/front/*.png"):
        path.rename(path.with_stem(f"image_{path.stem}"))
    with pytest.raises(InputError, match=mentions("000.bin", "front/image_000.png")):
        Folder(root)
    (root / "a/scans/000.pcd").touch()
    with pytest.raises(InputError, match=mentions("000.bin", "000.pcd")):
        Folder(root)
    raw.rewrite_settings(root, classes=None)
    (root / "a/scans/000.pcd").unlink()
    with pytest.raises(InputError, match="classes"):
        Folder(root, labels=True)
    raw.rewrite_settings(root, validation=None)
    with pytest.raises(InputError, match=mentions("validation", "a, b")):
        Folder(root, split="validation", cameras=())


def test_without_dataset_json_there_are_scans_but_nothing_to_distil(root):
    (root / "dataset.json").unlink()
    dataset = Folder(root)
    assert len(dataset) == 4
    assert dataset.frame(0).image is None
    assert "missing" in dataset.describe()
    config = defaults.get_config()
    config.data.update(dataset="folder", root=str(root))
    with pytest.raises(InputError, match=mentions("images", "cameras", "dataset.json")):
        open_split(config, "train", cache=root)
