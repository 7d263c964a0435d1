"""Transforms against the published numbers, and their laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalr_jax.data import grids, transforms
from scalr_jax.data.grids import make_plane
from scalr_jax.data.readers.pandaset import PandaSet
from scalr_jax.data.scenes import PLANE_AXES, Frame, SceneNeeds
from scalr_jax.data.whole_scan import check_points, whole_scan
from scalr_jax.runtime.errors import BadFrameError
from tests.support.checks import present
from tests.support.paths import SAMPLES

FIELD_OF_VIEW = ((-64.0, -64.0, -8.0), (64.0, 64.0, 8.0))
GRIDS = ((256, 256), (256, 32), (256, 32))


def test_published_transforms(golden):
    arrays = golden("transforms")
    voxelized = arrays["points"][grids.voxelize(arrays["points"], 0.1)]
    np.testing.assert_array_equal(voxelized, arrays["voxelized"])
    cropped = arrays["cropped"]
    limited = cropped[transforms.limit(cropped, 3000)]
    for k, (axes, grid) in enumerate(zip(PLANE_AXES, GRIDS, strict=True)):
        plane = make_plane(limited[:, :3], axes, grid, FIELD_OF_VIEW)
        np.testing.assert_array_equal(plane.position[plane.cell], arrays["cell_ind"][k])
    neighbors = transforms.find_neighbors(limited[:, :3], 16)
    np.testing.assert_array_equal(neighbors.T, arrays["knn_index"][1:])


clouds = st.integers(0, 10_000).map(lambda seed: np.random.default_rng(seed).normal(size=(60, 4)) * [1, 1, 0.3, 9])


def voxels_by_row(points, size):
    """The plain form: unique rows."""
    return np.floor((points[:, :3] - points[:, :3].min(0)) / size).astype(int)


@settings(max_examples=30, deadline=None)
@given(clouds)
def test_voxelize_keeps_the_first_point_of_each_voxel_in_lexicographic_order(points):
    voxels = voxels_by_row(points, 0.5)
    _, first = np.unique(voxels, axis=0, return_index=True)
    np.testing.assert_array_equal(grids.voxelize(points, 0.5), first)


@settings(max_examples=30, deadline=None)
@given(clouds, st.integers(0, 100))
def test_random_voxelize_keeps_one_point_of_each_voxel(points, seed):
    kept = grids.voxelize(points, 0.5, np.random.default_rng(seed))
    voxels = voxels_by_row(points, 0.5)
    np.testing.assert_array_equal(voxels[kept], np.unique(voxels, axis=0))


@settings(max_examples=30, deadline=None)
@given(clouds, st.integers(0, 100))
def test_limit_keeps_the_nearest_to_one_of_the_points(points, seed):
    kept = transforms.limit(points, 20, np.random.default_rng(seed))
    center = points[kept[0], :3]
    distance = np.linalg.norm(points[:, :3] - center, axis=1)
    assert distance[kept].max() <= np.delete(distance, kept).min()


@settings(max_examples=30, deadline=None)
@given(clouds, st.integers(0, 100))
def test_augmentation_is_a_similarity_about_the_z_axis(points, seed):
    moved = transforms.augment(points[:, :3], np.random.default_rng(seed))
    scale = moved[0, 2] / points[0, 2]
    assert 0.9 <= scale <= 1.1
    np.testing.assert_allclose(moved[:, 2], scale * points[:, 2], rtol=1e-6)
    before, after = (np.linalg.norm(x[:, None, :3] - x[None, :, :3], axis=-1) for x in (points, moved))
    np.testing.assert_allclose(after, scale * before, rtol=1e-5, atol=1e-6)


def test_neighbors_of_coinciding_points_never_name_the_point_itself():
    xyz = np.repeat(np.random.default_rng(0).normal(size=(10, 3)), 8, axis=0).astype(np.float32)
    neighbors = transforms.find_neighbors(xyz, 4)
    assert neighbors.shape == (80, 4)
    assert not (neighbors == np.arange(80)[:, None]).any()


@settings(max_examples=20, deadline=None)
@given(clouds)
def test_neighbors_are_the_nearest(points):
    xyz = points[:, :3].astype(np.float32)
    distance = np.linalg.norm(xyz[:, None] - xyz[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    found = np.take_along_axis(distance, transforms.find_neighbors(xyz, 5), axis=1)
    np.testing.assert_allclose(found, np.sort(distance, axis=1)[:, :5], rtol=1e-4)


def test_resize_without_antialiasing_is_plain_bilinear():
    """Shrinking a ramp by two: half-pixel centres, two source pixels each, rounded."""
    image = np.repeat(np.arange(0, 160, 10, dtype=np.uint8).reshape(1, 16, 1), 3, axis=2).repeat(4, axis=0)
    out = transforms.resize_image(image, (4, 8), antialias=False)
    np.testing.assert_array_equal(out[0, :, 0], np.arange(5, 160, 20))
    line = np.zeros((4, 16, 3), np.uint8)
    line[:, 0] = 240  # plain bilinear reads pixels 2 and 3 for the first of four, and never sees it
    plain, antialiased = (transforms.resize_image(line, (4, 4), antialias=a)[0, :, 0] for a in (False, True))
    assert plain.tolist() == [0, 0, 0, 0]
    assert antialiased[0] > 10


@pytest.mark.parametrize("antialias", [False, True])
def test_a_resized_image_may_stay_float(antialias):
    """It rounds to the bytes, and a ramp of odd steps has its exact means."""
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    options = {"size": (14, 28), "antialias": antialias}
    rounded, exact = (transforms.resize_image(image, **options, dtype=dtype) for dtype in ("uint8", "float32"))
    assert exact.dtype == np.float32
    assert np.abs(exact - rounded).max() < 1.01  # Pillow rounds after each of the two axes
    assert np.abs(exact - np.rint(exact)).mean() > 0.1
    ramp = np.repeat(np.arange(16, dtype=np.uint8).reshape(1, 16, 1), 3, axis=2).repeat(4, axis=0)
    half = transforms.resize_image(ramp, (4, 8), antialias=antialias, dtype="float32")
    np.testing.assert_allclose(half[0, 1:-1, 0], np.arange(2.5, 14, 2), atol=1e-5)
    assert transforms.resize_image(image, (40, 60), antialias=antialias, dtype="float32").dtype == np.float32


def frame(num_points=200, **changes):
    rng = np.random.default_rng(0)
    points = rng.uniform(-5, 5, (num_points, 4)) * [1, 1, 0.2, 1]
    fields = {
        "name": "test/0",
        "points": points,
        "to_ego": np.eye(4),
        "image": rng.integers(0, 255, (40, 60, 3), dtype=np.uint8),
        "pixels": rng.random((num_points, 2)) * [40, 60],
        "visible": np.arange(num_points) % 2 == 0,
        "labels": np.arange(num_points, dtype=np.uint8) % 7,
        **changes,
    }
    return Frame(**fields)


def settings_of(task, **changes):
    fields = {"task": task, "train": True, "needs": SceneNeeds(FIELD_OF_VIEW, 16, GRIDS), "image_size": (20, 30)}
    return transforms.SceneSettings(**{**fields, **changes})


def test_a_distillation_scene_pairs_visible_points_with_their_pixels():
    settings = settings_of("distill", augmentation="none", voxel_size=1e-3)
    source = frame()
    scene = transforms.make_scene(source, 3, (0.0, 1.0), settings, np.random.default_rng(0))
    assert len(scene.feats) == 100
    xyz = source.points[:, :3].astype(np.float32)
    rows = [int(np.flatnonzero((xyz == point).all(1))[0]) for point in scene.feats[:, 1:4]]
    assert present(source.visible)[rows].all()
    np.testing.assert_array_equal(scene.pixels, np.floor(np.floor(present(source.pixels)[rows]) / 2))
    np.testing.assert_allclose(scene.feats[:, 4], np.linalg.norm(xyz[rows], axis=1), rtol=1e-6)
    assert present(scene.image).shape == (20, 30, 3)


def test_the_same_rng_gives_the_same_scene():
    def build():
        return transforms.make_scene(frame(), 0, (0.0, 1.0), settings_of("distill"), np.random.default_rng(5))

    scenes = [build(), build()]
    np.testing.assert_array_equal(scenes[0].feats, scenes[1].feats)
    np.testing.assert_array_equal(scenes[0].neighbors, scenes[1].neighbors)


def test_published_augmentation_moves_coordinates_and_features_apart():
    """As the released configs say it: x and y of the features turn by an angle of their own; x, y, z and radius are
    scaled, the coordinates are not."""
    source = frame(labels=np.arange(200, dtype=np.uint8))
    scenes = {
        kind: transforms.make_scene(
            source, 0, (0, 1), settings_of("segment", augmentation=kind, voxel_size=1e-3), np.random.default_rng(1)
        )
        for kind in ("published", "consistent")
    }
    published = scenes["published"]
    before = transforms.make_features(source.points[:, :3], source.points[:, 3], (0, 1))[published.labels]
    scale = published.feats[0, 4] / before[0, 4]
    assert 0.9 <= scale <= 1.1
    assert abs(scale - 1) > 1e-3
    np.testing.assert_array_equal(published.feats[:, 0], before[:, 0])
    np.testing.assert_allclose(published.feats[:, 3:], scale * before[:, 3:], rtol=1e-5)
    lengths, old_lengths = (np.linalg.norm(feats[:, 1:3], axis=1) for feats in (published.feats, before))
    np.testing.assert_allclose(lengths, scale * old_lengths, rtol=1e-5)
    for scene in scenes.values():
        np.testing.assert_allclose(np.linalg.norm(scene.feats[:, 1:4], axis=1), scene.feats[:, 4], rtol=1e-5)


def test_vavits_augmentation_moves_coordinates_and_features_apart():
    """Each is turned, flipped and scaled by draws of its own: distances keep their proportions, which differ."""
    source, flips = frame(labels=np.arange(200, dtype=np.uint8)), []
    needs = SceneNeeds(FIELD_OF_VIEW, 16, pillar_size=0.01)
    options = settings_of("segment", augmentation="vavit", voxel_size=1e-3, needs=needs)
    for seed in range(12):
        scene = transforms.make_scene(source, 0, (0, 1), options, np.random.default_rng(seed))
        before = source.points[scene.labels, :3]
        centres = present(scene.pillars).coordinates[present(scene.pillars).cell]
        moved = [scene.feats[:, 1:3], centres]
        turns = [np.linalg.lstsq(before[:, :2], after, rcond=None)[0] for after in moved]
        scales = [np.sqrt(abs(np.linalg.det(turn))) for turn in turns]
        assert abs(scales[0] / scales[1] - 1) > 1e-4
        flips.append(tuple(np.linalg.det(turn) < 0 for turn in turns))
        rest = np.c_[before[:, 2], np.linalg.norm(before, axis=1)]  # z and the radius are scaled alone
        np.testing.assert_allclose(scene.feats[:, 3:], scales[0] * rest, rtol=1e-4)
        np.testing.assert_allclose(moved[0], before[:, :2] @ turns[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(moved[1], before[:, :2] @ turns[1], atol=0.02)  # the centres of pillars of 1 cm
    assert len(set(flips)) == 4


def test_evaluation_maps_every_point_to_its_nearest_kept_point():
    source = frame(300)
    settings = settings_of("segment", train=False, voxel_size=1.0)
    scene = transforms.make_scene(source, 0, (0, 1), settings, np.random.default_rng(0))
    assert len(present(scene.upsample)) == len(present(scene.raw_labels)) == 300
    kept = scene.feats[:, 1:4]
    distance = np.linalg.norm(source.points[:, None, :3] - kept[None], axis=-1)
    np.testing.assert_allclose(distance[np.arange(300), scene.upsample], distance.min(1), rtol=1e-5)


def in_students_frame(source):
    """The frame as `scalr_jax.load(...).segment()` gets it: float32, moved."""
    xyz = transforms.to_ego(source.points, source.to_ego)
    return source._replace(points=np.column_stack([xyz, source.points[:, 3]]).astype(np.float32), to_ego=np.eye(4))


@pytest.mark.parametrize("train", [True, False])
def test_segmentation_voxelises_and_limits_in_the_students_frame(train):
    """As published; distillation does both where the reader's points are, on PandaSet the world."""
    to_ego = np.eye(4)
    to_ego[:2, :2], to_ego[:3, 3] = transforms.rotation(0.6), (3.0, -2.0, -1.6)
    source = frame(2000, to_ego=to_ego, pixels=np.ones((2000, 2)), visible=np.ones(2000, bool))

    def scenes(task):
        settings = settings_of(task, train=train, voxel_size=0.7, max_points=300, augmentation="none")
        frames = (source, in_students_frame(source))
        return [transforms.make_scene(f, 0, (0, 1), settings, np.random.default_rng(3)) for f in frames]

    one, other = scenes("segment")
    for field in ("feats", "labels", "neighbors", "upsample"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    one, other = scenes("distill")
    assert not np.array_equal(np.sort(one.feats, axis=0), np.sort(other.feats, axis=0))


@pytest.mark.samples
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the real frames")
def test_a_real_pandaset_frame_is_evaluated_as_it_is_predicted():
    dataset = PandaSet(SAMPLES / "pandaset", split="all", frames=[45], labels=True)
    source = dataset.frame(0)
    settings = settings_of("segment", train=False)
    scene = transforms.make_scene(source, 0, dataset.intensity(0), settings, np.random.default_rng(0))
    points = check_points(in_students_frame(source).points)
    predicted, nearest = whole_scan(points, settings.needs, dataset.intensity(0), 0.1)
    np.testing.assert_array_equal(predicted.feats[:, 1:4], scene.feats[:, 1:4])
    np.testing.assert_allclose(predicted.feats, scene.feats, rtol=1e-6, atol=1e-6)  # intensities, from float64
    np.testing.assert_array_equal(nearest, scene.upsample)
    in_doubles = source.points[:, :3] @ source.to_ego[:3, :3].T + source.to_ego[:3, 3]  # as published
    published = grids.voxelize(in_doubles, 0.1)
    kept = grids.voxelize(transforms.to_ego(source.points, source.to_ego), 0.1)
    assert len(np.setxor1d(published, kept)) < 1e-4 * len(kept)  # points on an edge, rounded to float32
    world = grids.voxelize(source.points, 0.1)
    assert len(np.setxor1d(published, world)) > 0.1 * len(kept)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"points": np.zeros((0, 4))}, "no points"),
        ({"visible": np.zeros(200, bool)}, "project"),
        ({"visible": np.arange(200) < 9}, "9 .* 17 "),
        ({"image": None}, "image"),
    ],
)
def test_bad_frames_are_named(changes, words):
    with pytest.raises(BadFrameError, match=words) as error:
        transforms.make_scene(frame(**changes), 0, (0, 1), settings_of("distill"), np.random.default_rng(0))
    assert "test/0" in str(error.value)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([0.5, 30.0, 1e7, 1e30]))
def test_voxels_are_those_of_a_plain_search(num_points, seed, far):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-0.5, 0.5, (num_points, 4))
    points[: num_points // 7] *= far
    rows = np.floor((points[:, :3] - points[:, :3].min(axis=0)) / 0.1)  # as published: the unique rows
    _, first, voxel = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(grids.voxelize(points, 0.1), first)
    voxels = grids.find_voxels(points, 0.1)
    np.testing.assert_array_equal(np.diff(voxels.start), np.bincount(voxel.ravel()))
    drawn = grids.draw_voxels(voxels, rng)
    np.testing.assert_array_equal(voxel.ravel()[drawn], np.arange(len(first)))  # one of each voxel, in order


def test_points_of_a_scene_are_ordered_by_cell_of_the_first_plane():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(4000, 4)) * [20, 20, 2, 9]
    for task in ("distill", "segment"):
        frame = Frame("a frame", points, np.eye(4), labels=np.zeros(4000, int))
        if task == "distill":
            image = np.zeros((30, 60, 3), np.uint8)
            frame = frame._replace(image=image, pixels=np.ones((4000, 2)), visible=np.ones(4000, bool), labels=None)
        chosen = transforms.SceneSettings(task, True, SceneNeeds(FIELD_OF_VIEW, 16, GRIDS), image_size=(30, 60))
        scene = transforms.make_scene(frame, 0, (0.0, 1.0), chosen, rng)
        assert (np.diff(scene.planes[0].cell) >= 0).all()
        for plane in scene.planes:
            np.testing.assert_array_equal(plane.order, np.argsort(plane.cell, kind="stable"))
            assert len(plane.position) == plane.cell.max() + 1
