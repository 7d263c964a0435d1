"""WaffleIron backbone: `depth` layers of spatial mixing on one plane, then channel mixing (WaffleIron, section 3).

    spatial: x + drop(scale * inflate(conv3x3(activation(conv3x3(flatten(norm(x)))))))
    channel: x + drop(scale * linear(activation(linear(norm(x)))))

Layer d mixes on plane d mod 3. Layers are scanned in groups of one layer a plane, so compile time does not grow with
depth; when the number of planes does not divide the depth, the remaining planes follow as single layers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scalr_jax.models.layers import Linear, Norm, per_shard, to_rows, torch_uniform
from scalr_jax.ops import cell_conv, cells, windows

Array = jax.Array

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


class SpatialMix(nn.Module):
    """x [D * P, C], plane [D, ...], mask [D * P] -> [D * P, C], what is added to the residual stream.

    `implementation`: "dense", "cells", or "windows" with a plane of `windows.make_windows`.
    """

    grid: tuple[int, int]
    norm: str
    activation: str
    implementation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, plane: Any, mask: Array, num_scenes: int, *, train: bool) -> Array:
        channels = x.shape[-1]
        x = Norm(self.norm, name="norm")(x, mask, train=train).astype(self.dtype)
        x = x.reshape(plane.cell.shape[0], -1, channels)  # [D, P, C]
        init = torch_uniform(9)
        kernel1 = self.param("kernel_1", init, (9, channels))
        bias1 = self.param("bias_1", init, (channels,)).astype(self.dtype)
        kernel2 = self.param("kernel_2", init, (9, channels))
        bias2 = self.param("bias_2", init, (channels,)).astype(self.dtype)
        scale = self.param("scale", torch_uniform(1), (channels,)).astype(self.dtype)
        activation = ACTIVATIONS[self.activation]

        def mix_cells(points: Array, plane: Any) -> Array:
            table = cells.flatten(points, plane)  # [M, C]
            halo = cell_conv.conv_taps(table, plane.halo_taps, plane.cell_taps, kernel1)  # [H, C]
            table = cell_conv.conv_taps(activation(halo + bias1), plane.cell_taps, plane.halo_taps, kernel2)
            return cells.inflate((table + bias2) * scale, plane)

        def mix_dense(points: Array, plane: Any) -> Array:
            grid = cells.flatten_dense(points, plane, grid=self.grid, num_scenes=num_scenes)  # [S, H, W, C]
            grid = activation(cell_conv.conv_dense(grid, kernel1) + bias1)
            grid = (cell_conv.conv_dense(grid, kernel2) + bias2) * scale
            return cells.inflate_dense(grid, plane)

        if self.implementation == "windows":
            table = windows.flatten(x, plane)  # [D, M, C]
            halo = activation(windows.conv_up(table, plane, kernel1) + bias1)  # [D, H, C]
            table = (windows.conv_down(halo, plane, kernel2) + bias2) * scale
            return to_rows(windows.inflate(table, plane))
        return to_rows(per_shard(mix_dense if self.implementation == "dense" else mix_cells, x, plane))


class ChannelMix(nn.Module):
    """x [D * P, C], mask [D * P] -> [D * P, C], what is added to the residual stream."""

    norm: str
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        channels = x.shape[-1]
        x = Norm(self.norm, name="norm")(x, mask, train=train)
        x = ACTIVATIONS[self.activation](Linear(channels, dtype=self.dtype, name="linear_1")(x))
        x = Linear(channels, dtype=self.dtype, name="linear_2")(x)
        return x * self.param("scale", torch_uniform(1), (channels,)).astype(self.dtype)


def drop_scenes(module: nn.Module, branch: Array, scene: Array, num_scenes: int, rate: float, train: bool) -> Array:
    """Stochastic depth: drop the whole branch of a scene with probability `rate`, scale the others by 1/(1 - rate).

    branch [D * P, C], scene [D, P].
    """
    if not train or rate == 0.0:
        return branch
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, (scene.shape[0], num_scenes + 1))
    factor = jnp.take_along_axis(keep, scene, axis=1).astype(branch.dtype) / (1.0 - rate)  # [D, P]
    return branch * factor.reshape(-1, 1)


class Layer(nn.Module):
    """One spatial and one channel mixing on one plane; the residual stream [D * P, C] is float32."""

    grid: tuple[int, int]
    norm: str
    activation: str
    drop_path: float
    implementation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, plane: Any, scene: Array, num_scenes: int, train: bool) -> Array:
        mask = to_rows(scene < num_scenes)
        settings = {"norm": self.norm, "activation": self.activation, "dtype": self.dtype}
        spatial = SpatialMix(self.grid, implementation=self.implementation, name="spatial", **settings)
        branch = spatial(x, plane, mask, num_scenes, train=train)
        x += drop_scenes(self, branch, scene, num_scenes, self.drop_path, train).astype(x.dtype)
        branch = ChannelMix(name="channel", **settings)(x, mask, train=train)
        return x + drop_scenes(self, branch, scene, num_scenes, self.drop_path, train).astype(x.dtype)


class Group(nn.Module):
    """One layer a plane, as the body of a scan: parameters `plane_0`, `plane_1`, ..."""

    grids: tuple[tuple[int, int], ...]
    layer: dict
    remat: str
    num_scenes: int
    train: bool

    @nn.compact
    def __call__(self, x: Array, planes: tuple, scene: Array):
        layer = nn.remat(Layer, static_argnums=(4, 5)) if self.remat == "layer" else Layer
        for d, grid in enumerate(self.grids):
            x = layer(grid, name=f"plane_{d}", **self.layer)(x, planes[d], scene, self.num_scenes, self.train)
        return x, None


class WaffleIron(nn.Module):
    """x [D * P, C], scene [D, P] -> [D * P, C].

    `remat`: "none", "layer" or "group" (what is computed again in the backward pass).
    `implementation`: "cells" (occupied cells only), "windows" (the same as matrix products, for a TPU), "dense" (the
    reference), "auto" (windows where the batch lies on a TPU, else cells).
    """

    depth: int
    grids: tuple[tuple[int, int], ...]
    norm: str = "layer"
    activation: str = "relu"
    drop_path: float = 0.0
    implementation: str = "auto"
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, planes: tuple, scene: Array, num_scenes: int, *, train: bool) -> Array:
        grids = tuple((h, w) for h, w in self.grids)
        implementation = self.implementation
        if implementation == "auto":
            implementation = "windows" if windows.platform_of(planes[0].cell) == "tpu" else "cells"
        if implementation == "windows":
            planes = tuple(windows.make_windows(plane, grid) for plane, grid in zip(planes, grids, strict=True))
        layer = {
            "norm": self.norm,
            "activation": self.activation,
            "drop_path": self.drop_path,
            "implementation": implementation,
            "dtype": self.dtype,
        }
        settings = {"layer": layer, "remat": self.remat, "num_scenes": num_scenes, "train": train}
        num_groups, num_rest = divmod(self.depth, len(grids))
        x = x.astype(jnp.float32)
        if num_groups:
            group = nn.remat(Group, prevent_cse=False) if self.remat == "group" else Group
            scanned = nn.scan(
                group,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,  # type: ignore[arg-type]
                length=num_groups,
            )
            x, _ = scanned(grids, name="groups", **settings)(x, planes, scene)
        if num_rest:
            x, _ = Group(grids[:num_rest], name="rest", **settings)(x, planes, scene)
        return x
