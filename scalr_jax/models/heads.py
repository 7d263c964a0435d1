"""Heads on the backbone's point features [D * P, C]: distillation and segmentation, each linear or an MLP."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scalr_jax.models.layers import BatchNorm, Linear

Array = jax.Array

SEGMENTATION_HEADS = ("segment", "mlp", "linear")


class DistillationHead(nn.Module):
    """To the teacher's width: one linear layer (`hidden` 0, ScaLR) or linear, ReLU, linear (ScaLR+, hidden 2048)."""

    features: int
    hidden: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.hidden:
            x = jax.nn.relu(Linear(self.hidden, dtype=self.dtype, name="hidden")(x))
        return Linear(self.features, dtype=self.dtype, name="out")(x)


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
