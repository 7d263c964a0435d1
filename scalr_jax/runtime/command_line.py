"""How every command ends when something given to it is wrong: exit code 2 and one sentence on stderr."""

from __future__ import annotations

import os
import re
import sys
from typing import NoReturn


def one_sentence(error: BaseException) -> str:
    text = str(error)
    if "Traceback (most recent call last)" in text:  # ml_collections hands on what a config file raised with its trace
        text = text.strip().splitlines()[-1].removeprefix("scalr_jax.data.scenes.InputError: ")
    return " ".join(text.split())


def config_sentence(error: BaseException) -> str:
    """What ml_collections says of a --config that it could not load, without its own words."""
    text = one_sentence(error).removeprefix("Configuration is not available because of an earlier failure to load: ")
    missing = re.search(r"Attempted \[(?:Relative|Absolute) path\]: (.+?) \[Errno 2\]", text)
    return f"{missing[1]} is not there; give a config file, as in --config=configs/demo.py" if missing else text


def named(name: object, error: BaseException) -> str:
    """The sentence of an error, beginning with the file or frame that it is about."""
    text = one_sentence(error)
    return text if str(name) in text else f"{name}: {text}"


def say(message: str) -> None:
    print(f"scalr_jax: error: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Exit with code 2 and one sentence on stderr."""
    say(message)
    sys.exit(2)


def end(code: int, message: str) -> NoReturn:
    """`fail` beside other processes: out at once, for an orderly exit would wait for peers that may never come."""
    say(message)
    sys.stdout.flush()
    os._exit(code)
