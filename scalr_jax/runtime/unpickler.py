"""Pickles read without trusting them: every name that a file may mention becomes a record, and nothing is called.

A pickle is a small program: a plain loader calls whatever the file names. Here each allowed name becomes a class that
only remembers its arguments and its state; any other name is refused. Loading therefore runs nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import IO, Any


class ForbiddenError(Exception):
    """The pickle names something that is not allowed; the message is that name."""


class MalformedError(Exception):
    """The file can be unpickled, but does not hold what it should."""


class Record:
    """Stands in for an object of the pickle: its kind, what it was called with, its items and its state."""

    kind = ""
    args: tuple[Any, ...]
    items: dict
    state: Any

    def __new__(cls, *args: object, **_: object) -> Record:
        record = super().__new__(cls)
        record.args, record.items, record.state = args, {}, None
        return record

    def __setitem__(self, key: object, value: object) -> None:  # SETITEMS of an OrderedDict
        self.items[key] = value

    def __setstate__(self, state: object) -> None:
        self.state = state


def stand_ins(kinds: Mapping[tuple[str, str], str]) -> dict[tuple[str, str], type[Record]]:
    """The class that stands in for each (module, name) that a pickle may mention, by the kind of its records.

    Classes, not functions: all that a pickle can do to one (BUILD) ends in `__setstate__`, so it cannot change them.
    """
    classes = {kind: type(f"_{kind.title()}", (Record,), {"kind": kind}) for kind in kinds.values()}
    return {name: classes[kind] for name, kind in kinds.items()}


class RecordingUnpickler(pickle.Unpickler):
    """Loads records: `allowed`, from `stand_ins`, has every name that the pickle may mention."""

    def __init__(self, file: IO[bytes], allowed: Mapping[tuple[str, str], type[Record]]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module_name: str, global_name: str, /) -> type[Record]:
        if (module_name, global_name) not in self._allowed:
            raise ForbiddenError(f"{module_name}.{global_name}")
        return self._allowed[module_name, global_name]


def is_record(value: object, kind: str) -> bool:
    return isinstance(value, Record) and value.kind == kind


def need(condition: bool, problem: str) -> None:
    """Raises MalformedError unless the condition holds."""
    if not condition:
        raise MalformedError(problem)
