"""Corruptions: labels follow their points, names seed them, their sizes and their physics; CE and RR."""

import time

import numpy as np
import pytest

from scalr_jax.config import CORRUPTIONS, SEVERITIES
from scalr_jax.data.readers.files import read_label_map
from scalr_jax.data.scenes import IGNORE, Frame
from scalr_jax.data.streets.streets import Streets
from scalr_jax.evaluation import weather
from scalr_jax.evaluation.corruptions import ELEVATIONS, Corrupted, beams_of, corrupt, is_vehicle
from scalr_jax.runtime.errors import InputError
from tests.support.checks import mentions, present
from tests.support.datasets import Frames

NAMES = ("road", "car", "building")


def make_scan(number=20_000, seed=0):
    """A plane 1.8 m below the sensor with a wall at 30 m: points [N, 4], labels [N]."""
    rng = np.random.default_rng(seed)
    elevation = np.radians(rng.choice(ELEVATIONS["beams32"], number))
    azimuth = rng.uniform(-np.pi, np.pi, number)
    rays = np.stack(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], axis=1
    )
    ground, wall = -1.8 / np.minimum(rays[:, 2], -1e-6), 30 / np.maximum(np.abs(rays[:, :2]).max(axis=1), 1e-6)
    distance = np.minimum(ground, wall)
    labels = np.where(ground < wall, 0, np.where(azimuth > 2, 1, 2)).astype(np.uint8)
    return np.concatenate([rays * distance[:, None], rng.uniform(5, 60, (number, 1))], axis=1), labels


def run(corruption, severity, name="a/b/0", scan=None, sensor="beams32"):
    points, labels = scan or make_scan()
    return corrupt(points, labels, corruption, severity, name=name, sensor=sensor, class_names=NAMES)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_name_seeds_a_corruption_and_labels_follow_their_points(corruption):
    points, labels = make_scan()
    before = points.copy()
    once, twice, other = (run(corruption, "heavy", name, (points, labels)) for name in ("a/0", "a/0", "a/1"))
    np.testing.assert_array_equal(points, before)
    np.testing.assert_array_equal(once[0], twice[0])
    np.testing.assert_array_equal(once[1], twice[1])
    if corruption not in ("cross_sensor", "wet_ground"):  # in these two nothing (or only the fit) is drawn
        assert len(once[0]) != len(other[0]) or not np.array_equal(once[0], other[0])
    assert np.isfinite(once[0]).all()
    assert len(once[0]) == len(once[1]) <= len(points)
    assert set(np.unique(once[1])) <= {0, 1, 2, IGNORE}
    # what still has a class lies along the same ray as a point of that class (blur moves all of them)
    if corruption != "motion_blur":
        kept = once[1] != IGNORE
        known = {(*np.round(p, 6), k) for p, k in zip(points[:, :3], labels, strict=True)}
        assert all((*np.round(p, 6), k) in known for p, k in zip(once[0][kept, :3], once[1][kept], strict=True))


def test_vehicles_are_known_by_whole_words():
    names = ("bush", "carriageway", "carpet", "bicyclist", "motorcyclist", "road", "vegetation", "scar", "traffic cone")
    assert not [name for name in names if is_vehicle(name)]
    datasets = ("nuscenes", "semantic_kitti", "pandaset")
    found = {name for dataset in datasets for name in read_label_map(dataset).class_names if is_vehicle(name)}
    several_words = {"construction_vehicle", "other-vehicle", "oth. vehicle"}
    assert found == {"bicycle", "bus", "car", "motorcycle", "trailer", "truck", *several_words}
    assert all(map(is_vehicle, ("cars", "Buses", "PickupTruck", "BUS", "parked_car2", "Other Vehicle")))


@pytest.mark.parametrize("corruption", ["fog", "wet_ground", "snow", "beam_missing", "incomplete_echo", "cross_sensor"])
def test_heavier_corruptions_leave_fewer_labelled_points(corruption):
    left = [(run(corruption, severity)[1] != IGNORE).sum() for severity in SEVERITIES]
    assert len(make_scan()[1]) >= left[0] > left[1] > left[2] > 0


def test_shares_of_points_and_beams():
    points, labels = make_scan()
    for share, severity in zip((0.75, 0.85, 0.95), SEVERITIES, strict=True):
        left = (run("incomplete_echo", severity)[1] == 1).sum() / (labels == 1).sum()
        assert left == pytest.approx(1 - share, abs=0.02)
    for share, severity in zip((0.006, 0.008, 0.010), SEVERITIES, strict=True):
        moved, moved_labels = run("crosstalk", severity)
        assert (moved_labels == IGNORE).sum() == round(share * len(labels))
        np.testing.assert_array_equal(moved_labels == IGNORE, np.any(moved != points, axis=1))
        assert np.std((moved - points)[moved_labels == IGNORE, :3]) == pytest.approx(3.0, rel=0.15)
    assert (run("crosstalk", "light", sensor="nuscenes")[1] == IGNORE).mean() == pytest.approx(0.03)
    for missing, kept, severity in zip((8, 16, 24), (24, 16, 8), SEVERITIES, strict=True):
        assert len(np.unique(beams_of(run("beam_missing", severity)[0][:, :3], "beams32"))) == 32 - missing
        other = run("cross_sensor", severity)[0]
        assert len(np.unique(beams_of(other[:, :3], "beams32"))) == kept
        assert len(other) / len(points) == pytest.approx(kept / 64, rel=0.05)


def test_motion_blur_is_a_shift_and_a_tenth_of_jitter():
    points, _ = make_scan()
    moved = np.array(
        [run("motion_blur", "heavy", name=str(n))[0][:, :3] - points[:, :3] for n in range(60)]
    )  # [60, N, 3]
    assert np.std(moved.mean(axis=1)) == pytest.approx(0.30, rel=0.25)
    np.testing.assert_allclose(
        (moved - moved.mean(axis=1, keepdims=True)).std(axis=(0, 1)), [0.03, 0.03, 0.015], rtol=0.05
    )


def test_beams_are_found_by_elevation():
    for sensor, elevations in ELEVATIONS.items():
        angle = np.radians(elevations)
        xyz = 10 * np.stack([np.cos(angle), np.zeros(len(angle)), np.sin(angle)], axis=1)
        np.testing.assert_array_equal(beams_of(xyz, sensor), np.arange(len(angle)), err_msg=sensor)
    assert [len(ELEVATIONS[name]) for name in ("nuscenes", "semantic_kitti", "pandar64")] == [32, 64, 64]
    assert len(np.unique(beams_of(make_scan()[0][:, :3], "unknown"))) > 30


def test_the_ground_is_found_and_wet_ground_darkens_it_more_at_grazing_angles():
    points, _ = make_scan()
    tilt = np.radians(3.0)
    turn = np.array([[np.cos(tilt), 0, np.sin(tilt)], [0, 1, 0], [-np.sin(tilt), 0, np.cos(tilt)]])
    plane = weather.find_ground(points[:, :3] @ turn.T, np.random.default_rng(0))
    assert plane is not None
    np.testing.assert_allclose(plane, [*turn[:, 2], 1.8], atol=0.02)
    wet, wet_labels = run("wet_ground", "heavy")
    high = points[:, 2] > -1.5  # the wall, but for its foot
    np.testing.assert_array_equal(wet[wet[:, 2] > -1.5], points[high])
    ratio = {p[:3].tobytes(): p[3] for p in points}
    ground = wet[wet_labels == 0]
    ratio = np.array([p[3] / ratio[p[:3].tobytes()] for p in ground])
    distance = np.linalg.norm(ground[:, :3], axis=1)
    assert ratio[distance < 5].mean() > 1.5 * ratio[distance > 20].mean()
    assert ratio.max() < 1


def test_fresnel_and_flat_scans():
    normal = weather.fresnel(np.array([1.0]), np.array([1.0]))
    np.testing.assert_allclose(normal, ((1.328 - 1) / (1.328 + 1)) ** 2, rtol=1e-6)
    assert weather.fresnel(np.array([0.0]), np.array([0.6]))[0] == pytest.approx(1.0)
    wall = np.random.default_rng(0).uniform(0, 30, (500, 4))
    wall[:, 0] = 10.0
    assert weather.find_ground(wall[:, :3], np.random.default_rng(0)) is None  # upright: no ground
    assert len(run("wet_ground", "heavy", scan=(wall, np.zeros(500, np.uint8)))[0]) == 500


def test_fog_follows_beer_and_lambert_where_the_target_is_seen():
    points, _ = make_scan()
    foggy, labels = run("fog", "moderate")
    seen = foggy[labels != IGNORE]
    before = {p[:3].tobytes(): p[3] for p in points}
    distance = np.linalg.norm(seen[:, :3], axis=1)
    expected = [before[p[:3].tobytes()] for p in seen] * np.exp(-2 * np.log(20) / 300 * distance)
    np.testing.assert_allclose(seen[:, 3], expected, rtol=1e-9)
    scattered = np.linalg.norm(foggy[labels == IGNORE][:, :3], axis=1)
    assert np.median(scattered) < 12  # near the sensor
    assert np.median(np.linalg.norm(points[:, :3], axis=1)) < distance.max()


def test_snow_shadows_and_clutter_near_the_sensor():
    """The mean shadow equals the flakes' mean cover of the air; what flakes send back is near and dim."""
    points, _ = make_scan(60_000)
    snowy, labels = run("snow", "heavy", scan=(points, np.zeros(len(points), np.uint8)))
    clutter = np.linalg.norm(snowy[labels == IGNORE][:, :3], axis=1)
    assert 0.02 < len(clutter) / len(snowy) < 0.4
    assert weather.FROM <= clutter.min() <= clutter.max() <= weather.SAMPLED
    slope = 2.55 * 2.5**-0.48
    density, width = 3.8e3 * 2.5**-0.87 / slope, weather.GROWTH / slope / 1000
    extinction = density * np.pi / 4 * 2 * width**2  # 1/m
    before = {p[:3].tobytes(): (p[3], np.linalg.norm(p[:3])) for p in points}
    pairs = np.array([(p[3] / before[p[:3].tobytes()][0], before[p[:3].tobytes()][1]) for p in snowy[labels != IGNORE]])
    near = pairs[(pairs[:, 1] > 6) & (pairs[:, 1] < 11)]
    measured = -np.log(near[:, 0].mean()) / (near[:, 1].mean() - weather.FROM)
    assert measured == pytest.approx(extinction, rel=0.35)  # beams with large flakes are those that became clutter


def test_a_dataset_of_corrupted_streets(street_cache):
    streets = Streets(street_cache, split="validation", num_scenes=2)
    assert streets.sensor(0) == "beams32"
    snowy = Corrupted(streets, "snow", "heavy")
    frame, clear = snowy.frame(1), streets.frame(1)
    assert (frame.points.dtype, frame.image, len(snowy)) == (clear.points.dtype, None, 2)
    assert frame.labels is not None
    assert len(frame.labels) == len(frame.points)
    assert frame.name == "streets/validation/1 (snow, heavy)"
    assert snowy.intensity(0) == streets.intensity(0)
    still = Corrupted(streets, "incomplete_echo", "light").frame(1)
    assert {p.tobytes() for p in still.points} < {p.tobytes() for p in clear.points}


class OnACar(Frames):
    """One scan of a Pandar64 that stands 2 m above the frame's origin and leans by 3 degrees; x, y and z in the car's
    frame, the student's 1 m above that. `beams` are told or left to be found."""

    class_names = NAMES

    def __init__(self, *, told):
        rng = np.random.default_rng(0)
        self.beams = rng.integers(64, size=4000).astype(np.uint8)
        elevation, azimuth = np.radians(ELEVATIONS["pandar64"][self.beams]), rng.uniform(-np.pi, np.pi, 4000)
        flat, distance = np.cos(elevation), rng.uniform(3, 60, (4000, 1))
        rays = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=1) * distance
        lean, to_ego, to_car = np.radians(3.0), np.eye(4), np.eye(4)
        to_ego[2, 3], to_car[2, 3] = -1.0, 2.0
        to_car[:3, :3] = [[np.cos(lean), 0, np.sin(lean)], [0, 1, 0], [-np.sin(lean), 0, np.cos(lean)]]
        self.xyz = rays @ to_car[:3, :3].T + to_car[:3, 3]
        points = np.concatenate([self.xyz, rng.uniform(5, 60, (4000, 1))], axis=1)
        beams = self.beams if told else None
        labels = rng.integers(3, size=4000).astype(np.uint8)
        self.clear = Frame("car/0/0", points, to_ego, labels=labels, to_sensor=np.linalg.inv(to_car), beams=beams)

    def __len__(self):
        return 1

    def name(self, index):
        return self.clear.name

    def sensor(self, index):
        return "pandar64"

    def frame(self, index, rng=None, *, camera=None):
        return self.clear


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("corruption", "kept", "of_a_beam"), [("beam_missing", 16, 1.0), ("cross_sensor", 16, 0.5)])
def test_beams_of_a_lidar_away_from_the_students_origin(told, corruption, kept, of_a_beam):
    """Whole beams are lost, and the others keep all their points or every second one; in the car's coordinates."""
    scan = OnACar(told=told)
    frame = Corrupted(scan, corruption, "heavy").frame(0)
    places = {tuple(xyz): n for n, xyz in enumerate(np.round(scan.xyz, 6))}
    left = np.array([places[tuple(xyz)] for xyz in np.round(frame.points[:, :3], 6)])
    before, after = np.bincount(scan.beams, minlength=64), np.bincount(scan.beams[left], minlength=64)
    assert (after > 0).sum() == kept
    assert (np.abs(after - of_a_beam * before)[after > 0] <= (0.5 if of_a_beam < 1 else 0)).all()
    np.testing.assert_array_equal(frame.labels, present(scan.clear.labels)[left])


def test_a_corruption_takes_less_than_a_second():
    scan = make_scan(120_000)
    for corruption in CORRUPTIONS:
        started = time.process_time()
        run(corruption, "heavy", scan=scan)
        assert time.process_time() - started < 1.5, corruption  # 0.05 to 0.5 s on an idle core, 2026-11-23


def test_unknown_names_are_refused(street_cache):
    with pytest.raises(InputError, match=mentions("hail", "fog, wet_ground")):
        run("hail", "light")
    with pytest.raises(InputError, match=mentions("huge", "light, moderate, heavy")):
        Corrupted(Streets(street_cache, split="validation", num_scenes=2), "fog", "huge")
