"""Sums of runs as a tree: the plain sums, the same bits whatever stands beside a run, and what a GPU is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from scalr_jax.ops import cells
from scalr_jax.ops.runs import add_at, make_tree, sum_tree
from tests.support.cell_planes import ADVERSARIAL, CHANNELS, POINTS, packed_plane

ROWS, RUNS = 700, 90  # three levels


@jax.jit
def summed(rows, run, order):
    return sum_tree(rows, make_tree(run, RUNS, order))


def sorted_runs(counts):
    """Lengths of the first runs -> the run of each row, RUNS for those that are left."""
    counts = np.array(counts, int)
    used = np.repeat(np.arange(len(counts)), counts)[:ROWS]
    return np.concatenate([used, np.full(ROWS - len(used), RUNS)]).astype(np.int32)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65, 300, 700]), max_size=RUNS), st.integers(0, 1000))
def test_the_sum_of_a_tree_is_that_of_its_rows(counts, seed):
    """Whole numbers, so that it is exact; a row that belongs to no run may hold anything."""
    rng = np.random.default_rng(seed)
    run, order = sorted_runs(counts), rng.permutation(ROWS).astype(np.int32)
    rows = rng.integers(-1000, 1000, (ROWS, 2)).astype(np.float32)
    expected = np.zeros((RUNS + 1, 2), np.float32)
    np.add.at(expected, run, rows[order])
    rows[order[run == RUNS]] = np.nan
    np.testing.assert_array_equal(summed(rows, run, order), expected[:RUNS])


def test_a_runs_bits_do_not_depend_on_where_it_stands():
    """As those of a sum with atomics would; nor on the other runs."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(ROWS, 4)).astype(np.float32)
    own = rows[:300]
    first = summed(rows, sorted_runs([300, 64, 200]), np.arange(ROWS, dtype=np.int32))[0]
    moved = np.concatenate([rows[300:500], own, rows[500:]])
    second = summed(moved, sorted_runs([13, 187, 300, 9]), np.arange(ROWS, dtype=np.int32))[2]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, own.sum(0, dtype=np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_plane_with_a_tree_is_the_plane(name):
    """Flatten and inflate, with their gradients."""
    plane = packed_plane(ADVERSARIAL[name])
    tree = make_tree(plane.cell[plane.order], len(plane.inverse_count), plane.order)
    rng = np.random.default_rng(1)
    points = jnp.asarray(rng.normal(size=(POINTS, CHANNELS)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(POINTS, CHANNELS)), jnp.float32)

    @jax.jit
    def both(plane):
        function = lambda points: cells.inflate(jnp.sin(cells.flatten(points, plane)), plane)  # noqa: E731
        out, pull = jax.vjp(function, points)
        return out, pull(weights)

    for a, b in zip(both(plane._replace(order=tree)), both(plane), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def traced_for(platform, function, *shapes):
    """The primitives of a function on arrays of `platform`, which need not be there; with those inside of others."""
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=AbstractDevice(platform, 1, platform))
    place = NamedSharding(mesh, PartitionSpec())
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    return str(jax.make_jaxpr(function)(*given))


@pytest.mark.parametrize(("platform", "atomics"), [("cpu", True), ("tpu", True), ("gpu", False), ("cuda", False)])
def test_a_gpu_adds_nothing_to_rows_in_any_order(platform, atomics):
    """But whole numbers. The sums of rows by an index that is not sorted, too."""
    shapes = ((40, 3), jnp.float32), ((8, 5), jnp.int32), ((8, 5, 3), jnp.float32)
    text = traced_for(platform, lambda table, index, rows: add_at(table, index, rows), *shapes)
    assert ("f32[40,3] = scatter-add" in text) == atomics


def test_rows_are_added_at_an_index_in_any_order(monkeypatch):
    rng = np.random.default_rng(0)
    table, rows = (rng.integers(-99, 99, shape).astype(np.float32) for shape in ((40, 3), (8, 50, 3)))
    index = rng.integers(0, 40, (8, 50)).astype(np.int32)
    expected = jax.jit(add_at)(table, index, rows)
    monkeypatch.setattr("scalr_jax.ops.runs.by_tree", lambda index: True)
    found = jax.jit(lambda *arrays: add_at(*arrays))(table, index, rows)
    np.testing.assert_array_equal(found, expected)
