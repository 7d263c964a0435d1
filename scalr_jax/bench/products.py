"""The student's matrix products without anything else: the floor for its times.

Shapes, dtypes and the order in which one product needs the last one's result are those of the model; activations,
norms and spatial mixing are left out. Every result is returned or carried on, so that XLA can drop nothing, and
weights have unit gain, so that numbers neither vanish nor overflow (zeros would run faster on some chips).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from scalr_jax.data.scenes import Batch
from scalr_jax.models.flops import Matrix, Sizes, head_products, vavit_matrices
from scalr_jax.models.student import Student
from scalr_jax.models.vavit import VaViTBackbone

Array = jax.Array


def unit_gain(key: Array, *shape: int, dtype: DTypeLike) -> Array:
    """Weights [..., inner, outer] that keep the size of what they multiply."""
    bound = (3 / shape[-2]) ** 0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


def forward(x: Array, kernels: tuple[Array, ...]) -> Array:
    """x [P, C] through one matrix after the other."""
    for kernel in kernels:
        x = x @ kernel
    return x


def forward_backward(x: Array, kernels: tuple[Array, ...], gradient: Array) -> tuple:
    """The same, with the gradients of x and of the matrices for an output's gradient [P, C_out]."""
    out, pull_back = jax.vjp(forward, x, kernels)
    return out, *pull_back(gradient)


class StepOperands(NamedTuple):
    """Inputs of `step_products`."""

    feats: Array  # [P, F]
    offsets: Array  # [K, P, F]
    x: Array  # [P, C]: also stands for gradients
    out: Array  # [P, out_features]: the gradient of the output
    point: Array  # [F, C]
    neighbor_in: Array  # [F, C]
    neighbor_out: Array  # [C, C]
    final: Array  # [2 C, C]
    layers: tuple[Array, Array]  # [depth, C, C] each
    head: tuple[Array, ...]


def step_operands(sizes: Sizes, num_points: int, dtype: DTypeLike) -> StepOperands:
    """Random ones. Offsets, features and what multiplies offsets are float32, as in the model."""
    c, f, p = sizes.channels, sizes.num_features, num_points
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def normal(*shape: int, dtype: DTypeLike = dtype) -> Array:
        return jax.random.normal(next(keys), shape, jnp.float32).astype(dtype)

    def weight(*shape: int, dtype: DTypeLike = dtype) -> Array:
        return unit_gain(next(keys), *shape, dtype=dtype)

    return StepOperands(
        feats=normal(p, f),
        offsets=normal(sizes.num_neighbors, p, f, dtype=jnp.float32),
        x=normal(p, c),
        out=normal(p, sizes.out_features),
        point=weight(f, c),
        neighbor_in=weight(f, c, dtype=jnp.float32),
        neighbor_out=weight(c, c),
        final=weight(2 * c, c),
        layers=(weight(sizes.depth, c, c), weight(sizes.depth, c, c)),
        head=tuple(weight(product.inner, product.outer) for product in head_products(sizes)),
    )


def step_products(operands: StepOperands) -> tuple:
    """All products of a training step, forward and backward; neighbours and layers one after the other in loops."""
    o = operands
    points = forward_backward(o.feats, (o.point,), o.x)
    neighborhood = _neighbors(o)
    joined = jnp.concatenate([points[0], neighborhood[0]], axis=-1)
    final = forward_backward(joined, (o.final,), o.x)

    def layer(carry: tuple[Array, Array], kernels: tuple[Array, Array]):
        out, below, kernel_gradients = forward_backward(carry[0], kernels, carry[1])
        return (out, below), kernel_gradients

    layers = jax.lax.scan(layer, (final[0], o.x), o.layers)
    return points, neighborhood, final[1:], layers, forward_backward(layers[0][0], o.head, o.out)


def _neighbors(o: StepOperands) -> tuple:
    """The products of `ops/neighbors.py`: forward two products a neighbour, backward the first again and three."""
    dtype = o.neighbor_out.dtype

    def product(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)

    def visit(_: Array, offset: Array) -> tuple[Array, None]:
        return product((offset @ o.neighbor_in).astype(dtype), o.neighbor_out), None

    def revisit(carry: tuple, offset: Array) -> tuple[tuple, None]:
        gradient, in_gradient, out_gradient = carry
        hidden = (offset @ o.neighbor_in).astype(dtype)
        out_gradient += product(hidden.T, gradient)
        hidden_gradient = product(gradient, o.neighbor_out.T)
        in_gradient += offset.T @ hidden_gradient
        return (hidden_gradient.astype(dtype), in_gradient, out_gradient), None  # next round's: nothing is invariant

    out, _ = jax.lax.scan(visit, jnp.zeros(o.x.shape, jnp.float32), o.offsets)
    zeros = jnp.zeros(o.neighbor_in.shape, jnp.float32), jnp.zeros(o.neighbor_out.shape, jnp.float32)
    gradients, _ = jax.lax.scan(revisit, (o.x, *zeros), o.offsets)
    return out.astype(dtype), gradients


def vavit_step(student: Student, batch: Batch) -> Callable[[], object]:
    """All products of a step with a VaViT, each and its two gradients; attention's, of each scene alone, and their
    four. A product that comes several times takes the last one's gradient for its input."""
    backbone = student.backbone
    assert isinstance(backbone, VaViTBackbone) and batch.pillars is not None  # noqa: PT018
    counts = [count for count in batch.pillars.counts.ravel().tolist() if count]
    num_points, num_features = int(batch.scene_points.sum()), batch.feats.shape[-1]
    sizes = Sizes(backbone.channels, backbone.depth, student.out_features, student.head_hidden)
    matrices = vavit_matrices(backbone, num_points, sum(counts), num_features)
    matrices += [Matrix(num_points, product.inner, product.outer) for product in head_products(sizes)]
    keys, heads = iter(jax.random.split(jax.random.key(0), 2 * len(matrices) + len(counts))), backbone.num_heads
    rows = [jax.random.normal(next(keys), (m.rows, m.inner)).astype(student.dtype) for m in matrices]
    kernels = [unit_gain(next(keys), m.inner, m.outer, dtype=student.dtype) for m in matrices]
    shape = lambda count: (heads, count, backbone.width // heads)  # noqa: E731
    scenes = [jax.random.normal(next(keys), shape(count)).astype(student.dtype) for count in counts]

    def product(x: Array, kernel: Array) -> tuple[Array, Array]:
        y = x @ kernel
        return y @ kernel.T, x.T @ y

    def attend(x: Array) -> Array:
        logits = jnp.einsum("hqd,hkd->hqk", x, x) * 0.01
        y = jnp.einsum("hqk,hkd->hqd", logits, x)
        of_logits = jnp.einsum("hqd,hkd->hqk", y, x) * 0.01
        of_value, of_key = (jnp.einsum("hqk,hqd->hkd", weights, y) for weights in (logits, of_logits))
        return (jnp.einsum("hqk,hkd->hqd", of_logits, x) + of_value + of_key).astype(x.dtype) * 1e-3

    @jax.jit
    def run(rows: list, kernels: list, scenes: list) -> tuple[list, list]:
        def repeat(x: Array, kernel: Array, times: int) -> tuple[Array, Array]:
            return jax.lax.scan(lambda x, _: product(x, kernel), x, None, length=times)

        out = [repeat(x, kernel, m.times) for x, kernel, m in zip(rows, kernels, matrices, strict=True)]
        return out, [jax.lax.fori_loop(0, backbone.depth, lambda _, x: attend(x), x) for x in scenes]

    return lambda: run(rows, kernels, scenes)
