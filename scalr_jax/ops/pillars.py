"""From points to the pillars of the top view that they stand in. Points stand in the order of their pillars.

All functions work on one data shard; the model maps them over D.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from scalr_jax.ops.cells import take_rows
from scalr_jax.ops.runs import by_tree, make_tree, sum_tree

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def pillar_max(points: Array, cell: Array, num_pillars: int) -> Array:
    """The maximum over each pillar's points, [P, C] -> [T, C]; zero for unused rows.

    cell [P] int32, ascending: the point's pillar, T for padding. Points that attain it share the gradient, as those of
    PyTorch's `scatter_reduce` do.
    """
    most = jax.ops.segment_max(points, cell, num_pillars, indices_are_sorted=True)
    return jnp.where(most == -jnp.inf, 0, most)


def _pillar_max_forward(points: Array, cell: Array, num_pillars: int) -> tuple[Array, tuple]:
    most = jnp.asarray(pillar_max(points, cell, num_pillars))
    return most, (points, cell, most)


def _pillar_max_backward(num_pillars: int, saved: tuple, gradient: Array) -> tuple[Array, None]:
    points, cell, most = saved
    attains = (points == take_rows(most, cell)) & (cell < num_pillars)[:, None]
    number = _sum_pillars(attains.astype(jnp.float32), cell, num_pillars)
    share = gradient / jnp.maximum(number, 1.0).astype(gradient.dtype)
    return jnp.where(attains, take_rows(share, cell), 0), None


pillar_max.defvjp(_pillar_max_forward, _pillar_max_backward)


@jax.custom_vjp
def to_points(pillars: Array, cell: Array) -> Array:
    """Each point reads its pillar; padding reads zero. [T, C], [P] -> [P, C]."""
    return take_rows(pillars, cell)


def _to_points_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    like, cell = saved
    return _sum_pillars(gradient, cell, len(like)).astype(gradient.dtype), None


to_points.defvjp(lambda pillars, cell: (to_points(pillars, cell), (pillars[:, :0], cell)), _to_points_backward)


def _sum_pillars(points: Array, cell: Array, num_pillars: int) -> Array:
    if by_tree(cell):
        return sum_tree(points, make_tree(cell, num_pillars))
    return jax.ops.segment_sum(points.astype(jnp.float32), cell, num_pillars, indices_are_sorted=True)
