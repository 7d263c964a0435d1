"""Several teachers of one student: their heads, their losses, and a run from a live and a cached one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scalr_jax
from scalr_jax import tasks
from scalr_jax.export.run import export_model
from scalr_jax.interop import teacher as teachers
from scalr_jax.models import vit
from scalr_jax.models.heads import DistillationHead, joined_heads
from scalr_jax.prepare.tokens import Choices, write_tokens
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings
from scalr_jax.train import losses
from scalr_jax.train import teachers as train_teachers
from scalr_jax.train.normalization import FILE
from tests.support.checks import mentions
from tests.support.runs import lines, on_one_device, open_split, small_config

TINY, OTHER = (vit.ViTConfig(8, width, 1, 2, 16, position_grid=(2, 3)) for width in (8, 12))


def test_heads_of_several_teachers_are_one_wider_head():
    x = np.random.default_rng(0).normal(size=(20, 7)).astype(np.float32)
    apart = DistillationHead(10, hidden=5, widths=(6, 4))
    params = {"head": apart.init(jax.random.key(0), x)["params"]}
    joined = joined_heads(params)
    expected = np.asarray(apart.apply({"params": params["head"]}, x))
    found = np.asarray(DistillationHead(10, hidden=10).apply({"params": joined["head"]}, x))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert joined_heads(joined) == joined  # as is
    other = jax.tree.map(lambda y: y + 1.0, params["head"]["out_1"])  # a teacher's head bears on its features alone
    changed = np.asarray(apart.apply({"params": {**params["head"], "out_1": other}}, x))
    np.testing.assert_array_equal(changed[:, :6], expected[:, :6])
    assert (changed[:, 6:] != expected[:, 6:]).all()


def test_dropping_keeps_the_largest_loss_and_each_other_with_its_probability():
    each = jnp.array([0.5, 4.0, 1.0])
    found = jax.jit(jax.vmap(lambda key: losses.dropped(each, 0.25, key)))(jax.random.split(jax.random.key(0), 2000))
    values, counts = np.unique(np.asarray(found), return_counts=True)
    np.testing.assert_array_equal(values, [4.0, 4.5, 5.0, 5.5])
    np.testing.assert_allclose(counts / 2000, [0.25**2, 0.75 * 0.25, 0.75 * 0.25, 0.75**2], atol=0.03)
    assert losses.dropped(each, 0.0, jax.random.key(0)) == 5.5


@pytest.mark.slow
def test_a_run_from_a_live_and_a_cached_teacher(tmp_path, street_cache, monkeypatch):
    on_one_device(monkeypatch)
    monkeypatch.setattr(train_teachers, "STATISTICS_SCENES", 3)
    known = iter([OTHER, TINY])  # of the cache, then of the run
    monkeypatch.setattr(
        teachers, "load_demo_teacher", lambda: (made := next(known), vit.init(made, jax.random.key(1), (8, 8)))
    )
    changes = {"num_steps": 2, "log_every_steps": 1, "mesh.data": 1, "data.num_workers": 0, "data.num_scenes": 4}
    config = small_config(street_cache, **changes, **{"data.scenes_per_shard": 3, "data.max_points": 500})
    settings, cache = read_settings(config), tmp_path / "tokens"
    choices = Choices(settings.teacher, settings.data.image_size, settings.data.antialias, "int8")
    write_tokens(cache, open_split(config, "train", cache=tmp_path), choices)
    config.teacher.checkpoint, config.model.head_hidden = "", 4
    config.teachers = ({"checkpoint": "demo"}, {"cache": str(cache), "normalize": "phi_s", "weight": 0.5})
    config.loss.teacher_dropping = 0.5
    tasks.distill(read_settings(config), tmp_path / "run")
    for line in lines(tmp_path / "run"):
        for kind in ("loss", "loss_constant"):
            whole = line[f"train/{kind}/demo"] + 0.5 * line[f"train/{kind}/tokens"]
            assert line[f"train/{kind}"] == pytest.approx(whole, rel=1e-5)
    model = scalr_jax.load(tmp_path / "run")
    points = np.random.default_rng(0).uniform(-5, 5, (300, 4)).astype(np.float32)
    both = model.distilled(points)
    assert both.shape == (300, 20)
    np.testing.assert_array_equal(model.distilled(points, teacher="tokens"), both[:, 8:])
    with pytest.raises(InputError, match=mentions("sam", "demo, tokens")):
        model.distilled(points, teacher="sam")
    assert export_model(model, "safetensors", tmp_path / "exported", source=tmp_path / "run") < 1e-5
    assert (tmp_path / "exported" / FILE).read_bytes() == (tmp_path / "run" / FILE).read_bytes()
    assert re.search(
        mentions("demo [N, 8]; tokens [N, 12]", "phi_s"), (tmp_path / "exported" / "README.md").read_text()
    )
    config.teachers = (config.teachers[0], {**config.teachers[1], "weight": 1.0})
    with pytest.raises(InputError, match=mentions("run", "teachers", "--workdir")):
        tasks.distill(read_settings(config), tmp_path / "run")
