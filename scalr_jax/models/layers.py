"""The two layers that every part of the student shares, initialised as PyTorch does.

Linear: x @ kernel + bias, kernel and bias U(+-1/sqrt(fan_in)).
Batch norm: statistics over the valid rows of the global batch; running variance unbiased (n / (n - 1)), momentum 0.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


def to_rows(x: Array) -> Array:
    """[D, P, ...] -> [D * P, ...]. XLA reduces two axes on CPU five times slower than one (2026-11-22), and a row is
    a row; under a mesh D stays the sharded part of the joint axis."""
    return x.reshape(-1, *x.shape[2:])


def per_shard(function: Callable, *arrays: Any) -> Any:
    """`function` on each data shard: mapped over the leading axis D, without a map when D is 1."""
    if jax.tree.leaves(arrays)[0].shape[0] > 1:
        return jax.vmap(function)(*arrays)
    return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], arrays)))


MOMENTUM = 0.1
BATCH_NORM_EPS = 1e-5
LAYER_NORM_EPS = 1e-5


def torch_uniform(fan_in: int):
    """PyTorch's default initialiser of linear and convolution layers: U(+-1/sqrt(fan_in))."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Linear(nn.Module):
    """[..., C_in] -> [..., features] in `dtype`; parameters `kernel` [C_in, features] and `bias` in float32."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = torch_uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            y += self.param("bias", init, (self.features,)).astype(self.dtype)
        return y


def unbiased(variance: Array, count: Array) -> Array:
    return variance * count / jnp.maximum(count - 1, 1)


def update_running(module: nn.Module, mean: Any, variance: Any, batch_mean: Array, batch_variance: Array) -> None:
    """Move a batch norm's running statistics; a step without one valid row must not come here as NaN."""
    if not module.is_initializing():
        mean.value = (1 - MOMENTUM) * mean.value + MOMENTUM * batch_mean
        variance.value = (1 - MOMENTUM) * variance.value + MOMENTUM * batch_variance


class BatchNorm(nn.Module):
    """Batch norm of the last axis over the rows where `mask` is true, all shards together; computed in float32.

    `train=False` uses the running statistics. Padded rows come out as finite numbers that nobody may read.
    """

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_variance = self.variable("batch_stats", "variance", jnp.ones, (channels,))
        x = jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)
        if train:
            axes = tuple(range(x.ndim - 1))
            count = jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)
            mean = x.sum(axes) / count
            variance = jnp.where(mask[..., None], jnp.square(x - mean), 0.0).sum(axes) / count
            update_running(self, running_mean, running_variance, mean, unbiased(variance, count))
        else:
            mean, variance = running_mean.value, running_variance.value
        return (x - mean) * (jax.lax.rsqrt(variance + BATCH_NORM_EPS) * scale) + bias


class Norm(nn.Module):
    """The norm at the start of each mixing block: "layer" (ScaLR) or "batch" (WaffleIron). Float32 inside."""

    kind: str

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        if self.kind == "batch":
            return BatchNorm(name="batch")(x, mask, train=train)
        # A padded row must not reach the norm: its gradient would be NaN where the row is constant.
        x = jnp.where(mask[..., None], x.astype(jnp.float32), jax.lax.stop_gradient(_not_constant(x.shape[-1])))
        return nn.LayerNorm(epsilon=LAYER_NORM_EPS, use_fast_variance=False, name="layer")(x)


def _not_constant(channels: int) -> Array:
    return jnp.linspace(-1.0, 1.0, channels)
