"""The neighbourhood branch of the point embedding: max over K neighbours of W2^T relu(offsets A + b).

Published (WaffleIron, section 3.3) as batch norm, 1x1, batch norm, ReLU, 1x1, max on [P, K, C]. Everything before the
ReLU is affine in the offsets (neighbour - centre), so the two norms and the first matrix fold into one [F, C] matrix
(`models/embedding.py`), and what remains is computed one neighbour at a time: nothing of size [P, K, C] is stored in
the forward pass, and the backward pass computes the hidden layer again.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array


class Form(NamedTuple):
    """Arguments of `neighbor_max` that are no arrays."""

    dtype: DTypeLike  # of products
    at_a_time: int = 1  # neighbours, of which XLA then reads and writes the maximum once


def _hidden(offset: Array, matrix: Array, bias: Array, dtype: DTypeLike) -> Array:
    """[P, C]; as sums of F products, which XLA joins with what follows, where a matrix product would be written first
    (compiled for an H100: 27 GB instead of 55 for 65,536 points x 768, 2026-11-28), and rounded on a TPU."""
    return jax.nn.relu(sum((offset[:, f, None] * matrix[f] for f in range(len(matrix))), bias)).astype(dtype)


def _forward(offsets: Array, matrix: Array, bias: Array, kernel: Array, form: Form) -> tuple[Array, Array]:
    """Maximum [P, C] and which neighbour attains it [P, C] uint8 (the first one, where several do)."""
    num_points, num_neighbors, _ = offsets.shape
    kernel = kernel.astype(form.dtype)

    def visit(carry, inputs):
        best, winner = carry
        k, offset = inputs
        value = _hidden(offset, matrix, bias, form.dtype) @ kernel
        better = value > best
        return (jnp.where(better, value, best), jnp.where(better, k, winner)), None

    shape = (num_points, kernel.shape[1])
    start = jnp.full(shape, -jnp.inf, form.dtype), jnp.zeros(shape, jnp.uint8)
    steps = (jnp.arange(num_neighbors, dtype=jnp.uint8), offsets.swapaxes(0, 1))
    return jax.lax.scan(visit, start, steps, unroll=form.at_a_time)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def neighbor_max(offsets: Array, matrix: Array, bias: Array, kernel: Array, form: Form) -> Array:
    """Max over neighbours of `relu(offsets @ matrix + bias) @ kernel`, [P, C_out] in `form.dtype`, the products' own.

    offsets [P, K, F] (data: no gradient flows to them), matrix [F, C], bias [C] and kernel [C, C_out], all float32,
    as are the gradients.
    """
    return _forward(offsets, matrix, bias, kernel, form)[0]


def _neighbor_max_forward(offsets: Array, matrix: Array, bias: Array, kernel: Array, form: Form):
    best, winner = _forward(offsets, matrix, bias, kernel, form)
    return best, (offsets, matrix, bias, kernel, winner)


def _neighbor_max_backward(form: Form, residuals, gradient: Array):
    offsets, matrix, bias, kernel, winner = residuals
    kernel = kernel.astype(form.dtype)

    def visit(sums, inputs):
        k, offset = inputs
        hidden = _hidden(offset, matrix, bias, form.dtype)
        chosen = jnp.where(winner == k, gradient, jnp.zeros_like(gradient))  # [P, C_out]
        of_hidden = jnp.where(hidden > 0, chosen @ kernel.T, 0)
        with_one = jnp.pad(offset, ((0, 0), (0, 1)), constant_values=1).astype(form.dtype)  # the one is the bias's
        parts = (with_one, of_hidden), (hidden, chosen)
        return tuple(
            s + jnp.matmul(x.T, y, preferred_element_type=jnp.float32) for s, (x, y) in zip(sums, parts, strict=True)
        ), None

    start = jnp.zeros((len(matrix) + 1, len(bias)), jnp.float32), jnp.zeros(kernel.shape, jnp.float32)
    steps = (jnp.arange(offsets.shape[1], dtype=jnp.uint8), offsets.swapaxes(0, 1))
    (of_matrix, of_kernel), _ = jax.lax.scan(visit, start, steps, unroll=form.at_a_time)
    return None, of_matrix[:-1], of_matrix[-1], of_kernel


neighbor_max.defvjp(_neighbor_max_forward, _neighbor_max_backward)
