"""Published ViT weights to `scalr_jax.models.vit`: DINO, DINOv2 (with and without registers), Franca, DINOv3, SigLIP 2
and C-RADIO.

All names a file must hold, and their shapes, follow from its project's table (`vit_names.py`) and the config read off
the file; every difference is listed before anything is converted.

What no file says is how its code interpolates the position table, so it is set to what the code that wrote the file
does (2026-11): Meta's DINO and DINOv2 "dinov2", timm and everything with registers "antialias", transformers "size",
C-RADIO "radio", SigLIP 2's NaFlex "naflex".
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
from scalr_jax.interop.vit_names import IGNORED, Family, Parts, find
from scalr_jax.models import vit
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import read_json

BESIDE = "config.json"
AGAIN = "copy it again from where the weights are, or take it away (the published models' settings then hold)"
KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit", "radio", "siglip_vision_model", "siglip2_vision_model")
WHOLE = ("siglip", "siglip2")  # with a text model: what is said of the images stands in `vision_config`
NUMBERS = {"num_attention_heads": "num_heads", "layer_norm_eps": "norm_eps", "rope_theta": "rotary_base"}
FEED_FORWARD = {  # by activation, gated
    **{("gelu", False): "mlp", ("gelu_pytorch_tanh", False): "mlp_tanh"},
    **{("silu", True): "swiglu", ("gelu", True): "geglu", ("gelu_pytorch_tanh", True): "geglu_tanh"},
}


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
    weights, family = _weights(unwrapped(torch_file.read_weights_file(path), str(path)), path)
    chosen = {target: _choose(alternatives, weights) for target, alternatives in family.layout.items()}
    config = _config(weights, family, chosen, num_heads, path)
    shapes = jax.eval_shape(lambda: vit.init(config, jax.random.key(0), (config.patch_size, config.patch_size)))
    leaves = flat_shapes(shapes)
    _check(weights, chosen, leaves, config, path)
    flat = {target: _parameter(weights, target, chosen[target], shape) for target, shape in leaves.items()}
    params: dict = unflatten_dict(flat, sep="/")
    if config.positions == "learned":
        positions = weights[str(chosen["positions"][0])][0]
        if config.cls and len(positions) > math.prod(config.position_grid):  # the CLS token's own position comes first
            params["cls"] = params["cls"] + positions[:1].astype(np.float32)
    return config, params


def _weights(contents: dict, path: str | Path) -> tuple[dict[str, np.ndarray], Family]:
    """The ViT's weights, without the prefix they have inside a larger model or a training checkpoint."""
    for key in ("teacher", "state_dict_ema", "state_dict", "model"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
    arrays = {str(name): value for name, value in contents.items() if isinstance(value, np.ndarray)}
    try:
        found = find(arrays)
    except (KeyError, IndexError) as error:
        raise InputError(f"{path} holds no ViT that is known here: {error} is missing or of another kind") from None
    if found is None:
        tokens = sum(name.endswith("cls_token") for name in arrays)
        raise InputError(
            f"{path} holds no ViT that is known here: it has {tokens} weights named cls_token among {len(arrays)}, and "
            "no other name of one alone"
        )
    return found


def _choose(alternatives: tuple[Parts, ...], weights: dict[str, np.ndarray]) -> Parts:
    """The first alternative of which the file holds all parts in some block, else the first."""
    names = {re.sub(r"(blocks|layers?)\.\d+\.", r"\1.{n}.", name) for name in weights}
    held = (parts for parts in alternatives if all(part is None or part in names for part in parts))
    return next(held, alternatives[0])


def _config(
    weights: dict[str, np.ndarray], family: Family, chosen: dict[str, Parts], num_heads: int | None, path: str | Path
) -> vit.ViTConfig:
    """The architecture, from names and shapes of the first block."""
    first = {target: tuple(part and part.format(n=0) for part in parts) for target, parts in chosen.items()}
    has_registers = "registers" in first and first["registers"][0] in weights
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
    ffn = "swiglu" if gated else family.ffn
    beside = read_beside(Path(path), gated=gated, default=ffn) if family.from_transformers else {}
    said = beside.pop("num_heads", family.heads.get(width))
    num_heads = said if num_heads is None else num_heads
    config = {
        "patch_size": patch_size,
        "width": width,
        "depth": len(
            {match[0] for match in (re.search(r"(blocks|layers?)\.\d+\.", name) for name in weights) if match}
        ),
        "num_heads": _num_heads(width, num_heads, periods, rotary, path),
        "hidden": hidden,
        "ffn": ffn,
        "num_registers": shape("registers")[1] if has_registers else 0,
        "layer_scale": "blocks/scale_1" in first and first["blocks/scale_1"][0] in weights,
        "cls": "cls" in first,
        "final_norm": "norm/layer/scale" in first,
    }
    if family.image:
        config |= {"image_mean": family.image[:3], "image_std": family.image[3:]}
    if not rotary:
        config["position_grid"] = _grid(shape("positions")[1], path)
        config["position_interpolation"] = family.interpolation or _interpolation(weights, config, path)
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
        elif name not in needed and not IGNORED.fullmatch(name):
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


def read_beside(weights: Path, *, gated: bool, default: str) -> dict[str, Any]:
    """Fields of `ViTConfig` that the config.json which transformers wrote beside a file of `weights` says, for what
    names and shapes do not say; {} without one.

    gated: whether the MLP has a gate. DINOv2's is SiLU whatever `hidden_act` says, DINOv3's is `hidden_act`. default:
    the `ffn` where nothing is said.

    Raises:
      InputError: the file is damaged, or says an activation or a number that is not known here.
    """
    path = weights.with_name(BESIDE)
    if not path.is_file():
        return {}
    said = read_json(path, AGAIN)
    if said.get("model_type") in WHOLE and isinstance(said.get("vision_config"), dict):
        said = {"model_type": f"{said['model_type']}_vision_model", **said["vision_config"]}
    if said.get("model_type") not in KINDS:
        return {}
    rotary = said.get("rope_parameters")  # where transformers 5 says `rope_theta`
    said |= rotary if isinstance(rotary, dict) else {}
    numbers = {ours: said[theirs] for theirs, ours in NUMBERS.items() if said.get(theirs) is not None}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < math.inf or (name == "num_heads" and value % 1):
            raise InputError(f"{path}: {value!r} is no value for {name} of a ViT; {AGAIN}")
    activation = None if gated and said["model_type"] != "dinov3_vit" else said.get("hidden_act")
    if activation is None:
        return {**numbers, "ffn": default}
    if not isinstance(activation, str) or (activation, gated) not in FEED_FORWARD:
        raise InputError(
            f"{path}: hidden_act = {activation!r} of {'a gated' if gated else 'a plain'} MLP is not known here, which "
            f"has gelu, gelu_pytorch_tanh{' and silu' if gated else ''}; take another teacher"
        )
    return {**numbers, "ffn": FEED_FORWARD[activation, gated]}
