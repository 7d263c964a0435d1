"""Checks the content of a JSON file against a type, as a whole: `TypedDict`, `dict[str, X]`, `list[X]`, tuples, unions,
numbers, text. As in `runtime.keys` a bool is no number, a whole number is a number, and numbers are finite."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from scalr_jax.runtime import keys


def problems(content: object, hint: Any, where: str = "") -> Iterator[str]:
    """A text for each value that is not of type `hint`, each key that is missing, and each that is unknown.

    where: what the content is called, "splits.train"; "" for the whole file.
    """
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if typing.is_typeddict(hint) and isinstance(content, dict):
        hints = typing.get_type_hints(hint)
        for key in sorted({*hints, *content}):
            name = f"{where}.{key}" if where else key
            if key not in content:
                yield f"{name} is missing"
            elif key not in hints:
                yield f"{name} is not a key"
            else:
                yield from problems(content[key], hints[key], name)
    elif origin is dict and isinstance(content, dict):
        for key, value in content.items():
            yield from problems(value, members[1], f"{where}.{key}")
    elif origin is list and isinstance(content, list):
        for k, value in enumerate(content):
            if type(value) is not members[0]:  # most lists are thousands of names
                yield from problems(value, members[0], f"{where}[{k}]")
    elif not _fits(content, hint):
        yield f"{where} = {repr(content)[:80]} (expected: {_describe(hint)})"


def _fits(content: object, hint: Any) -> bool:
    if hint is Any or hint is types.NoneType:
        return hint is Any or content is None
    if isinstance(hint, types.UnionType):
        return any(not any(problems(content, member)) for member in typing.get_args(hint))
    if _is_container(hint):
        return False
    try:
        keys.convert(content, hint)
    except TypeError:
        return False
    return True


def _is_container(hint: Any) -> bool:
    return typing.is_typeddict(hint) or typing.get_origin(hint) in (dict, list)


def _describe(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_describe, typing.get_args(hint)))
    if _is_container(hint):
        return "list" if typing.get_origin(hint) is list else "object"
    return "None" if hint is types.NoneType else keys.describe(hint)
