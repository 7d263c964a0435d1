"""Exported folders: written whole or not at all, and read back.

config.json   "settings" (what `scalr_jax.load` and `export_inputs` need), "files" (their SHA-256), "training",
              "results", "check", "licence"
README.md     the same for people: the model card
model.*       the weights or the program, by format (`FILES`)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from scalr_jax import interop
from scalr_jax.checkpoint import load_weights, save_weights
from scalr_jax.data.scenes import InputError
from scalr_jax.torch_file import read_weights_file

VERSION = 1  # of the folder's layout
FILES = {
    "torch": "model.pth",
    "safetensors": "model.safetensors",
    "stablehlo": "model.stablehlo",
    "onnx": "model.onnx",
    "orbax": "checkpoint",
}
CARD = ("config.json", "README.md")
READABLE = ("torch", "safetensors", "orbax")  # by `scalr_jax.load`; the others are programs


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises InputError when `output` exists (with `overwrite`: as something else than an export) or lies in a file."""
    above = next((folder for folder in output.parents if folder.exists()), output.parent)
    if above.exists() and not above.is_dir():
        raise InputError(f"{output} cannot be written, for {above} is a file; give another --output")
    if output.exists() or output.is_symlink():
        if not overwrite:
            raise InputError(f"{output} exists; give another --output, or --overwrite to replace it")
        if not is_export(output):
            raise InputError(f"{output} exists and is no exported folder; --overwrite replaces only those")


@contextlib.contextmanager
def new_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `output`, which becomes `output` when the block ends well, and else is removed.

    Raises:
      InputError: as `check_output`, or `output` cannot be written.
    """
    check_output(output, overwrite=overwrite)
    partial = output.parent / f".{output.name}.partial"  # what a kill left behind is removed by the next export
    made = [folder for folder in (output.parent, *output.parent.parents) if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        partial.mkdir()
        yield partial
        if overwrite and output.exists():
            old = output.parent / f".{output.name}.old"
            _remove(old)
            output.rename(old)
            partial.rename(output)
            _remove(old)
        else:
            partial.rename(output)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(partial)
            for folder in made:
                folder.rmdir()
        if isinstance(error, OSError):
            raise InputError(
                f"{output} cannot be written ({error.strerror or error}); free space or give another --output, nothing "
                "was left there"
            ) from error
        raise


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def is_export(folder: Path) -> bool:
    """Whether `folder` is one that `scalr_jax.export` wrote."""
    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "export" in content


def write_weights(folder: Path, form: str, settings: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """Writes the weights in one of the `READABLE` formats. The first two have PyTorch's names and layouts."""
    path = folder / FILES[form]
    if form == "torch":
        interop.save_torch_checkpoint(path, settings, variables)
    elif form == "safetensors":
        path.write_bytes(safetensors.numpy.save(interop.published_state_dict(settings, variables)))
    else:
        _write_orbax(path, variables)


def _write_orbax(path: Path, variables: Mapping[str, Any]) -> None:
    """`save_weights`; raises OSError. That there is space is tried first: when a disk is full while Orbax writes, its
    abandoned tasks print tracebacks of pages."""
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(variables))
    path.write_bytes(bytes(size + size // 8 + (1 << 16)))
    path.unlink()
    try:
        save_weights(path, variables)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise OSError(errno.EIO, str(error).splitlines()[0][:200]) from error


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
        _check_settings(settings)
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
            interop.check_shapes(settings, variables, str(path))
        else:
            weights, _ = interop.published_weights(read_weights_file(path), str(path))
            container = "model_point" if head == "distill" else "net"
            found = interop.infer_model(weights, settings["activation"], str(path), container=container)
            variables = interop.convert_weights(weights, found, str(path))
            settings |= {name: found[name] for name in ("channels", "depth", "norm", "head", "head_hidden")}
            settings |= {name: found[name] for name in ("num_features", "out_features")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):  # which is a ValueError
            raise
        raise InputError(f"{folder / 'config.json'} is not that of an exported model ({error!r})") from None
    return settings, variables


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in `folder`, by its path there; the card apart, which may be edited."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in CARD:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _check_files(folder: Path, expected: Mapping[str, str]) -> None:
    """Raises InputError unless the files that were exported (none in folders from before "files") are there as then."""
    found = checksums(folder) if expected else {}
    missing = [name for name in expected if name not in found]
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    wrong = [f"{name} is missing" for name in missing] + [f"{name} is damaged or was changed" for name in changed]
    if wrong:
        more = f" (and {len(wrong) - 3} more files)" if len(wrong) > 3 else ""
        raise InputError(f"{folder}: {', '.join(wrong[:3])}{more}; copy the folder again, or export it again")


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raises KeyError or ValueError for what `Model` would stumble over later."""
    for key in ("intensity", "field_of_view", "grids", "drop_path", "dtype", "implementation"):
        settings[key]
    voxel_size, neighbors = settings["voxel_size"], settings["num_neighbors"]
    if not (isinstance(voxel_size, int | float) and 0 < voxel_size < float("inf")):
        raise ValueError(f"voxel_size is {voxel_size!r}")
    if not (isinstance(neighbors, int) and neighbors > 0):
        raise ValueError(f"num_neighbors is {neighbors!r}")
    names = settings.get("class_names") or ()
    if names and not (isinstance(names, list) and len(names) == settings["out_features"]):
        raise ValueError(f"class_names are {names!r} for {settings['out_features']} classes")


def save_example(path: Path, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
    """Inputs of a program and what the model makes of them ("output/NAME"), as a plain .npz."""
    arrays: Any = {**inputs, **{f"output/{name}": rows for name, rows in outputs.items()}}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
