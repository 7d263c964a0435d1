"""Published files of every backbone, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scalr_jax.config import get_config
from scalr_jax.interop import minkunet, vavit, waffleiron
from scalr_jax.interop.model import Published, student_of, unwrapped
from scalr_jax.interop.names import state_dict
from scalr_jax.interop.torch_file import read_weights_file, write_torch_file
from scalr_jax.models.student import Student, Variables
from scalr_jax.models.vavit import VaViTBackbone

if TYPE_CHECKING:  # a bare machine has no ml_collections, and no config files to read
    from ml_collections import ConfigDict

# By the updates of ScaLR's 25 and ScaLR+'s 65 epochs, 55,100 frames each in batches of 8: with eight GPUs the last
# batch is filled up, with one, two or four it is left out.
GPUS = {epochs * batches: gpus for epochs in (25, 65) for batches, gpus in ((6_888, "8"), (6_887, "fewer than 8"))}


def read_published(path: str | Path) -> Published:
    """The student in a published file, `.pth`, `.pt` or `.safetensors`. Raises `InputError`."""
    return read_content(read_weights_file(path), str(path))


def read_content(content: Mapping, name: str) -> Published:
    """`read_published` of a file's content. For an unknown backbone the error says what a WaffleIron would need."""
    content = unwrapped(content, name)
    module = next((module for module in (minkunet, vavit) if module.recognises(content)), waffleiron)
    found = module.read(content, name)
    return found._replace(training=read_training(content))


def read_training(content: Mapping) -> dict[str, int | str]:
    """Facts about a training from a file's scheduler: `updates`, and of a published pretraining `gpus`; or {}."""
    try:
        schedule = content["scheduler"]["lr_lambdas"][0]
        updates = schedule.get("max_iter", schedule.get("max_it"))  # ScaLR's name and ScaLR+'s
    except (KeyError, IndexError, TypeError, AttributeError):
        return {}
    if type(updates) is not int:
        return {}
    return {"updates": updates} | ({"gpus": GPUS[updates]} if updates in GPUS else {})


def load_torch_checkpoint(path: str | Path, *, activation: str | None = None) -> tuple[ConfigDict, dict]:
    """A published student, `.pth` or `.safetensors`: (model config, {"params", "batch_stats"} of NumPy arrays).

    The model config is `config.model` with `num_features`, `head` and `out_features` added. The file does not say
    intensity statistics, field of view and grids, which keep their defaults; `scalr_jax.load` asks for those.

    Raises:
      InputError: not a readable checkpoint, another model, weights that are missing, extra or of another shape (all
        are listed), or a file that does not say its activation and `activation` ("relu" or "gelu") is not given.
    """
    found = read_published(path)
    model = get_config().model.unlock()
    model.update(found.model_with(activation, str(path)))
    return model, found.variables


def published_state_dict(student: Student, variables: Variables) -> dict[str, np.ndarray]:
    """Our variables under PyTorch's names and shapes, complete for a strict `load_state_dict`."""
    if isinstance(student.backbone, VaViTBackbone):
        return vavit.published_state_dict(student, variables)
    return state_dict(waffleiron.weight_table(student), variables)


def save_torch_checkpoint(path: str | Path, model: Mapping, variables: Variables) -> None:
    """Writes a model, with its config as `load_torch_checkpoint` gives it, in the published layout."""
    write_published(path, student_of(model), variables)


def write_published(path: str | Path, student: Student, variables: Variables) -> None:
    """Writes the published layout: under `model_point` for distilled models, `net` for others, names with `module.`."""
    state = {f"module.{key}": value for key, value in published_state_dict(student, variables).items()}
    write_torch_file(path, {"model_point" if student.head == "distill" else "net": state})
