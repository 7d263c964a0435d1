"""The occupied-cells form equals the dense grid: outputs and gradients, on random and adversarial occupancy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalr_jax.data.grids import plane_tables
from scalr_jax.models.layers import normalize
from scalr_jax.models.waffleiron import flatten_normalized
from scalr_jax.ops import cell_conv, cells
from scalr_jax.ops.neighbors import Form, neighbor_max
from tests.support.cell_planes import (
    ADVERSARIAL,
    AREA,
    CELLS,
    CHANNELS,
    GRID,
    POINTS,
    WEIGHTS,
    dense_gradient,
    gradients,
    mixed_dense,
    packed_plane,
)


@jax.jit
def mixed_cells(points, plane, kernel1, bias, kernel2):
    table = cells.flatten(points, plane)
    halo = jax.nn.relu(cell_conv.conv_taps(table, plane.halo_taps, plane.cell_taps, kernel1) + bias)
    return cells.inflate(cell_conv.conv_taps(halo, plane.cell_taps, plane.halo_taps, kernel2), plane)


cells_gradient = gradients(mixed_cells, WEIGHTS)


def check_agreement(positions, seed):
    rng = np.random.default_rng(seed)
    plane = packed_plane(positions)
    points = rng.normal(size=(POINTS, CHANNELS)).astype(np.float32)
    rest = [rng.normal(size=shape).astype(np.float32) for shape in ((9, CHANNELS), (CHANNELS,), (9, CHANNELS))]
    ours, reference = mixed_cells(points, plane, *rest), mixed_dense(points, plane, *rest)
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(ours)[sum(map(len, positions)) :] == 0)
    for a, b in zip(*(gradient(points, plane, *rest) for gradient in (cells_gradient, dense_gradient)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_cells_equal_dense_on_adversarial_occupancy(name):
    check_agreement(ADVERSARIAL[name], 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, AREA - 1), max_size=POINTS // 2),
    st.lists(st.integers(0, AREA - 1), max_size=POINTS // 2),
    st.integers(0, 1000),
)
def test_cells_equal_dense(first, second, seed):
    check_agreement((first, second), seed)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, AREA - 1), min_size=1, max_size=30))
def test_tap_tables_are_each_others_transpose(positions):
    plane = plane_tables(np.array(positions), GRID)
    m, u = len(plane.position), len(plane.halo_taps)
    there = {(row, plane.halo_taps[row, t], t) for row in range(u) for t in range(9) if plane.halo_taps[row, t] >= 0}
    back = {(plane.cell_taps[row, t], row, 8 - t) for row in range(m) for t in range(9) if plane.cell_taps[row, t] >= 0}
    assert there == back


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, AREA - 1), min_size=1, max_size=30))
def test_the_halo_is_the_dilation(positions):
    plane = plane_tables(np.array(positions), GRID)
    near = np.zeros(GRID, bool)
    for i, j in zip(*np.divmod(np.array(positions), GRID[1]), strict=True):
        near[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] = True
    np.testing.assert_array_equal(plane.halo_position, np.flatnonzero(near))
    np.testing.assert_array_equal(plane.position, np.unique(positions))


def test_flatten_is_the_mean():
    plane = packed_plane(([4, 4, 9], [4]))
    points = np.arange(POINTS * CHANNELS, dtype=np.float32).reshape(POINTS, CHANNELS)
    table = np.asarray(cells.flatten(points, plane))
    np.testing.assert_allclose(table[:3], [points[:2].mean(0), points[2], points[3]], rtol=1e-5)
    assert np.all(table[3:] == 0)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_normalized_rows_are_summed_in_blocks_as_at_once(norm):
    """Outputs and gradients; padded rows may hold anything."""
    plane = packed_plane(([4, 4, 9, 4, 29], [4, 0, 0]))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(POINTS, CHANNELS)).astype(np.float32)
    mask = jnp.arange(POINTS) < 8
    x[8:] = np.nan
    x = jnp.asarray(x)
    statistics = (rng.normal(size=CHANNELS), rng.uniform(0.5, 2, size=CHANNELS)) if norm == "batch" else None
    statistics = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), statistics)
    weights = rng.normal(size=(CELLS, CHANNELS)).astype(np.float32)

    def plain(x, statistics):
        return cells.flatten(normalize(x, mask, statistics), plane)

    def in_blocks(x, statistics):
        return flatten_normalized(x, mask, statistics, plane, jnp.float32, 6)

    np.testing.assert_allclose(jax.jit(in_blocks)(x, statistics), plain(x, statistics), rtol=1e-5, atol=1e-5)
    found, wanted = (
        jax.jit(jax.grad(lambda *a, function=function: jnp.sum(weights * function(*a)), argnums=(0, 1)))(x, statistics)
        for function in (in_blocks, plain)
    )
    assert np.abs(np.asarray(wanted[0])).max() > 0.1
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def neighbor_max_reference(offsets, matrix, bias, kernel):
    """The plain form of `neighbor_max`, with everything in memory at once."""
    hidden = jax.nn.relu(jnp.einsum("pkf,fc->pkc", offsets, matrix) + bias)
    return jnp.einsum("pkc,cd->pkd", hidden, kernel).max(axis=1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_neighbor_max_equals_its_reference(seed):
    rng = np.random.default_rng(seed)
    offsets = rng.normal(size=(20, 4, 5)).astype(np.float32)
    arguments = [rng.normal(size=shape).astype(np.float32) for shape in ((5, 8), (8,), (8, 6))]
    weights = rng.normal(size=(20, 6)).astype(np.float32)
    (out, gradients), (wanted, wanted_gradients) = _both_neighbor_max(offsets, arguments, weights)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@jax.jit
def _both_neighbor_max(offsets, arguments, weights):
    """Outputs, and gradients of their weighted sum, of the function and of its reference."""

    def of(function):
        out, pull = jax.vjp(lambda *a: function(offsets, *a), *arguments)
        return out, pull(weights)

    return of(lambda *a: neighbor_max(*a, Form(jnp.float32, 2))), of(neighbor_max_reference)


def test_gradients_are_deterministic():
    plane = packed_plane(([1, 1, 1, 2, 7], [7, 7, 0]))
    rng = np.random.default_rng(0)
    arguments = [
        rng.normal(size=s).astype(np.float32) for s in ((POINTS, CHANNELS), (9, CHANNELS), (CHANNELS,), (9, CHANNELS))
    ]
    runs = [cells_gradient(arguments[0], plane, *arguments[1:]) for _ in range(3)]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
