"""The two layers that every part of the student shares, initialised as PyTorch does.

Linear: x @ kernel + bias, kernel and bias U(+-1/sqrt(fan_in)).
Batch norm: statistics over the valid rows of the global batch; running variance unbiased (n / (n - 1)), momentum 0.1.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scalr_jax.runtime.sharding import whole

Array = jax.Array


def to_rows(x: Array) -> Array:
    """[D, P, ...] -> [D * P, ...]. XLA reduces two axes on CPU five times slower than one (2026-11-22), and a row is
    a row; under a mesh D stays the sharded part of the joint axis."""
    return x.reshape(-1, *x.shape[2:])


MOMENTUM = 0.1
BATCH_NORM_EPS = 1e-5
LAYER_NORM_EPS = 1e-5


def torch_uniform(fan_in: int):
    """PyTorch's default initialiser of linear and convolution layers: U(+-1/sqrt(fan_in))."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


@jax.custom_vjp
def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """x @ kernel + bias in the dtype of x. x [N, C_in]; kernel [C_in, C_out] and bias [C_out] float32.

    The gradients of kernel and bias are summed in float32, over the rows here and then over the devices. JAX's own
    would leave the product in the dtype of x, and XLA would add up a thousand devices' gradients in bfloat16.
    """
    product = x @ whole(kernel.astype(x.dtype))
    return product if bias is None else product + bias.astype(x.dtype)


def _linear_backward(residuals: tuple, gradient: Array):
    x, kernel, bias = residuals
    dimensions = (((0,), (0,)), ((), ()))
    kernel_gradient = jax.lax.dot_general(x, gradient, dimensions, preferred_element_type=jnp.float32)
    bias_gradient = None if bias is None else gradient.sum(0, dtype=jnp.float32).astype(bias.dtype)
    return gradient @ whole(kernel.astype(x.dtype)).T, kernel_gradient.astype(kernel.dtype), bias_gradient


linear.defvjp(lambda x, kernel, bias=None: (linear(x, kernel, bias), (x, kernel, bias)), _linear_backward)


def linear_weights(module: nn.Module, fan_in: int, features: int) -> tuple[Array, Array]:
    """Parameters of a linear layer in `module`: `kernel` [fan_in, features] and `bias` [features], float32."""
    init = torch_uniform(fan_in)
    return module.param("kernel", init, (fan_in, features)), module.param("bias", init, (features,))


class LinearWeights(nn.Module):
    """`linear_weights` as a module of its own."""

    features: int

    @nn.compact
    def __call__(self, fan_in: int) -> tuple[Array, Array]:
        return linear_weights(self, fan_in, self.features)


class Linear(nn.Module):
    """[N, C_in] -> [N, features] in `dtype`."""

    features: int
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = linear_weights(self, x.shape[-1], self.features)
        return linear(x.astype(self.dtype), kernel, bias)


def update_running(module: nn.Module, mean: Any, variance: Any, moments: tuple[Array, Array, Array]) -> None:
    """Move a batch norm's running statistics by a batch's mean, (biased) variance and count, which is at least 1."""
    if not module.is_initializing():
        batch_mean, batch_variance, count = moments
        unbiased = batch_variance * count / jnp.maximum(count - 1, 1)
        mean.value = (1 - MOMENTUM) * mean.value + MOMENTUM * batch_mean
        variance.value = (1 - MOMENTUM) * variance.value + MOMENTUM * unbiased


def norm_variables(module: nn.Module, channels: int) -> tuple[Array, Array, nn.Variable, nn.Variable]:
    """Scale and bias [channels] of a batch norm, parameters of `module`, and its running mean and variance."""
    scale = module.param("scale", nn.initializers.ones, (channels,))
    bias = module.param("bias", nn.initializers.zeros, (channels,))
    mean = module.variable("batch_stats", "mean", jnp.zeros, (channels,))
    return scale, bias, mean, module.variable("batch_stats", "variance", jnp.ones, (channels,))


def batch_statistics(
    module: nn.Module, x: Array, mask: Array, *, train: bool
) -> tuple[tuple[Array, Array], Array, Array]:
    """The parts of a batch norm of rows: the mean [C] and inverse deviation [C] over the rows where `mask` is true,
    all shards together (the running ones unless `train`), and its parameters scale [C] and bias [C]. Float32."""
    scale, bias, running_mean, running_variance = norm_variables(module, x.shape[-1])
    if train:
        x = jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)
        axes = tuple(range(x.ndim - 1))
        count = jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)
        mean = x.sum(axes) / count
        variance = jnp.where(mask[..., None], jnp.square(x - mean), 0.0).sum(axes) / count
        update_running(module, running_mean, running_variance, (mean, variance, count))
    else:
        mean, variance = running_mean.value, running_variance.value
    return (mean, jax.lax.rsqrt(variance + BATCH_NORM_EPS)), scale, bias


class BatchStatistics(nn.Module):
    """`batch_statistics` as a module of its own."""

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> tuple[tuple[Array, Array], Array, Array]:
        return batch_statistics(self, x, mask, train=train)


class BatchNorm(nn.Module):
    """Batch norm of the last axis. Padded rows come out as finite numbers, to be ignored."""

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        statistics, scale, bias = batch_statistics(self, x, mask, train=train)
        return normalize(x, mask, statistics) * scale + bias


class Norm(nn.Module):
    """The norm at the start of each mixing block, "layer" (ScaLR) or "batch" (WaffleIron), for `normalize`:
    statistics (None for a layer norm, whose are each row's own), scale [C] and bias [C]."""

    kind: str

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> tuple[tuple[Array, Array] | None, Array, Array]:
        if self.kind == "batch":
            return BatchStatistics(name="batch")(x, mask, train=train)
        scale, bias = _Affine(name="layer")(x.shape[-1])
        return None, scale, bias


class _Affine(nn.Module):
    """scale [C], ones at first, and bias [C], zeros."""

    @nn.compact
    def __call__(self, channels: int) -> tuple[Array, Array]:
        scale = self.param("scale", nn.initializers.ones, (channels,))
        return scale, self.param("bias", nn.initializers.zeros, (channels,))


def normalize(x: Array, mask: Array, statistics: tuple[Array, Array] | None) -> Array:
    """Rows minus mean, over deviation, in float32; what follows applies scale and bias. x [N, C], mask [N].

    With `statistics` (mean and inverse deviation of each channel) a batch norm, else a layer norm of each row. A padded
    row is replaced before the norm, not only after it: else its gradient may be NaN.
    """
    x = jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)
    if statistics is not None:
        mean, inverse_deviation = statistics
        return (x - mean) * inverse_deviation
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + LAYER_NORM_EPS)


def keep_scenes(module: nn.Module, scene: Array, num_scenes: int, rate: float, train: bool) -> Array | None:
    """Stochastic depth: a factor for each row's branch, for a whole scene 0 with probability `rate`, else
    1 / (1 - rate).

    scene [D, rows] -> [D, rows] float32; None where nothing is dropped.
    """
    if not train or rate == 0.0:
        return None
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, (scene.shape[0], num_scenes + 1))
    return jnp.take_along_axis(keep, scene, axis=1).astype(jnp.float32) / (1.0 - rate)
