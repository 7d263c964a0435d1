"""The teacher: published numbers through `interop_vit_test.py`; here its laws, against a ViT in plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.models import vit
from scalr_jax.ops.positions import resample_matrix, rotary_angles, rotary_periods
from tests.support.checks import mentions

SMALL = vit.ViTConfig(patch_size=4, width=32, depth=3, num_heads=2, hidden=48, position_grid=(3, 5))
SIZE = (8, 12)  # 2 x 3 patches
IMAGES = np.random.default_rng(0).random((3, *SIZE, 3), np.float32)

VARIANTS = {
    "mlp": SMALL,
    "swiglu": dataclasses.replace(SMALL, ffn="swiglu"),
    "registers": dataclasses.replace(SMALL, num_registers=4, position_interpolation="antialias"),
    "rotary": dataclasses.replace(SMALL, positions="rotary", num_registers=2),
    "no layer scale": dataclasses.replace(SMALL, layer_scale=False),
}


@pytest.fixture(scope="module", autouse=True)
def highest():
    with jax.default_matmul_precision("highest"):
        yield


features = jax.jit(vit.features, static_argnums=0, static_argnames="which")


def make_params(config, seed=0):
    """Random parameters, with no bias zero and no scale one."""
    shapes = jax.eval_shape(lambda: vit.init(config, jax.random.key(0), SIZE))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(leaf.ndim < 3, 0.15, leaf.shape).astype(np.float32), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_tokens(config):
    params = make_params(config)
    tokens = features(config, params, IMAGES)
    assert tokens.shape == (3, vit.num_tokens(config, SIZE), 32)
    assert tokens.dtype == jnp.float32
    assert vit.patch_tokens(tokens, config).shape == (3, 6, 32)
    others = np.concatenate([IMAGES[:1], 1 - IMAGES[1:]])  # images do not mix
    np.testing.assert_allclose(features(config, params, others)[0], tokens[0], atol=1e-5)
    assert np.abs(features(config, params, others)[1] - tokens[1]).max() > 0.1


def test_x_is_the_norm_of_x_pre_norm():
    params = make_params(SMALL)
    tokens = np.asarray(features(SMALL, params, IMAGES), np.float64)
    centered = tokens - tokens.mean(-1, keepdims=True)
    normal = centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + SMALL.norm_eps)
    layer = params["norm"]["layer"]
    x = features(SMALL, params, IMAGES, which="x")
    np.testing.assert_allclose(x, normal * layer["scale"] + layer["bias"], atol=1e-5)


def test_without_positions_patches_are_a_set():
    """Permuting patches permutes tokens: only positions tell where a patch is."""
    config = dataclasses.replace(SMALL, position_grid=(2, 3))
    params = make_params(config)
    params["positions"] = np.zeros_like(params["positions"])
    flipped = IMAGES.reshape(3, 2, 4, 3, 4, 3)[:, ::-1, :, ::-1].reshape(IMAGES.shape)
    tokens, turned = features(config, params, IMAGES), features(config, params, flipped)
    np.testing.assert_allclose(tokens[:, 0], turned[:, 0], atol=1e-5)
    np.testing.assert_allclose(tokens[:, 1:], turned[:, :0:-1], atol=1e-5)


def test_an_own_grid_reads_the_table_as_it_is():
    config = dataclasses.replace(SMALL, position_grid=(2, 3))
    table = jnp.arange(6.0 * 32).reshape(6, 32)
    np.testing.assert_array_equal(vit.resample_positions(table, config, (2, 3)), table)


# F.interpolate(TABLE, mode="bicubic") of PyTorch 2.13 to 2 x 3 and to the first row of 7 x 6.
TABLE = np.array([[0, 1, 4, 9, -16], [2, 0, 1, 3, 1], [5, -7, 2, 2, 0], [1, 1, 3, -4, 2], [0, 6, -2, 1, 8.0]])
INTERPOLATED = {
    "dinov2": [[1.0484267, 1.5536997, 0.4762137], [0.9606701, 3.0373685, -1.1342006]],
    "size": [[1.1129922, 1.5742188, -0.3153925], [1.2337245, 1.9726562, 1.0404348]],
    "antialias": [[0.3945749, 2.3285787, -0.9724980], [1.3615172, 0.2686981, 1.9347913]],
}
FIRST_ROWS = {
    "dinov2": [-0.2305738, 0.4315259, 2.4052014, 8.1726503, 5.5486789, -17.5314808],
    "size": [-0.2223545, 0.4656411, 2.4896297, 8.7369871, 3.9503024, -18.7462158],
    "antialias": [-0.1598684, 0.5840806, 2.6319783, 7.7807813, 3.8740833, -17.9625645],
}


@pytest.mark.parametrize("interpolation", INTERPOLATED)
def test_position_interpolation(interpolation):
    def resample(rows, columns):
        return resample_matrix(5, rows, interpolation) @ TABLE @ resample_matrix(5, columns, interpolation).T

    np.testing.assert_allclose(resample(2, 3), INTERPOLATED[interpolation], atol=1e-5)
    np.testing.assert_allclose(resample(7, 6)[0], FIRST_ROWS[interpolation], atol=1e-5)
    for num_out in (1, 2, 5, 16, 74):
        np.testing.assert_allclose(resample_matrix(5, num_out, interpolation).sum(1), 1, atol=1e-6)


def test_rotary_positions_are_relative():
    """The product of a turned query and key depends on where they are to one another, not on where they are."""
    angles = rotary_angles((4, 6), rotary_periods(16, 100.0))  # [24, 8]
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
    q, k = (np.asarray(vit.rotate(np.repeat(x, 24, axis=1), angles))[0, :, 0].reshape(4, 6, 16) for x in (q, k))
    products = np.einsum("ijd,kld->ijkl", q, k)
    np.testing.assert_allclose(products[0, 0, 1, 2], products[2, 3, 3, 5], atol=1e-5)
    np.testing.assert_allclose(products[3, 1, 0, 4], products[3, 2, 0, 5], atol=1e-5)
    assert abs(products[0, 0, 1, 2] - products[0, 0, 2, 1]) > 1e-3


def test_rotary_positions_leave_cls_and_registers():
    angles = rotary_angles((2, 3), rotary_periods(16, 100.0))
    x = np.random.default_rng(0).normal(size=(2, 9, 3, 16)).astype(np.float32)
    turned = vit.rotate(x, angles)
    np.testing.assert_array_equal(turned[:, :3], x[:, :3])
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_blocks_are_one_scan():
    """The program has the same size at any depth, so compile time does not grow with it."""

    def num_lines(depth):
        config = dataclasses.replace(SMALL, depth=depth)
        params = jax.eval_shape(lambda: vit.init(config, jax.random.key(0), SIZE))
        assert params["blocks"]["attention"]["qkv"]["kernel"].shape == (depth, 32, 96)
        return len(jax.jit(lambda p, x: vit.features(config, p, x)).lower(params, IMAGES).as_text().splitlines())

    assert num_lines(2) == num_lines(40)


def test_bfloat16_follows_the_parameters_and_keeps_the_stream_in_float32():
    params = make_params(SMALL)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    exact = features(SMALL, params, IMAGES)
    for config, weights in ((SMALL, half), (dataclasses.replace(SMALL, dtype="bfloat16"), params)):
        out = features(config, weights, IMAGES)
        assert out.dtype == jnp.float32
        assert 0 < np.abs(out - exact).max() / np.abs(exact).max() < 0.02
    full = features(dataclasses.replace(SMALL, dtype="float32"), half, IMAGES)
    rounded = jax.tree.map(lambda p: p.astype(np.float32), half)
    np.testing.assert_allclose(full, features(SMALL, rounded, IMAGES), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "rotary"])
def test_every_parameter_learns(name):
    config = VARIANTS[name]
    params = make_params(config)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.square(vit.features(config, params, IMAGES, which="x") - 1).mean()

    before, gradient = loss(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-6, path
    if config.positions == "learned":  # softmax does not see what is added to all keys, unless they are turned
        assert np.abs(gradient["blocks"]["attention"]["qkv"]["bias"][:, 32:64]).max() < 1e-6
    after, _ = loss(jax.tree.map(lambda p, g: p - 1e-2 * g, params, gradient))
    assert after < before


def test_initial_parameters():
    params = vit.init(dataclasses.replace(SMALL, width=64), jax.random.key(0), SIZE)
    kernel = params["blocks"]["attention"]["qkv"]["kernel"]
    assert 0.015 < kernel.std() < 0.025
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01  # each block its own key
    assert not params["blocks"]["mlp"]["linear_1"]["bias"].any()
    assert (params["blocks"]["scale_1"] == 1).all()
    assert params["positions"].shape == (15, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, mentions("width", 32, "num_heads", 3)),
        ({"ffn": "relu"}, mentions("ffn", "relu", "swiglu")),
        ({"positions": "none"}, mentions("positions", "none")),
        ({"position_interpolation": "nearest"}, mentions("nearest", "dinov2, size, antialias")),
        ({"dtype": "float16"}, mentions("dtype", "float16")),
        ({"positions": "rotary", "num_heads": 16}, mentions("4 channels", 2)),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_bad_input():
    params = make_params(SMALL)
    with pytest.raises(ValueError, match=mentions("which", "cls", "x_pre_norm, x")):
        vit.features(SMALL, params, IMAGES, which="cls")
    with pytest.raises(ValueError, match=mentions((8, 11), "patch", "4")):
        vit.features(SMALL, params, IMAGES[:, :, :11])
    with pytest.raises(ValueError, match=mentions("nearest", "dinov2, size, antialias")):
        resample_matrix(5, 3, "nearest")
