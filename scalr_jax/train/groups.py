"""Means over groups of scenes, as the published code has them: over the points of each GPU, then over the GPUs.

    loss = mean over groups g with points of (mean over the points of g)

A group is k consecutive scenes of a step, shard by shard: those that one GPU of a published run holds (8 scenes on 8
GPUs: k = 1, and each scene weighs alike). Without groups each point weighs alike, as on one GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Groups(NamedTuple):
    """The groups of a batch, G of them at most; some may have no points."""

    number: Array  # [D, P] int32: the group of each point, G where it does not count
    counts: Array  # [G] int32: points that count
    share: Array  # [D, P] float32: of each point in the mean; they sum to 1


def make_groups(scene: Array, scene_points: Array, mask: Array, scenes_per_group: int) -> Groups | None:
    """Groups of `scenes_per_group` consecutive scenes; None for 0.

    scene [D, P] and scene_points [D, S] as in `Batch`, mask [D, P]: the points that count.
    """
    if not scenes_per_group:
        return None
    slots = scene_points.shape[1]
    num = -(-scene_points.size // scenes_per_group)
    order = jnp.cumsum((scene_points > 0).reshape(-1), dtype=jnp.int32) - 1  # scenes of all shards, without gaps
    group = jnp.maximum(order, 0).reshape(scene_points.shape) // scenes_per_group  # [D, S]
    inside = (scene[:, None, :] == jnp.arange(slots)[:, None]) & mask[:, None, :]  # [D, S, P]
    counts = jnp.zeros(num, jnp.int32).at[group].add(inside.sum(-1, dtype=jnp.int32))
    present = jnp.sum(counts > 0)
    share = jnp.where(counts > 0, 1.0 / (jnp.maximum(counts, 1) * jnp.maximum(present, 1)), 0.0)
    place = jnp.minimum(scene, slots - 1)
    number, of_point = (jnp.take_along_axis(table, place, axis=1) for table in (group, share[group]))
    return Groups(jnp.where(mask, number, num), counts, jnp.where(mask, of_point, 0.0))


def running_sums(x: Array, num_shards: int) -> Array:
    """The cumulative sum of x [N]: in each of `num_shards` parts, then over the parts' sums. Exact for counts.

    Where rows lie on several devices, XLA's partitioner makes of one cumulative sum a window of N rows for each of a
    device's N / D rows: N^2 / D additions (2^29 a class for 65,536 points on eight devices) instead of N.
    """
    inside = jnp.cumsum(x.reshape(num_shards, -1), axis=1)
    before = jnp.cumsum(inside[:, -1]) - inside[:, -1]
    return (inside + before[:, None]).reshape(-1)


def lovasz_by_group(logits: Array, labels: Array, groups: Groups) -> Array:
    """`losses.lovasz_softmax` of each group, over the classes present in it; the mean over the groups with classes.

    logits [N, classes], labels [N], in the order of the groups' points [D, P]. One sort a class, by group and then by
    error, for all groups together: what the sorted rows add up to is counted from the start of their group.
    """
    number, num, num_shards = groups.number.reshape(-1), len(groups.counts), len(groups.number)
    mask, sorted_number = number < num, jnp.sort(number)
    ends = jnp.cumsum(groups.counts)
    starts, own = ends - groups.counts, jnp.minimum(sorted_number, num - 1)
    rows = jnp.arange(len(number), dtype=jnp.int32)
    so_far = rows + 1 - starts[own]  # rows of the group up to this one
    probabilities = jax.nn.softmax(jnp.where(mask[:, None], logits, 0.0))  # [N, classes]

    def one_class(k: Array, probability: Array) -> tuple[Array, Array]:
        truth = mask & (labels == k)
        error = jnp.where(mask, jnp.abs(truth - probability), 0.0)
        *_, order = jax.lax.sort((number, -jax.lax.stop_gradient(error), rows), num_keys=2)
        seen = jnp.concatenate([jnp.zeros(1, jnp.int32), running_sums(truth[order].astype(jnp.int32), num_shards)])
        total = seen[ends] - seen[starts]  # [G]
        hits = seen[1:] - seen[starts][own]
        intersection, union = total[own] - hits, total[own] + so_far - hits
        jaccard = 1.0 - intersection / jnp.maximum(union, 1)
        weights = jaccard - jnp.where(so_far == 1, 0.0, jnp.roll(jaccard, 1))
        return error.at[order].get(unique_indices=True) * jnp.where(sorted_number < num, weights, 0.0), total > 0

    values, present = jax.vmap(one_class)(jnp.arange(logits.shape[-1]), probabilities.T)  # [classes, N], [classes, G]
    classes = present.sum(0)
    share = present / (jnp.maximum(classes, 1) * jnp.maximum(jnp.sum(classes > 0), 1))
    return jnp.sum(values * share[:, own])
