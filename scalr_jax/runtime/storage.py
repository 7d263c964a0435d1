"""Files: written whole or not at all, read back, locked, compared by checksums."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
import socket
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from absl import logging

from scalr_jax.runtime.errors import InputError

PARTIAL = ".partial"  # ends the name of a file that is being written
LFS = b"version https://git-lfs.github.com/spec/"  # begins a pointer that Git LFS leaves in place of a file
MAX_DEPTH = 50  # of lists and objects in a JSON file
LFS_SENTENCE = "it is a Git LFS pointer, not the file itself; fetch that with git lfs pull"


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends well, and else is removed."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")  # no other process writes to it
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it was
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to; it becomes `path` when the block ends well, and else is removed. A killed process leaves the
    old file or the new one (and perhaps a hidden partial one, which the next `locked` removes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as partial, partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def json_text(values: object, indent: int | None = None) -> str:
    """A JSON text, with null for numbers that are not finite: JSON has no others, and Python would write NaN."""

    def plain(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(values), indent=indent, allow_nan=False)


def write_json(path: Path, values: object, indent: int | None = 2) -> None:
    """Writes a JSON file whole, with null for numbers that are not finite."""
    with written_whole(path) as file:
        file.write((json_text(values, indent) + "\n").encode())


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an uncompressed .npz whole."""
    with written_whole(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError, which ends with the `remedy`, when there is none."""
    try:
        content = json.loads(path.read_text())
        if _is_deeper(content, MAX_DEPTH):
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise InputError(f"{path}: not valid JSON ({reason(error, path)}); {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be one JSON object, in braces; {remedy}")
    return content


def _is_deeper(content: object, depth: int) -> bool:
    """Whether lists and objects are nested deeper than that, so that no recursion through them would end well."""
    level = [content]
    for _ in range(depth + 1):
        holders = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, list | dict))
        level = [value for part in holders for value in part]
    return bool(level)


def reason(error: BaseException, path: Path | None = None) -> str:
    """Why a file cannot be read, in a few words: the error's own, or that `path` is a pointer of Git LFS."""
    if path is not None and is_lfs_pointer(path):
        return LFS_SENTENCE
    if isinstance(error, OverflowError | MemoryError):
        return "it announces more than memory holds"
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves where the file itself was not fetched."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(LFS)) == LFS
    return False


def check_writable(path: Path, flag: str = "--output") -> None:
    """Raises InputError unless `path`, which `flag` gave, can be made, by the nearest existing folder."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{path} cannot be written: {there} is no folder, or a read-only one; give another {flag}")


@contextlib.contextmanager
def locked(path: Path, remedy: str) -> Iterator[None]:
    """Holds the lock file `path` of a folder, and removes what killed writers left there.

    The system frees the lock when its process ends, however it ends.

    Raises:
      InputError: another process holds it; ends with the `remedy`.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(f"{path.parent} is in use by a live run ({holder}); {remedy}") from None
        except OSError as error:  # a file system without locks
            logging.warning("%s cannot be locked (%s): make sure that no other run uses the folder", path, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        remove_partial(path.parent)
        yield


def remove_partial(folder: Path) -> None:
    """Removes what killed writers left in a folder; for the only process that writes there."""
    for partial in folder.glob(f".*{PARTIAL}"):
        if partial.is_file():
            partial.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path, but: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of each file in `folder`, by its path there; `but`: paths that are left out."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: checksum(path) for name, path in files.items() if name not in but}


def changes(folder: Path, expected: Mapping[str, Any]) -> str:
    """The first three files of `folder` that are not as their SHA-256 in `expected`, as "NAME is missing" or "NAME is
    damaged or was changed", and how many more; "" when all are. Other files may be there."""
    missing = [name for name in expected if not (folder / name).is_file()]
    changed = [name for name in expected if name not in missing and checksum(folder / name) != expected[name]]
    wrong = [f"{name} is missing" for name in missing] + [f"{name} is damaged or was changed" for name in changed]
    return ", ".join(wrong[:3]) + (f" (and {len(wrong) - 3} more files)" if len(wrong) > 3 else "")


def differences(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    where: str = "saved",
    here: str = "now",
) -> str:
    """The values by dotted name that differ, but for `free` ones: "seed: 0 saved, 1 now; ..."; "" when none do."""
    a, b = flatten(saved), flatten(now)
    names = sorted(name for name in {*a, *b} - {*free} if a.get(name) != b.get(name))
    return "; ".join(f"{name}: {a.get(name)} {where}, {b.get(name)} {here}" for name in names)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name."""
    flat = {}
    for key, value in nested.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
