"""Sparse 3D convolutions against dense ones, masked; on random and adversarial occupancy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalr_jax.ops import cells, sparse_conv
from scalr_jax.ops.voxels import Sizes, count_levels, sizes_for

EXTENT, NUM_SCENES, NUM_POINTS, LEVELS = (8, 6, 4), 2, 160, 3
SIZES = (Sizes(160, 28 * 256, 256), Sizes(64, 28 * 128, 128), Sizes(16, 28 * 128, 128))
make = jax.jit(functools.partial(sparse_conv.make_levels, sizes=SIZES, num_scenes=NUM_SCENES, extent=EXTENT))


def dense(rows, index, extent):
    """[S, X, Y, Z, C] of a table's rows. index [V, 4]: scene, x, y, z of each row, outside the grid where unused."""
    grid = jnp.zeros((NUM_SCENES, *extent, rows.shape[-1]))
    return grid.at[tuple(index.T)].set(rows, mode="drop")


def read(grid, index):
    """The rows again; zero where unused."""
    return grid.at[tuple(index.T)].get(mode="fill", fill_value=0.0)


def dense_convolution(grid, kernel, **settings):
    """kernel [k * k * k, C_in, C_out]"""
    width = round(kernel.shape[0] ** (1 / 3))
    kernel = kernel.reshape(width, width, width, *kernel.shape[1:])
    return jax.lax.conv_general_dilated(
        grid, kernel, dimension_numbers=("NXYZC", "XYZIO", "NXYZC"), precision="highest", **settings
    )


def occupied(coordinates, scene, level):
    """The voxels of a level, in the table's order: (scene [v], ijk [v, 3])."""
    valid = scene < NUM_SCENES
    coordinates = np.clip(coordinates[valid], 0, np.array(EXTENT) - 1) // 2**level
    found = np.unique(np.concatenate([scene[valid, None], coordinates], axis=1), axis=0)
    return found[:, 0], found[:, 1:]


def case(number, seed):
    """Random voxels, each of one or more points; the scenes' points come mixed, and padding among them."""
    rng = np.random.default_rng(seed)
    coordinates = rng.integers(-1, np.array(EXTENT) + 1, (NUM_POINTS, 3)).astype(np.int32)
    scene = np.full(NUM_POINTS, NUM_SCENES, np.int32)
    scene[rng.permutation(NUM_POINTS)[:number]] = rng.integers(0, NUM_SCENES, number)
    return coordinates, scene


CASES = {
    "nothing": case(0, 0),
    "one": case(1, 1),
    "few": case(20, 2),
    "many": case(160, 3),
    "one voxel": (np.full((NUM_POINTS, 3), 2, np.int32), np.zeros(NUM_POINTS, np.int32)),
    "corners": (
        np.array([[x, y, z] for x in (0, 7) for y in (0, 5) for z in (0, 3)] * 20, np.int32),
        np.repeat(np.arange(2, dtype=np.int32), 80),
    ),
    "a full slab": (
        np.array([[x, y, z] for x in range(8) for y in range(5) for z in range(4)], np.int32),
        np.ones(NUM_POINTS, np.int32),
    ),
}


def check(coordinates, scene, seed=0):
    voxels = make(coordinates, scene)
    assert int(voxels.missing) == 0
    rng = np.random.default_rng(seed)
    tables = [occupied(coordinates, scene, level) for level in range(LEVELS)]
    cell = np.asarray(voxels.cell)
    assert (cell[scene == NUM_SCENES] == SIZES[0].voxels).all()
    points = rng.normal(size=(NUM_POINTS, 5)).astype(np.float32)
    means = np.asarray(cells.flatten(jnp.asarray(points), voxels))
    for row, (s, ijk) in enumerate(zip(*tables[0], strict=True)):
        inside = (scene == s) & (np.clip(coordinates, 0, np.array(EXTENT) - 1) == ijk).all(axis=1)
        assert (cell[inside] == row).all()
        np.testing.assert_allclose(means[row], points[inside].mean(axis=0), atol=1e-5)
    indices = []
    for size, (scenes, ijk) in zip(SIZES, tables, strict=True):
        indices.append(np.full((size.voxels, 4), NUM_SCENES, np.int32))
        indices[-1][: len(scenes)] = np.column_stack([scenes, ijk])
    for depth, (level, index, table) in enumerate(zip(voxels.levels, indices, tables, strict=True)):
        assert int(level.number) == len(table[0])
        x, kernel = draw(rng, SIZES[depth].voxels, table), draw(rng, (27, 5, 7))
        compare("near", depth, level, (index, index), x, kernel)
        if depth + 1 == LEVELS:
            continue
        kernel = draw(rng, (8, 5, 7))
        compare("down", depth, level, (index, indices[depth + 1]), x, kernel)
        x = draw(rng, SIZES[depth + 1].voxels, tables[depth + 1])
        compare("up", depth, level, (indices[depth + 1], index), x, kernel)


def draw(rng, shape, table=None):
    """Random float32; of rows [V, 5] those of a table, zero where unused."""
    if table is None:
        return rng.normal(size=shape).astype(np.float32)
    rows = np.zeros((shape, 5), np.float32)
    rows[: len(table[0])] = rng.normal(size=(len(table[0]), 5))
    return rows


def sparse(kind, level, x, kernel):
    if kind == "near":
        return sparse_conv.submanifold(x, level, kernel)
    return sparse_conv.convolve(x, level.down if kind == "down" else sparse_conv.exchange(level.down), kernel)


def reference(kind, depth, index, x, kernel):
    """The same by dense convolutions. index: of the rows that go in, and of those that come out."""
    extents = [tuple(-(-side // 2**d) for side in EXTENT) for d in (depth, depth + 1)]
    if kind == "near":
        out = dense_convolution(dense(x, index[0], extents[0]), kernel, window_strides=(1, 1, 1), padding="SAME")
    elif kind == "down":
        odd = [(0, 2 * c - e) for e, c in zip(*extents, strict=True)]
        out = dense_convolution(dense(x, index[0], extents[0]), kernel, window_strides=(2, 2, 2), padding=odd)
    else:
        blocks = jnp.einsum("sxyzc,tcd->sxyztd", dense(x, index[0], extents[1]), kernel, precision="highest")
        s, x, y, z, _, c = blocks.shape
        blocks = blocks.reshape(s, x, y, z, 2, 2, 2, c).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        out = blocks.reshape(s, 2 * x, 2 * y, 2 * z, c)
    return read(out, index[1])


@functools.partial(jax.jit, static_argnums=(0, 1))
def both(kind, depth, level, index, x, kernel, gradient):
    """Outputs and gradients of both, of the rows that count."""
    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(lambda x, kernel: sparse(kind, level, x, kernel), x, kernel)
        wanted, pull_wanted = jax.vjp(lambda x, kernel: reference(kind, depth, index, x, kernel), x, kernel)
        used = index[1][:, :1] < NUM_SCENES
        gradient = jnp.where(used, gradient, 0.0)
        return (jnp.where(used, jnp.asarray(out), 0.0), *pull(gradient)), (wanted, *pull_wanted(gradient))


def compare(kind, depth, level, index, x, kernel):
    """Outputs to 1e-5, gradients to 1e-4 of their scale."""
    gradient = np.random.default_rng(1).normal(size=(len(index[1]), 7)).astype(np.float32)
    found, wanted = both(kind, depth, level, index, x, kernel, gradient)
    inputs = index[0][:, :1] < NUM_SCENES
    for mine, theirs, tolerance, rows in zip(found, wanted, (1e-5, 1e-4, 1e-4), (True, inputs, True), strict=True):
        mine, theirs = np.where(rows, mine, 0.0), np.where(rows, theirs, 0.0)
        np.testing.assert_allclose(mine, theirs, atol=tolerance * max(1.0, np.abs(theirs).max(initial=0.0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equal_to_dense_convolutions(name):
    check(*CASES[name])


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(st.integers(0, NUM_POINTS), st.integers(0, 2**31))
def test_equal_to_dense_convolutions_at_random(number, seed):
    check(*case(number, seed), seed=seed)


@pytest.mark.slow
def test_counts_say_what_is_needed_and_without_room_it_is_said():
    coordinates, scene = CASES["many"]
    inside = np.clip(coordinates, 0, np.array(EXTENT) - 1)
    counts = np.sum([count_levels(inside[scene == s], LEVELS) for s in range(NUM_SCENES)], axis=0)
    voxels = make(coordinates, scene)
    for level, (number, pairs) in zip(voxels.levels, counts, strict=True):
        assert int(level.number) == number
        assert int((level.near.source < level.neighbors.shape[0]).sum()) == pairs
    exact = sizes_for(counts)

    def missing(sizes):
        limits = {"sizes": sizes, "num_scenes": NUM_SCENES, "extent": EXTENT}
        return int(jax.jit(functools.partial(sparse_conv.make_levels, **limits))(coordinates, scene).missing)

    assert missing(exact) == 0
    for level in (0, LEVELS - 1):
        fewer = list(exact)
        fewer[level] = exact[level]._replace(voxels=exact[level].voxels - 1)
        assert missing(tuple(fewer)) > 0
    fewer = (exact[0]._replace(pairs=26 * exact[0].block // 2), *exact[1:])
    assert missing(fewer) > 0


def test_on_a_cpu_nothing_is_fused_into_a_convolution():
    """With a norm between two, each is a branch of its own there, and a plain part of the program elsewhere."""
    levels = make(*CASES["few"]).levels

    def net(x, kernel, level):
        for _ in range(2):
            x = sparse_conv.submanifold(x, level, kernel)
            x = jax.nn.relu((x - x.mean(0)) / x.std(0))
        return x.sum()

    for size, level in zip(SIZES[:2], levels, strict=False):
        arguments = jnp.ones((size.voxels, 4)), jnp.ones((27, 4, 4)), level
        for program, number in ((net, 2), (jax.grad(net, argnums=(0, 1)), 4)):
            lowered = jax.jit(program).lower(*arguments)
            compiled = lowered.compile().as_text() or ""
            assert len(re.findall(r" conditional\(", compiled)) == number
            for platform in ("tpu", "cuda"):
                others = jax.jit(program).trace(*arguments).lower(lowering_platforms=(platform,))
                branches = (each.as_text().count("stablehlo.case") for each in (lowered, others))
                assert next(branches) - next(branches) >= number  # those by platform are decided when it is compiled


def test_sizes_have_room_for_what_was_counted():
    counts = np.array([[2**20, 2**22], [70_000, 1_000_000], [3, 2]])
    sizes = sizes_for(counts)
    assert [size.voxels for size in sizes] == counts[:, 0].tolist()
    for size, pairs in zip(sizes, counts[:, 1], strict=True):
        assert size.pairs % size.block == 0
        assert size.pairs >= pairs + 26 * (size.block - 1) + 1  # 26 blocks may be nearly empty, and a slot stays unused


def test_keys_that_do_not_fit_are_refused():
    coordinates, scene = CASES["one"]
    with pytest.raises(ValueError, match="take larger voxels"):
        sparse_conv.make_levels(coordinates, scene, SIZES, num_scenes=64, extent=(6000, 6000, 100))


def test_the_gradient_only_gathers():
    """No order in which something is added up may vary."""
    voxels = make(*CASES["many"])
    level = voxels.levels[0]
    x, kernel = jnp.ones((SIZES[0].voxels, 4)), jnp.ones((27, 4, 4))

    def loss(x, kernel):
        return jnp.square(sparse_conv.submanifold(x, level, kernel)).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, kernel))
    assert "gather" in text
    assert "scatter" not in text


def test_trilinear_reading():
    """Where every voxel is there it is linear interpolation; elsewhere a weighted mean of those that are."""
    rng = np.random.default_rng(0)
    full = np.array([[x, y, z] for x in range(8) for y in range(5) for z in range(4)], np.float32)
    offset = jnp.asarray(rng.uniform(-0.5, 0.5, (NUM_POINTS, 3)), jnp.float32)
    inner = ((full > 0) & (full < (7, 4, 3))).all(axis=1)
    voxels = make(full.astype(np.int32), np.zeros(NUM_POINTS, np.int32))
    weights = sparse_conv.trilinear_weights(voxels, offset)
    rows = jnp.asarray(rng.normal(size=(SIZES[0].voxels, 3)), jnp.float32)
    found = np.asarray(sparse_conv.read_trilinear(rows, voxels, weights))
    grid = np.asarray(rows[: len(full)]).reshape(8, 5, 4, 3)
    for c in range(3):
        wanted = jax.scipy.ndimage.map_coordinates(jnp.asarray(grid[..., c]), list((full + offset).T), order=1)
        np.testing.assert_allclose(found[inner, c], np.asarray(wanted)[inner], atol=1e-5)


@pytest.mark.parametrize("name", ["few", "many", "nothing"])
def test_trilinear_reading_of_sparse_voxels_and_its_gradient(name):
    coordinates, scene = CASES[name]
    rng = np.random.default_rng(0)
    offset = jnp.asarray(rng.uniform(-0.5, 0.5, (NUM_POINTS, 3)), jnp.float32)
    voxels = make(coordinates, scene)
    weights = sparse_conv.trilinear_weights(voxels, offset)
    valid = scene < NUM_SCENES
    np.testing.assert_allclose(np.asarray(weights).sum(axis=1), valid, atol=1e-6)
    ones = jnp.ones((SIZES[0].voxels, 2))
    np.testing.assert_allclose(sparse_conv.read_trilinear(ones, voxels, weights)[:, 0], valid, atol=1e-6)

    def plain(rows):
        near = cells.take_rows(voxels.levels[0].neighbors, voxels.cell)
        return (weights[..., None] * cells.take_rows(rows, near)).sum(axis=1)

    rows = jnp.asarray(rng.normal(size=(SIZES[0].voxels, 3)), jnp.float32)
    out, pull = jax.vjp(lambda rows: sparse_conv.read_trilinear(rows, voxels, weights), rows)
    wanted, pull_wanted = jax.vjp(plain, rows)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    gradient = jnp.asarray(rng.normal(size=out.shape), jnp.float32)
    np.testing.assert_allclose(pull(gradient)[0], pull_wanted(gradient)[0], atol=1e-5)
