"""Published ViT weights to `scalr_jax.models.vit`: DINO, DINOv2 (with and without registers) and DINOv3.

A layout is a table: for each parameter of ours, the names it may have in a file. What a parameter is made of is a tuple
of names, concatenated along the outputs (split queries, keys, values; the two halves of SwiGLU); None is a part that
the file leaves out because it is zero. All names a file must hold, and their shapes, follow from the table and the
config read off the file; every difference is listed before anything is converted.

What no file says is how its code interpolates the position table, so it is set to what the code that wrote the file
does (2026-11): Meta's DINO and DINOv2 "dinov2", timm and everything with registers "antialias", transformers "size".
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from scalr_jax.interop import torch_file
from scalr_jax.interop.finite import check_weights
from scalr_jax.interop.model import flat_shapes, unwrapped
from scalr_jax.interop.transformers_config import read_beside
from scalr_jax.models import vit
from scalr_jax.runtime.errors import InputError

Parts = tuple[str | None, ...]  # file names (or None) that, concatenated along the outputs, are one parameter
Layout = dict[str, tuple[Parts, ...]]  # path of a parameter -> its possible parts; "{n}" is the block


def _linear(path: str, *alternatives: Parts, norm: bool = False) -> Layout:
    """A kernel and a bias from the names of PyTorch modules."""

    def leaves(leaf: str) -> tuple[Parts, ...]:
        return tuple(tuple(module and f"{module}.{leaf}" for module in parts) for parts in alternatives)

    return {f"{path}/{'scale' if norm else 'kernel'}": leaves("weight"), f"{path}/bias": leaves("bias")}


def _each(prefix: str, *names: str) -> Parts:
    return tuple(f"{prefix}.{name}" for name in names)


def _without_bias(layout: Layout, query: str, value: str) -> Layout:
    """DINOv3: rotary positions instead of a table; no key bias, and none at all in the 7B."""
    bias = "blocks/attention/qkv/bias"
    layout = {target: alternatives for target, alternatives in layout.items() if target != "positions"}
    return {**layout, bias: (*layout[bias], (query, None, value), (None,))}


_DINO: Layout = {  # Meta's DINO and DINOv2, timm's copies of them
    "cls": (("cls_token",),),
    "registers": (("register_tokens",), ("storage_tokens",), ("reg_token",)),  # DINOv2, DINOv3, timm
    "positions": (("pos_embed",),),
    **_linear("patch", ("patch_embed.proj",)),
    **_linear("blocks/norm_1/layer", ("blocks.{n}.norm1",), norm=True),
    **_linear("blocks/attention/qkv", ("blocks.{n}.attn.qkv",)),
    **_linear("blocks/attention/projection", ("blocks.{n}.attn.proj",)),
    "blocks/scale_1": (("blocks.{n}.ls1.gamma",), ("blocks.{n}.gamma_1",)),  # the latter in timm's DINOv3
    **_linear("blocks/norm_2/layer", ("blocks.{n}.norm2",), norm=True),
    **_linear(
        "blocks/mlp/linear_1",
        ("blocks.{n}.mlp.fc1",),
        ("blocks.{n}.mlp.w12",),  # DINOv2 g
        ("blocks.{n}.mlp.w1", "blocks.{n}.mlp.w2"),  # DINOv3
        ("blocks.{n}.mlp.fc1_g", "blocks.{n}.mlp.fc1_x"),  # timm's DINOv3
    ),
    **_linear("blocks/mlp/linear_2", ("blocks.{n}.mlp.fc2",), ("blocks.{n}.mlp.w3",)),
    "blocks/scale_2": (("blocks.{n}.ls2.gamma",), ("blocks.{n}.gamma_2",)),
    **_linear("norm/layer", ("norm",), norm=True),
}

_DINOV3 = _without_bias(_DINO, "blocks.{n}.attn.q_bias", "blocks.{n}.attn.v_bias")  # timm's names of the two

_LAYER = "encoder.layer.{n}"

_TRANSFORMERS_DINOV2: Layout = {  # as published; the last of several is what transformers 5 has inside
    "cls": (("embeddings.cls_token",),),
    "registers": (("embeddings.register_tokens",),),
    "positions": (("embeddings.position_embeddings",),),
    **_linear("patch", ("embeddings.patch_embeddings.projection",)),
    **_linear("blocks/norm_1/layer", (f"{_LAYER}.norm1",), norm=True),
    **_linear(
        "blocks/attention/qkv",
        _each(f"{_LAYER}.attention.attention", "query", "key", "value"),
        _each(f"{_LAYER}.attention", "q_proj", "k_proj", "v_proj"),
    ),
    **_linear("blocks/attention/projection", (f"{_LAYER}.attention.output.dense",), (f"{_LAYER}.attention.o_proj",)),
    "blocks/scale_1": ((f"{_LAYER}.layer_scale1.lambda1",),),
    **_linear("blocks/norm_2/layer", (f"{_LAYER}.norm2",), norm=True),
    **_linear(
        "blocks/mlp/linear_1",
        (f"{_LAYER}.mlp.fc1",),
        (f"{_LAYER}.mlp.weights_in",),  # g
        _each(f"{_LAYER}.mlp", "gate_proj", "up_proj"),
    ),
    **_linear(
        "blocks/mlp/linear_2", (f"{_LAYER}.mlp.fc2",), (f"{_LAYER}.mlp.weights_out",), (f"{_LAYER}.mlp.down_proj",)
    ),
    "blocks/scale_2": ((f"{_LAYER}.layer_scale2.lambda1",),),
    **_linear("norm/layer", ("layernorm",), norm=True),
}

_TRANSFORMERS_DINOV3 = _without_bias(
    {
        "cls": (("embeddings.cls_token",),),
        "registers": (("embeddings.register_tokens",),),
        **_linear("patch", ("embeddings.patch_embeddings",)),
        **_linear("blocks/norm_1/layer", ("layer.{n}.norm1",), norm=True),
        **_linear("blocks/attention/qkv", _each("layer.{n}.attention", "q_proj", "k_proj", "v_proj")),
        **_linear("blocks/attention/projection", ("layer.{n}.attention.o_proj",)),
        "blocks/scale_1": (("layer.{n}.layer_scale1.lambda1",),),
        **_linear("blocks/norm_2/layer", ("layer.{n}.norm2",), norm=True),
        **_linear("blocks/mlp/linear_1", _each("layer.{n}.mlp", "gate_proj", "up_proj"), ("layer.{n}.mlp.up_proj",)),
        **_linear("blocks/mlp/linear_2", ("layer.{n}.mlp.down_proj",)),
        "blocks/scale_2": (("layer.{n}.layer_scale2.lambda1",),),
        **_linear("norm/layer", ("norm",), norm=True),
    },
    "layer.{n}.attention.q_proj.bias",
    "layer.{n}.attention.v_proj.bias",
)

# Used in training only, or heads of other tasks; `rope_embed.periods` goes into the config.
_IGNORED = re.compile(
    r"(embeddings\.)?mask_token|(head|fc_norm|pooler|classifier|local_cls_norm)\..*|rope_embed\.periods"
)


def load_dinov2(path: str | Path, *, num_heads: int | None = None) -> tuple[vit.ViTConfig, dict]:
    """Reads a DINO, DINOv2 or DINOv3 ViT: (vit_config, params), params nested dicts of float32 NumPy arrays.

    Args:
      path: a `.pth` of Meta's (the weights, or a training checkpoint that holds them under `teacher`), or a
        `.safetensors` with timm's or transformers' names.
      num_heads: None takes heads of 64 channels, as all of DINO and DINOv2 have; DINOv3's own files say it, and so
        does the config.json that transformers writes. Where that is beside the file, its activation, its epsilon and
        the base of its rotary periods hold, too.

    Returns:
      What `scalr_jax.models.vit.features` takes. `position_interpolation` is that of the code the file comes from
      (this module's docstring); `dataclasses.replace` changes it, as it does `image_mean` and `image_std` for DINOv3's
      satellite models, whose files look like the others.

    Raises:
      InputError: not a readable checkpoint, no ViT, heads that the file does not say, or weights that are missing,
        unknown, of another shape (all are listed, with both shapes) or not finite.
    """
    weights = _weights(unwrapped(torch_file.read_weights_file(path), str(path)), path)
    chosen = {target: _choose(alternatives, weights) for target, alternatives in _layout(weights).items()}
    config = _config(weights, chosen, num_heads, path)
    shapes = jax.eval_shape(lambda: vit.init(config, jax.random.key(0), (config.patch_size, config.patch_size)))
    leaves = flat_shapes(shapes)
    _check(weights, chosen, leaves, config, path)
    flat = {target: _parameter(weights, target, chosen[target], shape) for target, shape in leaves.items()}
    params: dict = unflatten_dict(flat, sep="/")
    if config.positions == "learned":
        positions = weights[str(chosen["positions"][0])][0]
        if len(positions) > math.prod(config.position_grid):  # the CLS token's own position comes first
            params["cls"] = params["cls"] + positions[:1].astype(np.float32)
    return config, params


def _weights(contents: dict, path: str | Path) -> dict[str, np.ndarray]:
    """The ViT's weights, without the prefix they have inside a larger model or a training checkpoint."""
    for key in ("teacher", "state_dict", "model"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
    arrays = {str(name): value for name, value in contents.items() if isinstance(value, np.ndarray)}
    tokens = [name for name in arrays if re.fullmatch(r"(.*\.)?cls_token", name)]
    if len(tokens) != 1:
        raise InputError(f"{path} holds no ViT: it has {len(tokens)} weights named cls_token among {len(arrays)}")
    prefix = tokens[0].removesuffix("cls_token").removesuffix("embeddings.")
    arrays = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    # DINOv2 trains with blocks in chunks, blocks.CHUNK.N; transformers 5 has model.layer.N inside
    arrays = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): value for name, value in arrays.items()}
    return {re.sub(r"^model\.(?=layer\.)", "", name): value for name, value in arrays.items()}


def _layout(weights: dict[str, np.ndarray]) -> Layout:
    if "embeddings.cls_token" in weights:
        return _TRANSFORMERS_DINOV3 if any(name.startswith("layer.") for name in weights) else _TRANSFORMERS_DINOV2
    return _DINOV3 if "storage_tokens" in weights or "blocks.0.gamma_1" in weights else _DINO


def _choose(alternatives: tuple[Parts, ...], weights: dict[str, np.ndarray]) -> Parts:
    """The first alternative of which the file holds all parts in some block, else the first."""
    names = {re.sub(r"(blocks|layer)\.\d+\.", r"\1.{n}.", name) for name in weights}
    held = (parts for parts in alternatives if all(part is None or part in names for part in parts))
    return next(held, alternatives[0])


def _config(
    weights: dict[str, np.ndarray], chosen: dict[str, Parts], num_heads: int | None, path: str | Path
) -> vit.ViTConfig:
    """The architecture, from names and shapes of the first block."""
    first = {target: tuple(part and part.format(n=0) for part in parts) for target, parts in chosen.items()}
    has_registers = first["registers"][0] in weights
    dims = {"registers": 3} if has_registers else {}
    dims |= {"patch/kernel": 4, "positions": 3, "blocks/mlp/linear_1/kernel": 2, "blocks/mlp/linear_2/kernel": 2}
    needed = {str(name): num for target, num in dims.items() if target in first for name in first[target]}
    wrong = [name for name, num in needed.items() if name not in weights or weights[name].ndim != num]
    if wrong:
        raise InputError(f"{path} holds no ViT that is known here: {', '.join(wrong)} missing or of another kind")

    def shape(target: str) -> tuple[int, ...]:
        return weights[str(first[target][0])].shape

    width, _, patch_size, _ = shape("patch/kernel")
    hidden = shape("blocks/mlp/linear_2/kernel")[1]
    outputs = sum(len(weights[str(name)]) for name in first["blocks/mlp/linear_1/kernel"])
    periods = weights.get("rope_embed.periods")
    rotary, gated = "positions" not in chosen, outputs == 2 * hidden
    beside = read_beside(Path(path), gated=gated) if "embeddings.cls_token" in weights else {}
    said = beside.pop("num_heads", None)
    num_heads = said if num_heads is None else num_heads
    config = {
        "patch_size": patch_size,
        "width": width,
        "depth": len({match[0] for match in (re.search(r"(blocks|layer)\.\d+\.", name) for name in weights) if match}),
        "num_heads": _num_heads(width, num_heads, periods, rotary, path),
        "hidden": hidden,
        "ffn": "swiglu" if gated else "mlp",
        "num_registers": shape("registers")[1] if has_registers else 0,
        "layer_scale": first["blocks/scale_1"][0] in weights,
    }
    if not rotary:
        config["position_grid"] = _grid(shape("positions")[1], path)
        config["position_interpolation"] = _interpolation(weights, config, path)
        return vit.ViTConfig(**{**config, **beside})
    if periods is not None:  # Meta's files hold them rounded to bfloat16; timm and transformers compute them
        config["rotary_periods"] = tuple(periods.astype(float).tolist())
    return vit.ViTConfig(**{**config, "positions": "rotary", "norm_eps": 1e-5, **beside})


def _num_heads(width: int, given: int | None, periods: Any, rotary: bool, path: str | Path) -> int:
    if periods is not None:  # a quarter of a head each
        known = width // (4 * len(periods))
        if given not in (None, known):
            raise InputError(f"{path} has {known} heads by its rotary periods, not num_heads = {given}")
        return known
    if given is None and (width % 64 or (rotary and width == 4096)):
        hint = "; DINOv3 7B has 32" if width == 4096 else ""
        raise InputError(f"{path} is {width} wide and does not say in how many heads: give num_heads{hint}")
    if given is not None and (given < 1 or width % given):
        raise InputError(f"{path} is {width} wide, which num_heads = {given} does not divide")
    return given or width // 64


def _grid(num_positions: int, path: str | Path) -> tuple[int, int]:
    """Square, with or without an entry for CLS (timm adds it to the token in models with registers)."""
    for count in (num_positions, num_positions - 1):
        if math.isqrt(count) ** 2 == count:
            return math.isqrt(count), math.isqrt(count)
    raise InputError(f"{path} has a table of {num_positions} positions, which is no square grid with or without CLS")


def _interpolation(weights: dict[str, np.ndarray], config: dict, path: str | Path) -> str:
    if config["num_registers"]:
        return "antialias"
    if "embeddings.cls_token" in weights:
        return "size"
    # Meta's DINOv2 files hold a mask token, timm's copies do not; DINO's have the same names, but Meta's are .pth
    metas = "mask_token" in weights or not (config["layer_scale"] or Path(path).suffix == ".safetensors")
    return "dinov2" if metas else "antialias"


def _check(
    weights: dict[str, np.ndarray], chosen: dict[str, Parts], leaves: dict, config: vit.ViTConfig, path: str | Path
) -> None:
    """Raises one InputError that lists every weight that is missing, unknown or of another shape, or not finite."""
    needed = {}
    for target, shape in leaves.items():
        stacked = target.startswith("blocks/")
        parts = chosen[target]
        for n in range(config.depth if stacked else 1):
            for part in parts:
                if part is not None:
                    needed[part.format(n=n)] = _file_shape(target, shape[1:] if stacked else shape, parts, config)
    for name in [name for name in weights if name.endswith(".bias_mask")]:
        needed[name] = needed.get(name.removesuffix("_mask"), ())
    if config.positions == "learned":  # the table may hold an entry for CLS
        name = str(chosen["positions"][0])
        if weights[name].shape == (1, 1 + math.prod(config.position_grid), config.width):
            needed[name] = weights[name].shape
    problems = []
    for name in sorted({*needed, *weights}):
        if name not in weights:
            problems.append(f"{name}: missing, needs {needed[name]}")
        elif name not in needed and not _IGNORED.fullmatch(name):
            problems.append(f"{name}: unknown, has {weights[name].shape}")
        elif name in needed and weights[name].shape != needed[name]:
            problems.append(f"{name}: has {weights[name].shape}, needs {needed[name]}")
    if problems:
        listed = "\n  ".join(problems)
        raise InputError(f"{path} does not fit a ViT of {config.depth} blocks, {config.width} wide:\n  {listed}")
    used = [name for name in {*needed, "rope_embed.periods"} & weights.keys() if not name.endswith("_mask")]
    check_weights({name: _masked(weights, name) for name in used}, str(path))


def _file_shape(target: str, shape: tuple[int, ...], parts: Parts, config: vit.ViTConfig) -> tuple[int, ...]:
    """The shape in a PyTorch file of one part of a parameter of `shape`."""
    if target == "patch/kernel":
        return (shape[1], 3, config.patch_size, config.patch_size)
    if target in ("cls", "registers", "positions"):
        return (1, *shape)
    shape = (*shape[:-1], shape[-1] // len(parts))
    return shape[::-1]


def _parameter(weights: dict[str, np.ndarray], target: str, parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    """One parameter of ours in float32, blocks stacked."""
    if target == "patch/kernel":  # [C, 3, rows, columns] -> [rows * columns * 3, C]
        return weights[str(parts[0])].transpose(2, 3, 1, 0).reshape(shape).astype(np.float32)
    if target in ("cls", "registers", "positions"):
        return weights[str(parts[0])][0, -shape[0] :].astype(np.float32)
    if not target.startswith("blocks/"):
        return weights[str(parts[0])].astype(np.float32)
    out = np.zeros(shape, np.float32)
    size = shape[-1] // len(parts)
    for n in range(shape[0]):
        for i, part in enumerate(parts):
            if part is not None:
                out[n, ..., i * size : (i + 1) * size] = _masked(weights, part.format(n=n)).T
    return out


def _masked(weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A weight; where DINOv3 masks a bias (that of the keys), zero."""
    mask = weights.get(f"{name}_mask") if name.endswith(".bias") else None
    return weights[name] if mask is None else np.where(mask == 1, weights[name], 0)
