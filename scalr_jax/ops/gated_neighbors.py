"""The neighbourhood branch of a VaViT's point layer (arXiv 2605.31177): for point i with neighbours j_1, ..., j_K

    y_i = max_k sigmoid(W r_ik + b) * r_ik,    r_ik = relu(norm(u_j - u_i)),    j = j_k,

where u = x @ W_n, so that the linear layer of differences is one of points, and norm is a batch norm whose statistics
are over all N * K pairs. Published on arrays [N, K, C]. Here neighbours are visited `at_a_time`: one after another on a
CPU, where what a pass makes then stays in the cache, all at once elsewhere, where XLA fuses that into fewer bytes
(compiled for an H100: 26 GB a step of VaViT-B instead of 46, 2026-11-28). Where several neighbours attain the maximum
the gradient goes to the first, as in PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from scalr_jax.ops.runs import add_at
from scalr_jax.runtime.sharding import per_shard

Array = jax.Array
Sums = TypeVar("Sums")
EPS = 1e-5


class Form(NamedTuple):
    """Arguments of `gated_max` that are no arrays."""

    train: bool  # statistics of the batch, else the running ones
    dtype: DTypeLike  # of products
    at_a_time: int  # neighbours; a divisor of K


class Norm(NamedTuple):
    """[C] each, float32; mean and variance are the running ones, which training does not read."""

    scale: Array
    bias: Array
    mean: Array
    variance: Array


class Gate(NamedTuple):
    kernel: Array  # [C, C] float32
    bias: Array  # [C] float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_max(
    form: Form, u: Array, norm: Norm, gate: Gate, neighbors: Array, mask: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    """u [D, P, C], neighbors [D, P, K] int32 rows of the shard, mask [D, P] -> y [D, P, C] in `form.dtype`.

    Also the mean [C] and (biased) variance [C] that normalised, and the number of pairs. To these no gradient flows.
    """
    return _forward(form, u, norm, gate, neighbors, mask)[0]


def _visit(form: Form, neighbors: Array, function: Callable, start: Sums) -> tuple[Sums, Array]:
    """A scan of `function(sums, (k [n], index [n, P]))` over the neighbours of one shard, n at a time."""
    index = neighbors.T.reshape(-1, form.at_a_time, neighbors.shape[0])
    k = jnp.arange(neighbors.shape[1], dtype=jnp.uint8).reshape(-1, form.at_a_time)
    if len(k) > 1:
        return jax.lax.scan(function, start, (k, index))
    sums, out = function(start, (k[0], index[0]))
    return sums, jax.tree.map(lambda x: x[None], out)


def _differences(u: Array, index: Array) -> Array:
    """[n, P, C] float32"""
    return u[index].astype(jnp.float32) - u.astype(jnp.float32)


def _moments(form: Form, u: Array, neighbors: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Mean, variance and number of the differences of all pairs.

    In one pass: their mean is small beside their deviation, for most pairs are there both ways.
    """

    def of_shard(u: Array, neighbors: Array, mask: Array) -> tuple[Array, Array]:
        def add(sums: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            d = jnp.where(mask[:, None], _differences(u, inputs[1]), 0.0)
            return (sums[0] + d.sum((0, 1)), sums[1] + jnp.square(d).sum((0, 1))), None

        zeros = jnp.zeros(u.shape[-1], jnp.float32)
        return _visit(form, neighbors, add, (zeros, zeros))[0]

    total, squares = per_shard(of_shard, u, neighbors, mask)
    count = jnp.maximum(mask.sum(dtype=jnp.float32) * neighbors.shape[-1], 1.0)
    mean = total.sum(0) / count
    return mean, squares.sum(0) / count - jnp.square(mean), count


def _first_of_largest(a: tuple[Array, Array, Array], b: tuple[Array, Array, Array]) -> tuple:
    """The one of two (value, gate, place) with the larger value; of equal ones the first. As one reduction XLA makes
    one pass of it on a GPU, and two of a chain of choices (compiled, 2026-11-29)."""
    better = (b[0] > a[0]) | ((b[0] == a[0]) & (b[2] < a[2]))
    return jax.tree.map(functools.partial(jnp.where, better), b, a)


def _affine(norm: Norm, mean: Array, variance: Array) -> tuple[Array, Array]:
    multiplier = norm.scale * jax.lax.rsqrt(variance + EPS)
    return multiplier, norm.bias - mean * multiplier


def _forward(form: Form, u: Array, norm: Norm, gate: Gate, neighbors: Array, mask: Array) -> tuple:
    zero = jnp.float32(0)
    moments = _moments(form, u, neighbors, mask) if form.train else (norm.mean, norm.variance, zero)
    multiplier, shift = _affine(norm, *moments[:2])
    kernel = gate.kernel.astype(form.dtype)
    nothing = (np.array(-1, form.dtype), np.array(0, form.dtype), np.uint8(0))

    def of_shard(u: Array, neighbors: Array) -> tuple[Array, Array, Array]:
        def visit(best: tuple[Array, Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple, None]:
            k, index = inputs
            r = jax.nn.relu(_differences(u, index) * multiplier + shift).astype(form.dtype)
            opened = jax.nn.sigmoid((r @ kernel).astype(jnp.float32) + gate.bias)
            y = (r.astype(jnp.float32) * opened).astype(form.dtype)
            places = jnp.broadcast_to(k[:, None, None], y.shape)
            found = jax.lax.reduce((y, opened.astype(form.dtype), places), nothing, _first_of_largest, (0,))
            better = found[0] > best[0]
            return jax.tree.map(functools.partial(jnp.where, better), found, best), None

        start = jax.tree.map(lambda x: jnp.full(u.shape, x), nothing)
        return _visit(form, neighbors, visit, start)[0]

    y, opened, winner = per_shard(of_shard, u, neighbors)
    return (y, moments), (u, norm, gate, neighbors, mask, moments, y, opened, winner)


def _backward(form: Form, saved: tuple, gradients: tuple) -> tuple:
    u, norm, gate, neighbors, mask, (mean, variance, count), y, opened, winner = saved
    gradient = gradients[0].astype(jnp.float32)
    deviation = jax.lax.rsqrt(variance + EPS)
    multiplier, shift = _affine(norm, mean, variance)
    kernel = gate.kernel.astype(form.dtype)
    # Of the winners alone: r * gate is y, so that the gate need not be computed again.
    opened = opened.astype(jnp.float32)
    into_gate = (gradient * y.astype(jnp.float32) * (1 - opened)).astype(form.dtype)
    into_product = (gradient * opened).astype(form.dtype)

    def of_shard(u: Array, neighbors: Array, winner: Array, into_gate: Array, into_product: Array) -> tuple:
        def visit(sums: tuple, inputs: tuple[Array, Array]) -> tuple[tuple, Array]:
            k, index = inputs
            d, chosen = _differences(u, index), winner == k[:, None, None]
            r = jax.nn.relu(d * multiplier + shift).astype(form.dtype)
            of_gate = jnp.where(chosen, into_gate, 0)
            back = (of_gate @ kernel.T).astype(jnp.float32)
            of_norm = jnp.where(r > 0, jnp.where(chosen, into_product, 0).astype(jnp.float32) + back, 0.0)
            of_norm = of_norm.astype(form.dtype)  # all that leaves this pass
            rows = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
            parts = (
                jnp.matmul(rows(r).T, rows(of_gate), preferred_element_type=jnp.float32),
                of_norm.sum((0, 1), dtype=jnp.float32),
                (of_norm * d).sum((0, 1)),
            )
            return jax.tree.map(jnp.add, sums, parts), of_norm

        zeros = jnp.zeros(u.shape[-1], jnp.float32)
        return _visit(form, neighbors, visit, (jnp.zeros(kernel.shape, jnp.float32), zeros, zeros))

    sums, of_norm = per_shard(of_shard, u, neighbors, winner, into_gate, into_product)
    of_kernel, of_bias, with_d = jax.tree.map(lambda x: x.sum(0), sums)
    of_gate_bias = into_gate.sum((0, 1), dtype=jnp.float32)  # each point's is of one pair
    of_scale = deviation * (with_d - mean * of_bias)

    def to_points(u: Array, neighbors: Array, mask: Array, of_norm: Array) -> Array:
        """From each pair's gradient to its two points', through the norm's statistics too."""

        def visit(sums: Array, inputs: tuple) -> tuple[Array, None]:
            index, of_norm = inputs
            of_d = multiplier * of_norm.astype(jnp.float32)
            if form.train:
                d = _differences(u, index)
                of_d -= multiplier / count * (of_bias + (d - mean) * deviation * of_scale)
            of_d = jnp.where(mask[:, None], of_d, 0.0)
            return add_at(sums, index, of_d) - of_d.sum(0), None

        index = neighbors.T.reshape(-1, form.at_a_time, neighbors.shape[0])
        return jax.lax.scan(visit, jnp.zeros(u.shape, jnp.float32), (index, of_norm))[0]

    of_u = per_shard(to_points, u, neighbors, mask, of_norm).astype(u.dtype)
    of_norm_parameters = Norm(of_scale, of_bias, jnp.zeros_like(norm.mean), jnp.zeros_like(norm.variance))
    return of_u, of_norm_parameters, Gate(of_kernel, of_gate_bias), None, None


gated_max.defvjp(_forward, _backward)
