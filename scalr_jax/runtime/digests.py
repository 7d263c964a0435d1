"""Digests of a folder's files, kept in it: written last, compared before the files are read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import changes, checksums, read_json, remove_partial, write_json

FILE = "digests.json"  # {path in the folder: SHA-256}


def is_sealed(folder: Path) -> bool:
    return (folder / FILE).is_file()


def seal(folder: Path, but: Collection[str] = ()) -> None:
    """Writes digests of every file but those that have one and `but` (paths in the folder)."""
    remove_partial(folder)
    known = read_json(folder / FILE, "remove it") if is_sealed(folder) else {}
    if new := checksums(folder, but={FILE, *known, *but}):
        write_json(folder / FILE, {**known, **new})


def damage(folder: Path) -> str:
    """A sentence about the files that differ from their digests, "" when none does."""
    try:
        return changes(folder, read_json(folder / FILE, "")) if is_sealed(folder) else f"{FILE} is missing"
    except InputError:
        return f"{FILE} is damaged"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
