"""From a config to its parts: dataset, scene settings, student, teacher. Plain functions, read top to bottom."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from scalr_jax import distributed
from scalr_jax.build_dataset import given_intensity, make_dataset
from scalr_jax.data.instances import open_bank, write_bank
from scalr_jax.data.mixing import Mixing
from scalr_jax.data.scenes import InputError
from scalr_jax.data.transforms import SceneSettings
from scalr_jax.data.voxels import extent_of
from scalr_jax.models.minkunet import BLOCKS, READINGS, scaled_widths
from scalr_jax.models.student import SparseStudent, Student
from scalr_jax.ops.positions import INTERPOLATIONS

__all__ = (
    "channels_of",
    "compute_dtype",
    "depth_of",
    "given_intensity",
    "grids_of",
    "is_sparse",
    "make_dataset",
    "make_mixing",
    "make_settings",
    "make_sparse_student",
    "make_student",
    "make_teacher",
    "num_features",
    "segmentation_head",
)


def make_settings(config: Any, *, task: str, train: bool) -> SceneSettings:
    """`task`: "distill", "segment" or "features"."""
    data, model = config.data, config.model
    low, high = model.field_of_view
    fixed = train and config.task == "probe" and config.probe.features != "augmented"
    sparse = is_sparse(model)
    if sparse:
        _check_keys_fit(config)
    return SceneSettings(
        task=task,
        train=train,
        field_of_view=(tuple(low), tuple(high)),
        grids=() if task == "features" else grids_of(config),
        num_neighbors=0 if sparse else model.num_neighbors,
        student_voxel_size=model.minkunet.voxel_size if sparse and task != "features" else None,
        voxel_size=data.voxel_size,
        max_points=data.max_points,
        image_size=tuple(data.image_size),
        antialias=data.antialias,
        augmentation="none" if fixed else data.augmentation,
        fixed=fixed,
    )


def _check_keys_fit(config: Any) -> None:
    """Raises `InputError` when a pack has more places for voxels than 32-bit keys tell apart (`ops.sparse_conv`)."""
    data, size = config.data, config.model.minkunet.voxel_size
    low, high = (tuple(corner) for corner in config.model.field_of_view)
    if size <= 0:
        return  # refused with the student
    x, y, z = extent_of((low, high), size)
    if data.scenes_per_shard * (x + 2) * (y + 2) >= 2**31 or data.points_per_shard * (z + 2) >= 2**31:
        raise InputError(
            f"model.minkunet.voxel_size = {size} makes {x} x {y} x {z} voxels of model.field_of_view, and "
            f"data.scenes_per_shard = {data.scenes_per_shard} of these are too many for 32-bit keys; take larger "
            "voxels or a smaller field of view"
        )


def make_mixing(config: Any, dataset: Any, folder: Path) -> Mixing | None:
    """What is mixed into the training scans of a probe or fine-tuning; None when nothing is.

    `folder`: of the instance bank, which is written when it is missing. Raises `InputError`.
    """
    data = config.data
    if not data.polarmix and not data.cutmix:
        return None
    if config.task == "probe" and config.probe.features != "augmented":
        raise InputError(
            f"data.polarmix and data.cutmix change scans every epoch, and probe.features = {config.probe.features!r} "
            "keeps them; use 'augmented'"
        )
    if bool(data.cutmix) != bool(data.cutmix_ground):
        raise InputError(
            f"data.cutmix = {tuple(data.cutmix)} and data.cutmix_ground = {tuple(data.cutmix_ground)}: instances need "
            "both their classes and the classes that they stand on"
        )
    polar, instances, ground = (
        _class_numbers(key, data[key], dataset) for key in ("polarmix", "cutmix", "cutmix_ground")
    )
    bank = None
    if instances:
        if jax.process_index() == 0:
            write_bank(folder, dataset, instances)
        distributed.barrier(f"instances {folder}")
        bank = open_bank(folder, dataset, instances)
    return Mixing(polar, bank, ground)


def _class_numbers(key: str, names: Any, dataset: Any) -> tuple[int, ...]:
    known = tuple(dataset.class_names)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"data.{key}: {', '.join(map(str, unknown))} are none of the classes {', '.join(known)}")
    return tuple(known.index(name) for name in names)


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


def make_teacher(config: Any) -> tuple[Any, Any]:
    """(vit_config, params in the compute dtype) of `config.teacher`."""
    teacher = config.teacher
    if teacher.checkpoint == "demo":
        from scalr_jax.demo_teacher import load_demo_teacher

        vit_config, params = load_demo_teacher()
    elif Path(teacher.checkpoint).name == "demo_teacher.safetensors" and Path(teacher.checkpoint).is_file():
        from scalr_jax.demo_teacher import load_teacher

        vit_config, params = load_teacher(teacher.checkpoint)  # of a run with config.task = "teacher"
    elif teacher.checkpoint and Path(teacher.checkpoint).is_file():
        from scalr_jax.interop_vit import load_dinov2

        vit_config, params = load_dinov2(teacher.checkpoint, num_heads=teacher.num_heads)
    else:
        raise InputError(
            f"teacher.checkpoint = {teacher.checkpoint!r} is not a file; fetch dinov2_vitl14_pretrain.pth from the "
            "DINOv2 project's release page (docs/weights.md) and give its path, --config.teacher.checkpoint=PATH, or "
            "take the small packaged teacher, --config.teacher.checkpoint=demo"
        )
    if teacher.position_interpolation != "auto":
        if teacher.position_interpolation not in INTERPOLATIONS:
            raise InputError(
                f"teacher.position_interpolation = {teacher.position_interpolation!r} is none of auto, "
                f"{', '.join(INTERPOLATIONS)}"
            )
        vit_config = dataclasses.replace(vit_config, position_interpolation=teacher.position_interpolation)
    patch = vit_config.patch_size
    if any(size % patch for size in config.data.image_size):
        raise InputError(f"data.image_size = {tuple(config.data.image_size)} is not a multiple of the patch, {patch}")
    dtype = compute_dtype("auto")
    return vit_config, jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
