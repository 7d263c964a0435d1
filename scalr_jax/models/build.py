"""From `config.model` to its backbone and its student."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import DTypeLike

from scalr_jax.config import StudentSettings
from scalr_jax.models.backbone import Backbone
from scalr_jax.models.minkunet import BLOCKS, MinkUNetBackbone
from scalr_jax.models.student import Student
from scalr_jax.models.vavit import SIZES, VaViTBackbone
from scalr_jax.models.waffleiron import WaffleIronBackbone

BACKBONES: dict[str, Callable[[StudentSettings], Backbone]] = {  # by `config.model.name`
    "waffleiron": WaffleIronBackbone.of,
    **dict.fromkeys(BLOCKS, MinkUNetBackbone.of),
    **dict.fromkeys(SIZES, VaViTBackbone.of),
}


def make_backbone(settings: StudentSettings) -> Backbone:
    """The backbone of `config.model`."""
    return BACKBONES[settings.name](settings)


def make_student(
    settings: StudentSettings, *, head: str, out_features: int, platform: str, frozen_backbone: bool = False
) -> Student:
    """The student of `config.model` on devices of `platform`."""
    dtype = compute_dtype(settings.dtype, platform)
    head_hidden = settings.head_hidden if head == "distill" else 0
    return Student(make_backbone(settings), head, out_features, head_hidden, frozen_backbone, dtype)


def compute_dtype(name: str, platform: str) -> DTypeLike:
    """The dtype of matrix products, of `config.model.dtype`: "auto" is bfloat16 but on a CPU."""
    if name == "auto":
        return jnp.float32 if platform == "cpu" else jnp.bfloat16
    return jnp.dtype(name)
