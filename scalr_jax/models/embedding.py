"""Point embedding (WaffleIron, section 3.3): final([linear(n_i), max over neighbours j of MLP(n_j - n_i)]),
n = norm(f).

With the published order of layers, everything before the ReLU of the neighbourhood branch is affine in the raw
offsets r = feats[neighbour] - feats[centre]:

    input norm: r * s, s = scale / sqrt(variance + eps)       (its mean and bias cancel in the difference)
    norm 0:     (r * s - mean0) * a0 + b0                       1x1: @ W1 [F, C]        norm 1: * a1 + b1

so the statistics of both norms follow from the mean [F] and covariance [F, F] of r, exactly, and the three layers
are one matrix [F, C] and one bias [C]. Offsets are data, so no gradient is scattered back to neighbours.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scalr_jax.models.layers import BATCH_NORM_EPS, Linear, norm_variables, to_rows, torch_uniform, update_running
from scalr_jax.ops.neighbors import Form, neighbor_max
from scalr_jax.runtime.sharding import per_shard, platform_of, whole

Array = jax.Array


class _Statistics(nn.Module):
    """The parameters and running statistics of a batch norm whose batch statistics are computed elsewhere."""

    channels: int

    @nn.compact
    def __call__(self, moments: tuple[Array, Array, Array] | None) -> tuple[Array, Array]:
        """Returns (multiplier, shift) [channels] such that the norm is x * multiplier + shift.

        `moments`: mean, variance and count of the batch; None: the running ones.
        """
        scale, bias, running_mean, running_variance = norm_variables(self, self.channels)
        mean, variance = (running_mean.value, running_variance.value) if moments is None else moments[:2]
        if moments is not None:
            update_running(self, running_mean, running_variance, moments)
        multiplier = scale * jax.lax.rsqrt(variance + BATCH_NORM_EPS)
        return multiplier, bias - mean * multiplier


def _moments(x: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Mean [F], covariance [F, F] (biased) and count of the rows of x [D, P, F] or [D, P, K, F] where `mask`."""
    axes = tuple(range(x.ndim - 1))
    valid = jnp.broadcast_to(mask, x.shape[:-1])
    count = jnp.maximum(valid.sum(dtype=jnp.float32), 1.0)
    mean = jnp.where(valid[..., None], x, 0.0).sum(axes) / count
    centred = jnp.where(valid[..., None], x - mean, 0.0)
    covariance = jnp.tensordot(centred, centred, (axes, axes), precision="highest") / count
    return mean, covariance, count


class PointEmbedding(nn.Module):
    """feats [D, P, F], neighbours [D, P, K], mask [D, P] -> [D * P, C] in `dtype`."""

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, feats: Array, neighbors: Array, mask: Array, *, train: bool) -> Array:
        num_features = feats.shape[-1]
        feats = jnp.where(mask[..., None], feats, 0.0)
        of_feats = None
        if train:
            mean, covariance, count = _moments(feats, mask)
            of_feats = mean, jnp.diag(covariance), count
        scale, shift = _Statistics(num_features, name="norm")(of_feats)
        points = Linear(self.channels, dtype=self.dtype, name="point")(to_rows(feats) * scale + shift)  # [D * P, C]

        offsets = per_shard(lambda f, n: f[n] - f[:, None], feats, neighbors)  # [D, P, K, F]
        moments = _moments(offsets, mask[..., None]) if train else None
        matrix, bias = self._folded(scale, moments, num_features)
        kernel = self.param("neighbor_out", torch_uniform(self.channels), (self.channels, self.channels))
        # By shards, so that the loop over neighbours adds up each shard's gradients and the devices meet once after it.
        weights = (whole(matrix), bias, whole(kernel))
        form = Form(self.dtype, 1 if platform_of(neighbors) == "cpu" else 4)
        neighborhood = per_shard(lambda o: neighbor_max(o, *weights, form), offsets)  # [D, P, C]
        points = jnp.concatenate([points, to_rows(neighborhood)], axis=-1)
        return Linear(self.channels, dtype=self.dtype, name="final")(points)

    def _folded(self, scale: Array, moments, num_features: int) -> tuple[Array, Array]:
        """Input scale, norm 0, 1x1 and norm 1 as one matrix [F, C] and one bias [C] on raw offsets."""
        kernel = self.param("neighbor_in", torch_uniform(num_features), (num_features, self.channels))
        statistics0 = _Statistics(num_features, name="neighbor_norm_0")
        statistics1 = _Statistics(self.channels, name="neighbor_norm_1")
        if moments is None:
            multiplier, shift = statistics0(None)
            matrix = (scale * multiplier)[:, None] * kernel
            multiplier1, shift1 = statistics1(None)
        else:
            mean, covariance, count = moments  # over (point, neighbour) pairs
            multiplier, shift = statistics0((mean * scale, jnp.diag(covariance) * scale**2, count))
            matrix = (scale * multiplier)[:, None] * kernel
            hidden_mean = jnp.matmul(mean, matrix, precision="highest") + jnp.matmul(shift, kernel, precision="highest")
            hidden_variance = jnp.einsum("fc,fg,gc->c", matrix, covariance, matrix, precision="highest")
            multiplier1, shift1 = statistics1((hidden_mean, hidden_variance, count))
        bias = jnp.matmul(shift, kernel, precision="highest")
        return matrix * multiplier1, bias * multiplier1 + shift1
