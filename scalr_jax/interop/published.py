"""Published files of every backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scalr_jax.interop import minkunet, waffleiron
from scalr_jax.interop.model import Published
from scalr_jax.interop.torch_file import read_weights_file


def read_published(path: str | Path) -> Published:
    """The student in a published file, `.pth`, `.pt` or `.safetensors`. Raises `InputError`."""
    return read_content(read_weights_file(path), str(path))


def read_content(content: Mapping, name: str) -> Published:
    """`read_published` of a file's content. One of neither backbone is told what it lacks to be a WaffleIron."""
    return (minkunet if minkunet.recognises(content) else waffleiron).read(content, name)
