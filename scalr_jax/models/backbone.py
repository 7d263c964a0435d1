"""The contract of a backbone: what a student asks of it, and what it asks of a scene (docs/design.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from jax.typing import DTypeLike

from scalr_jax.data.scenes import Batch, SceneNeeds
from scalr_jax.models.layers import to_rows

Array = jax.Array


class Backbone(Protocol):
    """A frozen dataclass of hyperparameters, which makes its modules in the student that calls it.

    Names of modules are names of parameters: "backbone", and "embedding" for what comes before its layers.
    """

    exports: ClassVar[tuple[str, ...]]  # formats that `scalr_jax.export` writes: torch, safetensors, orbax, ...
    folds: ClassVar[bool]  # whether `export.fold` knows its norms
    weight_keys: ClassVar[tuple[str, ...]]  # keys of `config.model` in which two runs with the same weights agree

    @property
    def needs(self) -> SceneNeeds:
        """Tables that a scene must have beside its points' features."""
        ...

    @property
    def channels(self) -> int:
        """Width of a point's features."""
        ...

    @property
    def depth(self) -> int:
        """Layers, as `layer_numbers` counts them."""
        ...

    def layer_numbers(self, path: tuple[str, ...]) -> int | np.ndarray:
        """The layer of a parameter, 0 for what comes before layer 1: a number, or one a row of stacked layers.

        path: of the parameter in the student, as ("backbone", "groups", "plane_0", "channel", "scale").
        """
        ...

    def describe(self) -> str:
        """The hyperparameters that a model card tells."""
        ...

    def __call__(self, batch: Batch[Array], mask: Array, *, dtype: DTypeLike, train: bool) -> Array:
        """Points' features [D * P, C]. mask [D, P]: no padding; dtype: of matrix products."""
        ...


class _Kept(nn.Module):
    """Parameters and statistics that nothing reads: zeros at first, and then what a checkpoint has."""

    shapes: dict  # "params", "batch_stats" -> by name, jax.ShapeDtypeStruct

    @nn.compact
    def __call__(self) -> None:
        zeros = lambda shapes: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # noqa: E731
        shapes = unfreeze(self.shapes)
        for name in shapes["params"]:
            self.param(name, lambda _, name=name: zeros(shapes["params"][name]))
        for name in shapes["batch_stats"]:
            self.variable("batch_stats", name, zeros, shapes["batch_stats"][name])


@dataclasses.dataclass(frozen=True)
class CachedFeatures:
    """Stands for a backbone whose features [D, P, C] are the batch's `feats`, and keeps its weights beside the head."""

    backbone: Backbone
    shapes: Mapping[str, dict] = dataclasses.field(hash=False)  # of its {"params", "batch_stats"}

    exports: ClassVar[tuple[str, ...]] = ()
    folds: ClassVar[bool] = False
    weight_keys: ClassVar[tuple[str, ...]] = ()

    @property
    def needs(self) -> SceneNeeds:
        return SceneNeeds(self.backbone.needs.field_of_view)

    @property
    def channels(self) -> int:
        return self.backbone.channels

    @property
    def depth(self) -> int:
        return self.backbone.depth

    def layer_numbers(self, path: tuple[str, ...]) -> int | np.ndarray:
        return self.backbone.layer_numbers(path)

    def describe(self) -> str:
        return f"features of {self.backbone.describe()}"

    def __call__(self, batch: Batch[Array], mask: Array, *, dtype: DTypeLike, train: bool) -> Array:
        del mask, dtype, train
        for name in self.shapes["params"]:
            _Kept({kind: trees.get(name, {}) for kind, trees in self.shapes.items()}, name=name)()
        return to_rows(batch.feats)
