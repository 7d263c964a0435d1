"""A step with stored tokens is the live step from the tokens on."""

import contextlib

import jax
import numpy as np
import pytest

from scalr_jax import tasks
from scalr_jax.data.scenes import Batch, PackedTokens
from scalr_jax.interop import teacher as teachers
from scalr_jax.models import vit
from scalr_jax.ops.tokens import encode
from scalr_jax.prepare.tokens import Choices, write_tokens
from scalr_jax.runtime import distributed, stopping
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings
from scalr_jax.train import teachers as train_teachers
from scalr_jax.train.normalization import FILE
from scalr_jax.train.teachers import Source, Teacher, features, token_grid
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
        grid = token_grid(TINY, params, batch.images.reshape(-1, *SIZE, 3), which="x")
        found = features(Source(8, SIZE, TINY, "x"), Teacher(params), batch)
        return grid.reshape(SHARDS, SCENES, *grid.shape[1:]), found

    return batch, *jax.device_get(jax.jit(both)(params, batch))


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.0), ("bfloat16", 2.0**-8), ("int8", 0.5001 / 127)])
def test_features_of_stored_tokens_are_the_live_ones(live, dtype, share):
    """To the error of a token, of which a sample is a mean: half a step of its type."""
    batch, grid, expected = live

    def cached(batch, grid):
        values, scale = encode(grid, dtype)
        return features(Source(8, SIZE), Teacher(), batch._replace(images=None, tokens=(PackedTokens(values, scale),)))

    found = np.asarray(jax.jit(cached)(batch, grid))
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= share * np.abs(np.asarray(grid)).max() + 1e-6
    assert not found[np.asarray(batch.scene) == SCENES].any()


@pytest.mark.slow
def test_a_cached_run_has_the_live_losses_resumes_exactly_and_may_move(tmp_path, street_cache, monkeypatch):
    """From float32 tokens of a small teacher, normalised by statistics that a resumed run reads; its weights are those
    of one that was not stopped."""
    on_one_device(monkeypatch)
    monkeypatch.setattr(train_teachers, "STATISTICS_SCENES", 6)
    params = vit.init(TINY, jax.random.key(1), SIZE)
    monkeypatch.setattr(teachers, "load_demo_teacher", lambda: (TINY, params))
    changes = {"num_steps": 2, "checkpoint_every_steps": 1, "log_every_steps": 1, "mesh.data": 1}
    changes: dict = {**changes, "teacher.normalize": "phi_s"}
    changes |= {"data.num_workers": 0, "data.scenes_per_shard": 3, "data.num_scenes": 5, "data.max_points": 500}
    config = small_config(street_cache, **changes, **{"teacher.checkpoint": "demo"})
    settings, cache = read_settings(config), tmp_path / "tokens"
    choices = Choices(settings.teacher, settings.data.image_size, settings.data.antialias, "float32")
    write_tokens(cache, open_split(config, "train", cache=tmp_path), choices)
    tasks.distill(settings, tmp_path / "live")

    def cached(workdir, cache, **more):
        given = {"teacher.cache": str(cache), "teacher.checkpoint": "", **changes, **more}
        return tasks.distill(read_settings(small_config(street_cache, **given)), tmp_path / workdir)

    whole = cached("whole", cache)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "preemption", lambda: contextlib.nullcontext(lambda step: step == 1))
        with pytest.raises(stopping.Preempted):
            cached("run", cache)
    monkeypatch.setattr(train_teachers, "STATISTICS_SCENES", 1)  # nothing is measured anew
    cache.rename(tmp_path / "moved")
    state = cached("run", tmp_path / "moved")
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (whole.params, whole.opt_state))
    live, found = losses(tmp_path / "live"), losses(tmp_path / "run")
    assert list(found) == [1, 2]
    assert found == pytest.approx(live, rel=1e-5)
    (tmp_path / "run" / FILE).unlink()
    with pytest.raises(InputError, match=mentions(FILE, "missing", "workdir")):
        cached("run", tmp_path / "moved")
    images = {"streets/train/0": np.ones((14, 28, 8), np.float32)}
    header = {"image_size": list(config.data.image_size), "teacher": {"feature": "x_pre_norm", "sha256": "ab"}}
    with pytest.raises(InputError, match=mentions("teacher.cache_digest", "--workdir")):
        cached("run", write_cache(tmp_path / "other", images, **header))
    for key, value in (("data.image_size", (56, 112)), ("teacher.feature", "x"), ("teacher.checkpoint", __file__)):
        with pytest.raises(InputError, match=mentions("moved", "another teacher or of other images")):
            cached("refused", tmp_path / "moved", **{key: value})
        assert not (tmp_path / "refused").exists()
