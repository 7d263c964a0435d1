"""One's own data: every mistake in dataset.json is said, damaged frames are named, a wrong matrix is recognised."""

import numpy as np
import pytest

from scalr_jax import config as defaults
from scalr_jax.data.readers import calibration
from scalr_jax.data.readers.folder import Folder
from scalr_jax.runtime.errors import BadFrameError, InputError
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
        ("labels/000.label", lambda p: p.write_bytes(b"\x09\0\0\0" * 200), r"labels \[9\]"),
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
