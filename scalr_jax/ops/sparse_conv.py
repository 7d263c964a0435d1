"""Sparse 3D convolutions on the occupied voxels of packed scenes: gathers, matrix products, sums.

    submanifold 3x3x3:    out[v] = sum over d in {-1, 0, 1}^3 of kernel[t(d)] applied to in[v + d], v occupied
    strided 2x2x2:        out[w] = sum over children v of w of kernel[o(v)] applied to in[v], w = v // 2
    its transpose:        out[v] = kernel[o(v)] applied to in[v // 2]

with t(d) = 9 (d_x + 1) + 3 (d_y + 1) + d_z + 1 and o(v) = 4 (v_x mod 2) + 2 (v_y mod 2) + v_z mod 2 (Graham et al.,
"3D Semantic Segmentation with Submanifold Sparse Convolutional Networks", 2018). A voxel that is not there reads as
zero, so each equals the dense convolution, masked.

A table lists the pairs (input row, output row) of a convolution by kernel element. Gathered rows are multiplied by the
element they are for, and an output then gathers its products and adds them up. With inputs and outputs exchanged the
same table is that of the gradient, and of the transposed convolution: features are gathered, never scattered, and sums
have one order. There are two kinds:

    `Pairs`      one list of slots, of which every element takes as many whole blocks as it needs: all products are one
                 batched product of [block, C_in] by [C_in, C_out].
    `Neighbors`  of 3x3x3: two voxels that are neighbours are a pair in one of 13 directions and, turned round, in the
                 opposite one. Each direction has room of its own and two plain products, which on a CPU are faster.

On a CPU a convolution is a computation of its own, into which XLA fuses nothing (`_alone`).

`make_levels` finds the tables on the device, from integers alone; all functions work on one data shard, and the model
maps them over D. Sizes are static: `data.voxels.count_levels` says what scenes need.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scalr_jax.ops import cells
from scalr_jax.ops.cells import take_rows
from scalr_jax.ops.voxels import CENTRE, NEIGHBORS, Sizes

Array = jax.Array
F32 = jnp.float32

CHILDREN = 8


class Pairs(NamedTuple):
    """The pairs of one convolution in Q slots, by kernel element; unused slots have no row (the number of rows)."""

    source: Array  # [Q] int32: input rows
    target: Array  # [Q] int32: output rows
    element: Array  # [B] int32: which kernel element a block is for, ascending
    of_source: Array  # [V_in, T] int32: the slots in which an input row is; else Q - 1, which is never used
    of_target: Array  # [V_out, T] int32: those of an output row


class Neighbors(NamedTuple):
    """The pairs of neighbours of one level, in R_k slots of each of the 13 `DIRECTIONS`; unused slots hold row V."""

    low: tuple[Array, ...]  # 13 of [R_k] int32: rows, ascending
    high: tuple[Array, ...]  # 13 of [R_k] int32: their neighbours in the direction
    of_low: Array  # [V, 13] int32: the slot in which a row is low; else R_k - 1, which is never used
    of_high: Array  # [V, 13] int32: in which it is high


class Level(NamedTuple):
    """One resolution. Rows are sorted by scene, x, y, z; V rows, of which the first `number` are voxels."""

    number: Array  # [] int32
    near: Pairs | Neighbors  # 3x3x3 without its centre, among the rows of this level
    down: Pairs  # 2x2x2, from this level to the next; of the last level: to a level of its own, which nobody needs
    neighbors: Array  # [V, 27] int32: rows, V where there is none


class Voxels(NamedTuple):
    """What a sparse U-Net needs of a packed shard. `cells.flatten` and `cells.inflate` take it as a plane: the mean of
    each voxel's points, and each point reading its voxel."""

    cell: Array  # [P] int32: the finest level's voxel of each point; V for padding
    order: Array  # [P] int32: points sorted by voxel
    inverse_count: Array  # [V] float32: 1 / points of a voxel; 0 for unused rows
    levels: tuple[Level, ...]
    missing: Array  # [] int32: voxels and pairs for which there was no room; anything but 0 is an error


# ----------------------------------------------------------------------------------------------------------- the tables


def make_levels(
    coordinates: Array, scene: Array, sizes: tuple[Sizes, ...], *, num_scenes: int, extent: tuple
) -> Voxels:
    """The tables of every level, from the finest.

    Args:
        coordinates: [P, 3] int32, the voxel of each point; those outside of `extent` count as its border's.
        scene: [P] int32, num_scenes for padding.
        sizes: of each level; the next level's voxels are twice as wide.
        extent: voxels of the finest level along x, y, z. num_scenes * (x + 2) * (y + 2) must be below 2^31.
    """
    x, y, z = extent
    if num_scenes * (x + 2) * (y + 2) >= 2**31 or max(s.voxels for s in sizes) * (z + 2) >= 2**31:
        raise ValueError(f"{num_scenes} scenes of {x} x {y} x {z} voxels do not fit 32-bit keys; take larger voxels")
    ijk = jnp.clip(coordinates, 0, jnp.asarray(extent) - 1)
    table, row, order = _unique(scene, ijk, num_scenes, extent, sizes[0].voxels)
    counts = jax.ops.segment_sum((row[order] < sizes[0].voxels).astype(jnp.float32), row[order], sizes[0].voxels)
    number = (table[0] < num_scenes).sum(dtype=jnp.int32)
    missing = ((scene < num_scenes) & (row == sizes[0].voxels)).sum(dtype=jnp.int32)
    levels = []
    for depth, size in enumerate(sizes):
        following = sizes[min(depth + 1, len(sizes) - 1)].voxels
        neighbors = _find_neighbors(table[0], table[1], num_scenes, extent)
        if size.directions:
            near, without_room = _near_by_direction(neighbors, size.directions)
        else:
            near, without_room = _near_pairs(neighbors, size.pairs, size.block)
        level_scene, level_ijk = table
        table, parent, _ = _unique(level_scene, level_ijk >> 1, num_scenes, extent, following)
        octant = (level_ijk & 1) @ jnp.array([4, 2, 1])
        down = _down_pairs(parent, octant, following, size.block)
        levels.append(Level(number, near, down, neighbors))
        number = (table[0] < num_scenes).sum(dtype=jnp.int32)
        missing += without_room
        if depth + 1 < len(sizes):
            missing += ((level_scene < num_scenes) & (parent == following)).sum(dtype=jnp.int32)
    inverse = jnp.where(counts > 0, 1.0 / jnp.maximum(counts, 1.0), 0.0)
    return Voxels(row, order, inverse, tuple(levels), missing)


def _column(scene: Array, ijk: Array, extent: tuple) -> Array:
    """A key of (scene, x, y), whose neighbours at x +- 1 and y +- 1 are no other scene's or row's."""
    return (scene * (extent[0] + 2) + ijk[..., 0] + 1) * (extent[1] + 2) + ijk[..., 1] + 1


def _unique(scene: Array, ijk: Array, num_scenes: int, extent: tuple, size: int) -> tuple[tuple, Array, Array]:
    """The different (scene, ijk) in `size` rows, sorted: ((scene [V], ijk [V, 3]), row of each [N], order [N])."""
    valid = scene < num_scenes
    key = jnp.where(valid, _column(scene, ijk, extent), jnp.iinfo(jnp.int32).max)
    order = jnp.lexsort((ijk[:, 2], key)).astype(jnp.int32)
    key, z = key[order], ijk[order, 2]
    new = jnp.concatenate([jnp.ones(1, bool), (key[1:] != key[:-1]) | (z[1:] != z[:-1])]) & valid[order]
    rank = jnp.where(valid[order], jnp.minimum(jnp.cumsum(new) - 1, size), size).astype(jnp.int32)
    row = jnp.zeros_like(order).at[order].set(rank, unique_indices=True)
    first = order[jnp.nonzero(new, size=size, fill_value=0)[0]]
    there = jnp.arange(size) < new.sum()
    table = jnp.where(there, scene[first], num_scenes), jnp.where(there[:, None], ijk[first], 0)
    return table, row, order


def _find_neighbors(scene: Array, ijk: Array, num_scenes: int, extent: tuple) -> Array:
    """[V, 27]: rows of the neighbours in a sorted table, V where there is none.

    A binary search over the columns (scene, x, y), of which each has nine near it, and one in the column found, for
    the lowest of the three voxels that may be there.
    """
    size, height = scene.shape[0], extent[2] + 2
    big = jnp.iinfo(jnp.int32).max
    key = jnp.where(scene < num_scenes, _column(scene, ijk, extent), big)
    new = jnp.concatenate([jnp.ones(1, bool), key[1:] != key[:-1]])
    number = (jnp.cumsum(new) - 1).astype(jnp.int32)  # of the column
    columns = key[jnp.nonzero(new, size=size, fill_value=size - 1)[0]]
    columns = jnp.where(jnp.arange(size) < new.sum(), columns, big)
    fine = jnp.where(scene < num_scenes, number * height + ijk[:, 2] + 1, big)
    steps = jnp.array([i * (extent[1] + 2) + j for i in (-1, 0, 1) for j in (-1, 0, 1)])
    wanted = jnp.where(scene[:, None] < num_scenes, key[:, None] + steps, big - 1)  # [V, 9]
    found = jnp.searchsorted(columns, wanted.reshape(-1)).reshape(wanted.shape)
    found = jnp.minimum(found, size - 1)
    there = columns[found] == wanted
    lowest = jnp.where(there, found * height + ijk[:, 2:], big - 1)  # z - 1, and one for the key
    at = jnp.searchsorted(fine, lowest.reshape(-1)).reshape(lowest.shape)
    result = jnp.full((size, 9, 3), size, jnp.int32)
    for k in range(3):
        for later in range(3):
            candidate = jnp.minimum(at + later, size - 1)
            matches = there & (fine[candidate] == lowest + k) & (at + later < size)
            result = result.at[:, :, k].set(jnp.where(matches, candidate, result[:, :, k]))
    return result.reshape(size, 27).astype(jnp.int32)


def _slots(valid: Array, num_slots: int, block: int) -> tuple[Array, Array, Array]:
    """Where each pair goes. valid [V, T] -> slot [V, T] (the last: nowhere), element [Q / block], without room []."""
    blocks = (valid.sum(axis=0) + block - 1) >> block.bit_length() - 1  # blocks are powers of two
    ends = jnp.cumsum(blocks) * block
    slot = jnp.where(valid, ends - blocks * block + jnp.cumsum(valid, axis=0) - 1, num_slots - 1)
    without_room = (valid & (slot >= num_slots - 1)).sum(dtype=jnp.int32)
    element = jnp.searchsorted(ends, jnp.arange(num_slots // block) * block, side="right")
    element = jnp.minimum(element, valid.shape[1] - 1).astype(jnp.int32)
    return jnp.minimum(slot, num_slots - 1).astype(jnp.int32), element, without_room


def _fill(slot: Array, rows: Array, num_slots: int, none: int) -> Array:
    """[Q]: `rows` in their slots, `none` in those without."""
    filled = jnp.full(num_slots, none, jnp.int32).at[slot.reshape(-1)].set(rows.reshape(-1))
    return filled.at[num_slots - 1].set(none)


def _near_pairs(neighbors: Array, num_slots: int, block: int) -> tuple[Pairs, Array]:
    """The pairs of a 3x3x3 convolution but its centre's; kernel elements count 26, the centre left out."""
    size = neighbors.shape[0]
    near = neighbors[:, jnp.array([t for t in range(27) if t != CENTRE])]  # [V, 26]
    slot, element, without_room = _slots(near < size, num_slots, block)
    rows = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[:, None], near.shape)
    # The pair of v's neighbour w in direction d, as an input, is w's own pair with v in direction -d, as an output.
    reverse = slot[jnp.minimum(near, size - 1), jnp.arange(26)[::-1]]
    of_source = jnp.where(near < size, reverse, num_slots - 1)
    return Pairs(
        _fill(slot, near, num_slots, size), _fill(slot, rows, num_slots, size), element, of_source, slot
    ), without_room


def _near_by_direction(neighbors: Array, slots: tuple[int, ...]) -> tuple[Neighbors, Array]:
    """[V, 27] -> the pairs in so many slots of each direction, and how many pairs have no room."""
    size, last = neighbors.shape[0], jnp.array(slots) - 1
    ahead, behind = neighbors[:, CENTRE + 1 :], neighbors[:, CENTRE - 1 :: -1]  # [V, 13] in each direction
    number = jnp.cumsum(ahead < size, axis=0, dtype=jnp.int32) - 1
    fits = (ahead < size) & (number < last)
    of_low = jnp.where(fits, number, last)
    of_high = jnp.where(behind < size, jnp.take_along_axis(of_low, jnp.minimum(behind, size - 1), axis=0), last)
    ends = list(itertools.accumulate(slots))
    at = jnp.where(fits, of_low + jnp.array([0, *ends[:-1]]), ends[-1]).reshape(-1)
    rows = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[:, None], ahead.shape)
    low, high = (
        jnp.split(jnp.full(ends[-1], size, jnp.int32).at[at].set(each.reshape(-1), mode="drop"), ends[:-1])
        for each in (rows, ahead)
    )
    return Neighbors(tuple(low), tuple(high), of_low, of_high), ((ahead < size) & ~fits).sum(dtype=jnp.int32)


def _down_pairs(parent: Array, octant: Array, num_parents: int, block: int) -> Pairs:
    """A slot for each voxel, and a part of a block unused by each of the eight elements."""
    size = parent.shape[0]
    num_slots = (size // block + CHILDREN + 1) * block
    valid = (parent < num_parents)[:, None] & (octant[:, None] == jnp.arange(CHILDREN))
    slots, element, _ = _slots(valid, num_slots, block)
    slot = slots.min(axis=1)  # a voxel has one parent
    of_target = jnp.full((num_parents, CHILDREN), num_slots - 1, jnp.int32)
    of_target = of_target.at[parent, octant].set(slot, mode="drop")
    rows = jnp.arange(size, dtype=jnp.int32)
    return Pairs(
        _fill(slot, rows, num_slots, size),
        _fill(slot, parent, num_slots, num_parents),
        element,
        slot[:, None],
        of_target,
    )


# ----------------------------------------------------------------------------------------------------- the convolutions


def _alone(function: Callable, rows: Array, *others: Any) -> Any:
    """`function(rows, *others)`, where others[0] is a table: on a CPU a computation of its own, which XLA cannot fuse.

    Else it computes the norm before a convolution again in each of its gathers, and writes every gather of a sum to
    memory. It is a branch that is always taken, which XLA cannot know: row numbers are not negative.
    """

    def of_cpu(rows: Array, *others: Any) -> Any:
        row = jax.tree.leaves(others[0])[0].reshape(-1)[0]
        shapes = jax.eval_shape(function, rows, *others)

        def nothing(*_: Any) -> Any:
            return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

        return jax.lax.cond(row >= 0, function, nothing, rows, *others)

    return jax.lax.platform_dependent(rows, *others, cpu=of_cpu, default=function)


@jax.custom_vjp
def convolve(rows: Array, pairs: Pairs, kernel: Array) -> Array:
    """Every pair's input row times its kernel element, summed over the pairs of each output row.

    rows [V_in, C_in]; kernel [T, C_in, C_out]. Returns [V_out, C_out] float32: products are made in the dtype of `rows`
    and summed in float32. Its gradients gather as well.
    """
    return _alone(_convolve, rows, pairs, kernel)


def _convolve(rows: Array, pairs: Pairs, kernel: Array) -> Array:
    products = _multiply(_blocks(rows, pairs.source, pairs), kernel, pairs)
    # An unused slot holds the product of some row. Only the last of them is read, by outputs that lack a neighbour.
    none = jnp.zeros((1, kernel.shape[-1]), F32)
    products = jax.lax.dynamic_update_slice_in_dim(products, none, products.shape[0] - 1, axis=0)
    return _sum_slots(products, pairs.of_target)


def _blocks(rows: Array, at: Array, pairs: Pairs) -> Array:
    """[V, C], [Q] -> [B, Q / B, C]: the row of each slot; of an unused one the last row, which is faster than zero."""
    return jnp.take(rows, at, axis=0, mode="clip").reshape(*pairs.element.shape, -1, rows.shape[-1])


def _multiply(blocks: Array, kernel: Array, pairs: Pairs) -> Array:
    """[B, Q / B, C_in], [T, C_in, C_out] -> [Q, C_out] float32: each block by its kernel element."""
    products = jnp.einsum(
        "bnc,bcd->bnd", blocks, kernel.astype(blocks.dtype)[pairs.element], preferred_element_type=F32
    )
    return products.reshape(-1, kernel.shape[-1])


def _sum_slots(products: Array, slots: Array) -> Array:
    """[Q, C], [V, T] -> [V, C]: the sum of each row's slots, of which those without a pair hold zero."""
    total = jnp.zeros((slots.shape[0], products.shape[-1]), F32)
    for t in range(slots.shape[1]):
        total += products.at[slots[:, t]].get(mode="promise_in_bounds")
    return total


def exchange(pairs: Pairs) -> Pairs:
    """Inputs for outputs: the pairs of the transposed convolution."""
    return Pairs(pairs.target, pairs.source, pairs.element, pairs.of_target, pairs.of_source)


def _convolve_forward(rows: Array, pairs: Pairs, kernel: Array):
    return convolve(rows, pairs, kernel), (rows, pairs, kernel)


def _convolve_backward(residuals: tuple, gradient: Array):
    rows, pairs, kernel = residuals
    back, of_kernel = _alone(_convolve_gradients, rows, pairs, kernel, gradient)
    return back, None, of_kernel


def _convolve_gradients(rows: Array, pairs: Pairs, kernel: Array, gradient: Array) -> tuple[Array, Array]:
    gradient = gradient.astype(rows.dtype)
    inputs = _blocks(rows, pairs.source, pairs)
    outputs = take_rows(gradient, pairs.target).reshape(*inputs.shape[:2], -1)  # zero in unused slots
    back = _sum_slots(_multiply(outputs, kernel.swapaxes(1, 2), pairs), pairs.of_source)
    by_block = jnp.einsum("bnc,bnd->bcd", inputs, outputs, preferred_element_type=F32)
    of_element = (jnp.arange(kernel.shape[0])[:, None] == pairs.element).astype(F32)  # [T, B]
    kernel_gradient = jnp.einsum("tb,bcd->tcd", of_element, by_block, precision="highest")
    return back.astype(rows.dtype), kernel_gradient.astype(kernel.dtype)


convolve.defvjp(_convolve_forward, _convolve_backward)


@jax.custom_vjp
def submanifold(rows: Array, level: Level, kernel: Array) -> Array:
    """3x3x3 on the occupied voxels. rows [V, C_in], kernel [27, C_in, C_out] -> [V, C_out] float32."""
    return _alone(_submanifold, rows, level.near, kernel)


def _submanifold(rows: Array, near: Pairs | Neighbors, kernel: Array) -> Array:
    total = jnp.matmul(rows, kernel[CENTRE].astype(rows.dtype), preferred_element_type=F32)
    if isinstance(near, Pairs):
        return total + _convolve(rows, near, _without_centre(kernel))
    for k, (low, high) in enumerate(zip(near.low, near.high, strict=True)):
        gathered = take_rows(rows, jnp.stack([high, low]))
        total = _add_products(total, gathered, near, kernel, k)
    return total


def _without_centre(kernel: Array) -> Array:
    return jnp.concatenate([kernel[:CENTRE], kernel[CENTRE + 1 :]])


def _add_products(total: Array, gathered: Array, near: Neighbors, kernel: Array, k: int) -> Array:
    """`total` and what the pairs in direction k give their low rows, from gathered[0], and their high ones, from [1].

    A row without a pair reads the unused slot, whose product is zero.
    """
    elements = jnp.stack([kernel[CENTRE + 1 + k], kernel[CENTRE - 1 - k]]).astype(gathered.dtype)
    products = jnp.einsum("enc,ecd->end", gathered, elements, preferred_element_type=F32)
    for product, slot in zip(products, (near.of_low, near.of_high), strict=True):
        total += product.at[slot[:, k]].get(mode="promise_in_bounds")
    return total


def _submanifold_forward(rows: Array, level: Level, kernel: Array):
    return submanifold(rows, level, kernel), (rows, level.near, kernel)


def _submanifold_backward(residuals: tuple, gradient: Array):
    rows, near, kernel = residuals
    back, of_kernel = _alone(_submanifold_gradients, rows, near, kernel, gradient)
    return back, None, of_kernel


def _submanifold_gradients(rows: Array, near: Pairs | Neighbors, kernel: Array, gradient: Array) -> tuple[Array, Array]:
    """Of the features it is the same convolution, with the kernel turned round and transposed."""
    gradient = gradient.astype(rows.dtype)
    turned = kernel[::-1].swapaxes(1, 2)
    back = jnp.matmul(gradient, turned[CENTRE].astype(rows.dtype), preferred_element_type=F32)
    of_centre = jnp.einsum("nc,nd->cd", rows, gradient, preferred_element_type=F32)
    if isinstance(near, Pairs):
        of_pairs, of_kernel = _convolve_gradients(rows, near, _without_centre(kernel), gradient)
        of_kernel = jnp.concatenate([of_kernel[:CENTRE], of_centre[None].astype(kernel.dtype), of_kernel[CENTRE:]])
        return (back + of_pairs).astype(rows.dtype), of_kernel
    of_elements = [of_centre] * len(kernel)
    for k, (low, high) in enumerate(zip(near.low, near.high, strict=True)):
        outputs = take_rows(gradient, jnp.stack([high, low]))
        inputs = take_rows(rows, jnp.stack([low, high]))
        back = _add_products(back, outputs, near, turned, k)
        both = jnp.einsum("enc,end->ecd", inputs, outputs, preferred_element_type=F32)
        of_elements[CENTRE - 1 - k], of_elements[CENTRE + 1 + k] = both
    return back.astype(rows.dtype), jnp.stack(of_elements).astype(kernel.dtype)


submanifold.defvjp(_submanifold_forward, _submanifold_backward)


# ------------------------------------------------------------------------------------------------- back to the points


def trilinear_weights(voxels: Voxels, offset: Array) -> Array:
    """[P, 27]: what each point takes of its voxel and the neighbours of that, by their distance along each axis.

    offset [P, 3]: the point's place relative to its voxel's centre, in voxels, -0.5 to 0.5. Voxels that are not there
    get no weight, and the others' add up to 1; padding gets none at all.
    """
    steps = jnp.array(NEIGHBORS, F32)  # [27, 3]
    near = take_rows(voxels.levels[0].neighbors, voxels.cell)  # of padding anything
    there = (near < voxels.inverse_count.shape[0]) & (voxels.cell < voxels.inverse_count.shape[0])[:, None]
    weights = jnp.where(there, jnp.maximum(1.0 - jnp.abs(offset[:, None] - steps), 0.0).prod(-1), 0.0)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)


@jax.custom_vjp
def read_trilinear(rows: Array, voxels: Voxels, weights: Array) -> Array:
    """Each point reads its voxel and the neighbours of that, by `trilinear_weights`. [V, C] -> [P, C] float32.

    The gradient of `rows` gathers and sums runs; `weights` get none.
    """
    near = take_rows(voxels.levels[0].neighbors, voxels.cell)
    total = jnp.zeros((voxels.cell.shape[0], rows.shape[-1]), F32)
    for t in range(27):
        total += weights[:, t, None] * take_rows(rows, near[:, t]).astype(F32)
    return total


def _read_forward(rows: Array, voxels: Voxels, weights: Array):
    return read_trilinear(rows, voxels, weights), (rows, voxels, weights)


def _read_backward(residuals: tuple, gradient: Array):
    rows, voxels, weights = residuals

    def add(total: Array, of_direction: tuple[Array, Array]):
        weight, opposite = of_direction  # [P], [V]: rows from which direction d leads here
        return total + take_rows(cells.sum_runs(gradient * weight[:, None], voxels), opposite), None

    opposites = voxels.levels[0].neighbors.T[::-1]
    total, _ = jax.lax.scan(add, jnp.zeros(rows.shape, F32), (weights.T, opposites))
    return total.astype(rows.dtype), None, jnp.zeros_like(weights)


read_trilinear.defvjp(_read_forward, _read_backward)
