"""Ways to damage a file, as functions of the folder that holds it: what a disk, a copy, an editor or a user does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path], object]

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"

# What takes the place of a JSON file that must hold one object.
JSON: dict[str, bytes] = {
    "empty": b"",
    "a brace": b"{",
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "text": b'"text"',
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "zeros": b"\0" * 100,
    "deep": b"[" * 100_000,
    "a deep object": b'{"a":' * 60 + b"1" + b"}" * 60,
    "other keys": b'{"key": 1}',
    "a pointer of Git LFS": LFS,
}


def written(name: str, data: bytes | str) -> Damage:
    """Other bytes in place of a file."""
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def gone(name: str) -> Damage:
    def remove(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def folder_there(name: str) -> Damage:
    """A folder in place of a file."""

    def replace(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return replace


def cut(name: str, share: float = 0.5) -> Damage:
    def shorten(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return shorten


def flipped(pattern: str, share: float = 0.5) -> Damage:
    """One bit in the middle, or at another share, of the largest file that matches."""

    def flip(folder: Path) -> None:
        path = max(folder.glob(pattern), key=lambda path: path.stat().st_size)
        data = bytearray(path.read_bytes())
        data[int(len(data) * share)] ^= 1
        path.write_bytes(data)

    return flip


def keys(file: str, /, **changes: Any) -> Damage:
    """Other values of a JSON file's keys, of nested ones as section__key; `...`: without the key."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for path, value in changes.items():
            *sections, last = path.split("__")
            part = content
            for section in sections:
                part = part[section]
            if value is ...:
                del part[last]
            else:
                part[last] = value
        (folder / file).write_text(json.dumps(content))

    return change


def every_way(name: str) -> dict[str, Damage]:
    """Each thing that may have happened to a JSON file, by what it is called."""
    damages = {text: written(name, data) for text, data in JSON.items()}
    return {"gone": gone(name), "a folder": folder_there(name), "cut": cut(name), **damages}
