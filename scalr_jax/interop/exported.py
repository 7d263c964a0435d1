"""Exported folders, read back: their settings, their files and their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from scalr_jax.interop.finite import check_weights
from scalr_jax.interop.model import check_shapes, student_of
from scalr_jax.interop.published import read_content
from scalr_jax.interop.torch_file import read_weights_file
from scalr_jax.models.heads import SEGMENTATION_HEADS
from scalr_jax.runtime.checkpoint import load_weights
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import changes, read_json
from scalr_jax.settings import student_settings

VERSION = 1  # of the folder's layout
HEADS = ("distill", *SEGMENTATION_HEADS)
FILES = {
    "torch": "model.pth",
    "safetensors": "model.safetensors",
    "stablehlo": "model.stablehlo",
    "onnx": "model.onnx",
    "orbax": "checkpoint",
}
READABLE = ("torch", "safetensors", "orbax")  # by `scalr_jax.load`; the others are programs


def is_export(folder: Path) -> bool:
    """Whether `folder` is one that `scalr_jax.export` wrote."""
    try:
        return "export" in read_json(folder / "config.json", "")
    except InputError:
        return False


def read_export(folder: Path) -> tuple[dict, dict]:
    """(settings, variables) of an exported folder of a `READABLE` format.

    Raises:
      InputError: a program, a version this package does not know, or files that are missing, not those that were
        exported, damaged, or do not fit each other.
    """
    try:
        content = json.loads((folder / "config.json").read_text())
        version, settings = content["export"], dict(content["settings"])
        form, head = settings["format"], settings["head"]
        for key in ("intensity", "field_of_view", "grids", "drop_path", "dtype", "implementation"):
            settings[key]
        check_settings(settings)
        student_settings(settings)
        if version != VERSION:
            raise InputError(
                f"{folder} is an export of layout {version}, and this version of scalr_jax reads {VERSION}"
            )
        if form in FILES and form not in READABLE:
            raise InputError(
                f"{folder} is a program ({form}), which {folder / 'README.md'} says how to run; scalr_jax.load reads "
                f"exports of format {', '.join(READABLE)}"
            )
        path = folder / FILES[form]
        _check_files(folder, dict(content.get("files", {})))  # before Orbax, whose tasks print pages of what is damaged
        if form == "orbax":
            variables = load_weights(path)
            check_shapes(student_of(settings), settings["num_features"], variables, str(path))
            check_weights(variables, str(path))
        else:
            container, content = "model_point" if head == "distill" else "net", read_weights_file(path)
            found = read_content({container: content.get(container, content)}, str(path))
            variables = found.variables
            said = ("channels", "depth", "norm", "head", "head_hidden", "num_features", "out_features")
            settings |= {name: found.model[name] for name in said if name in found.model}
            if "vavit" in found.model:
                settings |= {"name": found.model["name"], "vavit": {**settings["vavit"], **found.model["vavit"]}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):  # which is a ValueError
            text = str(error)
            raise InputError(text if str(folder) in text else f"{folder / 'config.json'}: {text}") from None
        raise InputError(f"{folder / 'config.json'} is not that of an exported model ({error!r})") from None
    return settings, variables


def _check_files(folder: Path, expected: Mapping[str, str]) -> None:
    """Raises InputError unless the exported files are unchanged (folders from before "files" are not checked)."""
    if wrong := changes(folder, expected):
        raise InputError(f"{folder}: {wrong}; copy the folder again, or export it again")


def check_settings(settings: Mapping) -> None:
    """Raises KeyError or ValueError for settings that `Model` could not use."""
    if settings["head"] not in HEADS:
        raise ValueError(f"head is {settings['head']!r}, and none of {', '.join(HEADS)}")
    for key in ("out_features", "num_features"):
        if type(settings[key]) is not int or settings[key] < 1:
            raise ValueError(f"{key} is {settings[key]!r}")
    voxel_size, neighbors = settings["voxel_size"], settings["num_neighbors"]
    if not (isinstance(voxel_size, int | float) and 0 < voxel_size < float("inf")):
        raise ValueError(f"voxel_size is {voxel_size!r}")
    if not (isinstance(neighbors, int) and neighbors > 0):
        raise ValueError(f"num_neighbors is {neighbors!r}")
    names = settings.get("class_names") or ()
    if names and not (
        isinstance(names, list)
        and len(names) == settings["out_features"]
        and all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"class_names are {names!r} for {settings['out_features']} classes")
