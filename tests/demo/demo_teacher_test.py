"""The packaged teacher loads, is small and tells things apart; its training step learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scalr_jax.config import get_config
from scalr_jax.data.streets import sensors as street_sensors
from scalr_jax.data.streets.streets import split_seed
from scalr_jax.data.streets.views import render_views
from scalr_jax.demo import teacher as demo_teacher
from scalr_jax.interop.teacher import ASSET, load_demo_teacher, load_teacher, make_teacher, save_teacher
from scalr_jax.models import vit
from scalr_jax.settings import read_settings
from tests.support.paths import ROOT
from tests.support.runs import config_of

IMAGE_SIZE = (112, 224)
SMALL = {"patch_size": 8, "width": 32, "depth": 1, "num_heads": 2, "hidden": 64, "position_grid": (14, 28)}


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    return render_views(tmp_path_factory.mktemp("views"), 2, IMAGE_SIZE, 256, 0)


@pytest.mark.slow
def test_the_asset_is_small_and_its_features_are_spread():
    asset = ROOT / "scalr_jax/assets" / ASSET
    assert asset.stat().st_size <= 6e6
    vit_config, params = load_demo_teacher()
    seeds = [split_seed("validation", index) for index in range(4)]
    images = np.stack([street_sensors.render(seed, "beams32", IMAGE_SIZE).image for seed in seeds])
    tokens = vit.features(vit_config, params, jnp.asarray(images / 255, jnp.float32))
    tokens = np.asarray(vit.patch_tokens(tokens, vit_config)).reshape(-1, vit_config.width)
    assert np.isfinite(tokens).all()
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    assert (unit @ unit.T).mean() < 0.5


def test_saving_and_loading_keeps_config_and_parameters(tmp_path):
    vit_config = vit.ViTConfig(**SMALL)
    params = vit.init(vit_config, jax.random.key(0), IMAGE_SIZE)
    save_teacher(tmp_path / "teacher.safetensors", vit_config, params)
    loaded_config, loaded = load_teacher(tmp_path / "teacher.safetensors")
    assert loaded_config == vit_config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), params, loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]  # nothing half-written is left


def test_a_teacher_of_ones_own_is_what_a_distillation_is_given(tmp_path):
    vit_config = vit.ViTConfig(**SMALL)
    path = tmp_path / ASSET
    save_teacher(path, vit_config, vit.init(vit_config, jax.random.key(0), IMAGE_SIZE))
    config = get_config()
    config.teacher.checkpoint = str(path)
    config.data.image_size = IMAGE_SIZE
    settings = read_settings(config)
    assert make_teacher(settings.teacher, settings.data.image_size, "cpu")[0] == vit_config


@pytest.mark.slow
def test_views_hold_no_sky_and_no_label(views):
    assert not any("label" in field for field in views._fields)
    assert (views.depth > 0).all()
    assert (views.size > 0).all()
    np.testing.assert_allclose(np.linalg.norm(views.normal, axis=-1), 1, atol=1e-3)


@pytest.mark.slow
def test_mirroring_keeps_pixels_on_their_colour(views):
    batch = demo_teacher.make_batch(views, 6, np.random.default_rng(0))
    picked = batch.images[np.arange(6)[:, None], batch.pixels[..., 0], batch.pixels[..., 1]]
    correlation = np.corrcoef(picked.ravel(), batch.albedo.ravel())[0, 1]
    assert correlation > 0.5


@pytest.mark.slow
def test_the_loss_falls_and_reaches_every_parameter(views):
    config = config_of("demo_teacher")
    weights = config.teacher_training.weights.to_dict()
    vit_config = vit.ViTConfig(**SMALL)
    keys = jax.random.split(jax.random.key(0))
    state = {
        "vit": vit.init(vit_config, keys[0], IMAGE_SIZE),
        "heads": demo_teacher.init_heads(vit_config.width, keys[1]),
    }
    scales = dict.fromkeys(demo_teacher.CONTINUOUS, 1.0)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(state, moments, batch):
        gradient, metrics = jax.grad(demo_teacher.loss, has_aux=True)(state, vit_config, batch, scales, weights)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(state, updates), moments, metrics["loss"], gradient

    moments = optimizer.init(state)
    batch = demo_teacher.make_batch(views, 2, np.random.default_rng(0))
    losses, gradient = [], state
    for _ in range(12):
        state, moments, value, gradient = step(state, moments, batch)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    unused = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(gradient) if not g.any()]
    assert all("norm']['layer" in name for name in unused), unused  # the last norm comes after the features
