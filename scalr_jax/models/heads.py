"""Heads on the backbone's point features [D * P, C]: distillation and segmentation, each linear or an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from scalr_jax.models.layers import BatchNorm, Linear

Array = jax.Array

SEGMENTATION_HEADS = ("segment", "mlp", "linear")


class DistillationHead(nn.Module):
    """To the teacher's width: one linear layer (`hidden` 0, ScaLR) or linear, ReLU, linear (ScaLR+, hidden 2048).

    With several teachers `features` is the sum of their widths and each has its own hidden layer; linear heads beside
    one another are one linear layer.
    """

    features: int
    hidden: int = 0
    dtype: Any = jnp.float32
    widths: tuple[int, ...] = ()  # of several teachers

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.hidden:
            return Linear(self.features, dtype=self.dtype, name="out")(x)
        number = max(1, len(self.widths))
        x = jax.nn.relu(Linear(number * self.hidden, dtype=self.dtype, name="hidden")(x))
        if number == 1:
            return Linear(self.features, dtype=self.dtype, name="out")(x)
        parts = zip(self.widths, jnp.split(x, number, axis=-1), strict=True)
        return jnp.concatenate(
            [Linear(width, dtype=self.dtype, name=f"out_{k}")(part) for k, (width, part) in enumerate(parts)], axis=-1
        )


def joined_heads(params: Mapping[str, Mapping]) -> dict[str, Mapping]:
    """Parameters whose head of several teachers with hidden layers is that of one: a last layer of blocks, zero
    elsewhere. Outputs are equal."""
    head = params.get("head", {})
    outs = [head[f"out_{k}"] for k in range(len(head)) if f"out_{k}" in head]
    if not outs:
        return dict(params)
    kernel = scipy.linalg.block_diag(*(np.asarray(out["kernel"]) for out in outs))
    bias = np.concatenate([np.asarray(out["bias"]) for out in outs])
    return {**params, "head": {"hidden": head["hidden"], "out": {"kernel": kernel, "bias": bias}}}


class SegmentationHead(nn.Module):
    """Batch norm and a zero-initialised linear layer (ScaLR, section 4): rows [N, C] -> logits [N, classes].

    With `mlp` a hidden layer as wide as the features, and ReLU, come before the last layer.
    """

    num_classes: int
    mlp: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        x = BatchNorm(name="norm")(x, mask, train=train)
        if self.mlp:
            x = jax.nn.relu(Linear(x.shape[-1], name="hidden")(x))
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.num_classes))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return x @ kernel + bias


def segmentation_head(params: dict) -> str | None:
    """Which segmentation head the parameters have: "segment" (batch norm and linear), "mlp", "linear" or none."""
    head = params.get("head", {})
    if "kernel" not in head:
        return None
    return "mlp" if "hidden" in head else "segment" if "norm" in head else "linear"
