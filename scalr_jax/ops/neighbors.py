"""The neighbourhood branch of the point embedding: max over K neighbours of W2^T relu(offsets A + b).

Published (WaffleIron, section 3.3) as batch norm, 1x1, batch norm, ReLU, 1x1, max on [P, K, C]. Everything before the
ReLU is affine in the offsets (neighbour - centre), so the two norms and the first matrix fold into one [F, C] matrix
(`models/embedding.py`), and what remains is computed one neighbour at a time: nothing of size [P, K, C] is stored in
the forward pass, and the backward pass computes the hidden layer again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array


def _hidden(offset: Array, matrix: Array, bias: Array, dtype: DTypeLike) -> Array:
    return jax.nn.relu(offset @ matrix + bias).astype(dtype)  # [P, C]


def _forward(offsets: Array, matrix: Array, bias: Array, kernel: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """Maximum [P, C] and which neighbour attains it [P, C] uint8 (the first one, where several do)."""
    num_points, num_neighbors, _ = offsets.shape
    kernel = kernel.astype(dtype)

    def visit(carry, inputs):
        best, winner = carry
        k, offset = inputs
        value = jnp.matmul(_hidden(offset, matrix, bias, dtype), kernel, preferred_element_type=jnp.float32)
        better = value > best
        return (jnp.where(better, value, best), jnp.where(better, k, winner)), None

    shape = (num_points, kernel.shape[1])
    start = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.uint8)
    steps = (jnp.arange(num_neighbors, dtype=jnp.uint8), offsets.swapaxes(0, 1))
    (best, winner), _ = jax.lax.scan(visit, start, steps)
    return best.astype(dtype), winner


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def neighbor_max(offsets: Array, matrix: Array, bias: Array, kernel: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """Max over neighbours of `relu(offsets @ matrix + bias) @ kernel`, [P, C_out] in `dtype`, the products' own.

    offsets [P, K, F] (data: no gradient flows to them), matrix [F, C], bias [C] and kernel [C, C_out], all float32,
    as are the gradients.
    """
    return _forward(offsets, matrix, bias, kernel, dtype)[0]


def _neighbor_max_forward(offsets: Array, matrix: Array, bias: Array, kernel: Array, dtype: DTypeLike):
    best, winner = _forward(offsets, matrix, bias, kernel, dtype)
    return best, (offsets, matrix, bias, kernel, winner)


def _neighbor_max_backward(dtype: DTypeLike, residuals, gradient: Array):
    offsets, matrix, bias, kernel, winner = residuals
    kernel = kernel.astype(dtype)

    def visit(carry, inputs):
        matrix_gradient, bias_gradient, kernel_gradient = carry
        k, offset = inputs
        hidden = _hidden(offset, matrix, bias, dtype)
        chosen = jnp.where(winner == k, gradient, jnp.zeros_like(gradient))  # [P, C_out]
        kernel_gradient += jnp.matmul(hidden.T, chosen, preferred_element_type=jnp.float32)
        hidden_gradient = jnp.matmul(chosen, kernel.T, preferred_element_type=jnp.float32)
        hidden_gradient = jnp.where(hidden > 0, hidden_gradient, 0)
        matrix_gradient += offset.T @ hidden_gradient
        bias_gradient += hidden_gradient.sum(axis=0)
        return (matrix_gradient, bias_gradient, kernel_gradient), None

    start = (jnp.zeros_like(matrix), jnp.zeros_like(bias), jnp.zeros(kernel.shape, jnp.float32))
    steps = (jnp.arange(offsets.shape[1], dtype=jnp.uint8), offsets.swapaxes(0, 1))
    (matrix_gradient, bias_gradient, kernel_gradient), _ = jax.lax.scan(visit, start, steps)
    return None, matrix_gradient, bias_gradient, kernel_gradient


neighbor_max.defvjp(_neighbor_max_forward, _neighbor_max_backward)
