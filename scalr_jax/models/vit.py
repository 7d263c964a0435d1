"""The teacher: a Vision Transformer as DINO, DINOv2, DINOv3, SigLIP 2 and C-RADIO publish it.

    tokens = [CLS, registers, patch(image)] + positions
    tokens = tokens + scale1 * attention(norm1(tokens))        depth times, scanned
    tokens = tokens + scale2 * mlp(norm2(tokens))
    x_pre_norm = tokens, x = norm(tokens)

(Dosovitskiy et al., "An Image is Worth 16x16 Words"; Oquab et al., "DINOv2"; Darcet et al., "Vision Transformers Need
Registers"; Simeoni et al., "DINOv3".) Blocks are one scan over stacked parameters, so compile time does not grow with
depth. The CLS token's own position is part of `cls`. Norms, softmax and the residual stream are float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from scalr_jax.models.layers import keep_scenes, linear
from scalr_jax.ops import attention
from scalr_jax.ops.positions import INTERPOLATIONS, resample_matrix, rotary_angles, rotary_periods

Array = jax.Array

FEATURES = ("x_pre_norm", "x")
INIT = nn.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Settings in which the teacher's blocks and a VaViT's (`models/vavit.py`) may differ."""

    width: int
    num_heads: int
    hidden: int
    ffn: str = "mlp"
    norm_eps: float = 1e-6
    layer_scale: float | None = None  # where it begins; None: there is none
    use_bias: bool = True
    axes: int = 1  # of rotary positions, see `rotate`
    drop_path: float = 0.0  # share of branches that training drops, a scene at a time
    init: Callable[..., Array] = INIT

    def dense(self, features: int, dtype: DTypeLike | None, name: str) -> Dense:
        return Dense(features, dtype, self.use_bias, self.init, name=name)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything about a ViT that is not a parameter. The defaults are DINOv2 ViT-S/14."""

    patch_size: int = 14
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    hidden: int = 1536  # channels between the two linear layers of the MLP (SwiGLU: of each of the two halves)
    ffn: str = "mlp"  # mlp, mlp_tanh, swiglu, geglu, geglu_tanh: see `Mlp`
    cls: bool = True  # whether a class token comes first (not in SigLIP)
    num_registers: int = 0
    final_norm: bool = True  # without it (C-RADIO) x is x_pre_norm
    layer_scale: bool = True
    norm_eps: float = 1e-6  # DINOv3: 1e-5
    positions: str = "learned"  # learned, rotary (DINOv3)
    position_grid: tuple[int, int] = (37, 37)  # rows, columns of the learned table
    position_interpolation: str = "dinov2"  # dinov2, size, antialias, radio, naflex: see ops/positions.py
    rotary_base: float = 100.0
    rotary_periods: tuple[float, ...] = ()  # [C / heads / 4] in half images; (): powers of `rotary_base`
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's red, green, blue, of images in 0..1;
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # DINOv3's satellite models have their own
    dtype: str = "params"  # what matrix products compute in: params (the parameters' own dtype), float32, bfloat16

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: CLS and registers."""
        return self.cls + self.num_registers

    @property
    def block(self) -> BlockConfig:
        layer_scale = 1.0 if self.layer_scale else None
        return BlockConfig(self.width, self.num_heads, self.hidden, self.ffn, self.norm_eps, layer_scale)

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width = {self.width} is not a multiple of num_heads = {self.num_heads}")
        for name, known in (
            ("ffn", ("mlp", "mlp_tanh", "swiglu", "geglu", "geglu_tanh")),
            ("positions", ("learned", "rotary")),
            ("position_interpolation", INTERPOLATIONS),
            ("dtype", ("params", "float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r} is none of {', '.join(known)}")
        if self.positions == "rotary" and self.head_dim % 4:
            raise ValueError(f"rotary positions need heads of a multiple of 4 channels, not {self.head_dim}")


def features(vit_config: ViTConfig, params: Any, images: Array | np.ndarray, *, which: str = "x_pre_norm") -> Array:
    """Tokens of the last block, float32 [B, prefix + th * tw, C]: CLS, registers, patches row by row.

    Args:
      vit_config: the architecture.
      params: as `init` or `scalr_jax.interop.load_dinov2` return them.
      images: [B, h, w, 3], red, green, blue in 0..1; mean and standard deviation are applied here.
      which: "x_pre_norm" (before the final norm, what ScaLR distils) or "x" (after it).

    Raises:
      ValueError: `which` is unknown, or the image's size is not a multiple of the patch.
    """
    if which not in FEATURES:
        raise ValueError(f"which = {which!r} is none of {', '.join(FEATURES)}")
    tokens: Any = ViT(vit_config).apply({"params": params}, images, normalise=which == "x")
    return tokens


def init(vit_config: ViTConfig, key: Array, image_size: tuple[int, int]) -> dict:
    """Random float32 parameters: truncated normal of deviation 0.02, biases 0, norms and layer scales 1.

    The tree does not depend on `image_size` (rows, columns), which must be a multiple of the patch.
    """
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    return jax.jit(lambda key: dict(ViT(vit_config).lazy_init(key, images)["params"]))(key)


def patch_grid(vit_config: ViTConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """(th, tw), the patches of an image of (h, w) pixels. Raises ValueError unless both are multiples of the patch."""
    rows, columns = (size // vit_config.patch_size for size in image_size)
    if (rows * vit_config.patch_size, columns * vit_config.patch_size) != tuple(image_size) or not rows * columns:
        raise ValueError(f"an image of {image_size} pixels is no whole number of {vit_config.patch_size}-pixel patches")
    return rows, columns


def num_tokens(vit_config: ViTConfig, image_size: tuple[int, int]) -> int:
    """Tokens of one image: CLS, registers and patches."""
    rows, columns = patch_grid(vit_config, image_size)
    return vit_config.num_prefix + rows * columns


def patch_tokens(tokens: Array, vit_config: ViTConfig) -> Array:
    """Drops CLS and registers: [B, tokens, C] -> [B, th * tw, C]."""
    return tokens[:, vit_config.num_prefix :]


class Dense(nn.Module):
    """[..., C_in] -> [..., features] in `dtype` (None: the kernel's own)."""

    features: int
    dtype: DTypeLike | None
    use_bias: bool = True
    kernel_init: Callable[..., Array] = INIT

    @nn.compact
    def __call__(self, x: Array, scale: Array | None = None) -> Array:
        """scale [features]: of each output; put into the weights, which are fewer than the outputs."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        if scale is not None:
            kernel, bias = kernel * scale, None if bias is None else bias * scale
        rows = x.astype(self.dtype or kernel.dtype).reshape(-1, x.shape[-1])
        return linear(rows, kernel, bias).reshape(*x.shape[:-1], self.features)


class Norm(nn.Module):
    """Layer norm over channels in float32, whatever the parameters' dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.LayerNorm(self.eps, dtype=jnp.float32, use_fast_variance=False, name="layer")(x)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """x P(Z < x) of a standard normal Z (Hendrycks and Gimpel, 2016). The gradient keeps x alone."""
    return jax.nn.gelu(x, approximate=False)


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2 * math.pi)
    slope = 0.5 * (1 + jax.lax.erf(wide / math.sqrt(2))) + wide * density
    return ((gradient * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def rotate(x: Array | np.ndarray, angles: Array | np.ndarray, axes: int = 1) -> Array:
    """Rotary positions (Su et al., "RoFormer"): the last T tokens of x [B, tokens, heads, d] turn by angles
    [..., T, d/2]. CLS and registers come first and keep their place.

    A head's channels are `axes` parts, each of which turns by its part of the angles: in a part of p channels the pair
    (x_i, x_{i + p/2}) by angle i.
    """
    tokens, (*_, heads, width) = angles.shape[-2], x.shape
    angles = jnp.asarray(angles).reshape(*angles.shape[:-2], tokens, 1, axes, width // (2 * axes))
    prefix, turning = jnp.split(jnp.asarray(x), [x.shape[1] - tokens], axis=1)
    parts = turning.astype(jnp.float32).reshape(-1, tokens, heads, axes, 2, width // (2 * axes))
    a, b, cos, sin = parts[..., 0, :], parts[..., 1, :], jnp.cos(angles), jnp.sin(angles)
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-2).reshape(turning.shape)
    return jnp.concatenate([prefix, turned.astype(x.dtype)], axis=1)


class Mlp(nn.Module):
    """mlp: linear(gelu(linear(x))), exact GELU; swiglu, geglu: linear(act(a) * b), [a, b] = linear(x), with SiLU or
    GELU; _tanh: with the approximate GELU. [B, tokens, C]; `scale` [C] multiplies the result."""

    config: BlockConfig
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Array, scale: Array | None) -> Array:
        width, config = x.shape[-1], self.config
        act = jax.nn.silu if config.ffn == "swiglu" else jax.nn.gelu if config.ffn.endswith("_tanh") else gelu
        if config.ffn.startswith("mlp"):
            x = act(config.dense(config.hidden, self.dtype, "linear_1")(x))
        else:
            a, b = jnp.split(config.dense(2 * config.hidden, self.dtype, "linear_1")(x), 2, axis=-1)
            x = act(a) * b
        return config.dense(width, self.dtype, "linear_2")(x, scale)


class Attention(nn.Module):
    """Multi-head self-attention, [B, tokens, C] -> [B, tokens, C]; queries, keys, values in one product.

    attend: (queries, keys, values [B, tokens, heads, C / heads], *context) -> the same shape. `scale` [C] multiplies
    the result.
    """

    config: BlockConfig
    attend: Callable[..., Array]
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Array, scale: Array | None, angles: Array | np.ndarray | None, context: tuple) -> Array:
        batch, tokens, width = x.shape
        qkv = self.config.dense(3 * width, self.dtype, "qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.config.num_heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, tokens, heads, C / heads]
        if angles is not None:
            q, k = (rotate(x, angles, self.config.axes) for x in (q, k))
        x = self.attend(q, k, v, *context).reshape(batch, tokens, width)
        return self.config.dense(width, self.dtype, "projection")(x, scale)


class Block(nn.Module):
    """One transformer block as the body of a scan: tokens [B, tokens, C] in and out, in float32 or the dtype in which
    their sum is to be kept.

    angles [..., T, C / heads / 2] or None; context: what `attend` reads beside queries, keys and values; scene
    [B, tokens], where `config.drop_path` drops branches of scenes in training.
    """

    config: BlockConfig
    dtype: DTypeLike | None
    attend: Callable[..., Array] = attention.dense
    num_scenes: int = 0
    train: bool = False

    @nn.compact
    def __call__(
        self, x: Array, angles: Array | np.ndarray | None = None, context: tuple = (), scene: Array | None = None
    ) -> tuple[Array, None]:
        config = self.config
        attend = Attention(config, self.attend, self.dtype, name="attention")
        branches = {"1": partial(attend, angles=angles, context=context), "2": Mlp(config, self.dtype, name="mlp")}
        for n, branch in branches.items():
            scale = None
            if config.layer_scale is not None:
                scale = self.param(f"scale_{n}", nn.initializers.constant(config.layer_scale), (config.width,))
            y = branch(Norm(config.norm_eps, name=f"norm_{n}")(x), scale).astype(jnp.float32)
            keep = None if scene is None else keep_scenes(self, scene, self.num_scenes, config.drop_path, self.train)
            x = (x + (y if keep is None else y * keep[..., None])).astype(x.dtype)
        return x, None


class ViT(nn.Module):
    """Images [B, h, w, 3] in 0..1 -> float32 tokens [B, prefix + th * tw, C]; see `features`."""

    config: ViTConfig

    @nn.compact
    def __call__(self, images: Array, *, normalise: bool = True) -> Array:
        config = self.config
        grid = patch_grid(config, (images.shape[1], images.shape[2]))
        dtype = None if config.dtype == "params" else jnp.dtype(config.dtype)
        x = self.embed(images, grid, dtype)
        angles = None
        if config.positions == "rotary":
            angles = rotary_angles(grid, config.rotary_periods or rotary_periods(config.head_dim, config.rotary_base))
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
        blocks: Any = nn.scan(Block, length=config.depth, **axes)  # type: ignore[arg-type]
        x, _ = blocks(config.block, dtype, name="blocks")(x, angles)
        return Norm(config.norm_eps, name="norm")(x) if normalise and config.final_norm else x

    def embed(self, images: Array, grid: tuple[int, int], dtype: Any) -> Array:
        """[B, h, w, 3] -> float32 [B, tokens, C]: patches with positions, after CLS and registers."""
        config, size = self.config, self.config.patch_size
        rows, columns = grid
        x = (images.astype(jnp.float32) - jnp.asarray(config.image_mean)) / jnp.asarray(config.image_std)
        x = x.reshape(-1, rows, size, columns, size, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, size * size * 3)  # [B, th * tw, patch pixels]
        x = Dense(config.width, dtype, name="patch")(x).astype(jnp.float32)
        if config.positions == "learned":
            num_rows, num_columns = config.position_grid
            table = self.param("positions", INIT, (num_rows * num_columns, config.width))
            x += resample_positions(table, config, grid)
        prefix = [self.param("cls", INIT, (1, config.width))] if config.cls else []
        if config.num_registers:
            prefix.append(self.param("registers", INIT, (config.num_registers, config.width)))
        if not prefix:
            return x
        prefix = jnp.concatenate(prefix)
        prefix = jnp.broadcast_to(prefix.astype(jnp.float32), (len(x), *prefix.shape))
        return jnp.concatenate([prefix, x], axis=1)


def resample_positions(table: Array, config: ViTConfig, grid: tuple[int, int]) -> Array:
    """The learned table [rows * columns, C] at the patches of another grid: float32 [th * tw, C]."""
    table = table.astype(jnp.float32)
    if grid == config.position_grid:
        return table
    rows, columns = (
        resample_matrix(num_in, num_out, config.position_interpolation, longest=max(grid))
        for num_in, num_out in zip(config.position_grid, grid, strict=True)
    )  # [th, rows], [tw, columns]
    table = table.reshape(*config.position_grid, -1)
    table = jnp.einsum("ij,jkc->ikc", rows, table, precision="highest")
    return jnp.einsum("ij,kjc->kic", columns, table, precision="highest").reshape(grid[0] * grid[1], -1)


# DINOv2's four (Oquab et al., 2023, table 15), and DINOv3's largest (Simeoni et al., 2025, table 2).
TEACHERS = {
    "vits14": ViTConfig(width=384, depth=12, num_heads=6, hidden=1536),
    "vitb14": ViTConfig(width=768, depth=12, num_heads=12, hidden=3072),
    "vitl14": ViTConfig(width=1024, depth=24, num_heads=16, hidden=4096),
    "vitg14": ViTConfig(width=1536, depth=40, num_heads=24, hidden=4096, ffn="swiglu"),
    "vit7b16": ViTConfig(16, 4096, 40, 32, 8192, ffn="swiglu", num_registers=4, norm_eps=1e-5, positions="rotary"),
}
