"""Flatten and inflate between points and the occupied cells of a plane.

    flatten: cells[m] = inverse_count[m] * sum over points p of cell m of points[p]
    inflate: points[p] = cells[cell[p]]

Both are linear and (but for the factor) each other's transpose, so both gradients are written with the same two
primitives: a gather by `cell`, and a sum over runs of points that are sorted by cell. A CPU and a TPU add up a run from
its first point on, a GPU as a tree (`ops/runs.py`), so gradients are the same every time on each. All functions work on
one data shard; the model maps them over D.

`flatten_dense` and `inflate_dense` are the plain reference on the whole H x W grid (WaffleIron, section 3.2), whose
sums on a GPU have no order.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from scalr_jax.ops.runs import Tree, by_tree, make_tree, sum_tree

Array = jax.Array


class Tables(Protocol):
    """Fields of `data.scenes.Plane` that the ops read: one shard's here, all shards' [D, ...] in `windows.py`."""

    @property
    def cell(self) -> Array: ...  # [P] int32: row of the point's cell, M for padding

    @property
    def order(self) -> Array | Tree: ...  # [P] int32: points sorted by cell; or `summing_order` of that

    @property
    def inverse_count(self) -> Array: ...  # [M] float32

    @property
    def grid_index(self) -> Array: ...  # [M] int32

    @property
    def halo_index(self) -> Array: ...  # [H] int32

    @property
    def halo_taps(self) -> Array: ...  # [H, 9] int32


def take_rows(table: Array, rows: Array) -> Array:
    """Rows of `table` [M, C] at `rows` [...] (any shape); row M is the zero row. Returns [..., C]."""
    return jnp.take(table, rows, axis=0, mode="fill", fill_value=0)


def summing_order(cell: Array, order: Array, inverse_count: Array) -> Array | Tree:
    """`order`, or the tree that a GPU needs in its place; of a plane's arrays. To be made once, outside of loops."""
    return make_tree(cell[order], len(inverse_count), order) if by_tree(cell) else order


def sum_runs(points: Array, plane: Tables) -> Array:
    """Sum of `points` [P, C] over each cell's run; accumulates in float32. Returns [M, C] in float32."""
    order = plane.order
    if not isinstance(order, tuple):
        order = summing_order(plane.cell, order, plane.inverse_count)
    if isinstance(order, tuple):
        return sum_tree(points, order)
    in_order, cell = points[order].astype(jnp.float32), plane.cell[order]  # [P, C], [P]; padding (cell M) falls off
    return jax.ops.segment_sum(in_order, cell, plane.inverse_count.shape[0], indices_are_sorted=True)


def filled(plane: Tables) -> Array:
    """The result of `flatten` for ones: n / (n + 1e-6) for a cell of n points, 0 for an unused row. [M] float32."""
    return jnp.where(plane.inverse_count > 0, 1.0 - 1e-6 * plane.inverse_count, 0.0)


@jax.custom_vjp
def flatten(points: Array, plane: Tables) -> Array:
    """Mean of the points of each occupied cell. [P, C] -> [M, C], same dtype; unused rows are zero."""
    return (sum_runs(points, plane) * plane.inverse_count[:, None]).astype(points.dtype)


def _flatten_backward(plane: Tables, gradient: Array):
    scaled = gradient.astype(jnp.float32) * plane.inverse_count[:, None]
    return take_rows(scaled.astype(gradient.dtype), plane.cell), None


flatten.defvjp(lambda points, plane: (flatten(points, plane), plane), _flatten_backward)


@jax.custom_vjp
def inflate(cells: Array, plane: Tables) -> Array:
    """Each point reads its cell; padded points read zero. [M, C] -> [P, C]."""
    return take_rows(cells, plane.cell)


def _inflate_backward(plane: Tables, gradient: Array):
    return sum_runs(gradient, plane).astype(gradient.dtype), None


inflate.defvjp(lambda cells, plane: (inflate(cells, plane), plane), _inflate_backward)


def flatten_dense(points: Array, plane: Tables, *, grid: tuple[int, int], num_scenes: int) -> Array:
    """The reference: mean of the points of every cell of every scene's grid. [P, C] -> [S, H, W, C]."""
    num_cells = num_scenes * grid[0] * grid[1]
    position = jnp.take(plane.grid_index, plane.cell, mode="fill", fill_value=num_cells)  # [P]
    sums = jax.ops.segment_sum(points.astype(jnp.float32), position, num_cells)
    counts = jax.ops.segment_sum(jnp.ones(position.shape, jnp.float32), position, num_cells)
    means = sums / (counts[:, None] + 1e-6)
    return means.astype(points.dtype).reshape(num_scenes, *grid, points.shape[-1])


def inflate_dense(cells: Array, plane: Tables) -> Array:
    """The reference: each point reads its cell of the whole grid. [S, H, W, C] -> [P, C]; padding reads zero."""
    flat = cells.reshape(-1, cells.shape[-1])
    position = jnp.take(plane.grid_index, plane.cell, mode="fill", fill_value=flat.shape[0])
    return take_rows(flat, position)
