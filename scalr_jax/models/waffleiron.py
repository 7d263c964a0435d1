"""WaffleIron backbone: `depth` layers of spatial mixing on one plane, then channel mixing (WaffleIron, section 3).

    spatial: x + drop(scale * inflate(conv3x3(activation(conv3x3(flatten(norm(x)))))))
    channel: x + drop(scale * linear(activation(linear(norm(x)))))

Layer d mixes on plane d mod 3. Layers are scanned in groups of one layer a plane, so compile time does not grow with
depth (but in training on a GPU, where they are unrolled); when the number of planes does not divide the depth, the
remaining planes follow as single layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from scalr_jax.config import StudentSettings
from scalr_jax.data.scenes import PLANE_AXES, Batch, SceneNeeds
from scalr_jax.models.embedding import PointEmbedding
from scalr_jax.models.layers import LinearWeights, Norm, keep_scenes, linear, normalize, to_rows, torch_uniform
from scalr_jax.ops import cell_conv, cells, windows
from scalr_jax.runtime.sharding import by_shard, on_gpu, per_shard, platform_of

Array = jax.Array

ROW_BLOCK = 2048  # rows of a block on CPU: 2 MB each of 256 channels

UNROLLED = 4  # groups, at most, that are not looped over on CPU

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


def save_only(*names: str) -> Callable:
    """For the backward pass keep a function's inputs and the values of these names, and compute the rest again: norms
    and activations are cheap where every [P, C] kept costs memory, and on CPU the time to touch it."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)  # type: ignore[arg-type]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flatten_normalized(x: Array, mask: Array, statistics: Any, plane: Any, dtype: Any, block: int) -> Array:
    """`cells.flatten(normalize(x, mask, statistics), plane)`, [P, C] -> [M, C], `block` rows at a time in the order of
    their cells: normalised rows are summed while they are in the cache, and no [P, C] is written."""

    def add(table: Array, rows: tuple[Array, Array]) -> tuple[Array, None]:
        row, cell = rows
        points = normalize(x[row], mask[row], statistics).astype(dtype).astype(jnp.float32)
        return table.at[cell].add(points, mode="drop", indices_are_sorted=True), None

    empty = jnp.zeros((plane.inverse_count.shape[0], x.shape[-1]), jnp.float32)
    in_order = plane.order.reshape(-1, block), plane.cell[plane.order].reshape(-1, block)
    table, _ = jax.lax.scan(add, empty, in_order)
    return (table * plane.inverse_count[:, None]).astype(dtype)


def _flatten_normalized_backward(dtype: Any, block: int, residuals: tuple, gradient: Array):
    x, mask, statistics, plane = residuals
    plain = lambda x, statistics: cells.flatten(normalize(x, mask, statistics).astype(dtype), plane)  # noqa: E731
    _, pull_back = jax.vjp(plain, x, statistics)
    x_gradient, statistics_gradient = pull_back(gradient)
    return x_gradient, None, statistics_gradient, None


flatten_normalized.defvjp(lambda *inputs: (flatten_normalized(*inputs), inputs[:4]), _flatten_normalized_backward)


class SpatialMix(nn.Module):
    """x [D * P, C], plane [D, ...], mask [D * P] -> [D * P, C], what is added to the residual stream.

    Its implementation is "dense", "cells", or "windows" with a plane of `windows.make_windows`.
    """

    grid: tuple[int, int]
    backbone: WaffleIronBackbone
    dtype: Any
    block: int = 0  # rows worked on at a time; 0: all

    @nn.compact
    def __call__(self, x: Array, plane: Any, mask: Array, num_scenes: int, *, train: bool) -> Array:
        channels = x.shape[-1]
        statistics, norm_scale, norm_bias = Norm(self.backbone.norm, name="norm")(x, mask, train=train)
        init = torch_uniform(9)
        kernel1 = self.param("kernel_1", init, (9, channels))
        bias1 = self.param("bias_1", init, (channels,)).astype(self.dtype)
        kernel2 = self.param("kernel_2", init, (9, channels))
        bias2 = self.param("bias_2", init, (channels,)).astype(self.dtype)
        scale = self.param("scale", torch_uniform(1), (channels,)).astype(self.dtype)
        activation = ACTIVATIONS[self.backbone.activation]

        def mix_table(table: Array, plane: Any) -> Array:
            # The mean of a cell's points goes before the norm's scale and bias: on cells these cost nothing.
            filled = cells.filled(plane)[:, None]  # [M, 1]
            table = checkpoint_name(table, "cells")  # [M, C]
            table = (table * norm_scale + norm_bias * filled).astype(self.dtype)
            halo = checkpoint_name(cell_conv.conv_taps(table, plane.halo_taps, plane.cell_taps, kernel1), "halo")
            table = cell_conv.conv_taps(activation(halo + bias1), plane.cell_taps, plane.halo_taps, kernel2)
            return cells.inflate((table + bias2) * scale, plane)

        def mix_dense(points: Array, plane: Any) -> Array:
            points = (points * norm_scale + norm_bias).astype(self.dtype)
            grid = cells.flatten_dense(points, plane, grid=self.grid, num_scenes=num_scenes)  # [S, H, W, C]
            grid = activation(cell_conv.conv_dense(grid, kernel1) + bias1)
            grid = (cell_conv.conv_dense(grid, kernel2) + bias2) * scale
            return cells.inflate_dense(grid, plane)

        def mix_windows(points: Array, plane: Any) -> Array:  # all with their axis D
            filled = cells.filled(plane)[..., None]
            table = checkpoint_name(windows.flatten(points, plane), "cells")
            table = (table * norm_scale + norm_bias * filled).astype(self.dtype)
            halo = checkpoint_name(windows.conv_up(table, plane, kernel1), "halo")
            table = windows.conv_down(activation(halo + bias1), plane, kernel2)
            return windows.inflate((table + bias2) * scale, plane)

        @save_only("cells", "halo")
        def mix(x: Array) -> Array:
            block, implementation = block_of(x.shape[0], self.block), self.backbone.implementation
            if block and implementation == "cells":
                plane_0 = jax.tree.map(lambda leaf: leaf[0], plane)
                return mix_table(flatten_normalized(x, mask, statistics, plane_0, self.dtype, block), plane_0)
            points = normalize(x, mask, statistics).astype(self.dtype).reshape(plane.cell.shape[0], -1, channels)
            if implementation == "windows":
                return to_rows(mix_windows(points, plane))
            if implementation == "dense":
                return to_rows(per_shard(mix_dense, points, plane))
            return to_rows(
                per_shard(lambda points, plane: mix_table(cells.flatten(points, plane), plane), points, plane)
            )

        return mix(x)


class ChannelMix(nn.Module):
    """x [D * P, C], mask [D * P], keep [D * P] (or None: all ones) -> x + keep * branch, [D * P, C].

    The norm's scale and bias go into the first matrix and the layer scale into the second, so that neither their
    products nor what their gradients would need are ever [P, C].
    """

    backbone: WaffleIronBackbone
    dtype: Any
    block: int  # rows worked on at a time

    @nn.compact
    def __call__(self, x: Array, mask: Array, keep: Array | None, *, train: bool) -> Array:
        channels = x.shape[-1]
        statistics, norm_scale, norm_bias = Norm(self.backbone.norm, name="norm")(x, mask, train=train)
        kernel1, bias1 = LinearWeights(channels, name="linear_1")(channels)
        kernel2, bias2 = LinearWeights(channels, name="linear_2")(channels)
        scale = self.param("scale", torch_uniform(1), (channels,))
        bias1 += jnp.matmul(norm_bias, kernel1, precision="highest")
        kernel1 = norm_scale[:, None] * kernel1
        kernel2, bias2 = kernel2 * scale, bias2 * scale
        activation = ACTIVATIONS[self.backbone.activation]

        @save_only("hidden")
        def mix(rows: tuple) -> Array:
            x, mask, keep = rows
            points = normalize(x, mask, statistics).astype(self.dtype)
            hidden = checkpoint_name(linear(points, kernel1, bias1), "hidden")
            branch = linear(activation(hidden), kernel2, bias2).astype(x.dtype)
            return x + (branch if keep is None else branch * keep[:, None].astype(x.dtype))

        return map_blocks(mix, (x, mask, keep), self.block)


def block_of(num_rows: int, block: int) -> int:
    """The largest divisor of `num_rows` up to `block`; 0 (all rows at once) where it is less than an eighth of
    `ROW_BLOCK` or all rows, and where the number of rows is a symbol (in an exported program)."""
    if not isinstance(num_rows, int):
        return 0
    block = next((size for size in range(min(block, num_rows), 0, -1) if num_rows % size == 0), 0)
    return 0 if block < ROW_BLOCK // 8 or block == num_rows else block


def map_blocks(function: Callable, rows: Any, block: int) -> Array:
    """`function` of [N, ...] arrays, about `block` rows at a time (`block_of`): what it makes stays in the cache."""
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    block = block_of(num_rows, block)
    if not block:
        return function(rows)
    blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), rows)
    _, out = jax.lax.scan(lambda _, rows: (None, function(rows)), None, blocks)
    return out.reshape(num_rows, *out.shape[2:])


class Layer(nn.Module):
    """One spatial and one channel mixing on one plane; the residual stream [D * P, C] has `backbone.residual_dtype`."""

    grid: tuple[int, int]
    backbone: WaffleIronBackbone
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, plane: Any, scene: Array, num_scenes: int, train: bool) -> Array:
        mask, drop_path = to_rows(scene < num_scenes), self.backbone.drop_path
        # In blocks on one CPU only: a loop over rows that lie on several devices would move them.
        block = ROW_BLOCK if scene.shape[0] == 1 and platform_of(scene) == "cpu" else 0
        spatial = SpatialMix(self.grid, self.backbone, self.dtype, block, name="spatial")
        branch = spatial(x, plane, mask, num_scenes, train=train).astype(x.dtype)
        keep = keep_scenes(self, scene, num_scenes, drop_path, train)
        x += branch if keep is None else branch * to_rows(keep)[:, None].astype(x.dtype)
        keep = keep_scenes(self, scene, num_scenes, drop_path, train)
        keep = None if keep is None else to_rows(keep)
        return ChannelMix(self.backbone, self.dtype, block, name="channel")(x, mask, keep, train=train)


class Group(nn.Module):
    """One layer a plane, as the body of a scan: parameters `plane_0`, `plane_1`, ..."""

    grids: tuple[tuple[int, int], ...]
    backbone: WaffleIronBackbone
    dtype: Any
    num_scenes: int
    train: bool

    @nn.compact
    def __call__(self, x: Array, planes: tuple, scene: Array):
        layer = nn.remat(Layer, static_argnums=(4, 5)) if self.backbone.remat == "layer" else Layer
        for d, grid in enumerate(self.grids):
            mix = layer(grid, self.backbone, self.dtype, name=f"plane_{d}")
            x = mix(x, planes[d], scene, self.num_scenes, self.train)
        return x, None


class WaffleIron(nn.Module):
    """The layers of a backbone: x [D * P, C], scene [D, P] -> [D * P, C]."""

    backbone: WaffleIronBackbone
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, planes: tuple, scene: Array, num_scenes: int, *, train: bool) -> Array:
        backbone = self.backbone.on(platform_of(planes[0].cell))
        grids = backbone.needs.grids
        if backbone.implementation == "windows":
            planes = tuple(windows.make_windows(plane, grid) for plane, grid in zip(planes, grids, strict=True))
        elif on_gpu(planes[0].cell):
            tables = ((plane.cell, plane.order, plane.inverse_count) for plane in planes)
            orders = [by_shard(cells.summing_order, table) for table in tables]
            planes = tuple(plane._replace(order=order) for plane, order in zip(planes, orders, strict=True))
        settings = {"backbone": backbone, "dtype": self.dtype, "num_scenes": num_scenes, "train": train}
        num_groups, num_rest = divmod(backbone.depth, len(grids))
        shallow = num_groups <= UNROLLED and platform_of(scene) == "cpu"
        x = x.astype(backbone.residual_dtype)
        if num_groups:
            group = nn.remat(Group, prevent_cse=False) if backbone.remat == "group" else Group
            scanned = nn.scan(
                group,
                variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,  # type: ignore[arg-type]
                length=num_groups,
                # A shallow student on CPU has no loop, which would stack and copy what each layer keeps: 1.6 s a layer
                # of a step instead of 2.5 (62,592 points x 256, 2 busy cores, 2026-11-22), compiled 1.5 times as long.
                # Training on a GPU has none at any depth: 97 GB a step of 12 layers instead of 102 (compiled).
                unroll=num_groups if shallow or (train and on_gpu(scene)) else 1,
            )
            x, _ = scanned(grids, name="groups", **settings)(x, planes, scene)
        if num_rest:
            x, _ = Group(grids[:num_rest], name="rest", **settings)(x, planes, scene)
        return x


@dataclasses.dataclass(frozen=True)
class WaffleIronBackbone:
    """Point embedding and WaffleIron: the hyperparameters, by their keys of `config.model`.

    `remat`: "none", "layer" or "group" (what is computed again in the backward pass).
    `implementation`: "cells" (occupied cells only), "windows" (the same as matrix products, for a TPU), "dense" (the
    reference), "auto" (windows where the batch lies on a TPU, else cells).
    """

    needs: SceneNeeds  # neighbours and the grids of the planes
    channels: int
    depth: int
    norm: str = "layer"
    activation: str = "relu"
    drop_path: float = 0.0
    implementation: str = "auto"
    remat: str = "none"
    residual_dtype: str = "float32"

    exports: ClassVar[tuple[str, ...]] = ("torch", "safetensors", "orbax", "stablehlo", "onnx")
    folds: ClassVar[bool] = True
    weight_keys: ClassVar[tuple[str, ...]] = ("channels", "depth", "norm", "activation", "num_neighbors")

    @classmethod
    def of(cls, settings: StudentSettings) -> WaffleIronBackbone:
        """The backbone of `config.model`."""
        needs = SceneNeeds(settings.field_of_view, settings.num_neighbors, settings.grids)
        return cls(needs, **{field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)[1:]})

    def on(self, platform: str) -> WaffleIronBackbone:
        """With the implementation that "auto" means on devices of `platform`."""
        chosen = "windows" if platform == "tpu" else "cells"
        return dataclasses.replace(self, implementation=chosen) if self.implementation == "auto" else self

    def layer_numbers(self, path: tuple[str, ...]) -> int | np.ndarray:
        """The embedding is 0, layer d of `WaffleIron` d + 1."""
        if path[0] == "embedding":
            return 0
        plane, num_groups = int(path[2].removeprefix("plane_")), self.depth // len(PLANE_AXES)
        first = len(PLANE_AXES) * (np.arange(num_groups) if path[1] == "groups" else np.array(num_groups))
        return first + plane + 1

    def describe(self) -> str:
        return f"WaffleIron, {self.depth} layers, {self.channels} wide, {self.norm} norm, {self.activation}"

    def __call__(self, batch: Batch[Array], mask: Array, *, dtype: DTypeLike, train: bool) -> Array:
        x = PointEmbedding(self.channels, dtype, name="embedding")(batch.feats, batch.neighbors, mask, train=train)
        layers = WaffleIron(self, dtype, name="backbone")
        return layers(x, batch.planes, batch.scene, batch.scene_points.shape[1], train=train)
