"""The student: point embedding and WaffleIron, or a MinkUNet; then a head. A packed batch in, one row a point out."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scalr_jax.models.embedding import PointEmbedding
from scalr_jax.models.heads import DistillationHead, SegmentationHead
from scalr_jax.models.layers import Linear, to_rows
from scalr_jax.models.minkunet import MinkUNet, tables_of
from scalr_jax.models.waffleiron import WaffleIron
from scalr_jax.ops import sparse_conv

Array = jax.Array


class Student(nn.Module):
    """`head`: "distill" (to `out_features`), "segment" (batch norm and linear, to `out_features` classes),
    "mlp" (the same with a hidden layer), "linear" (a plain linear layer, as WaffleIron's own segmentation files) or
    "none" (the backbone's features).
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
        mask = batch.scene < batch.scene_points.shape[1]  # [D, P]
        return self._head(self._features(batch, mask, train=train), mask, train=train)

    def _features(self, batch: Any, mask: Array, *, train: bool) -> Array:
        """[D * P, C]"""
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
        x = backbone(x, batch.planes, batch.scene, batch.scene_points.shape[1], train=backbone_train)
        return jax.lax.stop_gradient(x) if self.frozen_backbone else x

    def _head(self, x: Array, mask: Array, *, train: bool) -> Array:
        """[D, P, out_features]"""
        if self.head == "distill":
            x = DistillationHead(self.out_features, self.head_hidden, self.dtype, name="head")(x)
        elif self.head in ("segment", "mlp"):
            x = SegmentationHead(self.out_features, self.head == "mlp", name="head")(x, to_rows(mask), train=train)
        elif self.head == "linear":
            x = Linear(self.out_features, dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32).reshape(*mask.shape, -1)


class SparseStudent(Student):
    """A student with a MinkUNet in place of embedding and WaffleIron: `channels` a point, the last of `widths`.

    `depth`, `grids`, `norm`, `activation`, `drop_path`, `implementation` and `remat` are not used.
    """

    blocks: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    stem: int = 0
    stem_convolutions: int = 1
    extent: tuple[int, int, int] = (0, 0, 0)  # voxels of the field of view along x, y, z
    reading: str = "nearest"  # nearest, trilinear

    def _features(self, batch: Any, mask: Array, *, train: bool) -> Array:
        del mask
        voxels, offset = self._tables(batch)
        backbone = MinkUNet(
            self.blocks,
            self.widths,
            self.stem,
            self.stem_convolutions,
            self.reading,
            self.dtype,
            name="backbone",
        )
        x = backbone(batch.feats, voxels, offset, train=train and not self.frozen_backbone)
        # Sizes were counted on the host from the same coordinates: no room for a voxel is a defect, and must not pass.
        x = jnp.where((voxels.missing == 0).all(), x, jnp.nan)
        return jax.lax.stop_gradient(x) if self.frozen_backbone else x

    def _tables(self, batch: Any) -> tuple[sparse_conv.Voxels, Array]:
        """And where each point is in its voxel, [D, P, 3], -0.5 to 0.5."""
        voxels = tables_of(batch.voxels, batch.scene, self.extent, num_scenes=batch.scene_points.shape[1])
        return voxels, batch.voxels.coordinates % 1.0 - 0.5


class SparseStudentOnTables(SparseStudent):
    """A sparse student whose tables come with the batch: `batch.voxels` is (tables, places in the voxels)."""

    def _tables(self, batch: Any) -> tuple[sparse_conv.Voxels, Array]:
        return batch.voxels


class Head(Student):
    """The student's head alone, on a batch whose `feats` [D, P, C] are the backbone's features."""

    def _features(self, batch: Any, mask: Array, *, train: bool) -> Array:
        del mask, train
        return to_rows(batch.feats)


@dataclasses.dataclass(frozen=True)
class StudentOnFeatures:
    """A student with all its parameters, of which only the head is computed: `init` and `apply` as Flax's.

    `student` says which; `backbone` are the shapes of its other parameters and statistics, zeros at first.
    """

    student: Student
    backbone: Any  # {"params", "batch_stats"} of jax.ShapeDtypeStruct

    def _alone(self) -> Head:
        fields = {field.name: getattr(self.student, field.name) for field in dataclasses.fields(Student)}
        return Head(**{name: value for name, value in fields.items() if name not in ("parent", "name")})

    def init(self, rngs: Any, batch: Any, *, train: bool) -> dict:
        head: Any = self._alone().init(rngs, batch, train=train)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.backbone)
        return {kind: {**zeros[kind], **head.get(kind, {})} for kind in ("params", "batch_stats")}

    def apply(self, variables: Any, batch: Any, *, train: bool, rngs: Any = None, mutable: Any = False) -> Any:
        head = {kind: {"head": tree["head"]} for kind, tree in variables.items() if "head" in tree}
        result: Any = self._alone().apply(head, batch, train=train, rngs=rngs, mutable=mutable)
        if not mutable:
            return result
        output, updated = result
        return output, {kind: {**variables[kind], **dict(updated.get(kind, {}))} for kind in mutable}


def without_head(variables: dict) -> dict:
    """The embedding's and backbone's part of params and batch_stats."""
    return {kind: {k: v for k, v in tree.items() if k != "head"} for kind, tree in variables.items()}
