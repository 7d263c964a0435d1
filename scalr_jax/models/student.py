"""The student: point embedding, WaffleIron backbone, head. A packed batch in, one row a point out."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scalr_jax.models.embedding import PointEmbedding
from scalr_jax.models.heads import DistillationHead, SegmentationHead
from scalr_jax.models.layers import Linear, to_rows
from scalr_jax.models.waffleiron import WaffleIron

Array = jax.Array


class Student(nn.Module):
    """`head`: "distill" (to `out_features`), "segment" (batch norm and linear, to `out_features` classes),
    "linear" (a plain linear layer, as WaffleIron's own segmentation files) or "none" (the backbone's features).
    """

    channels: int
    depth: int
    grids: tuple[tuple[int, int], ...]
    head: str = "distill"
    out_features: int = 0
    head_hidden: int = 0
    norm: str = "layer"
    activation: str = "relu"
    drop_path: float = 0.0
    implementation: str = "auto"
    remat: str = "none"
    frozen_backbone: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, batch: Any, *, train: bool) -> Array:
        """batch: `scenes.Batch`. Returns [D, P, out_features] (or [D, P, C] for head "none"), float32."""
        num_scenes = batch.scene_points.shape[1]
        mask = batch.scene < num_scenes  # [D, P]
        backbone_train = train and not self.frozen_backbone
        embedding = PointEmbedding(self.channels, self.dtype, name="embedding")
        x = embedding(batch.feats, batch.neighbors, mask, train=backbone_train)
        backbone = WaffleIron(
            self.depth,
            self.grids,
            self.norm,
            self.activation,
            self.drop_path,
            self.implementation,
            self.remat,
            self.dtype,
            name="backbone",
        )
        x = backbone(x, batch.planes, batch.scene, num_scenes, train=backbone_train)
        if self.frozen_backbone:
            x = jax.lax.stop_gradient(x)
        if self.head == "distill":
            x = DistillationHead(self.out_features, self.head_hidden, self.dtype, name="head")(x)
        elif self.head == "segment":
            x = SegmentationHead(self.out_features, name="head")(x, to_rows(mask), train=train)
        elif self.head == "linear":
            x = Linear(self.out_features, dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32).reshape(*batch.scene.shape, -1)
