"""Gather rows of a table, and add rows up into one, as block-sparse matrix products: the two kernels of a TPU.

    select_rows: out[q] = table[index[q]]                      (zero where index[q] is none)
    sum_rows:    out[r] = sum over q with index[q] = r of values[q]

With A the [Q, R] matrix of zeros and ones of `index`, these are A @ table and A^T @ values: each is the gradient of the
other. XLA gathers and scatters on a TPU row by row. Here A is cut into tiles of BLOCK rows of q by WINDOW rows of the
table; a tile is made in registers by comparing, multiplied on the matrix unit, and only tiles that hold a one are
visited. Points lie in row-major order of the top view, so a block of 512 touches one or two windows of the planes that
share its rows and two or three of the other one. Any order is as exact; a worse one costs more tiles.

`make_links` lists the tiles, once a step; the kernels read the list before they run (scalar prefetch), so that the
pipeline fetches the right blocks. Sums are in float32 and in a fixed order. Float32 rows are multiplied in full
precision, bfloat16 rows in one pass, which is exact as each row meets a single one.

Every table and every value must be finite, padded rows included: zero times infinity is not zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from scalr_jax.runtime.sharding import by_shard, platform_of

Array = jax.Array

BLOCK = 512  # rows of q a tile
WINDOW = 256  # rows of the table a tile
CHANNELS = 384  # at most so many channels a tile: two tiles at 768, one for each core of a v5p
SHIFT = 16  # a tile is one number, its major index shifted by so many bits plus its minor one
MINOR = (1 << SHIFT) - 1
MAX_TILES = 1 << 16  # that can be listed: 256 kB of a TPU's scalar memory


class Links(NamedTuple):
    """Which row of a table each of Q rows reads, in `lists` lists, and the tiles that hold such a link.

    A block's links may reach into its neighbours' rows: `margin` rows before and after its own.
    """

    rows: Array  # [D, lists, blocks, 1, BLOCK] int32; -1 for none
    by_block: Array  # [D, tiles] int32: block << SHIFT | list * windows + window, ascending; every block occurs
    num_by_block: Array  # [D] int32
    by_window: Array  # [D, tiles] int32: window << SHIFT | list * blocks + block, ascending; every window occurs
    num_by_window: Array  # [D] int32


def make_links(index: Array, num_rows: int, *, margin: int = 0) -> Links:
    """index [D, lists, Q] int32 rows of a table of `num_rows` rows; anything outside 0..num_rows - 1 is none."""
    own, window = tile_sizes(index.shape[1], index.shape[2], num_rows, margin)
    index = blocks_of(jnp.where((index >= 0) & (index < num_rows), index, -1), own, margin, fill=-1)
    windows = jnp.arange(pl.cdiv(num_rows, window))
    touched = (index[..., None] // window == windows).any(axis=3)  # [D, lists, blocks, windows]
    by_block, by_window = touched.transpose(0, 2, 1, 3), touched.transpose(0, 3, 1, 2)
    return Links(index[:, :, :, None], *_listed(by_block), *_listed(by_window))


def tile_sizes(num_lists: int, num_links: int, num_rows: int, margin: int = 0) -> tuple[int, int]:
    """A block's own rows, and the rows of a window: smaller where there are fewer, in steps of a bfloat16 register;
    windows grow where there are so many rows that the list of all tiles would not fit."""
    own = min(BLOCK - 2 * margin, pl.cdiv(num_links, 16) * 16)
    window = min(WINDOW, pl.cdiv(num_rows, 16) * 16)
    while num_lists * pl.cdiv(num_links, own) * pl.cdiv(num_rows, window) > MAX_TILES and window < num_rows:
        window *= 2
    return own, window


def blocks_of(x: Array, own: int, margin: int, fill: int) -> Array:
    """[..., Q] -> [..., blocks, margin + own + margin]: a block's own entries and those around it."""
    num_blocks = pl.cdiv(x.shape[-1], own)
    spare = num_blocks * own - x.shape[-1]
    pads = ((0, 0),) * (x.ndim - 1)
    x = jnp.pad(x, (*pads, (own, own + spare)), constant_values=fill).reshape(*x.shape[:-1], num_blocks + 2, own)
    before, after = x[..., :-2, own - margin :], x[..., 2:, :margin]
    return jnp.concatenate([before, x[..., 1:-1, :], after], axis=-1)


def _listed(touched: Array) -> tuple[Array, Array]:
    """[D, a, ...] bool -> the tiles [D, n] int32 in order, how many there are [D]; every a has at least one."""
    touched = touched.reshape(*touched.shape[:2], -1)
    a, b = touched.shape[1:]
    touched |= ~touched.any(axis=2, keepdims=True) & (jnp.arange(b) == 0)
    code = (jnp.arange(a)[:, None] << SHIFT) | jnp.arange(b)
    code = jnp.where(touched, code, jnp.iinfo(jnp.int32).max).reshape(-1, a * b)
    return jnp.sort(code, axis=1), touched.sum(axis=(1, 2), dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def select_rows(table: Array, links: Links, num_links: int) -> Array:
    """out[q] = table[index[q]]: [D, R, C] -> [D, num_links, C] in the table's dtype."""
    return over_shards(functools.partial(_select, num_links), (table, links))


def _select_rows_backward(num_links: int, residuals: tuple[Links, Array], gradient: Array):
    links, table = residuals
    sums: Any = sum_rows(gradient, links, table.shape[1])
    return sums.astype(table.dtype), None


select_rows.defvjp(
    lambda table, links, n: (select_rows(table, links, n), (links, table[..., :0])), _select_rows_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_rows(values: Array, links: Links, num_rows: int) -> Array:
    """out[r] = sum of the values whose index is r: [D, Q, C] -> [D, num_rows, C] float32."""
    return over_shards(functools.partial(_sum, num_rows), (values, links))


def _sum_rows_backward(num_rows: int, residuals: tuple[Links, Array], gradient: Array):
    links, values = residuals
    return select_rows(gradient.astype(values.dtype), links, values.shape[1]), None


sum_rows.defvjp(lambda values, links, n: (sum_rows(values, links, n), (links, values[..., :0])), _sum_rows_backward)


def over_shards(kernel: Callable[..., Array], sharded: tuple, replicated: Array | tuple = ()) -> Array:
    """`kernel(sharded, replicated, interpret=...)` on each shard; the leaves of `sharded` have a leading axis D.

    Mosaic kernels cannot be partitioned automatically, so under a mesh this is a shard_map (`by_shard`).
    """
    leaf = jax.tree.leaves(sharded)[-1]  # an array of the batch, whose sharding is known; a derived one's may not be
    kernel = functools.partial(kernel, interpret=platform_of(leaf) != "tpu")
    out: Array = by_shard(lambda *parts: kernel(parts[:-1], parts[-1]), sharded, replicated)
    return out


def ones(index: Array, first_row: Array, window: int, dtype: DTypeLike) -> Array:
    """A tile of A, transposed: [window, block], one where a link reads a row of the window. index [1, block]."""
    row = jax.lax.broadcasted_iota(jnp.int32, (window, index.shape[1]), 0)
    return (row == index - first_row).astype(dtype)


def inside(rows: Array, first_row: Array, num_rows: int) -> Array:
    """Zero for the rows of a last, partial block, which hold anything."""
    if num_rows % rows.shape[0] == 0:
        return rows
    row = first_row + jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    return jnp.where(row < num_rows, rows, jnp.zeros_like(rows))


def product(tile: Array, rows: Array, contracted: int) -> Array:
    """A tile times rows in float32; the tile's axis `contracted` against the rows."""
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((contracted,), (0,)), ((), ()))
    return jax.lax.dot_general(tile, rows, dims, precision=precision, preferred_element_type=jnp.float32)


def is_first(tiles: jax.Ref) -> Array:
    """Whether this tile is the first of its major index, so that what it accumulates starts here."""
    i = pl.program_id(1)
    return (i == 0) | (tiles[jnp.maximum(i - 1, 0)] >> SHIFT != tiles[i] >> SHIFT)


def accumulate(out: jax.Ref, part: Array, first: Array) -> None:
    @pl.when(first)
    def _():
        out[...] = part.astype(out.dtype)

    @pl.when(~first)
    def _():
        out[...] = (out[...].astype(jnp.float32) + part).astype(out.dtype)


def channel_tile(num_channels: int) -> int:
    """Channels a tile: two tiles or more from 256 channels, one for each core of a v5p."""
    return num_channels if num_channels < 256 else min(CHANNELS, pl.cdiv(num_channels, 256) * 128)


def _select_kernel(tiles: jax.Ref, index: jax.Ref, table: jax.Ref, out: jax.Ref, *, num_rows: int) -> None:
    window = table.shape[0]
    first_row = (tiles[pl.program_id(1)] & MINOR) * window
    rows = inside(table[...], first_row, num_rows)
    part = product(ones(index[0, 0], first_row, window, rows.dtype), rows, 0)  # [block, channels]
    accumulate(out, part, is_first(tiles))  # a row is met once, so adding in the table's dtype is exact


def _sum_kernel(tiles: jax.Ref, index: jax.Ref, values: jax.Ref, out: jax.Ref, *, num_links: int) -> None:
    tile = tiles[pl.program_id(1)]
    window, block = out.shape[0], values.shape[0]
    rows = inside(values[...], (tile & MINOR) * block, num_links)
    part = product(ones(index[0, 0], (tile >> SHIFT) * window, window, rows.dtype), rows, 1)  # [window, channels]
    accumulate(out, part, is_first(tiles))


def _select(num_links: int, sharded: tuple, _: tuple, *, interpret: bool) -> Array:
    """One shard: table [R, C] -> [Q, C]."""
    table, links = sharded
    block, window = tile_sizes(1, num_links, table.shape[0])
    kernel = functools.partial(_select_kernel, num_rows=table.shape[0])
    out = jax.ShapeDtypeStruct((num_links, table.shape[1]), table.dtype)
    index_spec = pl.BlockSpec((1, 1, 1, block), lambda c, i, tiles: (0, tiles[i] >> SHIFT, 0, 0))
    in_specs, arguments = [index_spec, _minor_rows(window, out)], (links.by_block, links.rows, table)
    return call(kernel, out, in_specs, _major_rows(block, out), arguments, links.num_by_block, interpret=interpret)


def _sum(num_rows: int, sharded: tuple, _: tuple, *, interpret: bool) -> Array:
    """One shard: values [Q, C] -> [R, C] float32."""
    values, links = sharded
    block, window = tile_sizes(1, values.shape[0], num_rows)
    kernel = functools.partial(_sum_kernel, num_links=values.shape[0])
    out = jax.ShapeDtypeStruct((num_rows, values.shape[1]), jnp.float32)
    index_spec = pl.BlockSpec((1, 1, 1, block), lambda c, i, tiles: (0, tiles[i] & MINOR, 0, 0))
    in_specs, arguments = [index_spec, _minor_rows(block, out)], (links.by_window, links.rows, values)
    return call(kernel, out, in_specs, _major_rows(window, out), arguments, links.num_by_window, interpret=interpret)


def _minor_rows(rows: int, out: jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """A tile's minor index is the block of rows to read, its major one (below) the block to write."""
    return pl.BlockSpec((rows, channel_tile(out.shape[1])), lambda c, i, tiles: (tiles[i] & MINOR, c))


def _major_rows(rows: int, out: jax.ShapeDtypeStruct) -> pl.BlockSpec:
    return pl.BlockSpec((rows, channel_tile(out.shape[1])), lambda c, i, tiles: (tiles[i] >> SHIFT, c))


def call(kernel, out, in_specs, out_specs, arguments, num_tiles: Array, *, interpret: bool, scratch=()) -> Array:
    """`kernel` over (tiles of channels, listed tiles). `arguments`: tiles, then one for each of `in_specs`."""
    num_channels = out.shape[-1]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(num_channels, channel_tile(num_channels)), num_tiles),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=scratch,
    )
    params = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))
    run = pl.pallas_call(kernel, grid_spec=grid, out_shape=out, interpret=interpret, compiler_params=params)
    return run(*arguments)
