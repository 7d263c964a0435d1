"""Sums over runs of rows in a fixed order, by gathers alone: what a GPU would add up with atomics, in any order.

    sum of n rows = the first n mod 8 of them + the sum of n // 8 groups of eight, on a table of an eighth of the rows

Each row is read once and an eighth of them is written. `jax.ops.segment_sum` of sorted rows is the plain form. All
functions work on one data shard.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from scalr_jax.runtime.sharding import on_gpu

Array = jax.Array

FANS = (8, 8, 32)  # rows of a group on each level, the last one further on too; few levels are few kernels


class Level(NamedTuple):
    """B runs of a table of N rows. Of what is not used the number is N, or that of the next level's runs."""

    single: Array  # [B, fan - 1] int32: rows that fill no group; on the last level [B, N], all rows
    group: Array  # [N // fan, fan] int32: rows of each group; on the last level [0, fan]
    rest: Array  # [B] int32: which run of the next level the groups are


Tree = tuple[Level, ...]


def by_tree(index: Array) -> bool:
    """Whether sums by `index` need a tree to be the same every time: on a GPU, for sizes that are numbers."""
    return on_gpu(index) and all(isinstance(n, int) for n in index.shape)


def make_tree(run: Array, num_runs: int, order: Array | None = None) -> Tree:
    """The tree of the runs in `run` [N] int32, ascending: each row's run, `num_runs` for none.

    order [N]: which row of the table that is summed stands in each place; None: they stand in order.
    """
    count = jnp.zeros(num_runs, jnp.int32).at[run].add(1, mode="drop", indices_are_sorted=True)
    begin, size, levels = jnp.cumsum(count) - count, len(run), []
    while not levels or len(levels[-1].group):
        fan = FANS[min(len(levels), len(FANS) - 1)]
        level, begin, count = _level(begin, count, size, fan)
        if order is not None and not levels:
            level = level._replace(**{name: _at(order, getattr(level, name)) for name in ("single", "group")})
        levels.append(level)
        size //= fan
    return tuple(levels)


def _level(begin: Array, count: Array, size: int, fan: int) -> tuple[Level, Array, Array]:
    """One level, and where the runs of the next one begin and how many rows they have."""
    groups, left = count // fan, count % fan
    number = size // fan if size > FANS[-1] else 0
    if not number:
        groups, left, fan = jnp.zeros_like(count), count, size + 1
    column = jnp.arange(fan - 1, dtype=jnp.int32)
    single = jnp.where(column < left[:, None], begin[:, None] + column, size)
    (big,) = jnp.nonzero(groups > 0, size=min(number, len(count)), fill_value=len(count))
    rest = jnp.where(groups > 0, jnp.cumsum(groups > 0, dtype=jnp.int32) - 1, len(big))
    first = jnp.cumsum(groups) - groups
    run = jnp.repeat(jnp.arange(len(count)), groups, total_repeat_length=number)
    place = jnp.arange(number, dtype=jnp.int32)
    row = (begin + left - fan * first)[run] + fan * place
    group = jnp.where((place < groups.sum())[:, None], row[:, None] + jnp.arange(fan, dtype=jnp.int32), size)
    begin, count = (jnp.take(x, big, mode="fill", fill_value=0) for x in (first, groups))
    return Level(single, group, rest), begin, count


def _at(order: Array, rows: Array) -> Array:
    return jnp.take(order, rows, mode="fill", fill_value=len(order))


def sum_tree(rows: Array, tree: Tree) -> Array:
    """The sum of each run: [N, C] -> [B, C] float32."""
    level, *below = tree
    total = _sums(rows, level.single)
    if not below:
        return total
    return total + jnp.take(sum_tree(_sums(rows, level.group), tuple(below)), level.rest, 0, mode="fill", fill_value=0)


def _sums(rows: Array, index: Array) -> Array:
    """[N, C], [B, k] -> [B, C] float32; N is a row of zeros."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0).astype(jnp.float32).sum(1)


def add_at(table: Array, index: Array, rows: Array) -> Array:
    """`table` [B, C] float32 plus the rows [..., C] at their `index` [...], which stand in any order."""
    if not by_tree(index):
        return table.at[index].add(rows)
    index = index.reshape(-1)
    order = jnp.argsort(index)
    return table + sum_tree(rows.reshape(-1, rows.shape[-1]), make_tree(index[order], len(table), order))
