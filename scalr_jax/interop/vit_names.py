"""Names and shapes of published ViTs: a table for each project, and which of them a file has.

A layout is a table: for each parameter of ours, the names it may have in a file. What a parameter is made of is a tuple
of names, concatenated along the outputs (split queries, keys, values; the two halves of SwiGLU); None is a part that
the file leaves out because it is zero. What differs in shape alone is brought to these names before (`find`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Weights = dict[str, np.ndarray]
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


DINO: Layout = {  # Meta's DINO and DINOv2, timm's copies of them
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

DINOV3 = _without_bias(DINO, "blocks.{n}.attn.q_bias", "blocks.{n}.attn.v_bias")  # timm's names of the two

_LAYER = "encoder.layer.{n}"

TRANSFORMERS_DINOV2: Layout = {  # as published; the last of several is what transformers 5 has inside
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

TRANSFORMERS_DINOV3 = _without_bias(
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


_SIGLIP_LAYER = "encoder.layers.{n}"

SIGLIP: Layout = {  # transformers' SigLIP and SigLIP 2, whose vision tower has no CLS
    "positions": (("embeddings.position_embedding.weight",),),
    **_linear("patch", ("embeddings.patch_embedding",)),
    **_linear("blocks/norm_1/layer", (f"{_SIGLIP_LAYER}.layer_norm1",), norm=True),
    **_linear("blocks/attention/qkv", _each(f"{_SIGLIP_LAYER}.self_attn", "q_proj", "k_proj", "v_proj")),
    **_linear("blocks/attention/projection", (f"{_SIGLIP_LAYER}.self_attn.out_proj",)),
    **_linear("blocks/norm_2/layer", (f"{_SIGLIP_LAYER}.layer_norm2",), norm=True),
    **_linear("blocks/mlp/linear_1", (f"{_SIGLIP_LAYER}.mlp.fc1",)),
    **_linear("blocks/mlp/linear_2", (f"{_SIGLIP_LAYER}.mlp.fc2",)),
    **_linear("norm/layer", ("post_layernorm",), norm=True),
}


def _more(layout: Layout, more: Layout) -> Layout:
    """The targets of `more` with its names after those of `layout`."""
    return {target: (*layout[target], *parts) for target, parts in more.items()}


def _without(layout: Layout, *targets: str) -> Layout:
    return {target: parts for target, parts in layout.items() if not target.startswith(targets)}


RADIO: Layout = {  # its own names, and inside what transformers writes with them
    **_without(DINO, "norm/"),
    "blocks/scale_1": (*DINO["blocks/scale_1"], ("blocks.{n}.layer_scale1.lambda1",), ("blocks.{n}.ls1.grandma",)),
    "blocks/scale_2": (*DINO["blocks/scale_2"], ("blocks.{n}.layer_scale2.lambda1",), ("blocks.{n}.ls2.grandma",)),
    **_more(DINO, _linear("blocks/mlp/linear_1", _each("blocks.{n}.mlp", "gate_proj", "up_proj"))),
    **_more(DINO, _linear("blocks/mlp/linear_2", ("blocks.{n}.mlp.down_proj",))),
}


class Family(NamedTuple):
    """Facts about a project's files beside their names."""

    layout: Layout
    interpolation: str | None = None  # None: as `vit._interpolation` finds
    ffn: str = "mlp"  # without a gate, where nothing beside the file says it
    heads: Mapping[int, int] = {}  # by width, where not all have 64 channels
    image: tuple[float, ...] = ()  # mean and deviation of red, green, blue, where not ImageNet's
    from_transformers: bool = False


HALF = (0.5,) * 6
CLIP = (0.48145466, 0.4578275, 0.40821073, 0.26862954, 0.26130258, 0.27577711)
SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}
RADIO_HEADS = {768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24}

# Heads of other tasks, or used in training only; `rope_embed.periods` goes into the config.
IGNORED = re.compile(
    r"(embeddings\.)?mask_token|embeddings\.position_ids|rope_embed\.periods|patch_generator\.video_embedder\..*|"
    r"embeddings\.video_patch_projection\..*|summary_idxs|input_conditioner\..*|"
    r"(head|fc_norm|pooler|classifier|local_cls_norm|attn_pool|rasa_head|dino_head|ibot_head)\..*"
)


def _dino(weights: Weights) -> tuple[Weights, Family]:
    """DINO, DINOv2, Franca and DINOv3."""
    if "embeddings.cls_token" in weights:
        third = any(name.startswith("layer.") for name in weights)
        return weights, Family(TRANSFORMERS_DINOV3 if third else TRANSFORMERS_DINOV2, from_transformers=True)
    third = "storage_tokens" in weights or "blocks.0.gamma_1" in weights
    return weights, Family(DINOV3 if third else DINO)


def _radio(weights: Weights) -> tuple[Weights, Family]:
    """C-RADIO's own names: those of timm, with patches and class tokens of another shape, and without a last norm."""
    weights = dict(weights)
    tokens, patch = weights.pop("patch_generator.cls_token.token"), weights.pop("patch_generator.embedder.weight")
    bias = weights.pop("patch_generator.embedder.bias", np.zeros(len(patch), np.float32))
    weights |= {"pos_embed": weights.pop("patch_generator.pos_embed"), "patch_embed.proj.bias": bias}
    weights |= {"patch_embed.proj.weight": _square(patch), **_prefix(tokens, "cls_token", "register_tokens")}
    return weights, Family(RADIO, "radio", "mlp", RADIO_HEADS, CLIP, from_transformers=True)


def _radio_transformers(weights: Weights) -> tuple[Weights, Family]:
    weights, at = dict(weights), "embeddings"
    tokens, patch = weights.pop(f"{at}.cls_register_token"), weights.pop(f"{at}.patch_projection.weight")
    weights |= {f"{at}.position_embeddings": weights.pop(f"{at}.position_embedding")}
    weights |= {f"{at}.patch_embeddings.projection.weight": _square(patch)}
    weights |= {f"{at}.patch_embeddings.projection.bias": np.zeros(len(patch), np.float32)}
    weights |= _prefix(tokens, f"{at}.cls_token", f"{at}.register_tokens")
    layout = _without(TRANSFORMERS_DINOV2, "norm/")
    return weights, Family(layout, "radio", "mlp", RADIO_HEADS, CLIP, from_transformers=True)


def _siglip(weights: Weights) -> tuple[Weights, Family]:
    """Fixed sizes have a convolution, NaFlex a linear layer of patches whose channels come last."""
    weights = dict(weights)
    name, patch = "embeddings.position_embedding.weight", weights["embeddings.patch_embedding.weight"]
    if name in weights and weights[name].ndim == 2:
        weights[name] = weights[name][None]
    if naflex := patch.ndim == 2:
        size = round((patch.shape[1] / 3) ** 0.5)
        if patch.shape[1] == 3 * size * size:
            weights["embeddings.patch_embedding.weight"] = patch.reshape(-1, size, size, 3).transpose(0, 3, 1, 2)
    kind = "naflex" if naflex else "size"
    return weights, Family(SIGLIP, kind, "mlp_tanh", SIGLIP_HEADS, HALF, from_transformers=True)


def _siglip_timm(weights: Weights) -> tuple[Weights, Family]:
    """timm's models without CLS. It has the published approximate GELU in some sizes, the exact one in others."""
    patch, table = weights["patch_embed.proj.weight"].shape, weights.get("pos_embed", np.zeros((1, 0, 0))).shape
    large = patch[0] >= 1152 and patch[-1] == 16
    ffn = "mlp_tanh" if large or patch[-1] == 32 or (patch[0] == 1024 and table[1] == 1024) else "mlp"
    return weights, Family(_without(DINO, "cls", "registers"), "antialias", ffn, SIGLIP_HEADS, HALF)


def _square(patch: np.ndarray) -> np.ndarray:
    """A linear layer of patches [C, 3 * size * size] as a convolution [C, 3, size, size]; others as they are."""
    size = round((patch.shape[-1] / 3) ** 0.5)
    return patch.reshape(-1, 3, size, size) if patch.ndim == 2 and patch.shape[1] == 3 * size * size else patch


def _prefix(tokens: np.ndarray, cls: str, registers: str) -> Weights:
    """Class tokens and registers [K, C], of which the first is CLS here."""
    return {cls: tokens[None, :1]} | ({registers: tokens[None, 1:]} if len(tokens) > 1 else {})


FAMILIES: tuple[tuple[str, Callable[[Weights], tuple[Weights, Family]]], ...] = (  # by a name that one alone has
    (r"(embeddings\.)?cls_token", _dino),
    (r"patch_generator\.pos_embed", _radio),
    (r"embeddings\.cls_register_token", _radio_transformers),
    (r"embeddings\.patch_embedding\.weight", _siglip),
    (r"patch_embed\.proj\.weight", _siglip_timm),
)


def find(arrays: Weights) -> tuple[Weights, Family] | None:
    """The one ViT in `arrays` and its family, names without the prefix that they have inside a larger model; None for
    no ViT, or several. Raises KeyError for one that lacks its patches."""
    for pattern, make in FAMILIES:
        found = [match for match in (re.fullmatch(rf"(.*?\.)??{pattern}", name) for name in arrays) if match]
        if len(found) > 1:
            return None
        if found:
            prefix = found[0][1] or ""
            inside = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
            # DINOv2 trains with blocks in chunks, blocks.CHUNK.N; transformers 5 has model.layer.N inside
            inside = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): x for name, x in inside.items()}
            return make({re.sub(r"^model\.(?=layer\.)", "", name): x for name, x in inside.items()})
    return None
