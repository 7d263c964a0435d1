"""The config.json that transformers writes beside a ViT's weights, for what names and shapes do not say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import read_json

FILE = "config.json"
AGAIN = "copy it again from where the weights are, or take it away (the published models' settings then hold)"
KINDS = ("dinov2", "dinov2_with_registers", "dinov3_vit")
NUMBERS = {"num_attention_heads": "num_heads", "layer_norm_eps": "norm_eps", "rope_theta": "rotary_base"}
FEED_FORWARD = {("gelu", False): "mlp", ("silu", True): "swiglu", ("gelu", True): "geglu"}  # by activation, gated


def read_beside(weights: Path, *, gated: bool) -> dict[str, Any]:
    """Fields of `ViTConfig` that the config.json beside a file of transformers' `weights` says; {} without one.

    gated: whether the MLP has a gate. DINOv2's is SiLU whatever `hidden_act` says, DINOv3's is `hidden_act`.

    Raises:
      InputError: the file is damaged, or says an activation or a number that is not known here.
    """
    path = weights.with_name(FILE)
    if not path.is_file():
        return {}
    said = read_json(path, AGAIN)
    if said.get("model_type") not in KINDS:
        return {}
    rotary = said.get("rope_parameters")  # where transformers 5 says `rope_theta`
    said |= rotary if isinstance(rotary, dict) else {}
    numbers = {ours: said[theirs] for theirs, ours in NUMBERS.items() if said.get(theirs) is not None}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < math.inf or (name == "num_heads" and value % 1):
            raise InputError(f"{path}: {value!r} is no value for {name} of a ViT; {AGAIN}")
    default = "silu" if gated else "gelu"
    activation = default if gated and said["model_type"] != "dinov3_vit" else said.get("hidden_act") or default
    if not isinstance(activation, str) or (activation, gated) not in FEED_FORWARD:
        raise InputError(
            f"{path}: hidden_act = {activation!r} of {'a gated' if gated else 'a plain'} MLP is not known here, which "
            f"has gelu{' and silu' if gated else ''}; take another teacher"
        )
    return {**numbers, "ffn": FEED_FORWARD[activation, gated]}
