"""A --config file, which is a program: whatever it raises or returns becomes one sentence that names it."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from scalr_jax.runtime.errors import InputError, one_sentence

REMEDY = "correct it, or give another file, as in --config=configs/demo.py"


def named_config(arguments: Sequence[str]) -> str | None:
    """The file that --config names, without the argument after a colon; None where the flag was not given."""
    for i, text in reversed(list(enumerate(arguments))):
        name, given, value = text.partition("=")
        if name in ("--config", "-config"):
            return (value if given else " ".join(arguments[i + 1 : i + 2])).split(":", 1)[0]
    return None


def check_config(path: str, made: Any) -> None:
    """Raises InputError unless `made`, which a config file returned, is a ConfigDict; and what its references raise."""
    if not callable(getattr(made, "copy_and_resolve_references", None)):
        raise InputError(
            f"{path}: get_config() returned {type(made).__name__}, and a ConfigDict was expected; start from "
            "scalr_jax.config.get_config(), and return what it gives"
        )
    made.copy_and_resolve_references()


def config_sentence(error: BaseException, path: str | None) -> str:
    """The sentence of an error of parsing flags, among them the config file `path`."""
    if isinstance(error, InputError):
        return one_sentence(error)
    if path == "" or (path is not None and not Path(path).exists() and not Path(path).is_symlink()):
        return f"--config={path} is not there; give a config file, as in --config=configs/demo.py"
    raised = None if path is None else _raised_by(error, path)
    if isinstance(raised, InputError):
        return one_sentence(raised)
    if raised is None and (isinstance(error, flags.Error) and "Traceback (most recent call last)" not in str(error)):
        return one_sentence(error)
    found = raised or error
    try:
        text = one_sentence(found)[:300]
    except Exception:  # of an odd exception's own __str__
        text = ""
    kind = "" if isinstance(found, flags.Error) else f" raises {type(found).__name__}"  # ml_collections' own words
    return f"{path}{kind}{': ' if text else ''}{text}; {REMEDY}"


def _raised_by(error: BaseException, path: str) -> BaseException | None:
    """What a config file raised, inside of ml_collections' wrappings; None when the error is about something else."""
    found: BaseException | None = error
    while found is not None:
        code = [frame.f_code for frame, _ in traceback.walk_tb(found.__traceback__)]
        if any(each.co_filename == path or each.co_name == "_LoadConfigModule" for each in code):
            return found
        found = found.__cause__ or found.__context__
    return None
