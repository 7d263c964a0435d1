"""Depthwise 3x3 convolutions between occupied cells and their halo: three kernels of a TPU for one trilinear form.

    F(cells, halo, kernel) = sum over halo cells u, rows b, columns c of halo[u] kernel[b, c] cells[taps[u + c - 1, b]]

taps[u, b] is the occupied cell above, at or below halo cell u. Its left and right neighbours, where there are any, are
the halo cells u - 1 and u + 1, so that three gathers serve nine taps: what u reads to its left is what u - 1 reads
above, at and below itself. The derivatives of F are all that is needed, in both directions:

    to halo:   dF/dhalo    the convolution from the occupied cells to the halo
    to cells:  dF/dcells   its transpose: with the kernel turned, the convolution from the halo to the occupied cells
    to kernel: dF/dkernel  the gradient of either

A block of links is 512 rows of the halo, of which the inner 480 are its own: it selects rows for the whole of it by a
product with zeros and ones (`rows.py`), shifts them by one row in registers, and keeps or gives what is its own.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from scalr_jax.ops.pallas import rows as sparse

Array = jax.Array

MARGIN = 16  # links around a block's own: one would do, and a bfloat16 register has 16 rows
LEFT, RIGHT = 1, 2  # bits of `TapLinks.sides`


class TapLinks(NamedTuple):
    """The links of halo cells to the occupied cells above, at and below them, and which halo cells touch."""

    sides: Array  # [D, blocks, 1, BLOCK] int32: LEFT where the row before is the cell to the left, RIGHT likewise
    links: sparse.Links


def make_tap_links(halo_taps: Array, halo_index: Array, num_cells: int, columns: int) -> TapLinks:
    """halo_taps [D, H, 9], halo_index [D, H] of `scenes.Plane`; `columns` of the plane's grid."""
    links = sparse.make_links(halo_taps[:, :, 1::3].swapaxes(1, 2), num_cells, margin=MARGIN)
    before = jnp.pad(halo_index[:, :-1], ((0, 0), (1, 0)), constant_values=-2)
    left = (halo_index == before + 1) & (halo_index % columns != 0)
    right = jnp.pad(left[:, 1:], ((0, 0), (0, 1)))
    own = sparse.tile_sizes(3, halo_index.shape[1], num_cells, MARGIN)[0]
    sides = sparse.blocks_of(left * LEFT + right * RIGHT, own, MARGIN, fill=0)
    return TapLinks(sides[:, :, None].astype(jnp.int32), links)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def to_halo(cells: Array, kernel: Array, taps: TapLinks, num_halo: int) -> Array:
    """dF/dhalo: [D, M, C], [9, C] float32 -> [D, H, C] in the cells' dtype, accumulated in float32."""
    return sparse.over_shards(functools.partial(_to_halo, num_halo), (cells, taps), kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def to_cells(halo: Array, kernel: Array, taps: TapLinks, num_cells: int) -> Array:
    """dF/dcells: [D, H, C], [9, C] float32 -> [D, M, C] in the halo's dtype, accumulated in float32.

    The products with the kernel are rounded to the halo's dtype, three a row of the kernel at once.
    """
    return sparse.over_shards(functools.partial(_to_cells, num_cells), (halo, taps), kernel).astype(halo.dtype)


def to_kernel(cells: Array, halo: Array, taps: TapLinks) -> Array:
    """dF/dkernel: [D, M, C], [D, H, C] -> [9, C] float32, the sum over all shards."""
    parts = sparse.over_shards(_to_kernel, (cells, halo, taps))  # [D, 3, 3, 8, C]
    return parts.sum(axis=(0, 3)).reshape(9, -1)


def _to_halo_backward(num_halo: int, residuals: tuple[Array, Array, TapLinks], gradient: Array):
    cells, kernel, taps = residuals
    return to_cells(gradient, kernel, taps, cells.shape[1]), to_kernel(cells, gradient, taps), None


to_halo.defvjp(lambda *inputs: (to_halo(*inputs), inputs[:3]), _to_halo_backward)


def _to_cells_backward(num_cells: int, residuals: tuple[Array, Array, TapLinks], gradient: Array):
    halo, kernel, taps = residuals
    return to_halo(gradient, kernel, taps, halo.shape[1]), to_kernel(gradient, halo, taps), None


to_cells.defvjp(lambda *inputs: (to_cells(*inputs), inputs[:3]), _to_cells_backward)


def _shifts(x: Array, sides: Array) -> tuple[Array, Array, Array]:
    """For each row of x [block, channels]: the row before where LEFT, the row itself, the row after where RIGHT."""
    width = min(x.shape[1], 128)  # one transpose makes a column of the row `sides` [1, block]; registers repeat it
    column = jnp.broadcast_to(sides, (width, sides.shape[1])).T
    column = jnp.concatenate([column] * pl.cdiv(x.shape[1], width), axis=1)[:, : x.shape[1]]
    before, after = pltpu.roll(x, 1, 0), pltpu.roll(x, x.shape[0] - 1, 0)
    return jnp.where(column & LEFT != 0, before, 0.0), x, jnp.where(column & RIGHT != 0, after, 0.0)


def _with_margin(x: Array) -> Array:
    """Zeros around a block's own rows, in float32."""
    margin = jnp.zeros((MARGIN, x.shape[1]), jnp.float32)
    return jnp.concatenate([margin, x.astype(jnp.float32), margin], axis=0)


def _selected(index: jax.Ref, table: jax.Ref, window_index: Array, num_cells: int) -> Array:
    """The rows of a window that a block's links read, zero for the others: [block, channels] float32."""
    window = table.shape[0]
    rows = sparse.inside(table[...], window_index * window, num_cells)
    return sparse.product(sparse.ones(index[0, 0], window_index * window, window, rows.dtype), rows, 0)


def _to_halo_kernel(tiles, index, sides, kernel, table, out, sums, *, num_cells: int) -> None:
    i = pl.program_id(1)
    num_windows = pl.cdiv(num_cells, table.shape[0])
    rows = _selected(index, table, (tiles[i] & sparse.MINOR) % num_windows, num_cells)
    first = sparse.is_first(tiles)
    for c in range(3):
        sparse.accumulate(sums.at[c], rows * kernel[0, c : c + 1], first)
    last_tile = pl.num_programs(1) - 1

    @pl.when((i == last_tile) | (tiles[jnp.minimum(i + 1, last_tile)] >> sparse.SHIFT != tiles[i] >> sparse.SHIFT))
    def _():
        left, _, right = sums[0], sums[1], sums[2]
        total = sums[1] + _shifts(left, sides[0])[0] + _shifts(right, sides[0])[2]
        out[...] = total[MARGIN:-MARGIN].astype(out.dtype)


def _to_cells_kernel(tiles, index, sides, kernel, halo, out, *, num_halo: int) -> None:
    tile = tiles[pl.program_id(1)]
    num_blocks = pl.cdiv(num_halo, halo.shape[0])
    rows = sparse.inside(halo[...], ((tile & sparse.MINOR) % num_blocks) * halo.shape[0], num_halo)
    before, here, after = _shifts(_with_margin(rows), sides[0])
    rows = after * kernel[0, 0:1] + here * kernel[0, 1:2] + before * kernel[0, 2:3]
    first_row = (tile >> sparse.SHIFT) * out.shape[0]
    part = sparse.product(sparse.ones(index[0, 0], first_row, out.shape[0], halo.dtype), rows.astype(halo.dtype), 1)
    sparse.accumulate(out, part, sparse.is_first(tiles))


def _to_kernel_kernel(tiles, index, sides, halo, table, out, *, num_cells: int, num_halo: int) -> None:
    i = pl.program_id(1)
    num_windows = pl.cdiv(num_cells, table.shape[0])
    minor = tiles[i] & sparse.MINOR
    rows = _selected(index, table, minor % num_windows, num_cells)
    own = sparse.inside(halo[...], (tiles[i] >> sparse.SHIFT) * halo.shape[0], num_halo)
    before, here, after = _shifts(_with_margin(own), sides[0])

    @pl.when(i == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    for c, shifted in enumerate((after, here, before)):
        out[minor // num_windows, c] += (rows * shifted).reshape(-1, 8, rows.shape[1]).sum(axis=0)


def _specs(num_halo: int, num_cells: int, channels: int, *, block_major: bool) -> dict[str, pl.BlockSpec]:
    """How each array is cut; `block_major`: the tiles are those of `Links.by_block`."""
    own, window = sparse.tile_sizes(3, num_halo, num_cells, MARGIN)
    num_minor = pl.cdiv(num_cells, window) if block_major else pl.cdiv(num_halo, own)

    def major(tiles, i):
        return tiles[i] >> sparse.SHIFT

    def minor(tiles, i):
        return (tiles[i] & sparse.MINOR) % num_minor

    def row(tiles, i):
        return (tiles[i] & sparse.MINOR) // num_minor

    block_at, window_at = (major, minor) if block_major else (minor, major)
    links = own + 2 * MARGIN
    return {
        "index": pl.BlockSpec((1, 1, 1, links), lambda c, i, tiles: (row(tiles, i), block_at(tiles, i), 0, 0)),
        "sides": pl.BlockSpec((1, 1, links), lambda c, i, tiles: (block_at(tiles, i), 0, 0)),
        "kernel": pl.BlockSpec((1, 3, channels), lambda c, i, tiles: (row(tiles, i), 0, c)),
        "halo": pl.BlockSpec((own, channels), lambda c, i, tiles: (block_at(tiles, i), c)),
        "cells": pl.BlockSpec((window, channels), lambda c, i, tiles: (window_at(tiles, i), c)),
    }


def _to_halo(num_halo: int, sharded: tuple, kernel: Array, *, interpret: bool) -> Array:
    cells, (sides, links) = sharded
    num_cells, num_channels = cells.shape
    channels = sparse.channel_tile(num_channels)
    spec = _specs(num_halo, num_cells, channels, block_major=True)
    of_tile = functools.partial(_to_halo_kernel, num_cells=num_cells)
    in_specs = [spec[name] for name in ("index", "sides", "kernel", "cells")]
    inputs = links.by_block, links.rows, sides, kernel.reshape(3, 3, -1), cells
    sums = [pltpu.VMEM((3, links.rows.shape[-1], channels), jnp.float32)]
    out = jax.ShapeDtypeStruct((num_halo, num_channels), cells.dtype)
    return sparse.call(
        of_tile, out, in_specs, spec["halo"], inputs, links.num_by_block, interpret=interpret, scratch=sums
    )


def _to_cells(num_cells: int, sharded: tuple, kernel: Array, *, interpret: bool) -> Array:
    halo, (sides, links) = sharded
    num_halo, num_channels = halo.shape
    spec = _specs(num_halo, num_cells, sparse.channel_tile(num_channels), block_major=False)
    of_tile = functools.partial(_to_cells_kernel, num_halo=num_halo)
    in_specs = [spec[name] for name in ("index", "sides", "kernel", "halo")]
    inputs = links.by_window, links.rows, sides, kernel.reshape(3, 3, -1), halo
    out = jax.ShapeDtypeStruct((num_cells, num_channels), jnp.float32)
    return sparse.call(of_tile, out, in_specs, spec["cells"], inputs, links.num_by_window, interpret=interpret)


def _to_kernel(sharded: tuple, _: tuple, *, interpret: bool) -> Array:
    cells, halo, (sides, links) = sharded
    (num_cells, num_channels), num_halo = cells.shape, halo.shape[0]
    channels = sparse.channel_tile(num_channels)
    spec = _specs(num_halo, num_cells, channels, block_major=True)
    of_tile = functools.partial(_to_kernel_kernel, num_cells=num_cells, num_halo=num_halo)
    in_specs = [spec[name] for name in ("index", "sides", "halo", "cells")]
    out_spec = pl.BlockSpec((3, 3, 8, channels), lambda c, i, tiles: (0, 0, 0, c))
    out = jax.ShapeDtypeStruct((3, 3, 8, num_channels), jnp.float32)
    inputs = links.by_block, links.rows, sides, halo, cells
    return sparse.call(of_tile, out, in_specs, out_spec, inputs, links.num_by_block, interpret=interpret)
