"""Sparse 3D convolutions on the occupied voxels of packed scenes: gathers, matrix products, sums.

    submanifold 3x3x3:    out[v] = sum over d in {-1, 0, 1}^3 of kernel[t(d)] applied to in[v + d], v occupied
    strided 2x2x2:        out[w] = sum over children v of w of kernel[o(v)] applied to in[v], w = v // 2
    its transpose:        out[v] = kernel[o(v)] applied to in[v // 2]

with t(d) = 9 (d_x + 1) + 3 (d_y + 1) + d_z + 1 and o(v) = 4 (v_x mod 2) + 2 (v_y mod 2) + v_z mod 2 (Graham et al.,
"3D Semantic Segmentation with Submanifold Sparse Convolutional Networks", 2018). An empty voxel reads as zero, so each
equals the dense convolution, masked.

`Pairs` lists the pairs (input row, output row) of a convolution in slots, of which every kernel element takes as many
whole blocks as it needs. Gathered rows are multiplied by their element, all in one batched product of [block, C_in] by
[C_in, C_out], and an output then gathers its products and adds them up. With inputs and outputs exchanged the same
table is that of the gradient, and of the transposed convolution: features are gathered, never scattered, and sums have
one order. On a CPU a convolution is a computation of its own, into which XLA fuses nothing (`_alone`).

`make_levels` finds the tables on the device, from integers alone; all functions work on one data shard, and the model
maps them over D. Sizes are static: `ops.voxels.count_levels` counts what scenes need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from scalr_jax.ops import cells
from scalr_jax.ops.cells import take_rows
from scalr_jax.ops.runs import Tree
from scalr_jax.ops.voxels import CENTRE, NEIGHBORS, Sizes

Array = jax.Array
F32 = jnp.float32
Extent = tuple[int, int, int]
CHILDREN = 8
Result = TypeVar("Result")


class Pairs(NamedTuple):
    """The pairs of one convolution in Q slots, by kernel element; unused slots have no row (the number of rows)."""

    source: Array  # [Q] int32: input rows
    target: Array  # [Q] int32: output rows
    element: Array  # [B] int32: which kernel element a block is for, ascending
    of_source: Array  # [V_in, T] int32: the slots in which an input row is; else Q - 1, which is never used
    of_target: Array  # [V_out, T] int32: those of an output row


class Level(NamedTuple):
    """One resolution. Rows are sorted by scene, x, y, z; V rows, of which the first `number` are voxels."""

    number: Array  # [] int32
    near: Pairs  # 3x3x3 without its centre, among the rows of this level
    down: Pairs  # 2x2x2, from this level to the next; unused on the last level
    neighbors: Array  # [V, 27] int32: rows, V where there is none


class Voxels(NamedTuple):
    """The tables of a packed shard. `cells.flatten` and `cells.inflate` take it as a plane: the mean of each voxel's
    points, and each point reading its voxel."""

    cell: Array  # [P] int32: the finest level's voxel of each point; V for padding
    order: Array | Tree  # [P] int32: points sorted by voxel, or `cells.summing_order` of that
    inverse_count: Array  # [V] float32: 1 / points of a voxel; 0 for unused rows
    levels: tuple[Level, ...]
    missing: Array  # [] int32: voxels and pairs for which there was no room; anything but 0 is an error


# ----------------------------------------------------------------------------------------------------------- the tables


def make_levels(coordinates: Array, scene: Array, sizes: Sequence[Sizes], *, num_scenes: int, extent: Extent) -> Voxels:
    """The tables of every level, from the finest.

    Args:
        coordinates: [P, 3] int32, the voxel of each point; those outside `extent` count as its border's.
        scene: [P] int32, num_scenes for padding.
        sizes: of each level; the next level's voxels are twice as wide.
        extent: voxels of the finest level along x, y, z. num_scenes * (x + 2) * (y + 2) must be below 2^31.
    """
    x, y, z = extent
    if num_scenes * (x + 2) * (y + 2) >= 2**31 or max(s.voxels for s in sizes) * (z + 2) >= 2**31:
        raise ValueError(f"{num_scenes} scenes of {x} x {y} x {z} voxels do not fit 32-bit keys; take larger voxels")
    ijk = jnp.clip(coordinates, 0, jnp.asarray(extent) - 1)
    table, row, order = _unique(scene, ijk, num_scenes, extent, sizes[0].voxels)
    counts = jax.ops.segment_sum(jnp.ones_like(row), row, sizes[0].voxels)  # of whole numbers: the same in any order
    missing = ((scene < num_scenes) & (row == sizes[0].voxels)).sum(dtype=jnp.int32)
    levels = []
    for depth, size in enumerate(sizes):
        level_scene, level_ijk = table
        number = (level_scene < num_scenes).sum(dtype=jnp.int32)
        neighbors = _find_neighbors(level_scene, level_ijk, num_scenes, extent)
        near, without_room = _near_pairs(neighbors, size.pairs, size.block)
        following = sizes[min(depth + 1, len(sizes) - 1)].voxels
        table, parent, _ = _unique(level_scene, level_ijk >> 1, num_scenes, extent, following)
        octant = (level_ijk & 1) @ jnp.array([4, 2, 1])
        levels.append(Level(number, near, _down_pairs(parent, octant, following, size.block), neighbors))
        missing += without_room
        if depth + 1 < len(sizes):
            missing += ((level_scene < num_scenes) & (parent == following)).sum(dtype=jnp.int32)
    inverse = jnp.where(counts > 0, 1.0 / jnp.maximum(counts, 1.0), 0.0)
    return Voxels(row, cells.summing_order(row, order, inverse), inverse, tuple(levels), missing)


def _column(scene: Array, ijk: Array, extent: Extent) -> Array:
    """A key of (scene, x, y), whose neighbours at x +- 1 and y +- 1 are no other scene's or row's."""
    return (scene * (extent[0] + 2) + ijk[..., 0] + 1) * (extent[1] + 2) + ijk[..., 1] + 1


def _unique(
    scene: Array, ijk: Array, num_scenes: int, extent: Extent, size: int
) -> tuple[tuple[Array, Array], Array, Array]:
    """The different (scene, ijk) in `size` rows, sorted: ((scene [V], ijk [V, 3]), row of each [N], order [N])."""
    valid = scene < num_scenes
    key = jnp.where(valid, _column(scene, ijk, extent), jnp.iinfo(jnp.int32).max)
    order = jnp.lexsort((ijk[:, 2], key)).astype(jnp.int32)
    key, z = key[order], ijk[order, 2]
    new = jnp.concatenate([jnp.ones(1, bool), (key[1:] != key[:-1]) | (z[1:] != z[:-1])]) & valid[order]
    rank = jnp.where(valid[order], jnp.minimum(jnp.cumsum(new) - 1, size), size).astype(jnp.int32)
    row = jnp.zeros_like(order).at[order].set(rank, unique_indices=True)
    first = jnp.zeros(size, jnp.int32).at[jnp.where(new, rank, size)].set(order, mode="drop")
    used = jnp.arange(size) < new.sum()
    table = jnp.where(used, scene[first], num_scenes), jnp.where(used[:, None], ijk[first], 0)
    return table, row, order


def _find_neighbors(scene: Array, ijk: Array, num_scenes: int, extent: Extent) -> Array:
    """[V, 27]: rows of the neighbours in a sorted table, V where there is none.

    A binary search over the columns (scene, x, y) finds the nine around each, and one in each column that exists finds
    the lowest of its three voxels.
    """
    size, height = scene.shape[0], extent[2] + 2
    big = jnp.iinfo(jnp.int32).max
    key = jnp.where(scene < num_scenes, _column(scene, ijk, extent), big)
    new = jnp.concatenate([jnp.ones(1, bool), key[1:] != key[:-1]])
    number = (jnp.cumsum(new) - 1).astype(jnp.int32)  # of the column
    columns = jnp.full(size, big).at[jnp.where(new, number, size)].set(key, mode="drop")
    fine = jnp.where(scene < num_scenes, number * height + ijk[:, 2] + 1, big)
    steps = jnp.array([i * (extent[1] + 2) + j for i in (-1, 0, 1) for j in (-1, 0, 1)])
    near = jnp.where(scene[:, None] < num_scenes, key[:, None] + steps, big - 1)  # [V, 9]
    found = jnp.minimum(jnp.searchsorted(columns, near.reshape(-1)).reshape(near.shape), size - 1)
    occupied = columns[found] == near
    lowest = jnp.where(occupied, found * height + ijk[:, 2:], big - 1)  # z - 1, and one for the key
    at = jnp.searchsorted(fine, lowest.reshape(-1)).reshape(lowest.shape)
    result = [jnp.full((size, 9), size)] * 3
    for later in range(3):
        candidate = jnp.minimum(at + later, size - 1)
        voxel = jnp.where(occupied & (at + later < size), fine[candidate], -1)
        result = [jnp.where(voxel == lowest + k, candidate, found) for k, found in enumerate(result)]
    return jnp.stack(result, axis=-1).reshape(size, 27).astype(jnp.int32)


def _slots(valid: Array, num_slots: int, block: int) -> tuple[Array, Array, Array]:
    """Slots of pairs. valid [V, T] -> slot [V, T] (the last: none), element [Q / block], pairs without room []."""
    blocks = (valid.sum(axis=0) + block - 1) >> block.bit_length() - 1  # blocks are powers of two
    ends = jnp.tril(jnp.broadcast_to(blocks, 2 * blocks.shape)).sum(axis=1) * block  # few, and in one kernel
    slot = jnp.where(valid, ends - blocks * block + jnp.cumsum(valid, axis=0) - 1, num_slots - 1)
    without_room = (valid & (slot >= num_slots - 1)).sum(dtype=jnp.int32)
    element = (ends <= jnp.arange(0, num_slots, block)[:, None]).sum(axis=1)
    element = jnp.minimum(element, valid.shape[1] - 1).astype(jnp.int32)
    return jnp.minimum(slot, num_slots - 1).astype(jnp.int32), element, without_room


def _fill(slot: Array, rows: Array, num_slots: int, none: int) -> Array:
    """[Q]: `rows` in their slots, `none` in those without."""
    filled = jnp.full(num_slots, none, jnp.int32).at[slot.reshape(-1)].set(rows.reshape(-1))
    return filled.at[num_slots - 1].set(none)


def _near_pairs(neighbors: Array, num_slots: int, block: int) -> tuple[Pairs, Array]:
    """The pairs of a 3x3x3 convolution but its centre's, and how many of them have no room."""
    size = neighbors.shape[0]
    near = jnp.delete(neighbors, CENTRE, axis=1)  # [V, 26]
    slot, element, without_room = _slots(near < size, num_slots, block)
    rows = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[:, None], near.shape)
    # The pair of v's neighbour w in direction d, as an input, is w's own pair with v in direction -d, as an output.
    reverse = slot[jnp.minimum(near, size - 1), jnp.arange(26)[::-1]]
    of_source = jnp.where(near < size, reverse, num_slots - 1)
    source, target = (_fill(slot, each, num_slots, size) for each in (near, rows))
    return Pairs(source, target, element + (element >= CENTRE), of_source, slot), without_room


def _down_pairs(parent: Array, octant: Array, num_parents: int, block: int) -> Pairs:
    """The pairs of a 2x2x2 convolution: a slot for each voxel, and for each element a part of a block unused."""
    size = parent.shape[0]
    num_slots = (size // block + CHILDREN + 1) * block
    valid = (parent < num_parents)[:, None] & (octant[:, None] == jnp.arange(CHILDREN))
    slots, element, _ = _slots(valid, num_slots, block)
    slot = slots.min(axis=1)  # a voxel has one parent
    of_target = jnp.full((num_parents, CHILDREN), num_slots - 1, jnp.int32).at[parent, octant].set(slot, mode="drop")
    rows = jnp.arange(size, dtype=jnp.int32)
    source, target = _fill(slot, rows, num_slots, size), _fill(slot, parent, num_slots, num_parents)
    return Pairs(source, target, element, slot[:, None], of_target)


# ----------------------------------------------------------------------------------------------------- the convolutions


def _alone(function: Callable[..., Result], rows: Array, pairs: Pairs, *others: Array) -> Result:
    """`function(rows, pairs, *others)`: on a CPU a computation of its own, which XLA cannot fuse.

    Else it computes the norm before a convolution again in each of its gathers, and writes every gather of a sum to
    memory. It is a branch that is always taken, which XLA cannot know: row numbers are not negative.
    """

    def of_cpu(rows: Array, pairs: Pairs, *others: Array) -> Result:
        shapes = jax.eval_shape(function, rows, pairs, *others)
        always = pairs.source[0] >= 0
        return jax.lax.cond(always, function, lambda *_: jax.tree.map(jnp.zeros_like, shapes), rows, pairs, *others)

    return jax.lax.platform_dependent(rows, pairs, *others, cpu=of_cpu, default=function)


def submanifold(rows: Array, level: Level, kernel: Array) -> Array:
    """3x3x3 on the occupied voxels. rows [V, C_in], kernel [27, C_in, C_out] -> [V, C_out] float32."""
    return convolve(rows, level.near, kernel, CENTRE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def convolve(rows: Array, pairs: Pairs, kernel: Array, centre: int | None = None) -> Array:
    """Every pair's input row times its kernel element, summed over the pairs of each output row.

    rows [V_in, C_in]; kernel [T, C_in, C_out]. Returns [V_out, C_out] float32: products are made in the dtype of `rows`
    and summed in float32. Its gradients gather as well. Each row is paired with itself, too, by the element `centre`,
    which is then not in `pairs`.
    """
    return _alone(functools.partial(_convolve, centre), rows, pairs, kernel)


# Traced once for each set of shapes, and then written into the program as if it were no function of its own: `_alone`
# needs its branches several times, and 27 gathers take Python a tenth of a second.
traced_once = functools.partial(jax.jit, static_argnums=0, inline=True)


@traced_once
def _convolve(centre: int | None, rows: Array, pairs: Pairs, kernel: Array) -> Array:
    products = _multiply(_blocks(rows, pairs.source, pairs), kernel, pairs)
    # An unused slot holds the product of some row. Only the last of them is read, by outputs that lack a neighbour.
    none = jnp.zeros((1, kernel.shape[-1]), F32)
    products = jax.lax.dynamic_update_slice_in_dim(products, none, products.shape[0] - 1, axis=0)
    total = _sum_slots(products, pairs.of_target)
    if centre is None:
        return total
    return total + jnp.matmul(rows, kernel[centre].astype(rows.dtype), preferred_element_type=F32)


def _blocks(rows: Array, at: Array, pairs: Pairs) -> Array:
    """[V, C], [Q] -> [B, Q / B, C]: the row of each slot; of an unused one the last row, which is faster than zero."""
    return jnp.take(rows, at, axis=0, mode="clip").reshape(*pairs.element.shape, -1, rows.shape[-1])


def _multiply(blocks: Array, kernel: Array, pairs: Pairs) -> Array:
    """[B, Q / B, C_in], [T, C_in, C_out] -> [Q, C_out] float32: each block by its kernel element."""
    elements = kernel.astype(blocks.dtype)[pairs.element]
    return jnp.einsum("bnc,bcd->bnd", blocks, elements, preferred_element_type=F32).reshape(-1, kernel.shape[-1])


def _sum_slots(products: Array, slots: Array) -> Array:
    """[Q, C], [V, T] -> [V, C]: the sum of each row's slots, of which those without a pair hold zero."""
    total = jnp.zeros((slots.shape[0], products.shape[-1]), F32)
    for t in range(slots.shape[1]):
        total += products.at[slots[:, t]].get(mode="promise_in_bounds")
    return total


def exchange(pairs: Pairs) -> Pairs:
    """Inputs for outputs: the pairs of the transposed convolution."""
    return Pairs(pairs.target, pairs.source, pairs.element, pairs.of_target, pairs.of_source)


def _convolve_backward(centre: int | None, residuals: tuple[Array, Pairs, Array], gradient: Array):
    of_rows, of_kernel = _alone(functools.partial(_gradients, centre), *residuals, gradient)
    return of_rows, None, of_kernel


@traced_once
def _gradients(centre: int | None, rows: Array, pairs: Pairs, kernel: Array, gradient: Array) -> tuple[Array, Array]:
    """Gradients of rows and kernel. Those of rows are the transposed convolution of the incoming gradient."""
    gradient = gradient.astype(rows.dtype)
    inputs = _blocks(rows, pairs.source, pairs)
    outputs = take_rows(gradient, pairs.target).reshape(*inputs.shape[:2], -1)  # zero in unused slots
    transposed = kernel.swapaxes(1, 2)
    of_rows = _sum_slots(_multiply(outputs, transposed, pairs), pairs.of_source)
    by_block = jnp.einsum("bnc,bnd->bcd", inputs, outputs, preferred_element_type=F32)
    of_element = (jnp.arange(kernel.shape[0])[:, None] == pairs.element).astype(F32)  # [T, B]
    of_kernel = jnp.einsum("tb,bcd->tcd", of_element, by_block, precision="highest")
    if centre is not None:
        of_rows += jnp.matmul(gradient, transposed[centre].astype(rows.dtype), preferred_element_type=F32)
        of_centre = jnp.einsum("nc,nd->cd", rows, gradient, preferred_element_type=F32)
        of_kernel = jax.lax.dynamic_update_index_in_dim(of_kernel, of_centre, centre, axis=0)
    return of_rows.astype(rows.dtype), of_kernel.astype(kernel.dtype)


convolve.defvjp(lambda *inputs: (convolve(*inputs), inputs[:3]), _convolve_backward)


# ------------------------------------------------------------------------------------------------- back to the points


def trilinear_weights(voxels: Voxels, offset: Array) -> Array:
    """[P, 27]: a point's weights of its voxel and that one's neighbours, by their distance along each axis.

    offset [P, 3]: the point's place relative to its voxel's centre, in voxels, -0.5 to 0.5. Empty voxels get no weight,
    and the others' add up to 1; padding gets none at all.
    """
    steps = jnp.array(NEIGHBORS, F32)  # [27, 3]
    size = voxels.inverse_count.shape[0]
    near = take_rows(voxels.levels[0].neighbors, voxels.cell)  # of padding anything
    occupied = (near < size) & (voxels.cell < size)[:, None]
    weights = jnp.where(occupied, jnp.maximum(1.0 - jnp.abs(offset[:, None] - steps), 0.0).prod(-1), 0.0)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)


@jax.custom_vjp
def read_trilinear(rows: Array, voxels: Voxels, weights: Array) -> Array:
    """Each point reads its voxel and that one's neighbours, by `trilinear_weights`. [V, C] -> [P, C] float32.

    The gradient of `rows` gathers and sums runs; `weights` get none.
    """
    near = take_rows(voxels.levels[0].neighbors, voxels.cell)
    total = jnp.zeros((voxels.cell.shape[0], rows.shape[-1]), F32)
    for t in range(27):
        total += weights[:, t, None] * take_rows(rows, near[:, t]).astype(F32)
    return total


def _read_backward(residuals: tuple, gradient: Array):
    rows, voxels, weights = residuals

    def add(total: Array, of_direction: tuple[Array, Array]):
        weight, opposite = of_direction  # [P], [V]: rows from which direction d leads here
        return total + take_rows(cells.sum_runs(gradient * weight[:, None], voxels), opposite), None

    opposites = voxels.levels[0].neighbors.T[::-1]
    total, _ = jax.lax.scan(add, jnp.zeros(rows.shape, F32), (weights.T, opposites))
    return total.astype(rows.dtype), None, jnp.zeros_like(weights)


read_trilinear.defvjp(lambda *inputs: (read_trilinear(*inputs), inputs), _read_backward)
