"""Depthwise 3x3 convolutions over the occupied cells of a plane, without the empty ones.

The spatial mixing of WaffleIron needs, at occupied cells only, `conv2(activation(conv1(means)))` with zero padding
outside the grid. conv2 at an occupied cell reads conv1 at its 3x3 neighbours, so conv1 is computed on the dilation
of the occupied cells (the halo) and nowhere else:

    halo[u]  = activation(bias1 + sum_t kernel1[t] * cells[halo_taps[u, t]])
    cells[m] =            bias2 + sum_t kernel2[t] * halo[cell_taps[m, t]]

Taps are row-major over the 3x3 window; a tap outside the table reads the zero row. The two tap tables are each
other's transpose with the kernel flipped, so the gradient with respect to the input gathers as well.
`conv_dense` is the plain reference on the whole grid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from scalr_jax.ops.cells import take_rows
from scalr_jax.runtime.sharding import platform_of

Array = jax.Array


BLOCKS = 8  # in which a table's rows are visited on CPU


def _gather_taps(table: Array, taps: Array, kernel: Array) -> Array:
    """Sum over t of kernel[t] * table[taps[:, t]]: [R, C], [Q, 9], [9, C] -> [Q, C], accumulated in float32.

    On CPU a loop over blocks of rows, for it makes the sum once. Without it XLA sums again in every later reader of
    the result, the backward pass too, and keeps the nine gathers for them: 435 MB a layer of a step instead of 343
    (62,592 points x 256, 2026-11-23).
    """

    def sum_taps(taps: Array) -> Array:
        total = jnp.zeros((taps.shape[0], table.shape[-1]), jnp.float32)
        for t in range(9):
            total += take_rows(table, taps[:, t]).astype(jnp.float32) * kernel[t].astype(jnp.float32)
        return total.astype(table.dtype)

    num_rows = taps.shape[0]
    if platform_of(taps) != "cpu" or not isinstance(num_rows, int) or num_rows % BLOCKS:  # a symbol, in an export
        return sum_taps(taps)
    return jax.lax.map(sum_taps, taps.reshape(BLOCKS, -1, 9)).reshape(num_rows, -1)


@jax.custom_vjp
def conv_taps(table: Array, taps: Array, transposed_taps: Array, kernel: Array) -> Array:
    """Depthwise 3x3 convolution from one table of cells to another.

    table [R, C] input rows; taps [Q, 9] rows of `table` read by each output row (R: the zero row);
    transposed_taps [R, 9] rows of the output that each input row's neighbours are (Q: none); kernel [9, C].
    Returns [Q, C] in the table's dtype. Its gradient only gathers.
    """
    del transposed_taps  # read by the gradient
    return _gather_taps(table, taps, kernel)


def _conv_taps_backward(residuals, gradient: Array):
    table, taps, transposed_taps, kernel = residuals
    table_gradient = _gather_taps(gradient, transposed_taps, kernel[::-1])
    if taps.shape[0] > transposed_taps.shape[0]:  # the same sum over the smaller of the two tables
        kernel_gradient = _sum_taps(table, gradient, transposed_taps)[::-1]
    else:
        kernel_gradient = _sum_taps(gradient, table, taps)
    return table_gradient.astype(table.dtype), None, None, kernel_gradient.astype(kernel.dtype)


def _sum_taps(rows: Array, table: Array, taps: Array) -> Array:
    """Sum over q of rows[q] * table[taps[q, t]], in float32: [Q, C], [R, C], [Q, 9] -> [9, C].

    A loop on CPU, where XLA fuses nine of these sums into something four times slower (40 against 9 ms for [7000, 256],
    2 cores, 2026-11-22).
    """

    def visit(_, rows_of_tap: Array):
        products = rows.astype(jnp.float32) * take_rows(table, rows_of_tap).astype(jnp.float32)
        return None, products.sum(axis=0)

    return jax.lax.scan(visit, None, taps.T, unroll=1 if platform_of(taps) == "cpu" else 9)[1]


conv_taps.defvjp(
    lambda table, taps, back, kernel: (_gather_taps(table, taps, kernel), (table, taps, back, kernel)),
    _conv_taps_backward,
)


def conv_dense(grid: Array, kernel: Array) -> Array:
    """The reference: depthwise 3x3 convolution with zero padding. [S, H, W, C], [9, C] -> [S, H, W, C].

    Written as nine shifts: XLA's grouped convolution is 40 times slower on CPU (68 against 1.7 ms for
    [8, 64, 64, 64], 2 cores, 2026-11-22).
    """
    rows, columns = grid.shape[1:3]
    padded = jnp.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = jnp.zeros(grid.shape, jnp.float32)
    for t in range(9):
        i, j = divmod(t, 3)
        total += padded[:, i : i + rows, j : j + columns].astype(jnp.float32) * kernel[t].astype(jnp.float32)
    return total.astype(grid.dtype)
