"""MinkUNet: a residual U-Net on occupied voxels (Choy et al., "4D Spatio-Temporal ConvNets", CVPR 2019, "MinkUNet C").

    stem 3x3x3 -> four times (2x2x2 to voxels twice as wide, residual blocks)
               -> four times (2x2x2 back, beside what was there on the way down, residual blocks)

Every convolution but the 1x1x1 on a shortcut is of `ops.sparse_conv`, without bias, and a batch norm over the occupied
voxels of the global batch follows. A voxel's features are the mean of its points'. A point reads its voxel ("nearest")
or, by its distances, that and the neighbours ("trilinear").
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from jax.typing import DTypeLike

from scalr_jax.config import StudentSettings
from scalr_jax.data.scenes import Batch, PackedVoxels, SceneNeeds
from scalr_jax.models.layers import BatchNorm, to_rows
from scalr_jax.ops import cells, sparse_conv
from scalr_jax.ops.voxels import extent_of
from scalr_jax.runtime.sharding import per_shard, whole

Array = jax.Array

STEM = 32
WIDTHS = (32, 64, 128, 256, 256, 128, 96, 96)  # of the blocks, down and up
BLOCKS = {
    "minkunet14": (1, 1, 1, 1, 1, 1, 1, 1),
    "minkunet18": (2, 2, 2, 2, 2, 2, 2, 2),
    "minkunet34": (2, 3, 4, 6, 2, 2, 2, 2),
}

# Here and not beside the class, which data workers import without JAX: every student's module imports this one.
jax.tree_util.register_dataclass(PackedVoxels, data_fields=["coordinates"], meta_fields=["sizes"])


def scaled_widths(width: float) -> tuple[int, ...]:
    """Channels of stem and stages: the published ones times `width`, cut to integers as SPVNAS does."""
    return tuple(max(1, int(width * channels)) for channels in (STEM, *WIDTHS))


def tables_of(
    packed: PackedVoxels, scene: Array, extent: tuple[int, int, int], *, num_scenes: int
) -> sparse_conv.Voxels:
    """The tables of all levels of each shard, with their axis D.

    scene [D, P]; extent: voxels of the field of view along x, y, z.
    """
    return per_shard(
        lambda coordinates, scene: sparse_conv.make_levels(
            jnp.floor(coordinates).astype(jnp.int32), scene, packed.sizes, num_scenes=num_scenes, extent=extent
        ),
        packed.coordinates,
        scene,
    )


CONVOLUTIONS = {  # by name: kernel elements, and what they do to the rows of a level
    "near": (27, sparse_conv.submanifold),
    "down": (8, lambda x, level, kernel: sparse_conv.convolve(x, level.down, kernel)),  # to the rows of the next level
    "up": (8, lambda x, level, kernel: sparse_conv.convolve(x, sparse_conv.exchange(level.down), kernel)),  # and back
    "shortcut": (1, None),
}


class Convolution(nn.Module):
    """One of `CONVOLUTIONS` without bias, rows [D * V, C] -> [D * V', features]; products in `dtype`."""

    features: int
    kind: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, level: sparse_conv.Level) -> Array:
        elements, convolve = CONVOLUTIONS[self.kind]
        # He et al. 2015, by what leaves a row as in the published models.
        scale = (2.0 / (elements * self.features)) ** 0.5
        shape = (elements, x.shape[-1], self.features)
        kernel = whole(self.param("kernel", nn.initializers.normal(scale), shape))
        if convolve is None:
            return x.astype(self.dtype) @ kernel[0].astype(self.dtype)
        x = x.astype(self.dtype).reshape(level.number.shape[0], -1, x.shape[-1])
        return to_rows(per_shard(lambda x, level: convolve(x, level, kernel), x, level))


class NormReLU(nn.Module):
    """Batch norm over the rows of `mask`, then ReLU; unused rows come out as zero."""

    relu: bool = True

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        x = BatchNorm(name="norm")(x, mask, train=train)
        x = jnp.where(mask[:, None], x, 0.0)
        return jax.nn.relu(x) if self.relu else x


class Block(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))) of rows [D * V, C]; where widths differ the shortcut is 1x1x1."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, level: sparse_conv.Level, mask: Array, *, train: bool) -> Array:
        shortcut = x
        if x.shape[-1] != self.features:
            shortcut = Convolution(self.features, "shortcut", self.dtype, name="shortcut")(x, level)
            shortcut = NormReLU(relu=False, name="shortcut_norm")(shortcut.astype(jnp.float32), mask, train=train)
        for name, relu in (("1", True), ("2", False)):
            x = Convolution(self.features, "near", self.dtype, name=f"conv_{name}")(x, level)
            x = NormReLU(relu=relu, name=f"norm_{name}")(x, mask, train=train)
        return jax.nn.relu(x + shortcut)


class MinkUNet(nn.Module):
    """feats [D, P, F], `tables_of` the same points -> [D * P, 96] float32; padding reads zero.

    `blocks`: residual blocks of each of the eight stages, `BLOCKS[name]`; `stem_convolutions`: SPVNAS's stem
    has two. For `reading` "trilinear" `offset` [D, P, 3] is where each point is in its voxel, -0.5 to 0.5 from the
    centre.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...] = WIDTHS
    stem: int = STEM
    stem_convolutions: int = 1
    reading: str = "nearest"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, feats: Array, voxels: sparse_conv.Voxels, offset: Array | None = None, *, train: bool) -> Array:
        levels = voxels.levels
        masks = [to_rows(jnp.arange(level.neighbors.shape[1]) < level.number[:, None]) for level in levels]
        x = to_rows(per_shard(cells.flatten, feats.astype(jnp.float32), voxels))

        def convolve(x: Array, kind: str, features: int, name: str, level: int, to: int) -> Array:
            x = Convolution(features, kind, self.dtype, name=name)(x, levels[level])
            return NormReLU(name=f"{name}_norm")(x, masks[to], train=train)

        for name in ("stem", *(f"stem_{number}" for number in range(1, self.stem_convolutions))):
            x = convolve(x, "near", self.stem, name, 0, 0)
        skips = []
        for stage in range(4):
            skips.append(x)
            x = convolve(x, "down", x.shape[-1], f"down_{stage}", stage, stage + 1)
            x = self._blocks(x, stage, levels[stage + 1], masks[stage + 1], train)
        for stage in range(4, 8):
            depth = 7 - stage
            x = convolve(x, "up", self.widths[stage], f"up_{stage}", depth, depth)
            x = jnp.concatenate([x, skips[depth]], axis=-1)
            x = self._blocks(x, stage, levels[depth], masks[depth], train)
        x = x.reshape(feats.shape[0], -1, x.shape[-1])
        if self.reading == "trilinear":
            weights = per_shard(sparse_conv.trilinear_weights, voxels, offset)
            return to_rows(per_shard(sparse_conv.read_trilinear, x, voxels, weights))
        return to_rows(per_shard(cells.inflate, x, voxels))

    def _blocks(self, x: Array, stage: int, level: sparse_conv.Level, mask: Array, train: bool) -> Array:
        for number in range(self.blocks[stage]):
            x = Block(self.widths[stage], self.dtype, name=f"stage_{stage}_{number}")(x, level, mask, train=train)
        return x


class GivenTables(NamedTuple):
    """In place of a batch's `voxels`: the tables themselves, and where each point is in its voxel."""

    tables: sparse_conv.Voxels
    offset: Array  # [D, P, 3], -0.5 to 0.5 from the centre


@dataclasses.dataclass(frozen=True)
class MinkUNetBackbone:
    """A MinkUNet: the hyperparameters, by their keys of `config.model` and `config.model.minkunet`."""

    needs: SceneNeeds  # voxels
    name: str  # of `BLOCKS`
    width: float = 1.0
    stem_convolutions: int = 1
    reading: str = "nearest"

    exports: ClassVar[tuple[str, ...]] = ("stablehlo", "orbax")
    folds: ClassVar[bool] = False
    weight_keys: ClassVar[tuple[str, ...]] = tuple(
        f"minkunet.{key}" for key in ("width", "stem_convolutions", "voxel_size", "reading")
    )

    @classmethod
    def of(cls, settings: StudentSettings) -> MinkUNetBackbone:
        """The backbone of `config.model`."""
        if settings.drop_path:
            logging.log_first_n(logging.WARNING, "model.drop_path: a MinkUNet drops no path", 1)
        minkunet = settings.minkunet
        needs = SceneNeeds(settings.field_of_view, voxel_size=minkunet.voxel_size)
        return cls(needs, settings.name, minkunet.width, minkunet.stem_convolutions, minkunet.reading)

    @property
    def channels(self) -> int:
        return scaled_widths(self.width)[-1]

    @property
    def depth(self) -> int:
        """Residual blocks."""
        return sum(BLOCKS[self.name])

    def layer_numbers(self, path: tuple[str, ...]) -> int:
        """The stem is 0, residual block d is d + 1, with the convolution that leads to it."""
        kind, *numbers = path[1].split("_")
        if kind == "stem":
            return 0
        return 1 + sum(BLOCKS[self.name][: int(numbers[0])]) + (int(numbers[1]) if kind == "stage" else 0)

    def describe(self) -> str:
        voxels = f"voxels of {self.needs.voxel_size:g} metres"
        return f"{self.name}, width {self.width:g}, {voxels}, read by {self.reading}"

    def __call__(self, batch: Batch[Array], mask: Array, *, dtype: DTypeLike, train: bool) -> Array:
        del mask
        stem, *widths = scaled_widths(self.width)
        network = MinkUNet(
            BLOCKS[self.name], tuple(widths), stem, self.stem_convolutions, self.reading, dtype, name="backbone"
        )
        voxels = batch.voxels
        if not isinstance(voxels, GivenTables):
            assert voxels is not None, "a MinkUNet needs voxels"
            assert self.needs.voxel_size is not None, "a MinkUNet needs voxels"
            extent = extent_of(self.needs.field_of_view, self.needs.voxel_size)
            tables = tables_of(voxels, batch.scene, extent, num_scenes=batch.scene_points.shape[1])
            voxels = GivenTables(tables, voxels.coordinates % 1.0 - 0.5)
        x = network(batch.feats, voxels.tables, voxels.offset, train=train)
        # Sizes were counted on the host from the same coordinates: no room for a voxel is a defect, and must not pass.
        return jnp.where((voxels.tables.missing == 0).all(), x, jnp.nan)
