"""Scenes with tokens are those with images, but for the image: same cameras, points, pixels, bad frames, order."""

import dataclasses

import numpy as np
import pytest

from scalr_jax.data import packing
from scalr_jax.data.build import make_dataset
from scalr_jax.data.joined import Joined
from scalr_jax.data.pipeline import Pipeline
from scalr_jax.data.readers import files
from scalr_jax.data.readers.pandaset import PandaSet
from scalr_jax.data.readers.records import Records
from scalr_jax.data.tokens.dataset import WithTokens, image_of, images_of
from scalr_jax.data.tokens.store import TokenStore, look
from scalr_jax.runtime.errors import InputError
from tests.support import raw_datasets as raw
from tests.support.checks import mentions, present
from tests.support.prepared_datasets import CAMERAS, SETTINGS, assert_equal, make, make_config
from tests.support.token_files import to_bfloat16, write_cache

SHUFFLED = dataclasses.replace(SETTINGS, augmentation="published", max_points=500)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Raw PandaSet, the same as records, and a cache whose tokens say the number of their image."""
    root = tmp_path_factory.mktemp("tiny")
    raw.write_pandaset(root / "pandaset", numbers=(2, 5, 7), cameras=CAMERAS)
    records = make("pandaset", root, root / "records")
    names = [name for _, _, name in images_of(Records(records))]
    images = {name: np.full((2, 4, 3), k, np.float32) for k, name in enumerate(names)}
    return root / "pandaset", records, images, write_cache(root / "cache", images)


def opened(tiny, kind):
    return PandaSet(tiny[0], sensor="pandar64") if kind == "raw" else Records(tiny[1])


@pytest.mark.parametrize("kind", ["raw", "records"])
def test_scenes_are_the_same_but_for_the_image(tiny, kind, monkeypatch):
    live = Pipeline(opened(tiny, kind), SHUFFLED, seed=3)
    cached = Pipeline(WithTokens(opened(tiny, kind), TokenStore(tiny[3])), SHUFFLED, seed=3)
    expected = [live.order()[k] for k in range(9)]
    monkeypatch.setattr(files, "decode_image", None)  # nothing is decoded
    found = [cached.order()[k] for k in range(9)]
    for one, other in zip(expected, found, strict=True):
        assert one.error == other.error is None
        assert other.image is None
        (tokens,) = other.tokens
        assert_equal(one._replace(image=None), other._replace(tokens=()))
        np.testing.assert_array_equal(tokens.values, to_bfloat16(tiny[2][other.name]))
    assert len({scene.name for scene in found}) > 4


def test_a_pack_has_the_stored_tokens_of_its_scenes(tiny):
    pipeline = Pipeline(WithTokens(Records(tiny[1]), TokenStore(tiny[3])), SHUFFLED)
    sample = pipeline.sample(4)
    capacities = packing.derive_capacities(sample, points=2000, scenes=3)
    step = next(pipeline.steps(capacities, sample[0]))
    ((tokens, scale),) = step.batch.tokens
    assert (tokens.shape, tokens.dtype) == ((1, 3, 2, 4, 3), np.uint16)
    assert step.batch.images is scale is None
    for slot, scene in enumerate(step.scenes[0]):
        np.testing.assert_array_equal(tokens[0, slot], to_bfloat16(tiny[2][scene.name]))
    assert not tokens[0, len(step.scenes[0]) :].any()
    empty = pipeline.empty_batch(capacities, sample[0])
    assert empty.tokens[0].values.shape == tokens.shape


def test_several_views_have_the_tokens_of_their_cameras_beside_or_without_images(tiny):
    settings = dataclasses.replace(SHUFFLED, views=3)
    for images in (False, True):
        dataset = WithTokens(opened(tiny, "raw"), TokenStore(tiny[3]), TokenStore(tiny[3]), images=images)
        scene = Pipeline(dataset, settings, seed=3).order()[0]
        assert (scene.image is not None) == images
        names = [name for camera in dataset.cameras if (name := f"{scene.name}/{camera}") in tiny[2]]
        expected = np.stack([to_bfloat16(tiny[2][name]) for name in names])
        assert len(names) == 3
        for tokens in scene.tokens:
            np.testing.assert_array_equal(tokens.values, expected)
        assert len(scene.tokens) == 2


def test_of_a_joined_dataset_the_weights_stay(tiny):
    config = make_config(tiny[1].parent, dataset="pandaset", sensors=("pandar64",), weights=(1.0,))
    from scalr_jax.settings import read_settings

    data = read_settings(config).data
    dataset = make_dataset(data, "train", task="distill", seed=0, cache=tiny[0], tokens=(TokenStore(tiny[3]),))
    assert isinstance(dataset, Joined)
    assert dataset.weights == (1.0,)
    assert dataset.frame(0, np.random.default_rng(0)).tokens


def test_frames_without_tokens_are_bad_and_counted(tiny, tmp_path):
    names = list(tiny[2])
    folder = write_cache(tmp_path / "bad", {name: tiny[2][name] for name in names[:-1]})
    dataset = Records(tiny[1])
    with pytest.raises(InputError, match=mentions(len(names), len(names) - 1, names[-1], "--teacher")):
        WithTokens(dataset, TokenStore(folder))
    store = TokenStore(folder)
    store.rows[names[-1]] = (-1, -1)  # as a header says that lists it as bad
    (index,) = [index for index, _, name in images_of(dataset) if name == names[-1]]
    pipelines = [Pipeline(WithTokens(Records(tiny[1]), store), SHUFFLED, seed=seed) for seed in range(8)]
    bad = [scene for pipeline in pipelines for k in range(3) if (scene := pipeline.order()[k]).error]
    assert {scene.name for scene in bad} == {str(index)}
    assert all("no tokens" in present(scene.error) for scene in bad)


def test_a_cache_of_other_images_of_the_same_names_is_refused(tiny, tmp_path):
    dataset, (name, *_) = Records(tiny[1]), tiny[2]
    index, camera, _ = next(image for image in images_of(dataset) if image[2] == name)
    seen = look(image_of(dataset, index, camera))
    for shift, refused in ((3, False), (30, True)):
        folder = write_cache(tmp_path / str(shift), tiny[2])
        store = TokenStore(folder)
        next(iter(store.headers.values()))["shards"][0]["look"] = [value + shift for value in seen]
        if refused:
            with pytest.raises(InputError, match=mentions(name, "other images")):
                WithTokens(Records(tiny[1]), store)
        else:
            WithTokens(Records(tiny[1]), store)
