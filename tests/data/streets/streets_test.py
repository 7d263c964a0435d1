"""Generated streets: seeded, labelled consistently in scan and image, cached whole or not at all."""

import subprocess
import sys

import numpy as np
import pytest

from scalr_jax.data.readers import files
from scalr_jax.data.readers.scan_files import read_scan
from scalr_jax.data.streets import layout
from scalr_jax.data.streets import sensors as street_sensors
from scalr_jax.data.streets.builder import make_street
from scalr_jax.data.streets.streets import FIELDS, SCENES_PER_STREAM, SPLITS, STREAMS_PER_SPLIT, Streets, split_seed
from scalr_jax.runtime.errors import BadFrameError, InputError
from tests.support.checks import present

SIZE = (56, 112)


@pytest.fixture(scope="module")
def rendered():
    """Twelve scans and images of 32 beams with what each pixel sees."""
    return [street_sensors.render(seed, "beams32", SIZE, targets=True) for seed in range(12)]


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes(rendered):
    again = street_sensors.render(3, "beams32", SIZE)
    assert all(np.array_equal(getattr(again, field), getattr(rendered[3], field)) for field in FIELDS)
    assert not np.array_equal(rendered[3].image, rendered[4].image)


def test_seeds_of_splits_and_streams_are_disjoint():
    corners = [(0, 0), (SCENES_PER_STREAM - 1, 0), (0, 1), (SCENES_PER_STREAM - 1, STREAMS_PER_SPLIT - 1)]
    seeds = [split_seed(split, *corner) for split in SPLITS for corner in corners]
    assert seeds == sorted(set(seeds))
    for split, index, seed in (("test", 0, 0), ("train", SCENES_PER_STREAM, 0), ("train", 0, STREAMS_PER_SPLIT)):
        with pytest.raises(InputError):
            split_seed(split, index, seed)


@pytest.mark.slow
def test_scan_and_image_agree_on_the_class(rendered):
    agreed = []
    for scene in rendered:
        row, column = np.rint(scene.pixels[scene.visible]).astype(int).T
        agreed.append(scene.targets["labels"][row, column] == scene.labels[scene.visible])
    assert np.concatenate(agreed).mean() > 0.9  # parallax and outlines take the rest


def test_depth_of_the_image_agrees_with_the_scan(rendered):
    for scene in rendered[:3]:
        axes, position = street_sensors.camera_pose(scene.camera)
        depth = (scene.points[scene.visible, :3] - position) @ axes[2]
        row, column = np.rint(scene.pixels[scene.visible]).astype(int).T
        assert np.median(np.abs(scene.targets["depth"][row, column] / depth - 1)) < 0.04


def test_visible_points_are_inside_the_image(rendered):
    for scene in rendered:
        pixels = scene.pixels[scene.visible]
        assert len(pixels) > 500
        assert (pixels > 0).all()
        assert (pixels < np.array(SIZE) - 1).all()


def test_every_class_is_seen_and_none_rules(rendered):
    counts = np.bincount(np.concatenate([scene.labels for scene in rendered]), minlength=len(layout.CLASSES))
    share = counts / counts.sum()
    assert len(layout.CLASSES) >= 10
    assert len(share) == len(layout.CLASSES)
    assert share.min() > 0.004
    assert share.max() < 0.5


def test_height_alone_does_not_tell_the_ground_apart(rendered):
    points = np.concatenate([scene.points for scene in rendered])
    labels = np.concatenate([scene.labels for scene in rendered])
    near = np.linalg.norm(points[:, :2], axis=1) < 15
    pavement, terrain = (points[near & (labels == label), 2] for label in (layout.PAVEMENT, layout.TERRAIN))
    assert abs(np.median(pavement) - np.median(terrain)) < 0.1  # metres


@pytest.mark.parametrize("sensor", ["beams32", "solid"])
def test_sensors_have_their_beams_field_and_intensity(sensor, rendered):
    model = street_sensors.SENSORS[sensor]
    rays = street_sensors.lidar_rays(model, np.random.default_rng(0))
    assert len(np.unique(rays[:, 2].round(6))) == model.num_beams
    points = rendered[0].points if sensor == "beams32" else street_sensors.render(0, sensor, SIZE).points
    azimuth = np.degrees(np.arctan2(points[:, 1], points[:, 0]))
    assert np.abs(azimuth).max() <= model.azimuth / 2 + 1
    mean, std = model.intensity
    assert abs(points[:, 3].mean() - mean) < std
    assert np.linalg.norm(points[:, :3], axis=1).max() < model.max_range + 1


def test_a_camera_sees_what_is_ahead_of_it(rendered):
    for scene in rendered:
        _, _, forward = street_sensors.camera_pose(scene.camera)[0]
        assert (scene.points[scene.visible, :3] @ forward > 0).all()


def test_objects_do_not_stand_in_each_other():
    street = make_street(11)
    shapes, used = street.geometry.shapes, street.geometry.ends[2]
    cars = [i for i in range(used) if shapes.material[i] == layout.BODY and shapes.label[i] == layout.CAR]
    centers = shapes.center[cars, :2]
    distance = np.linalg.norm(centers[:, None] - centers[None], axis=-1) + 1e3 * np.eye(len(cars))
    assert distance.min() > 1.5
    assert np.linalg.norm(centers - street.ego[:2], axis=1).min() > 2.0


def test_cache_is_rendered_once_and_read_back(tmp_path):
    streets = Streets(tmp_path, split="validation", num_scenes=2, sensors=("beams32", "solid"), image_size=SIZE)
    lines = []
    assert streets.render_missing(lines.append) == 2
    assert "2 of 2" in lines[-1]
    assert streets.render_missing(lines.append) == 0
    assert len(streets) == 2
    assert streets.intensity(1) == street_sensors.SENSORS["solid"].intensity
    frame = streets.frame(1, np.random.default_rng(0))
    scene = street_sensors.render(split_seed("validation", 1), "solid", SIZE)
    assert np.array_equal(frame.points, scene.points)
    assert np.array_equal(present(frame.labels), scene.labels)
    assert present(frame.image).shape == (*SIZE, 3)

    whole = streets.path(0).read_bytes()
    streets.path(0).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadFrameError, match=streets.path(0).name):
        streets.frame(0)
    streets.path(0).unlink()
    with pytest.raises(BadFrameError, match="render_missing"):
        streets.frame(0)


def test_unknown_sensor_is_named(tmp_path):
    with pytest.raises(InputError, match="beams64"):
        Streets(tmp_path, split="train", num_scenes=1, sensors=("sonar",))


def test_reading_imports_no_jax():
    code = "import sys, scalr_jax.data.streets.streets; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_do_not_load_arrays_at_once(monkeypatch, street_cache, tmp_path):
    """CPython 3.11.7 failed now and then when they did, in a run on four processes (see `files.NUMPY_LOAD`)."""
    load, calls = np.load, []

    def watched(*args, **kwargs):
        calls.append(files.NUMPY_LOAD.locked())
        return load(*args, **kwargs)

    monkeypatch.setattr(np, "load", watched)
    Streets(street_cache, split="train", num_scenes=8, image_size=(112, 224)).frame(0)
    np.save(tmp_path / "scan.npy", np.ones((3, 4), np.float32))
    read_scan(tmp_path / "scan.npy")
    assert calls == [True, True]
    assert not files.NUMPY_LOAD.locked()
