"""A table of settings: frozen dataclasses whose fields are made with `key`, one field a config key.

From the same fields come the defaults, the checks, the help text and the documentation. A value is converted to the
type of its field (lists become tuples, whole numbers become floats where a float is expected) and compared with what
the key allows; every problem is collected before anything is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

Table = TypeVar("Table")

LONGEST = 120  # characters of a value in a sentence
MOST = 8  # problems in a sentence
NAMES = {int: "whole number", float: "number", str: "text", bool: "True or False", dict: "section"}


class Allowed(NamedTuple):
    """Values that a key takes, beside its type. Bounds and choices hold for every number and text inside a tuple."""

    low: float | None = None
    high: float | None = None
    above: float | None = None  # exclusive
    below: float | None = None  # exclusive
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.low is not None and self.high is not None:
            return f"{_number(self.low)} to {_number(self.high)}"
        limits = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {_number(limit)}" for word, limit in limits.items() if limit is not None)

    def holds(self, value: object) -> bool:
        """Whether every number and text in `value` is allowed."""
        if isinstance(value, tuple):
            return all(map(self.holds, value))
        if isinstance(value, str):
            return not self.choices or value in self.choices
        if value is None or isinstance(value, bool) or not isinstance(value, int | float):
            return True
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def key(
    default: Any,
    meaning: str,
    *,
    choices: Sequence[str] = (),
    resume: bool = False,
    local: bool = False,
    **bounds: float,
) -> Any:
    """A field of a table: its default, one line of meaning, and the `choices` or `bounds` of `Allowed`.

    `resume`: a run may be resumed with another value; `local`: the processes of one run may have different ones.
    """
    allowed = Allowed(choices=tuple(choices), **bounds)
    about = {"meaning": meaning, "allowed": allowed, "resume": resume, "local": local}
    return dataclasses.field(default=default, metadata=about)


class Row(NamedTuple):
    """One key of a table, as the documentation shows it."""

    name: str  # dotted
    takes: str  # type and bounds, in words
    default: object
    meaning: str
    resume: bool
    local: bool


def defaults(table: type) -> dict[str, Any]:
    """The default of each key, nested as the tables are; None as ml_collections' placeholder of a whole number."""
    from ml_collections import config_dict

    hints, nested = typing.get_type_hints(table), {}
    for field in dataclasses.fields(table):
        if dataclasses.is_dataclass(hints[field.name]):
            nested[field.name] = defaults(hints[field.name])
        else:
            nested[field.name] = config_dict.placeholder(int) if field.default is None else field.default
    return nested


def rows(table: type, prefix: str = "") -> Iterator[Row]:
    """Every key of a table and of the tables inside it."""
    hints = typing.get_type_hints(table)
    for field in dataclasses.fields(table):
        hint, about = hints[field.name], field.metadata
        if dataclasses.is_dataclass(hint):
            yield from rows(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            takes, more = _takes(hint, about["allowed"]), (about["meaning"], about["resume"], about["local"])
            yield Row(f"{prefix}{field.name}", takes, field.default, *more)


def read(table: type[Table], values: object, problems: list[str], prefix: str = "") -> Table:
    """The table filled from nested `values`. Appends a text to `problems` for each key that is missing, unknown or
    wrong, and uses the default in its place."""
    if not isinstance(values, Mapping):
        given = "is missing" if values is None else f"= {_shown(values)}"
        problems.append(f"{prefix.rstrip('.')} {given} (expected: a section of keys)")
        return table()
    hints = typing.get_type_hints(table)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, table))}
    problems += [f"{prefix}{name} is not a key" for name in values if name not in fields]
    found = {}
    for name, field in fields.items():
        hint, full = hints[name], f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            found[name] = read(typing.cast(type, hint), values.get(name), problems, f"{full}.")
            continue
        found[name] = field.default
        if name not in values:
            problems.append(f"{full} is missing")
            continue
        allowed: Allowed = field.metadata["allowed"]
        with contextlib.suppress(TypeError):
            if allowed.holds(value := convert(values[name], hint)):
                found[name] = value
                continue
        problems.append(f"{full} = {_shown(values[name])} (expected: {_takes(hint, allowed)})")
    return table(**found)


def _shown(value: object) -> str:
    """A value as it is written, the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def listed(problems: Sequence[str], most: int = MOST) -> str:
    """Problems in one line, the first ones of many."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def _takes(hint: Any, allowed: Allowed) -> str:
    kind = describe(hint)
    if allowed.choices:
        return kind.replace("text", str(allowed)) if hint is not str else str(allowed)
    return f"{kind}, {allowed}" if str(allowed) else kind


HEAD = """\
# Config keys

Set a key with `--config.data.num_workers=4`, or in a config file that starts from `scalr_jax.config.get_config()`. One
with a star may differ when a run is resumed. Written by `python -m scalr_jax.config > docs/config.md`."""


def markdown(sections: Mapping[str, type]) -> str:
    """docs/config.md: a table of keys for each section."""
    text = [HEAD]
    for name, table in sections.items():
        title = f"config.{name}" if name else "config"
        text.append(f"\n## {title}\n\n| key | default | takes | meaning |\n| --- | --- | --- | --- |")
        for row in rows(table, f"{name}." if name else ""):
            star = " *" if row.resume else ""
            text.append(f"| `{row.name}`{star} | `{row.default!r}` | {row.takes} | {row.meaning} |")
    return "\n".join(text) + "\n"


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`. Raises TypeError when it is not one: a bool is no number, numbers are finite."""
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if hint is dict and isinstance(value, Mapping):
        return dict(value)
    if isinstance(hint, types.UnionType):
        for member in typing.get_args(hint):
            if value is None and member is types.NoneType:
                return None
            try:
                return convert(value, member)
            except TypeError:
                continue
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        members = typing.get_args(hint)
        if members[-1] is Ellipsis:
            return tuple(convert(item, members[0]) for item in value)
        if len(value) == len(members):
            return tuple(convert(item, member) for item, member in zip(value, members, strict=True))
    raise TypeError(f"{value!r} is not {describe(hint)}")


def describe(hint: Any) -> str:
    """A type in words: "whole number", "tuple of text", "3 x (2 x whole number)"."""
    if hint in NAMES or hint is types.NoneType:
        return NAMES.get(hint, "None")
    if isinstance(hint, types.UnionType):
        return " or ".join(map(describe, typing.get_args(hint)))
    if typing.is_typeddict(hint) or typing.get_origin(hint) in (dict, list):
        return "list" if typing.get_origin(hint) is list else "object"
    members = typing.get_args(hint)
    if members[-1] is Ellipsis:
        return f"tuple of {describe(members[0])}"
    inner = describe(members[0])
    return f"{len(members)} x {f'({inner})' if ' x ' in inner else inner}"


def problems(content: object, hint: Any, where: str = "") -> Iterator[str]:
    """Problems of a whole JSON file's content: a text for each value that is not of type `hint`, each key
    that is missing, and each that is unknown.

    hint: a `TypedDict`, `dict[str, X]`, `list[X]`, a union, `Any`, or a type that `convert` knows.
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
        yield f"{where} = {repr(content)[:80]} (expected: {describe(hint)})"


def _fits(content: object, hint: Any) -> bool:
    if hint is Any or hint is types.NoneType:
        return hint is Any or content is None
    if isinstance(hint, types.UnionType):
        return any(not any(problems(content, member)) for member in typing.get_args(hint))
    try:
        convert(content, hint)
    except TypeError:
        return False
    return True
