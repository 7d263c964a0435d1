"""VaViT: a plain ViT on the occupied pillars of the top view (valeo.ai, arXiv 2605.31177, 2026).

    points  -> batch norm -> `point_depth` point layers (`ops.gated_neighbors`) -> maximum over each pillar's points
    pillars -> transformer blocks, as the teacher's (`models/vit.py`), with rotary positions in metres
    a point and its pillar -> ReLU(norm(W (m * sigmoid(G m + b)))), m = [ReLU(norm(A point)), ReLU(norm(B pillar))]

Published with a linear classifier on the merged features. Pillars of all scenes of a shard lie in one flat table
[T, C], and attention stays within a scene (`ops.attention`). As published: no biases but the gates', which begin at 1;
weights are normal of deviation 0.02; layer scales begin at 1e-5. The published code cuts no field of view, this
package cuts `model.field_of_view` for every backbone: ((-1e4, -1e4, -1e4), (1e4, 1e4, 1e4)) leaves it whole.

The published code fills the scenes of a batch up to the longest with copies of a learned token at the origin, which
attention sees (`padding_tokens = "published"`). Copies of one token in one scene stay equal, so that here it is one row
a scene, which as a key counts as often as it was copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from scalr_jax.config import StudentSettings
from scalr_jax.data.scenes import Batch, Pillars, SceneNeeds
from scalr_jax.models.layers import BatchNorm, norm_variables, to_rows, update_running
from scalr_jax.models.vit import Block, BlockConfig, Dense
from scalr_jax.ops import attention
from scalr_jax.ops.gated_neighbors import Form, Gate, Norm, gated_max
from scalr_jax.ops.pillars import pillar_max, to_points
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.sharding import on_gpu, per_shard, platform_of, whole

Array = jax.Array

ROTARY_BASE = 10_000.0  # angles are metres * ROTARY_BASE^(-2 i / h), for the h channels of an axis
INIT = nn.initializers.normal(0.02)


class Size(NamedTuple):
    """Sizes that `model.name` stands for; keys of `config.model.vavit` replace them."""

    width: int
    depth: int
    num_heads: int
    hidden: int
    point_hidden: int = 128
    merge_hidden: int = 128
    channels: int = 128


SIZES = {
    "vavit_tiny": Size(48, 3, 3, 192, point_hidden=24, merge_hidden=48, channels=96),
    "vavit_s": Size(384, 12, 6, 1536),
    "vavit_b": Size(768, 12, 12, 3072),  # as published
    "vavit_l": Size(1024, 24, 16, 4096),
    "vavit_g": Size(1536, 40, 24, 6144),
}


class _Gate(nn.Module):
    """Weights of a gate sigmoid(x @ kernel + bias)."""

    features: int

    @nn.compact
    def __call__(self) -> Gate:
        shape = (self.features, self.features)
        bias = self.param("bias", nn.initializers.ones, shape[1:])
        return Gate(whole(self.param("kernel", INIT, shape)), bias)


class _PairNorm(nn.Module):
    """A batch norm whose statistics `apply` finds: Norm -> (result, (mean, variance, count))."""

    features: int

    @nn.compact
    def __call__(self, apply: Callable[[Norm], tuple[Array, tuple[Array, Array, Array]]], *, train: bool) -> Array:
        scale, bias, mean, variance = norm_variables(self, self.features)
        y, moments = apply(Norm(scale, bias, mean.value, variance.value))
        if train:
            update_running(self, mean, variance, moments)
        return y


class PointLayer(nn.Module):
    """x [D, P, C_in], neighbours [D, P, K], mask [D, P] -> [D, P, features] in `dtype`."""

    hidden: int
    features: int
    dtype: DTypeLike
    first: bool  # differences of raw coordinates need float32

    @nn.compact
    def __call__(self, x: Array, neighbors: Array, mask: Array, *, train: bool) -> Array:
        dense = partial(Dense, use_bias=False, kernel_init=INIT)
        point = dense(self.hidden, self.dtype, name="point")(to_rows(x))
        point = jax.nn.relu(BatchNorm(name="point_norm")(point, to_rows(mask), train=train))
        u = dense(self.hidden, jnp.float32 if self.first else self.dtype, name="neighbor")(x)
        form = Form(train, self.dtype, 1 if platform_of(neighbors) == "cpu" else neighbors.shape[-1])
        gate = _Gate(self.hidden, name="gate")()
        near = _PairNorm(self.hidden, name="neighbor_norm")(
            lambda norm: gated_max(form, u, norm, gate, neighbors, mask), train=train
        )
        both = jnp.concatenate([point.astype(self.dtype), to_rows(near)], axis=-1)
        return dense(self.features, self.dtype, name="final")(both).reshape(*mask.shape, -1)


class PointLayers(nn.Module):
    """feats [D, P, F] -> [D, P, backbone.width]."""

    backbone: VaViTBackbone
    dtype: DTypeLike

    @nn.compact
    def __call__(self, feats: Array, neighbors: Array, mask: Array, *, train: bool) -> Array:
        size = self.backbone
        x = BatchNorm(name="norm")(to_rows(feats), to_rows(mask), train=train).reshape(feats.shape)
        for n in range(size.point_depth):
            features = size.width if n == size.point_depth - 1 else size.point_hidden
            layer = PointLayer(size.point_hidden, features, self.dtype, n == 0, name=f"layer_{n}")
            x = layer(x, neighbors, mask, train=train)
        return x


class Merge(nn.Module):
    """Points [D, P, C] and pillars [D, T, C] -> [D * P, features], float32."""

    hidden: int
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, points: Array, pillars: Array, cell: Array, mask: Array, *, train: bool) -> Array:
        dense, rows = partial(Dense, dtype=self.dtype, use_bias=False, kernel_init=INIT), to_rows(mask)

        def norm(x: Array, name: str) -> Array:
            return jax.nn.relu(BatchNorm(name=name)(x, rows, train=train))

        point = norm(dense(self.hidden, name="point")(to_rows(points)), "point_norm")
        pillar = dense(self.hidden, name="pillar")(pillars)
        pillar = norm(to_rows(per_shard(to_points, pillar, cell)), "pillar_norm")
        both = jnp.concatenate([point, pillar], axis=-1).astype(self.dtype)
        gate = _Gate(2 * self.hidden, name="gate")()
        opened = jax.nn.sigmoid((both @ gate.kernel.astype(self.dtype)).astype(jnp.float32) + gate.bias)
        return norm(dense(self.features, name="out")((both * opened).astype(self.dtype)), "out_norm")


class VaViT(nn.Module):
    """Points [D, P, C] as the point layers leave them, and their pillars -> [D * P, backbone.channels]."""

    backbone: VaViTBackbone
    dtype: DTypeLike

    @nn.compact
    def __call__(self, points: Array, pillars: Pillars[Array], mask: Array, *, train: bool) -> Array:
        size, counts = self.backbone, pillars.counts
        num_pillars, num_scenes = pillars.coordinates.shape[1], counts.shape[1]
        token = self.param("pad_token", nn.initializers.zeros, (size.width,))
        x = per_shard(partial(pillar_max, num_pillars=num_pillars), points, pillars.cell)
        x = x.astype(size.residual_dtype)
        scene, coordinates = attention.scene_of(counts, num_pillars), pillars.coordinates
        attend, context = attention.packed, (counts,)
        if size.padding_tokens == "published":
            missing = counts.max(axis=1, keepdims=True) - counts
            copies = jnp.concatenate([scene < num_scenes, missing], axis=1).astype(jnp.float32)
            x = jnp.concatenate([x, jnp.broadcast_to(token.astype(x.dtype), (*counts.shape, size.width))], axis=1)
            scene = jnp.concatenate([scene, jnp.broadcast_to(jnp.arange(num_scenes), counts.shape)], axis=1)
            coordinates = jnp.pad(coordinates, ((0, 0), (0, num_scenes), (0, 0)))
            attend, context = attention.reference, (scene, copies)
        x = self._blocks(
            x, _angles(coordinates, size.width // size.num_heads), attend, context, scene, num_scenes, train
        )
        merge = Merge(size.merge_hidden, size.channels, self.dtype, name="merge")
        return merge(points, x[:, :num_pillars], pillars.cell, mask, train=train)

    def _blocks(
        self, x: Array, angles: Array, attend: Callable, context: tuple, scene: Array, num_scenes: int, train: bool
    ) -> Array:
        size = self.backbone
        block = nn.remat(Block, prevent_cse=False) if size.remat != "none" else Block
        blocks: Any = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=size.depth,
            # On a GPU a scan copies what its layers keep: half as many bytes more (VaViT-B, compiled, 2026-11-28).
            unroll=size.depth if on_gpu(scene) else 1,
        )
        layers = blocks(size.block, self.dtype, attend, num_scenes, train, name="blocks")
        return layers(x, angles, context, scene)[0]


def rotary_frequencies(head: int) -> np.ndarray:
    """Radians a metre of the pairs of an axis, [head / 4] float32, for heads of `head` channels."""
    return (ROTARY_BASE ** (-2.0 * np.arange(head // 4) / (head // 2))).astype(np.float32)


def _angles(coordinates: Array, head: int) -> Array:
    """Coordinates [D, T, 2] in metres -> radians [D, T, head / 2]: first those of x, then those of y."""
    return (coordinates[..., None] * rotary_frequencies(head)).reshape(*coordinates.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class VaViTBackbone:
    """A VaViT: the hyperparameters, by their keys of `config.model` and `config.model.vavit`.

    `remat`: other than "none", blocks are computed again in the backward pass.
    """

    needs: SceneNeeds  # neighbours and pillars
    width: int
    depth: int
    num_heads: int
    hidden: int
    point_hidden: int
    merge_hidden: int
    channels: int
    point_depth: int = 4
    padding_tokens: str = "none"
    residual_dtype: str = "float32"
    drop_path: float = 0.0
    remat: str = "none"

    exports: ClassVar[tuple[str, ...]] = ("torch", "safetensors", "orbax", "stablehlo", "onnx")
    folds: ClassVar[bool] = False
    weight_keys: ClassVar[tuple[str, ...]] = ("num_neighbors", *(f"vavit.{key}" for key in Size._fields))
    weight_keys += ("vavit.point_depth", "vavit.pillar_size")

    @classmethod
    def of(cls, settings: StudentSettings) -> VaViTBackbone:
        """The backbone of `config.model`. Raises `InputError` for heads that rotary positions cannot turn."""
        vavit = settings.vavit
        size = Size(*(getattr(vavit, key) or value for key, value in SIZES[settings.name]._asdict().items()))
        if size.width % (4 * size.num_heads):
            raise InputError(
                f"model.vavit.num_heads = {size.num_heads} splits model.vavit.width = {size.width} into heads of "
                f"{size.width / size.num_heads:g} channels; rotary positions in two directions need a multiple of 4"
            )
        needs = SceneNeeds(settings.field_of_view, settings.num_neighbors, pillar_size=vavit.pillar_size)
        drop_path, remat = settings.drop_path, settings.remat
        return cls(needs, *size, vavit.point_depth, vavit.padding_tokens, settings.residual_dtype, drop_path, remat)

    @property
    def block(self) -> BlockConfig:
        return BlockConfig(
            *(self.width, self.num_heads, self.hidden),
            norm_eps=1e-5,
            layer_scale=1e-5,
            use_bias=False,
            axes=2,
            drop_path=self.drop_path,
            init=INIT,
        )

    def layer_numbers(self, path: tuple[str, ...]) -> int | np.ndarray:
        """The point layers are 0, block d is d + 1, what merges points and pillars is like the last block."""
        if path[0] == "embedding" or path[1] == "pad_token":
            return 0
        return np.arange(1, self.depth + 1) if path[1] == "blocks" else self.depth

    def describe(self) -> str:
        return f"VaViT, {self.depth} blocks, {self.width} wide, on pillars of {self.needs.pillar_size:g} metres"

    def __call__(self, batch: Batch[Array], mask: Array, *, dtype: DTypeLike, train: bool) -> Array:
        assert batch.pillars is not None, "a VaViT needs pillars"
        points = PointLayers(self, dtype, name="embedding")(batch.feats, batch.neighbors, mask, train=train)
        return VaViT(self, dtype, name="backbone")(points, batch.pillars, mask, train=train)
