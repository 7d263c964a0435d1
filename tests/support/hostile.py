"""Runs one row of a table of tests/hostile/: a command with something wrong, in this process, in a folder of its own.

The law: exit code 2, one line on stderr that names the file or key and what to do, nothing else there, and every file
as it was before.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from scalr_jax.train import loop
from tests.support.checks import mentions
from tests.support.paths import ROOT

PREFIX = "scalr_jax: error: "
LONGEST = 900  # characters of a sentence
PROGRESS = re.compile(
    r".*\d+%\|.*|.*\[\d\d:\d\d.*\]|\s*|warning: .*|bad scan, left out: .*"
)  # what else may be on stderr
KEPT = ("*lock", "*.lock", ".*.lock")  # lock files stay, for removing one would let two runs in


class Row(NamedTuple):
    """One thing that is wrong."""

    name: str
    arguments: tuple[str, ...]  # THINGS/ is the folder of `things`, CONFIGS/ that of the configs
    words: tuple[object, ...]  # what the sentence must have, in any order
    uses: tuple[str, ...] = ()  # things that are copied into the folder
    damage: Callable[[Path], object] | None = None  # of the folder, before the command runs
    leaves: tuple[str, ...] = ()  # patterns of files that may be new or changed


class Outcome(NamedTuple):
    code: object  # of the exit; None: the command ended well, "raised": a defect
    said: list[str]  # lines on stderr
    changed: list[str]  # files that are new, changed or gone
    warned: list[str]  # Python's warnings
    trace: str


def rows_of(*tables: list[Row], fast: int = 1) -> list[Any]:
    """The rows as parameters of `pytest.mark.parametrize("row", ...)`; one of `fast` is fast, the others are slow, for
    together they take long."""
    rows = [row for table in tables for row in table]
    marks = [() if number % fast == 0 else pytest.mark.slow for number in range(len(rows))]
    return [pytest.param(row, id=row.name, marks=mark) for row, mark in zip(rows, marks, strict=True)]


def content(folder: Path) -> dict[str, str]:
    """Digest of every file, and the folders, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        regular = path.is_file() and not path.is_symlink()
        found[name] = hashlib.md5(path.read_bytes()).hexdigest() if regular else "no file"
    return found


def call(command: str, arguments: list[str]) -> None:
    """A command as its process runs it."""
    if command == "main":
        from scalr_jax import main

        return main.main(main.parse(["main", *arguments]))
    module = importlib.import_module(f"scalr_jax.{command}.run")
    return module.main(arguments if command == "bench" else [command, *arguments])


def run(command: str, row: Row, things: Path, folder: Path, capfd: Any) -> Outcome:
    """Runs a row; `folder` is empty."""
    for name in row.uses:
        source = things / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    if row.damage:
        row.damage(folder)
    before, capture = content(folder), capfd.readouterr
    places = {"THINGS/": f"{things}/", "CONFIGS/": f"{ROOT / 'configs'}/"}
    arguments = [re.sub("THINGS/|CONFIGS/", lambda found: places[found[0]], text) for text in row.arguments]
    code, trace, kept = None, "", dict(os.environ)
    sys.modules.pop("config_config", None)  # which ml_collections would fill again
    capture()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)  # as Python does outside of tests
        patch.chdir(folder)
        patch.setattr(sys, "argv", [command, *arguments])  # where ml_collections finds --config.KEY
        patch.setattr(jax.distributed, "initialize", _no_cluster)
        make_program = loop.make_program
        patch.setattr(loop, "make_program", lambda *all: make_program(*all)._replace(fresh=_accepted))
        patch.setattr(loop, "prefetch", _accepted)
        patch.setattr(jax.distributed, "is_initialized", lambda: False)
        try:
            call(command, arguments)
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            code, trace = "raised", traceback.format_exc()
        finally:
            os.environ.clear()
            os.environ.update(kept)
    sys.stderr.flush()
    said = [line.strip() for line in capture().err.replace("\r", "\n").splitlines()]
    after = content(folder)
    changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    changed = [name for name in changed if not any(fnmatch(name, kept) for kept in (*KEPT, *row.leaves))]
    return Outcome(code, said, changed, [str(warning.message) for warning in warned], trace)


def _no_cluster(*_: object, **__: object) -> None:
    raise ValueError("coordinator_address should be defined.")  # JAX's own words, where it detects none


def _accepted(*_: object, **__: object) -> None:
    raise AssertionError("nothing was refused, and training would begin")


def check(row: Row, outcome: Outcome) -> None:
    """Asserts the law."""
    assert outcome.code == 2, outcome.trace or outcome
    sentences = [line for line in outcome.said if line.startswith(PREFIX)]
    others = [line for line in outcome.said if not line.startswith(PREFIX) and not PROGRESS.fullmatch(line)]
    assert len(sentences) == 1, outcome.said
    assert others == [], others
    assert outcome.warned == [], outcome.warned
    (sentence,) = sentences
    assert len(sentence) <= LONGEST, len(sentence)
    assert "Traceback" not in sentence, sentence
    assert re.search(mentions(*row.words), sentence), sentence
    assert outcome.changed == [], outcome.changed
