"""Several cameras of one scan as one scene: which points it has, and with which pixels they are paired."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.config import DataSettings
from scalr_jax.data import packing
from scalr_jax.data.build import with_views
from scalr_jax.data.pipeline import Pipeline
from scalr_jax.data.scenes import RANDOM, Batch, Frame, PackedTokens
from scalr_jax.data.transforms import make_scene
from scalr_jax.runtime.errors import NothingVisibleError
from scalr_jax.train.teachers import Source, Teacher, features
from tests.support.checks import present
from tests.support.datasets import Frames
from tests.support.prepared_datasets import SETTINGS

LEFT, FRONT, RIGHT, BLIND = "left", "front", "right", "blind"
SEES = {LEFT: (-30, -5), FRONT: (-10, 10), RIGHT: (5, 30), BLIND: (90, 99)}  # metres in y
SIZES = {LEFT: (20, 40), FRONT: (56, 112), RIGHT: (100, 60), BLIND: (8, 8)}


class Ring(Frames):
    """300 points in voxels of their own; a camera sees those in its range of y, at pixels that say which they are."""

    cameras = (LEFT, FRONT, RIGHT, BLIND)
    rng = np.random.default_rng(0)
    xy = rng.permutation(300) * 0.2 - 30, rng.uniform(-30, 30, 300)
    points = np.stack([*xy, *np.ones((2, 300))], axis=1)

    def cameras_of(self, index):
        return self.cameras

    def frame(self, index, rng=None, *, camera: str | None = RANDOM):
        assert camera is not None
        camera = self.cameras[present(rng).integers(3)] if camera == RANDOM else camera
        low, high = SEES[camera]
        seen = (self.points[:, 1] > low) & (self.points[:, 1] < high)
        if not seen.any():
            raise NothingVisibleError(f"{camera} sees nothing")
        rows, columns = SIZES[camera]
        pixels = np.stack([np.arange(300) % rows, np.arange(300) // 3 % columns], 1) + 0.3
        image = np.full((rows, columns, 3), self.cameras.index(camera) * 50, np.uint8)
        return Frame(f"{self.name(index)}/{camera}", self.points, np.eye(4), image, pixels, seen)


def scene_of(views, pairs, seed=0):
    settings = dataclasses.replace(SETTINGS, views=views, pairs=pairs)
    return Pipeline(Ring(), settings, seed=seed).order()[0]


def expected_pixel(point, camera):
    """The pixel of point number `point` in the resized image of a camera."""
    rows, columns = SIZES[camera]
    return np.floor(np.array([point % rows, point // 3 % columns]) * np.array([56, 112]) / np.array(SIZES[camera]))


@pytest.mark.parametrize("pairs", [1, 3])
def test_a_scene_has_every_point_that_a_camera_sees_once_with_its_pixels(pairs):
    scene, dataset = scene_of(4, pairs), Ring()
    assert scene.name == "frames/0"
    number = {round(x, 3): k for k, x in enumerate(dataset.points[:, 0])}
    found = [number[round(float(x), 3)] for x in scene.feats[:, 1]]
    y = dataset.points[:, 1]
    assert sorted(found) == np.flatnonzero((y > -30) & (y < 30)).tolist()
    views, pixels = present(scene.views), present(scene.pixels)
    assert views.shape == (300, pairs)
    for point, row, places in zip(found, views, pixels, strict=True):
        seen = [k for k, camera in enumerate(dataset.cameras) if SEES[camera][0] < y[point] < SEES[camera][1]]
        given = [k for k in row if k >= 0]
        assert given == seen if pairs == 3 else given in ([k] for k in seen)
        for k, place in zip(given, places, strict=False):
            np.testing.assert_array_equal(place, expected_pixel(point, dataset.cameras[k]))
    assert present(scene.image)[:, 0, 0, 0].tolist() == [0, 50, 100, 0]  # the last view is empty
    if pairs == 1:  # where two see a point each is drawn
        assert len({k for point, k in zip(found, views[:, 0], strict=True) if 5 < y[point] < 10}) == 2


def test_one_view_is_the_published_scene():
    """Bit for bit what a frame of the drawn camera gives."""
    rng = np.random.default_rng((5, 0, 0))
    frame = Ring().frame(0, rng)
    expected = make_scene(frame, 0, (0.0, 1.0), SETTINGS, rng)
    found = scene_of(1, 1, seed=5)
    assert found.views is expected.views is None
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_views_are_as_many_as_a_frame_has_at_most():
    chosen = {
        n: with_views(SETTINGS, DataSettings(cameras_per_scan=n, pairs_per_point=2), Ring()) for n in (0, 1, 2, 9)
    }
    assert {n: (settings.views, settings.pairs) for n, settings in chosen.items()} == {
        0: (4, 2),
        1: (1, 1),
        2: (2, 2),
        9: (4, 2),
    }
    assert with_views(SETTINGS, DataSettings(cameras_per_scan=0), Frames()).views == 1


def test_a_pack_numbers_the_images_of_its_scenes():
    pipeline = Pipeline(Ring(), dataclasses.replace(SETTINGS, views=2, pairs=2))
    sample = pipeline.sample(4)
    capacities = packing.derive_capacities(sample, points=1200, scenes=5)
    step = next(pipeline.steps(capacities, sample[0]))
    batch, scenes = step.batch, step.scenes[0]
    assert present(batch.images).shape == (1, 5, 2, 56, 112, 3)
    start = 0
    for k, scene in enumerate(scenes):
        rows = slice(start, start := start + len(scene.feats))
        views = present(scene.views)
        np.testing.assert_array_equal(present(batch.views)[0, rows], np.where(views < 0, 10, views + 2 * k))
        np.testing.assert_array_equal(present(batch.images)[0, k], scene.image)
    assert (present(batch.views)[0, start:] == 10).all()
    assert present(pipeline.empty_batch(capacities, sample[0]).views).shape == (1, 1200, 2)


def test_a_target_is_the_mean_over_the_views_that_see_the_point():
    """And that of one view is what the view alone would give."""
    rng = np.random.default_rng(0)
    size, (scenes, views, points) = (16, 24), (3, 2, 30)
    tokens = rng.normal(size=(1, scenes, views, 2, 3, 5)).astype(np.float32)
    pixels = rng.integers(0, size, (1, points, 2, 2)).astype(np.int32)
    which = rng.integers(0, scenes * views + 1, (1, points, 2)).astype(np.int32)  # the last is none
    nothing = np.zeros((1, points, 0), np.float32)
    base = Batch(nothing, which[..., 0], np.ones((1, scenes * views), np.int32), nothing, ())
    apart = [
        base._replace(
            scene=which[..., r], pixels=pixels[..., r, :], tokens=(PackedTokens(tokens.reshape(1, 6, 2, 3, 5)),)
        )
        for r in range(2)
    ]
    joint = base._replace(views=which, pixels=pixels, tokens=(PackedTokens(tokens),))
    run = jax.jit(lambda batch: features(Source(5, size), Teacher(), batch))
    one, other, found = (np.asarray(run(jax.tree.map(jnp.asarray, batch))) for batch in (*apart, joint))
    number = np.maximum((which < scenes * views).sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(found, (one + other) / number, rtol=1e-6, atol=1e-6)
