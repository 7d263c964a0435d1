"""Published files of every backbone, by one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from scalr_jax.interop import minkunet, waffleiron
from scalr_jax.interop.model import Published
from scalr_jax.interop.torch_file import read_weights_file


class Format(NamedTuple):
    recognises: Callable[[Mapping], bool]  # a file's content
    read: Callable[[Mapping, str], Published]  # content and the file's name; raises `InputError`


FORMATS = (  # the first that recognises a file reads it
    Format(minkunet.recognises, minkunet.read),
    Format(lambda content: True, waffleiron.read),  # and says what the file lacks to be one
)


def read_published(path: str | Path) -> Published:
    """The student in a published file, `.pth`, `.pt` or `.safetensors`. Raises `InputError`."""
    return read_content(read_weights_file(path), str(path))


def read_content(content: Mapping, name: str) -> Published:
    """`read_published` of a file's content."""
    return next(form for form in FORMATS if form.recognises(content)).read(content, name)
