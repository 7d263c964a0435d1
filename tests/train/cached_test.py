"""A step with stored tokens is the live step from the tokens on."""

import contextlib

import jax
import numpy as np
import pytest

from scalr_jax import tasks
from scalr_jax.data.scenes import Batch
from scalr_jax.data.tokens.dataset import images_of
from scalr_jax.models import vit
from scalr_jax.ops.tokens import encode
from scalr_jax.runtime import distributed, stopping
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings
from scalr_jax.train import steps
from tests.support.checks import mentions
from tests.support.runs import losses, on_one_device, open_split, small_config
from tests.support.token_files import write_cache

TINY = vit.ViTConfig(8, 8, 1, 2, 16, position_grid=(2, 3))
SHARDS, SCENES, POINTS, SIZE = 2, 3, 40, (16, 24)


@pytest.fixture(scope="module")
def live():
    """A batch with images, the tokens of these and the teacher's feature of each point."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (SHARDS, SCENES, *SIZE, 3), np.uint8)
    scene = np.sort(rng.integers(0, SCENES + 1, (SHARDS, POINTS)).astype(np.int32))  # the last is padding
    pixels = rng.integers(0, SIZE, (SHARDS, POINTS, 2)).astype(np.int32)
    points = np.zeros((SHARDS, SCENES), np.int32)
    nothing = np.zeros((SHARDS, POINTS, 0), np.float32)
    batch = jax.device_put(Batch(nothing, scene, points, nothing, (), images, pixels))
    params = vit.init(TINY, jax.random.key(0), SIZE)

    def both(params, batch):
        grid = steps.token_grid(TINY, params, batch.images.reshape(-1, *SIZE, 3), which="x")
        features = steps.teacher_features(TINY, params, batch, which="x")
        return grid.reshape(SHARDS, SCENES, *grid.shape[1:]), features

    return batch, *jax.device_get(jax.jit(both)(params, batch))


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.0), ("bfloat16", 2.0**-8), ("int8", 0.5001 / 127)])
def test_features_of_stored_tokens_are_the_live_ones(live, dtype, share):
    """To the error of a token, of which a sample is a mean: half a step of its type."""
    batch, grid, expected = live

    def cached(batch, grid):
        values, scale = encode(grid, dtype)
        return steps.cached_features(batch._replace(images=None, tokens=values, token_scale=scale), SIZE)

    found = np.asarray(jax.jit(cached)(batch, grid))
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= share * np.abs(np.asarray(grid)).max() + 1e-6
    assert not found[np.asarray(batch.scene) == SCENES].any()


@pytest.mark.slow
def test_a_cached_run_needs_no_teacher_resumes_and_may_move(tmp_path, street_cache, monkeypatch):
    """That its losses are the live ones follows from the features above; docs/measurements/tokens.md has 20 steps."""
    on_one_device(monkeypatch)
    changes = {"num_steps": 2, "checkpoint_every_steps": 1, "log_every_steps": 1, "mesh.data": 1}
    changes |= {"data.num_workers": 0, "data.scenes_per_shard": 3, "data.num_scenes": 5, "data.max_points": 500}
    config = small_config(street_cache, **changes)
    streets, rng, cache = open_split(config, "train", cache=tmp_path), np.random.default_rng(0), tmp_path / "tokens"
    images = {name: rng.standard_normal((2, 3, 8), np.float32) for _, _, name in images_of(streets)}
    header = {"image_size": list(config.data.image_size), "teacher": {"feature": "x_pre_norm", "sha256": "ab"}}
    write_cache(cache, images, **header)

    def cached(workdir, cache, **more):
        given = {"teacher.cache": str(cache), "teacher.checkpoint": "", **changes, **more}
        return tasks.distill(read_settings(small_config(street_cache, **given)), tmp_path / workdir)

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "preemption", lambda: contextlib.nullcontext(lambda step: step == 1))
        with pytest.raises(stopping.Preempted):
            cached("run", cache)
    cache.rename(tmp_path / "moved")
    state = cached("run", tmp_path / "moved")
    assert list(losses(tmp_path / "run")) == [1, 2]
    assert state.params["head"]["out"]["kernel"].shape[1] == 8
    images["streets/train/0"][0, 0, 0] += 1
    with pytest.raises(InputError, match=mentions("teacher.cache_digest", "--workdir")):
        cached("run", write_cache(tmp_path / "other", images, **header))
    for key, value in (("data.image_size", (56, 112)), ("teacher.feature", "x"), ("teacher.checkpoint", __file__)):
        with pytest.raises(InputError, match=mentions("moved", "another teacher or of other images")):
            cached("refused", tmp_path / "moved", **{key: value})
        assert not (tmp_path / "refused").exists()
