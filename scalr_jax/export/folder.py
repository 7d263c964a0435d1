"""Exported folders: written whole or not at all, and read back.

config.json   "settings" (what `scalr_jax.load` and `export.inputs` need), "files" (their SHA-256), "training",
              "results", "check", "licence"
README.md     the same for people: the model card
model.*       the weights or the program, by format (`FILES`)
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from scalr_jax.interop.exported import FILES, is_export
from scalr_jax.interop.published import published_state_dict, write_published
from scalr_jax.models.student import Student, Variables
from scalr_jax.runtime.checkpoint import save_weights
from scalr_jax.runtime.errors import InputError


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


def write_weights(folder: Path, form: str, student: Student, variables: Variables) -> None:
    """Writes the weights in one of the `READABLE` formats. The first two have PyTorch's names and layouts."""
    path = folder / FILES[form]
    if form == "torch":
        write_published(path, student, variables)
    elif form == "safetensors":
        path.write_bytes(safetensors.numpy.save(published_state_dict(student, variables)))
    else:
        _write_orbax(path, variables)


def _write_orbax(path: Path, variables: Variables) -> None:
    """`save_weights`; raises OSError. That there is space is tried first: when a disk is full while Orbax writes, its
    abandoned tasks print tracebacks of pages."""
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(variables))
    path.write_bytes(bytes(size + size // 8 + (1 << 16)))
    path.unlink()
    try:
        save_weights(path, variables)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise OSError(errno.EIO, str(error).splitlines()[0][:200]) from error


def save_example(path: Path, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
    """Inputs of a program and what the model makes of them ("output/NAME"), as a plain .npz."""
    arrays = {**inputs, **{f"output/{name}": rows for name, rows in outputs.items()}}
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
