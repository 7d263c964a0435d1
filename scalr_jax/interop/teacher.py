"""The frozen teacher: from `config.teacher` or a file to a ViT and its parameters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from scalr_jax.config import DataSettings, TeacherSettings
from scalr_jax.data.tokens.store import TokenStore
from scalr_jax.interop.finite import check_weights
from scalr_jax.interop.model import flat_shapes
from scalr_jax.interop.safetensors_file import read_safetensors
from scalr_jax.interop.vit import load_dinov2
from scalr_jax.models import vit
from scalr_jax.models.build import compute_dtype
from scalr_jax.runtime import hub
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import checksum, read_json, written_whole

ASSET = "demo_teacher.safetensors"
AGAIN = "copy the workdir again"


def make_teacher(settings: TeacherSettings, image_size: tuple[int, int], platform: str) -> tuple[vit.ViTConfig, dict]:
    """The ViT of `config.teacher`: its architecture, and its parameters in the compute dtype.

    Raises `InputError` for a file that is missing or no ViT, or an `image_size` that is no whole number of patches.
    """
    checkpoint = _local(settings.checkpoint)
    if settings.checkpoint == "demo":
        vit_config, params = load_demo_teacher()
    elif checkpoint.name == ASSET and checkpoint.is_file():
        vit_config, params = load_teacher(checkpoint)  # of a run with config.task = "teacher"
    elif settings.checkpoint and checkpoint.is_file():
        vit_config, params = load_dinov2(checkpoint, num_heads=settings.num_heads)
    else:
        raise InputError(
            f"teacher.checkpoint = {settings.checkpoint!r} is not a file; fetch dinov2_vitl14_pretrain.pth from the "
            "DINOv2 project's release page (docs/weights.md) and give its path, --config.teacher.checkpoint=PATH, or "
            "take the small packaged teacher, --config.teacher.checkpoint=demo"
        )
    if settings.num_heads not in (None, heads := vit_config.num_heads):
        raise InputError(f"teacher.num_heads = {settings.num_heads}, and {checkpoint} has {heads}; leave it out")
    if settings.position_interpolation != "auto":
        vit_config = dataclasses.replace(vit_config, position_interpolation=settings.position_interpolation)
    patch = vit_config.patch_size
    if any(size % patch for size in image_size):
        raise InputError(f"data.image_size = {image_size} is not a multiple of the patch, {patch}")
    dtype = compute_dtype("auto", platform)
    return vit_config, jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def _local(checkpoint: str) -> Path:
    """The file of `teacher.checkpoint`, from the hub where it says so. Raises `InputError`."""
    return hub.weights_file(checkpoint) if hub.is_address(checkpoint) else Path(checkpoint)


def teacher_digest(settings: TeacherSettings) -> str:
    """SHA-256 of the teacher's file. Raises `InputError` when it is missing."""
    if settings.checkpoint == "demo":
        with resources.as_file(resources.files("scalr_jax") / "assets" / ASSET) as path:
            return checksum(path)
    try:
        return checksum(_local(settings.checkpoint))
    except OSError as error:
        sentence = f"teacher.checkpoint = {settings.checkpoint!r} cannot be read ({error.strerror}); give a DINO file"
        raise InputError(sentence) from error


def names_of(teachers: Sequence[TeacherSettings]) -> list[str]:
    """Names of several teachers in logs: the file's or the cache's, numbered where two have the same."""
    names = [Path(teacher.cache or teacher.checkpoint).stem for teacher in teachers]
    return [name if names.count(name) == 1 else f"{name}_{k + 1}" for k, name in enumerate(names)]


def taught_by(path: Path, teacher: TeacherSettings) -> int:
    """Which of the teachers of the distillation whose config.json is `path` is `teacher`; files are compared by their
    name. Raises `InputError` with what differs where none is."""
    content, here = read_json(path, AGAIN), dataclasses.asdict(teacher)
    given, wrong = content.get("teachers") or [content.get("teacher")], []
    for k, there in enumerate(given):
        if not (isinstance(there, dict) and isinstance(there.get("checkpoint"), str)):
            raise InputError(f"{path}: teacher is not that of a run; {AGAIN}")
        there = {"normalize": "none", **(content.get("teacher") or {}), **there}  # written before there were several
        there["checkpoint"], here["checkpoint"] = Path(there["checkpoint"]).name, Path(here["checkpoint"]).name
        alone = not there["checkpoint"] and len(given) == 1  # and it had a cache: its file is not known
        keys = ("checkpoint", "feature", "normalize", "position_interpolation")[alone:]
        other = [f"{key} is {there.get(key)} there, {here[key]} here" for key in keys if there.get(key) != here[key]]
        if not other:
            return k
        wrong += other
    raise InputError(
        f"{path.parent} was distilled from another teacher than config.teacher ({'; '.join(wrong)}); give the one "
        "it was distilled from"
    )


def open_tokens(teacher: TeacherSettings, data: DataSettings) -> TokenStore | None:
    """The cache of the teacher's tokens, where the config names one. Raises `InputError` when it is none, or one of
    another teacher or image size."""
    if not teacher.cache:
        return None
    store = TokenStore(teacher.cache)
    expected = {"image_size": data.image_size, "antialias": data.antialias, "feature": teacher.feature}
    expected |= {"position_interpolation": teacher.position_interpolation}
    if teacher.checkpoint and any("sha256" in header["teacher"] for header in store.headers.values()):
        expected["sha256"] = teacher_digest(teacher)
    store.check(expected)
    return store


def load_demo_teacher() -> tuple[vit.ViTConfig, dict]:
    """The packaged ViT and its parameters, float32 NumPy arrays."""
    with resources.as_file(resources.files("scalr_jax") / "assets" / ASSET) as path:
        return load_teacher(path)


def load_teacher(path: str | Path) -> tuple[vit.ViTConfig, dict]:
    """Loads what `save_teacher` wrote: a ViT's config and parameters, float32 NumPy arrays. Raises `InputError`."""
    flat, metadata = read_safetensors(Path(path))
    check_weights(flat, str(path))
    try:
        fields = json.loads(metadata["vit_config"])
        for name, value in fields.items():
            fields[name] = tuple(value) if isinstance(value, list) else value
        config = vit.ViTConfig(**fields)
        patch = (config.patch_size, config.patch_size)
        expected = flat_shapes(jax.eval_shape(lambda: vit.init(config, jax.random.key(0), patch)))
    except Exception as error:  # what a config of another kind raises cannot be listed
        raise InputError(f"{path} is no teacher of a run of config.task = teacher ({error!r}); give another") from None
    found = flat_shapes(flat)
    if wrong := sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name)):
        raise InputError(f"{path} does not fit its vit_config in {', '.join(wrong[:3])}; copy it again")
    return config, traverse_util.unflatten_dict({name: x.astype(np.float32) for name, x in flat.items()}, sep="/")


def save_teacher(path: str | Path, vit_config: vit.ViTConfig, params: Any) -> None:
    """Writes parameters as float16 safetensors, the config as JSON in the metadata. Raises `InputError` for NaN."""
    flat = {name: np.asarray(x, np.float16) for name, x in traverse_util.flatten_dict(params, sep="/").items()}
    check_weights(flat, str(path))
    with written_whole(Path(path)) as file:
        file.write(safetensors.numpy.save(flat, {"vit_config": json.dumps(dataclasses.asdict(vit_config))}))
