"""The student: a backbone and a head. A packed batch in, one row a point out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from scalr_jax.data.scenes import Batch, SceneNeeds
from scalr_jax.models.backbone import Backbone
from scalr_jax.models.heads import DistillationHead, SegmentationHead
from scalr_jax.models.layers import Linear, to_rows

Array = jax.Array
Variables = Mapping[str, Any]  # "params", "batch_stats" -> trees of arrays


class Classifier(Protocol):
    """The contract of evaluation: a student, or a student with a classifier of its features."""

    @property
    def needs(self) -> SceneNeeds:
        """Tables that a scene must have beside its points' features."""
        ...

    def apply(self, variables: Variables, batch: Batch[Array], *, train: bool) -> Any:
        """Scores [D, P, classes] of each class, of which the largest counts."""
        ...


class Student(nn.Module):
    """`head`: "distill" (to `out_features`), "segment" (batch norm and linear, to `out_features` classes),
    "mlp" (the same with a hidden layer), "linear" (a plain linear layer, as WaffleIron's own segmentation files) or
    "none" (the backbone's features).
    """

    backbone: Backbone
    head: str = "distill"
    out_features: int = 0
    head_hidden: int = 0  # of a distillation head, 0: it has no hidden layer
    frozen_backbone: bool = False
    dtype: DTypeLike = jnp.float32  # of matrix products
    teacher_widths: tuple[int, ...] = ()  # of a distillation from several; they add up to `out_features`

    @property
    def needs(self) -> SceneNeeds:
        return self.backbone.needs

    @nn.compact
    def __call__(self, batch: Batch[Array], *, train: bool) -> Array:
        """Returns [D, P, out_features] (or [D, P, C] for head "none"), float32."""
        mask = batch.scene < batch.scene_points.shape[1]  # [D, P]
        x = self.backbone(batch, mask, dtype=self.dtype, train=train and not self.frozen_backbone)
        self.sow("intermediates", "features", x)  # [D * P, C], for `outputs_of`
        x = self._head(jax.lax.stop_gradient(x) if self.frozen_backbone else x, to_rows(mask), train=train)
        return x.astype(jnp.float32).reshape(*mask.shape, -1)

    def _head(self, x: Array, mask: Array, *, train: bool) -> Array:
        """[D * P, C] -> [D * P, out_features]"""
        if self.head == "distill":
            widths = self.teacher_widths
            return DistillationHead(self.out_features, self.head_hidden, self.dtype, widths, name="head")(x)
        if self.head in ("segment", "mlp"):
            return SegmentationHead(self.out_features, self.head == "mlp", name="head")(x, mask, train=train)
        return Linear(self.out_features, dtype=self.dtype, name="head")(x) if self.head == "linear" else x


def outputs_of(student: Student, variables: Variables, batch: Batch[Array]) -> tuple[Array, Array]:
    """The backbone's features [D * P, C] and the head's output [D, P, out_features], in prediction."""
    result: Any = student.apply(variables, batch, train=False, mutable=["intermediates"])
    rows, state = result
    return state["intermediates"]["features"][0], rows


def without_head(variables: Variables) -> dict:
    """The embedding's and backbone's part of params and batch_stats."""
    return {kind: {k: v for k, v in tree.items() if k != "head"} for kind, tree in variables.items()}
