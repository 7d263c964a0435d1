"""The frozen teacher: from `config.teacher` or a file to a ViT and its parameters."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import save_file

from scalr_jax.models import vit
from scalr_jax.models.build import compute_dtype
from scalr_jax.ops.positions import INTERPOLATIONS
from scalr_jax.runtime import sharding
from scalr_jax.runtime.errors import InputError


def make_teacher(config: Any) -> tuple[Any, Any]:
    """(vit_config, params in the compute dtype) of `config.teacher`."""
    teacher = config.teacher
    if teacher.checkpoint == "demo":
        vit_config, params = load_demo_teacher()
    elif Path(teacher.checkpoint).name == "demo_teacher.safetensors" and Path(teacher.checkpoint).is_file():
        vit_config, params = load_teacher(teacher.checkpoint)  # of a run with config.task = "teacher"
    elif teacher.checkpoint and Path(teacher.checkpoint).is_file():
        from scalr_jax.interop.vit import load_dinov2

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
    dtype = compute_dtype("auto", sharding.platform())
    return vit_config, jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


ASSET = "demo_teacher.safetensors"


def load_demo_teacher() -> tuple[vit.ViTConfig, dict]:
    """The packaged ViT and its parameters, float32 NumPy arrays."""
    with resources.as_file(resources.files("scalr_jax") / "assets" / ASSET) as path:
        return load_teacher(path)


def load_teacher(path: str | Path) -> tuple[vit.ViTConfig, dict]:
    """What `save_teacher` wrote: the ViT's config and its parameters, float32 NumPy arrays."""
    with safe_open(str(path), framework="numpy") as file:
        fields = json.loads(file.metadata()["vit_config"])
        flat = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    for name, value in fields.items():
        fields[name] = tuple(value) if isinstance(value, list) else value
    return vit.ViTConfig(**fields), traverse_util.unflatten_dict(flat, sep="/")


def save_teacher(path: str | Path, vit_config: vit.ViTConfig, params: Any) -> None:
    """Writes parameters as float16 safetensors, with the config as JSON in the file's metadata."""
    flat = {name: np.asarray(x, np.float16) for name, x in traverse_util.flatten_dict(params, sep="/").items()}
    temporary = Path(path).with_suffix(".tmp")  # a killed process leaves no half file
    save_file(flat, str(temporary), {"vit_config": json.dumps(dataclasses.asdict(vit_config))})
    temporary.replace(path)
