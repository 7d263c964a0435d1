"""Files: written whole or not at all, read back, compared by checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from scalr_jax.runtime.errors import InputError

PARTIAL = ".partial"  # ends the name of a file that is being written


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted name, of nested ConfigDicts or dicts."""
    flat = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": value})
    return flat


def write_json(path: Path, values: Any) -> None:
    """Write atomically: a killed process leaves the old file or the new one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into; it takes its name when the block ends well, and else leaves nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it was
        raise
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises InputError unless `path` can be made, judged by the nearest folder that is there. Makes nothing."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{path} cannot be written: {there} is no folder, or a read-only one; give another --output")


def write_atomically(path: Path, content: Any) -> None:
    """Writes JSON so that `path` is either absent, as it was, or whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
