"""Scans that fit the training data and scans that do not: wrong scale, columns, frame or numbers."""

import re

import numpy as np
import pytest

from scalr_jax.data.readers import scan_inputs
from scalr_jax.data.scan_checks import check_place, check_scan, count_unusable
from scalr_jax.data.scenes import SceneNeeds
from scalr_jax.data.sensors import INTENSITY
from scalr_jax.data.streets.sensors import SENSORS as STREETS
from scalr_jax.data.streets.streets import Streets
from scalr_jax.data.whole_scan import check_points, whole_scan
from scalr_jax.runtime.errors import InputError
from tests.support.checks import mentions, present
from tests.support.paths import SAMPLES


def make_points(number=3000):
    """Points on a ground and above it, within 14 m."""
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(-14, 14, (number, 2)), np.full(number, -1.7), rng.normal(10, 5, number)])
    points[::4, 2] = rng.uniform(-1.7, 2, len(points[::4]))
    return points


def settings(mean=10.0, std=5.0):
    return {"intensity": (mean, std), "field_of_view": ((-16, -16, -4), (16, 16, 4))}


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda p: p, []),
        (lambda p: p * [1, 1, 1, 1 / 255], ["intensity"]),
        (lambda p: p * [1, 1, 1, 0], ["intensity"]),
        (lambda p: p * [3, 3, 1, 1], ["view"]),
        (lambda p: p + np.array([0, 0, 1.7, 0]), ["ground"]),
        (lambda p: np.where(np.arange(len(p))[:, None] == 5, np.nan, p), ["finite"]),
        (lambda p: np.full_like(p, np.nan), ["finite"]),
        (lambda p: np.where(np.arange(4) == 3, np.nan, p), ["usable"]),
        (lambda p: p + np.array([350, 0, 0, 0]), ["place", "view"]),
    ],
)
def test_what_does_not_fit(change, kinds):
    points = change(make_points()).astype(np.float32)
    assert list(check_scan(points, settings())) == kinds


def test_places_that_no_lidar_sees_are_refused_and_distant_ones_told():
    xyz = make_points()[:, :3]
    assert check_place(xyz) == check_place(np.full((9, 3), np.nan)) == (None, None)
    refused = [
        (xyz + np.array([5e5, 4.6e6, 300]), mentions("map's frame", "x = 5e+05", "y = 4.6e+06", "subtract")),
        (xyz + np.array([1500, 0, 0]), "map's frame"),
        (xyz * 1000, mentions("metres", "millimetres")),
        (np.where(np.arange(len(xyz))[:, None] % 20 == 0, 3e19, xyz), mentions("5%", "3,000 m")),
    ]
    for points, match in refused:
        problem, told = check_place(points)
        assert told is None
        assert re.search(match, present(problem))
    for points, match in ((xyz + np.array([0, 400, 0]), "map's frame"), (xyz * 50, "centimetres")):
        problem, told = check_place(points)
        assert problem is None
        assert re.search(match, present(told))


def test_reasons_are_counted_apart():
    points = make_points()
    points[:1, 0], points[1:3, 1], points[3:6, 3] = np.inf, 2e4, 3e38
    found = check_scan(points, settings())
    assert re.search(mentions(1, "3,000", "no finite numbers"), found["finite"])
    assert re.search(mentions(1, "NaN or infinite", 2, "beyond 10 km", 3, "intensity"), count_unusable(points))
    assert re.search(mentions(2, "beyond 10 km", 3, "intensity"), found["usable"])
    with pytest.raises(InputError, match=mentions("9 of 9", "intensity")):
        whole_scan(np.where(np.arange(4) == 3, np.nan, points[-9:]), SceneNeeds(((-9, -9, -9), (9, 9, 9))), (0, 1), 0.1)
    with pytest.raises(InputError, match="map's frame"):
        check_points(points + np.array([5e5, 4.6e6, 0, 0]))


def test_scales_are_named():
    points = make_points()
    small = points * [1, 1, 1, 1 / 255]
    assert "runs from 0 to 1 where the model knows 0 to 255" in check_scan(small, settings())["intensity"]
    assert check_scan(small, settings(0.0, 1.0)) == {}, "raw intensities of unknown statistics"
    assert "divide it by its full scale" in check_scan(points, settings(0.286, 0.141))["intensity"]


def test_streets_fit_their_own_models(street_cache):
    streets = Streets(street_cache, split="train", num_scenes=8, image_size=(112, 224))
    view = {"field_of_view": ((-64, -64, -8), (64, 64, 8)), "intensity": STREETS["beams32"].intensity}
    for index in range(8):
        assert check_scan(streets.frame(index).points, view) == {}


@pytest.mark.samples
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared/samples is not there")
@pytest.mark.parametrize("sensor", ["semantic_kitti", "nuscenes", "pandar64", "pandargt"])
def test_real_scans_fit_their_own_sensor_and_no_other_scale(sensor):
    path = {
        "semantic_kitti": "semantic_kitti/dataset/sequences/00/velodyne/000000.bin",
        "pandar64": "pandaset/002/lidar/45.pkl.gz",
        "pandargt": "pandaset/002/lidar/45.pkl.gz",
    }.get(sensor) or next((SAMPLES / "nuscenes/samples/LIDAR_TOP").iterdir())
    points = scan_inputs.student_points(scan_inputs.read_frame(SAMPLES / path, sensor=sensor))
    view = {"field_of_view": ((-64, -64, -8), (64, 64, 8))}
    assert check_scan(points, {**view, "intensity": INTENSITY[sensor]}) == {}
    other = "nuscenes" if sensor == "semantic_kitti" else "semantic_kitti"
    assert "intensity" in check_scan(points, {**view, "intensity": INTENSITY[other]})
