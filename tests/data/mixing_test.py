"""Polar-mix and instance cut-mix: labels follow their points, the same random choices give the same scene, and what a
bank holds are the objects of the scans. Plain NumPy, no model."""

import json
from typing import Any

import numpy as np
import pytest

from scalr_jax.data import instances, mixing
from scalr_jax.data.build import make_mixing
from scalr_jax.data.pipeline import Pipeline
from scalr_jax.data.readers.semantic_kitti import SemanticKITTI
from scalr_jax.data.scenes import Cloud, Frame
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.settings import read_settings
from tests.support import raw_datasets as raw
from tests.support.checks import mentions, present
from tests.support.datasets import Frames
from tests.support.runs import config_of, open_split, scene_settings

CLASSES = ("road", "car", "person", "tree")
GROUND = 2.0  # metres below the sensor


class Scans(Frames):
    """Four scans of a flat road and some objects. A point's intensity is its label plus a tenth of its scan."""

    class_names = CLASSES

    def __init__(self, bad=()):
        self.bad = bad

    def __len__(self):
        return 4

    def name(self, index):
        return f"scans/{index}"

    def intensity(self, index):
        return (0.0, 1.0) if index % 2 == 0 else (1.0, 2.0)

    def frame(self, index, rng=None, *, camera=None):
        if index in self.bad:
            raise BadFrameError(f"scan {index} is damaged")
        own = np.random.default_rng(index)
        road = np.c_[own.uniform(-20, 20, (3000, 2)), np.full(3000, -GROUND)]
        objects = [own.normal(size=(30 + 10 * k, 3)) * 0.2 + (6 + 4 * k, 3 * index - 4, 0) for k in range(3)]
        xyz = np.concatenate([road, *objects])
        labels = np.repeat([0, 1, 2, 2], [3000, 30, 40, 50]).astype(np.uint8)
        points = np.c_[xyz, labels + 0.1 * index].astype(np.float32)
        return Frame(self.name(index), points, np.eye(4), labels=labels)


def label_of(points):
    return np.floor(points[:, 3] + 1e-4)


def test_polar_mix_takes_half_a_turn_and_adds_objects_three_times():
    scans, swapped = Scans(), 0
    first, second = (mixing.in_ego(scans.frame(k, None)) for k in (0, 1))
    for seed in range(20):
        points, labels = mixing.polar_mix(first, second, [1, 3], np.random.default_rng(seed))
        np.testing.assert_array_equal(label_of(points), labels)  # labels follow their points
        cars = second[0][second[1] == 1]
        pasted = points[-90:].reshape(3, 30, 4)
        np.testing.assert_array_equal(pasted[0], cars)
        for copy in pasted[1:]:  # turned about the sensor: heights, distances and intensities stay
            np.testing.assert_array_equal(copy[:, 2:], cars[:, 2:])
            np.testing.assert_allclose(np.hypot(*copy[:, :2].T), np.hypot(*cars[:, :2].T), rtol=1e-5)
            assert np.abs(copy[:, :2] - cars[:, :2]).max() > 0.01
        scan = np.round(10 * (points[:-90, 3] - labels[:-90])).astype(int)  # which scan a point is of
        if (scan == 0).all():
            np.testing.assert_array_equal(points[:-90], first[0])
            continue
        swapped += 1
        mine, theirs = points[:-90][scan == 0], points[:-90][scan == 1]
        # There is a half turn that holds all of the other scan's points and none of the own.
        start = np.random.default_rng(seed)
        start.random()
        start = start.uniform(-np.pi, np.pi)
        assert mixing.in_half_turn(theirs, start).all()
        assert not mixing.in_half_turn(mine, start).any()
        assert len(mine) == (~mixing.in_half_turn(first[0], start)).sum()
        assert len(theirs) == mixing.in_half_turn(second[0], start).sum()
    assert 3 < swapped < 17  # half of the time


def test_intensities_are_equal_once_normalised():
    scans = Scans()
    points, _ = mixing.in_ego(scans.frame(1, None))
    there, here = scans.intensity(1), scans.intensity(0)
    scaled = mixing.rescale_intensity(points, scans, 1, 0)
    np.testing.assert_allclose((scaled[:, 3] - here[0]) / here[1], (points[:, 3] - there[0]) / there[1], rtol=1e-5)
    np.testing.assert_array_equal(scaled[:, :3], points[:, :3])


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank") / "instances"
    instances.write_bank(folder, Scans(), (1, 2, 3))
    return instances.open_bank(folder, Scans(), (1, 2, 3))


def test_a_bank_holds_the_objects_of_the_scans(bank):
    """Two people stand apart and are two instances; no scan has a tree."""
    assert bank.classes == (1, 2)
    assert (bank.count(1), bank.count(2)) == (4, 8)
    wanted = sorted(
        len(part)
        for k in range(4)
        for part in (Scans().frame(k, None).points[-90:-50], Scans().frame(k, None).points[-50:])
    )
    assert sorted(len(bank.instance(2, k, (0.0, 1.0))) for k in range(8)) == wanted
    for k in range(8):
        person = bank.instance(2, k, (0.0, 1.0))
        np.testing.assert_allclose([*person[:, :2].mean(axis=0), person[:, 2].min()], 0, atol=1e-5)  # float32 metres
    raw = Scans().frame(3, None).points[-90:-50]
    person = next(p for k in range(8) if (p := bank.instance(2, k, (1.0, 2.0)))[0, 3] == raw[0, 3])  # scan 3's own
    np.testing.assert_allclose(np.diff(person, axis=0), np.diff(raw, axis=0), atol=1e-5)


def test_numbered_objects_are_taken_as_they_are_numbered():
    frame = Scans().frame(0, None)
    numbers = np.where(frame.labels == 2, np.arange(len(present(frame.labels))) % 3, 0)
    found = list(instances.cut(frame._replace(instances=numbers), (2,), (0.0, 1.0)))
    assert [label for label, _ in found] == [2, 2, 2]
    assert sum(len(points) for _, points in found) == 90
    few = frame._replace(instances=np.arange(len(present(frame.labels))))
    assert not list(instances.cut(few, (2,), (0.0, 1.0)))  # one point each


def test_connected_sets():
    line = np.c_[np.arange(0, 4, 0.4), np.zeros((10, 2))]
    xyz = np.concatenate([line, line + np.array([0, 3, 0]), line + np.array([0, 3, 5])])
    found = instances.connected(xyz)
    assert [len(np.unique(found[k : k + 10])) for k in (0, 10, 20)] == [1, 1, 1]
    assert len(np.unique(found)) == 3


def test_cut_mix_sets_instances_on_the_ground(bank):
    mix = mixing.Mixing(bank=bank, ground_classes=(0,))
    points, labels = mixing.in_ego(Scans().frame(2, None))
    counts = []
    for seed in range(8):
        new, new_labels = mix.cut_mix(points, labels, (0.0, 1.0), np.random.default_rng(seed))
        np.testing.assert_array_equal(new[: len(points)], points)
        added, added_labels = new[len(points) :], new_labels[len(points) :]
        normalised = {label: set() for label in (1, 2)}
        for label in (1, 2):
            for k in range(bank.count(label)):
                normalised[label] |= set(bank.instance(label, k, (0.0, 1.0))[:, 3].tolist())
            assert set(added[added_labels == label, 3].tolist()) <= normalised[label]  # labels follow
        assert added[:, 2].min() >= -GROUND - 1e-5  # the lowest point of each stands on the road
        counts.append(len(added))
    assert len(set(counts)) > 5
    none = mixing.Mixing(bank=bank, ground_classes=(3,)).cut_mix(points, labels, (0.0, 1.0), np.random.default_rng(0))
    assert len(none[0]) == len(points)  # no ground, no place


def test_a_placed_instance_keeps_its_shape():
    rng = np.random.default_rng(0)
    instance = np.c_[rng.normal(size=(20, 3)), np.arange(20)].astype(np.float32)
    instance[:, 2] -= instance[:, 2].min()
    placed = mixing.place_instance(instance, np.array([5.0, -3.0, 1.0]), rng)
    size = lambda p: np.linalg.norm(p[:, None, :3] - p[None, :, :3], axis=-1)  # noqa: E731
    ratio = size(placed)[0, 1:] / size(instance)[0, 1:]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert 0.9 <= ratio[0] <= 1.1
    assert placed[:, 2].min() == pytest.approx(1.0)
    np.testing.assert_array_equal(placed[:, 3], instance[:, 3])


def test_a_bank_of_other_scans_is_refused_and_a_damaged_one_named(bank, tmp_path):
    with pytest.raises(InputError, match=mentions(bank.folder.name, "other")):
        instances.open_bank(bank.folder, Scans(), (1, 2))
    instances.write_bank(tmp_path / "half", Scans(), (3,))
    with pytest.raises(InputError, match="instance"):
        instances.open_bank(tmp_path / "half", Scans(), (3,))
    (tmp_path / "half" / "bank.json").write_text("{")
    with pytest.raises(InputError, match=r"bank\.json: (cannot be read|not valid JSON) .* remove the folder"):
        instances.open_bank(tmp_path / "half", Scans(), (3,))
    with pytest.raises(InputError, match=mentions("2 of 4 frames", "1 %", "is damaged")):
        instances.write_bank(tmp_path / "bad", Scans(bad=(0, 1)), (1,))
    assert not (tmp_path / "bad" / "bank.json").exists()


def some_clouds(seed):
    """Three clouds of other places, whose features and labels say whose points they are."""
    rng = np.random.default_rng(seed)
    for k, shift in enumerate((0.0, 9.0, -4.0)):
        xyz = (rng.normal(size=(400, 3)) * (20, 20, 1) + shift).astype(np.float32)
        yield Cloud(xyz, np.c_[np.full(400, k), xyz].astype(np.float32), np.full(400, k, np.uint8))


def pillars_of(xyz, size):
    """The points of each pillar, as tuples."""
    found = {}
    for point in xyz:
        found.setdefault(tuple(np.floor(point[:2] / size).astype(int)), set()).add(tuple(point))
    return found


def test_pillar_mix_keeps_of_each_pillar_one_clouds_points():
    """As published: those of a cloud that has some, in the pillars of the first; each as often as another."""
    won = {}
    for seed in range(40):
        clouds = list(some_clouds(seed))
        mixed = mixing.pillar_mix(clouds, 7.5, np.random.default_rng(seed))
        np.testing.assert_array_equal(mixed.feats[:, 1:], mixed.xyz)
        np.testing.assert_array_equal(mixed.feats[:, 0], mixed.labels)
        sources, found = [pillars_of(cloud.xyz, 7.5) for cloud in clouds], pillars_of(mixed.xyz, 7.5)
        assert found.keys() == sources[0].keys()
        for pillar, points in found.items():
            candidates = tuple(k for k, source in enumerate(sources) if pillar in source)
            (winner,) = (k for k in candidates if sources[k][pillar] == points)
            won.setdefault(candidates, []).append(winner)
    assert won.keys() == {(0,), (0, 1), (0, 2), (0, 1, 2)}
    for candidates, winners in won.items():
        share = 1 / len(candidates)
        for k in candidates:
            error = 4 * np.sqrt(share * (1 - share) / len(winners))
            assert np.mean(np.array(winners) == k) == pytest.approx(share, abs=error)


def test_pillar_mix_of_one_pillar():
    one = [Cloud(np.zeros((n, 3), np.float32), np.zeros((n, 5), np.float32), np.zeros(n, np.uint8)) for n in (1, 2, 3)]
    assert {len(mixing.pillar_mix(one, 7.5, np.random.default_rng(seed)).xyz) for seed in range(20)} == {1, 2, 3}


def test_pillar_mix_draws_other_frames_where_there_are_some():
    mix, rng = mixing.Mixing(pillar_size=7.5), np.random.default_rng(0)
    drawn = [mix.others(2, 4, rng) for _ in range(50)]
    assert {len(pair) for pair in drawn} == {2}
    assert {k for pair in drawn for k in pair} == {0, 1, 3}
    assert mix.others(0, 1, rng) == [0, 0]
    assert mixing.Mixing().others(2, 4, rng) == []


# ---- in the pipeline


def street_config(street_cache, **changes):
    config = config_of("smoke")
    config.task = "finetune"
    config.data.update(root=str(street_cache), num_scenes=8)
    config.data.update(polarmix=("car", "person"), cutmix=("car", "person", "pole"), cutmix_ground=("road", "pavement"))
    config.data.update(pillarmix=7.5, augmentation="vavit")
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("workers", [0, 1])
def test_mixed_scenes_depend_on_seed_epoch_and_record_alone(workers, street_cache, tmp_path_factory):
    """With workers or without, from the beginning or resumed at a later scene: the same scenes."""
    config = street_config(street_cache)
    dataset = open_split(config, "train", cache=street_cache)
    folder = tmp_path_factory.getbasetemp() / "street_instances"
    settings = scene_settings(config, task="segment", train=True)
    mixed = Pipeline(
        dataset,
        settings.__class__(**{**vars(settings), "mixing": make_mixing(read_settings(config).data, dataset, folder)}),
    )
    order = mixed.order()
    stream: Any = Pipeline(dataset, mixed.settings, num_workers=workers).stream(0, 9)
    resumed = [next(stream) for _ in range(3)]
    stream.close()
    for scene, position in zip(resumed, (9, 10, 11), strict=True):
        again = order[position]
        np.testing.assert_array_equal(scene.feats, again.feats)
        np.testing.assert_array_equal(scene.labels, again.labels)
    plain = Pipeline(dataset, settings).order()[9]
    assert not np.array_equal(plain.feats, resumed[0].feats)
    assert json.loads((folder / "bank.json").read_text())["classes"] == ["car", "person", "pole"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.polarmix": ("zebra",)}, mentions("data.polarmix", "zebra", "road, ")),
        ({"data.cutmix_ground": ()}, r"data\.cutmix_ground = \(\)"),
        ({"task": "probe", "probe.features": "cached"}, "use 'augmented'"),
        ({"data.pillarmix": 0.01}, r"data\.pillarmix = 0\.01"),
        ({"task": "distill"}, mentions("data.augmentation", "vavit")),
    ],
)
def test_mixing_that_cannot_be_meant(changes, message, street_cache, tmp_path):
    config = street_config(street_cache, **changes)
    with pytest.raises(InputError, match=message):
        make_mixing(read_settings(config).data, open_split(config, "train", cache=street_cache), tmp_path)


def test_semantic_kitti_numbers_its_objects(tmp_path):
    """The whole number of a point, as published: the instance in the upper half, its class in the lower."""
    raw.write_semantic_kitti(tmp_path)
    frame = SemanticKITTI(tmp_path, split="all", labels=True).frame(0)
    assert frame.instances is not None
    assert set(np.unique(frame.instances)) == {(7 << 16) + k for k in (0, 10, 40, 252, 81)}
    assert len(present(frame.instances)) == len(present(frame.labels)) == len(frame.points)


def test_a_damaged_bank_is_one_sentence(tmp_path):
    np.save(tmp_path / "points.npy", np.zeros((9, 4), np.float32))
    np.save(tmp_path / "labels.npy", np.zeros(1, np.uint8))
    for start, match in (([0, 5], "do not fit"), ([], "damaged")):
        np.save(tmp_path / "start.npy", np.array(start, int))
        with pytest.raises(InputError, match=mentions(tmp_path, match, "remove it")):
            instances._open(tmp_path)
    (tmp_path / "points.npy").write_bytes(b"\x93NUMPY\x01\0\x76\0{'descr': '<f4', 'fortran_order': False, ")
    with pytest.raises(InputError, match="remove it"):
        instances._open(tmp_path)
