"""From a config to its parts: dataset, scene settings, student, teacher. Plain functions, read top to bottom."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from scalr_jax.models.minkunet import BLOCKS, READINGS, scaled_widths
from scalr_jax.models.student import SparseStudent, Student
from scalr_jax.ops.voxels import extent_of
from scalr_jax.runtime.errors import InputError


def is_sparse(model: Any) -> bool:
    """Whether `config.model` is a MinkUNet. Raises `InputError` when it is no student that there is."""
    name = model.get("name", "waffleiron")
    if name not in ("waffleiron", *BLOCKS):
        raise InputError(f"model.name = {name!r} is none of waffleiron, {', '.join(BLOCKS)}")
    return name in BLOCKS


def grids_of(config: Any) -> tuple[tuple[int, int], ...]:
    """Rows and columns of each plane's grid; a MinkUNet has no planes."""
    return () if is_sparse(config.model) else tuple((int(h), int(w)) for h, w in config.model.grids)


def channels_of(model: Any) -> int:
    """Of the backbone's features."""
    return scaled_widths(model.minkunet.width)[-1] if is_sparse(model) else model.channels


def depth_of(model: Any) -> tuple[int, tuple[int, ...]]:
    """Layers of the backbone; of a MinkUNet the residual blocks, and those of each stage."""
    blocks = BLOCKS[model.name] if is_sparse(model) else ()
    return (sum(blocks) if blocks else model.depth), blocks


def compute_dtype(name: str) -> Any:
    """`auto`: bfloat16 where the accelerator has it, float32 on CPU."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if name not in ("float32", "bfloat16"):
        raise InputError(f"model.dtype = {name!r} is none of 'auto', 'float32', 'bfloat16'")
    return jnp.dtype(name)


def make_student(config: Any, *, head: str, out_features: int, frozen_backbone: bool = False) -> Student:
    """The student of `config.model`; `head` and `out_features` as `Student` takes them."""
    model = config.model
    _check_choices(model, {"segmentation_head": ("segment", "linear")})
    if is_sparse(model):
        return make_sparse_student(model, head=head, out_features=out_features, frozen_backbone=frozen_backbone)
    _check_choices(
        model,
        {
            "norm": ("layer", "batch"),
            "activation": ("relu", "gelu"),
            "implementation": ("auto", "cells", "windows", "dense"),
            "remat": ("none", "layer", "group"),
        },
    )
    if len(model.grids) != 3:
        raise InputError(f"model.grids has {len(model.grids)} planes, and the three planes xy, xz, yz need one each")
    return Student(
        channels=model.channels,
        depth=model.depth,
        grids=grids_of(config),
        head=head,
        out_features=out_features,
        head_hidden=model.head_hidden if head == "distill" else 0,
        norm=model.norm,
        activation=model.activation,
        drop_path=model.drop_path,
        implementation=model.implementation,
        remat=model.remat,
        frozen_backbone=frozen_backbone,
        dtype=compute_dtype(model.dtype),
    )


def _check_choices(model: Any, choices: dict[str, tuple[str, ...]]) -> None:
    for key, known in choices.items():
        if model[key] not in known:
            raise InputError(f"model.{key} = {model[key]!r} is none of {', '.join(known)}")


def make_sparse_student(model: Any, *, head: str, out_features: int, frozen_backbone: bool = False) -> SparseStudent:
    """A MinkUNet with a head, of `config.model` or the like."""
    settings = model.minkunet
    if settings.voxel_size <= 0 or settings.width <= 0:
        raise InputError(
            f"model.minkunet.voxel_size = {settings.voxel_size} (metres) and width = {settings.width} must be positive"
        )
    if settings.stem_convolutions not in (1, 2):
        raise InputError(f"model.minkunet.stem_convolutions = {settings.stem_convolutions} is neither 1 nor 2")
    if settings.reading not in READINGS:
        raise InputError(f"model.minkunet.reading = {settings.reading!r} is none of {', '.join(READINGS)}")
    if model.drop_path:
        logging.log_first_n(logging.WARNING, "model.drop_path = %g: a MinkUNet drops no path", 1, model.drop_path)
    low, high = (tuple(corner) for corner in model.field_of_view)
    stem, *widths = scaled_widths(settings.width)
    return SparseStudent(
        channels=widths[-1],
        depth=depth_of(model)[0],
        grids=(),
        head=head,
        out_features=out_features,
        head_hidden=model.head_hidden if head == "distill" else 0,
        frozen_backbone=frozen_backbone,
        dtype=compute_dtype(model.dtype),
        blocks=BLOCKS[model.name],
        widths=tuple(widths),
        stem=stem,
        stem_convolutions=settings.stem_convolutions,
        extent=extent_of((low, high), settings.voxel_size),
        reading=settings.reading,
    )


def num_features(params: dict) -> int:
    """Of a point, in what the student takes."""
    if "embedding" in params:
        return params["embedding"]["norm"]["scale"].shape[0]
    return params["backbone"]["stem"]["kernel"].shape[1]


def segmentation_head(params: dict) -> str | None:
    """Which segmentation head the parameters have: "segment" (batch norm and linear), "mlp", "linear" or none."""
    head = params.get("head", {})
    if "kernel" not in head:
        return None
    return "mlp" if "hidden" in head else "segment" if "norm" in head else "linear"
