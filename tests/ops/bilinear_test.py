"""Sampling the token grid at pixels equals upsampling the whole map and reading it."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scalr_jax.ops.bilinear import sample_tokens

sample_tokens_jit = jax.jit(sample_tokens, static_argnums=3)


def upsample(tokens, image_size):
    """The whole map, aligned corners: [B, th, tw, C] -> [B, h, w, C] float64."""
    out = tokens.astype(np.float64)
    for axis, num_out in ((1, image_size[0]), (2, image_size[1])):
        num_in = out.shape[axis]
        position = np.linspace(0, num_in - 1, num_out)
        before = np.minimum(position.astype(int), max(num_in - 2, 0))
        after = np.minimum(before + 1, num_in - 1)
        shape = [1, 1, 1, 1]
        shape[axis] = num_out
        weight = (position - before).reshape(shape)
        out = out.take(before, axis) * (1 - weight) + out.take(after, axis) * weight
    return out


@settings(max_examples=60, deadline=None)
@given(
    batch=st.sampled_from([1, 3]),
    grid=st.sampled_from([(1, 1), (4, 1), (2, 3), (7, 5)]),  # few shapes: each is a compilation
    patch=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_reading_the_upsampled_map(batch, grid, patch, seed):
    rng = np.random.default_rng(seed)
    image_size = (grid[0] * patch[0], grid[1] * patch[1])
    tokens = rng.normal(size=(batch, *grid, 3)).astype(np.float32)
    image = rng.integers(0, batch + 1, 12)  # `batch` is padding
    pixels = rng.integers(0, image_size, (12, 2))
    full = np.concatenate([upsample(tokens, image_size), np.zeros((1, *image_size, 3))])
    out = sample_tokens(tokens, image, pixels, image_size)
    np.testing.assert_allclose(out, full[image, pixels[:, 0], pixels[:, 1]], atol=1e-5)


def test_published_upsampling(golden):
    arrays = golden("teacher_vit")
    tokens = arrays["x_pre_norm"][:, 1:].reshape(1, 4, 8, 48)
    rows, columns = np.meshgrid(np.arange(0, 56, 5), np.arange(0, 112, 5), indexing="ij")
    pixels = np.stack([rows, columns], -1).reshape(-1, 2)
    out = sample_tokens_jit(tokens, np.zeros(len(pixels), int), pixels, (56, 112))
    expected = arrays["upsampled"][0].reshape(48, -1).T
    assert np.abs(out - expected).max() / np.abs(expected).max() < 1e-6


def test_corners_are_corner_tokens_and_a_map_of_full_size_is_read_exactly():
    tokens = np.random.default_rng(0).normal(size=(1, 3, 5, 2)).astype(np.float32)
    corners = np.array([[0, 0], [0, 69], [41, 0], [41, 69]])
    out = sample_tokens_jit(tokens, np.zeros(4, int), corners, (42, 70))
    np.testing.assert_array_equal(out, tokens[0, [0, 0, 2, 2], [0, 4, 0, 4]])
    pixels = np.argwhere(np.ones((3, 5)))
    out = sample_tokens_jit(tokens, np.zeros(15, int), pixels, (3, 5))
    np.testing.assert_array_equal(out, tokens.reshape(15, 2))


def test_padding_is_zero_whatever_its_pixel_and_has_no_gradient():
    tokens = np.ones((2, 3, 4, 5), np.float32)
    image = np.array([0, 2, 2, 1])
    pixels = np.array([[0, 0], [-(2**31), 2**31 - 1], [999, 999], [5, 7]])
    out = sample_tokens_jit(tokens, image, pixels, (6, 8))
    np.testing.assert_array_equal(out, np.repeat([[1.0], [0.0], [0.0], [1.0]], 5, axis=1))
    gradient = jax.jit(jax.grad(lambda t: sample_tokens(t, image, pixels, (6, 8)).sum()))(tokens)
    assert np.asarray(gradient).sum() == 10  # two pairs of five channels
    nothing = sample_tokens_jit(np.full_like(tokens, np.nan), image[1:3], pixels[1:3], (6, 8))
    np.testing.assert_array_equal(nothing, 0)


def test_shards_are_apart_under_vmap_and_jit():
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(4, 2, 3, 5, 6)).astype(np.float32)  # [D, S, th, tw, C]
    image, pixels = rng.integers(0, 3, (4, 9)), rng.integers(0, (12, 20), (4, 9, 2))
    sample = jax.jit(jax.vmap(lambda t, i, p: sample_tokens(t, i, p, (12, 20))))
    out = sample(tokens, image, pixels)
    for d in range(4):
        np.testing.assert_allclose(out[d], sample_tokens_jit(tokens[d], image[d], pixels[d], (12, 20)), atol=1e-6)


def test_bfloat16_tokens_are_mixed_in_float32():
    tokens = np.random.default_rng(2).normal(size=(1, 4, 4, 8)).astype(jnp.bfloat16)
    image, pixels = np.zeros(20, int), np.random.default_rng(3).integers(0, 32, (20, 2))
    out = sample_tokens_jit(tokens, image, pixels, (32, 32))
    expected = sample_tokens_jit(tokens.astype(np.float32), image, pixels, (32, 32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, np.asarray(expected).astype(jnp.bfloat16))
