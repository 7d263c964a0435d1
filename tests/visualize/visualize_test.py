"""Correlation and colours obey their laws; every picture is there, of any scan that is read."""

import json

import numpy as np
import pytest
from PIL import Image

import scalr_jax
from scalr_jax.data.readers import scan_inputs
from scalr_jax.data.scenes import IGNORE
from scalr_jax.data.streets.layout import CLASSES
from scalr_jax.data.streets.streets import Streets
from scalr_jax.figures.colors import (
    DARKEST,
    NO_COLOR,
    QUERY_DISTANCE,
    choose_queries,
    color_by_axes,
    cosine_similarity,
    fit_color_axes,
)
from scalr_jax.figures.pictures import IGNORED, class_color, class_legend, color_labels, top_view_box
from scalr_jax.interop import published as interop
from scalr_jax.visualize import run as visualize
from tests.support.checks import present
from tests.support.tiny_student import tiny_model, write_workdir
from tests.support.viewer_page import decode, read_viewer

pytest.importorskip("plotly")


# ------------------------------------------------------------------------------------------------------- computations


def random_features(number=400, channels=12, seed=0):
    return np.random.default_rng(seed).normal(size=(number, channels)).astype(np.float32)


def test_similarity_is_the_cosine():
    features = random_features()
    features[5] = 0
    found = cosine_similarity(features, 3)
    for k in (0, 3, 77):
        expected = features[k] @ features[3] / np.linalg.norm(features[k]) / np.linalg.norm(features[3])
        assert found[k] == pytest.approx(expected, abs=1e-6)
    assert found[5] == 0
    np.testing.assert_allclose(cosine_similarity(7.5 * features, 3), found, atol=1e-6)


def test_colors_are_those_of_the_principal_axes():
    """Points that lie along three known directions get one colour channel each, whatever rotates the features."""
    rng = np.random.default_rng(0)
    base = np.zeros(20)
    base[0] = 1.0
    along = rng.uniform(-1, 1, (2000, 3)) * [0.3, 0.2, 0.1]
    features = base + np.column_stack([np.zeros(2000), along, np.zeros((2000, 16))])
    rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    for turned in (features, features @ rotation, 3.0 * features):
        colors = color_by_axes(turned, fit_color_axes(turned)).astype(float)
        for k in range(3):
            assert abs(np.corrcoef(colors[:, k], along[:, k])[0, 1]) > 0.98
        assert colors.min() == DARKEST
        assert colors.max() == 255


def test_colors_of_little():
    few = random_features(50, 2)
    few[3] = 0
    colors = color_by_axes(few, fit_color_axes(few))
    assert colors.shape == (50, 3)
    assert (colors[3] == NO_COLOR).all()
    nothing = np.zeros((4, 6), np.float32)
    assert (color_by_axes(nothing, fit_color_axes(nothing)) == NO_COLOR).all()


def test_query_points():
    """One a cluster, or one a class, allowed and near; the same every time."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 3, 3000)
    features = (np.eye(8)[group] * 5 + rng.normal(size=(3000, 8)) * 0.3).astype(np.float32)
    xyz = rng.uniform(-60, 60, (3000, 3))
    near = np.linalg.norm(xyz, axis=1) < QUERY_DISTANCE
    allowed = np.arange(3000) % 2 == 0
    found = choose_queries(features, xyz, 3, allowed=allowed)
    assert sorted(group[found]) == [0, 1, 2]
    assert (allowed & near)[found].all()
    assert found == choose_queries(features, xyz, 3, allowed=allowed)
    labels = np.where(group == 2, IGNORE, group)
    found = choose_queries(features, xyz, 5, labels=labels, allowed=allowed)
    assert sorted(labels[found]) == [0, 1]
    assert choose_queries(features * 0, xyz, 3, allowed=allowed) == []
    assert choose_queries(features, xyz, 3, allowed=np.zeros(3000, bool)) == []


def test_colors_of_classes():
    names = ("car", "other-vehicle", "bicyclist", "traffic_cone", "something new")
    labels = np.array([0, 1, 1, 4, IGNORE])
    colors = color_labels(labels, names)
    assert tuple(colors[4]) == IGNORED
    assert (colors[1] == colors[2]).all()
    assert len({class_color(name) for name in names}) == 5
    assert class_color("oth. vehicle") == class_color("other-vehicle")
    texts = [text for text, _ in class_legend(labels, names)]
    assert texts == ["other-vehicle  40.0 %", "car  20.0 %", "something new  20.0 %", "no class  20.0 %"]


@pytest.mark.parametrize("dataset", ["nuscenes", "semantic_kitti", "pandaset", "streets"])
def test_classes_of_a_dataset_differ_in_color(dataset):
    from scalr_jax.data.readers.files import read_label_map

    names = CLASSES if dataset == "streets" else read_label_map(dataset).class_names
    colors = [class_color(name) for name in names]
    assert len(set(colors)) == len(names), sorted(zip(colors, names, strict=True))


# ----------------------------------------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def streets(street_cache):
    return Streets(street_cache, split="validation", num_scenes=2, image_size=(112, 224))


def load(folder, head, out_features):
    path = folder / f"{head}.pth"
    interop.save_torch_checkpoint(path, *tiny_model(head, out_features))
    view = ((-64.0, -64.0, -8.0), (64.0, 64.0, 8.0))
    grids = ((32, 32), (32, 8), (32, 8))
    return path, scalr_jax.load(path, intensity=(16.7, 17.0), field_of_view=view, grids=grids, activation="relu")


@pytest.fixture(scope="module")
def drawn(streets, tmp_path_factory):
    """Everything for a labelled frame with an image and a model with the same classes."""
    folder = tmp_path_factory.mktemp("drawn")
    _, model = load(folder, "segment", len(CLASSES))
    model.class_names = CLASSES
    files = visualize.visualize(
        model, streets.frame(0), folder / "out", label_names=CLASSES, num_queries=2, max_points=4000
    )
    return folder / "out", [path.name for path in files]


@pytest.mark.slow
def test_all_pictures_are_drawn(drawn):
    folder, names = drawn
    assert names == ["pca.png", "correlation_0.png", "correlation_1.png", "prediction.png", "viewer.html"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name in names[:-1]:
        with Image.open(folder / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 400, name
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500, name


def test_a_scan_without_image_and_with_points_that_are_no_numbers(streets, tmp_path):
    points = streets.frame(1).points.copy()
    points[::7, 0] = np.nan
    points[1, 3] = np.inf
    points[2:5000:17, 1] = 1e30  # far more than a few: no picture may be drawn to hold them
    np.save(tmp_path / "scan.npy", points)
    _, model = load(tmp_path, "distill", 6)
    frame = scan_inputs.read_frame(tmp_path / "scan.npy")
    files = visualize.visualize(model, frame, tmp_path / "out", query=(10.0, 0.0, -1.7))
    assert [path.name for path in files] == ["pca.png", "correlation_0.png", "viewer.html"]
    shown = read_viewer(files[-1])["data"][0]
    near = np.isfinite(points).all(axis=1) & (np.abs(points[:, :3]) < 1e4).all(axis=1)
    assert 0.9 * near.sum() < len(decode(shown["x"])) <= near.sum()
    assert top_view_box(points[:, :3])[1] < 200
    assert np.abs(np.concatenate([decode(shown[axis]) for axis in "xyz"])).max() < 200


def test_pixels_lie_where_the_calibration_says(streets, tmp_path):
    """The photograph of a generated street, given as a file with its calibration, pairs points as the street does."""
    from scalr_jax.data.streets import sensors as street_sensors

    frame = next(f for f in map(streets.frame, range(2)) if f.image is not None)
    size, camera = frame.image.shape[:2], 0
    while not np.array_equal(street_sensors.project(frame.points[:, :3], camera, size)[1], frame.visible):
        camera += 1
    axes, position = street_sensors.camera_pose(camera)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = axes, -axes @ position
    focal = street_sensors.focal_length(size)
    entry: dict = {
        "fx": focal,
        "fy": focal,
        "cx": (size[1] - 1) / 2,
        "cy": (size[0] - 1) / 2,
        "size": [size[1], size[0]],
    }
    entry["lidar_to_camera"] = matrix.tolist()
    (tmp_path / "cameras.json").write_text(json.dumps({"front": entry}))
    Image.fromarray(frame.image).save(tmp_path / "front.png")
    np.save(tmp_path / "scan.npy", frame.points)
    scan = scan_inputs.read_frame(tmp_path / "scan.npy")
    paired = scan_inputs.pair_image(scan, tmp_path / "front.png", tmp_path / "cameras.json")
    np.testing.assert_array_equal(paired.visible, frame.visible)
    np.testing.assert_allclose(present(paired.pixels)[frame.visible], present(frame.pixels)[frame.visible], atol=1e-2)
    np.testing.assert_array_equal(paired.image, frame.image)


# ------------------------------------------------------------------------------------------------------------ command


@pytest.mark.slow
def test_a_frame_of_the_run_itself(street_cache, tmp_path, capsys):
    """A workdir says which streets it was trained on; one of validation is drawn, image and labels included."""
    data = {"dataset": "streets", "root": str(street_cache), "image_size": (112, 224)}
    path = write_workdir(tmp_path / "run", "probe", "segment", len(CLASSES), class_names=CLASSES, **data)
    flags = ("--cache=none", f"--output={tmp_path}/out", "--index=1", "--num_queries=1", "--max_points=500")
    visualize.main(["visualize", f"--model={path}", *flags])
    text = capsys.readouterr().out.splitlines()[-1]
    assert text.endswith("/out: pca.png, correlation_0.png, prediction.png, viewer.html")
    layout = read_viewer(tmp_path / "out" / "viewer.html")["layout"]
    assert layout["title"]["text"].startswith("features of streets/validation/1")
    assert layout["updatemenus"][0]["buttons"][-1]["label"] == "label"


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        visualize.main(["visualize", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.count("python -m scalr_jax.visualize --model=") == 4
    for name in visualize.FLAGS:
        if name not in ("?", "help", "helpfull", "helpshort", "helpxml", "only_check_args", "flagfile", "undefok"):
            assert f"--{name} " in text, name
