"""Small assertions that many tests share."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """A value that must not be None."""
    assert value is not None
    return value


def assert_one_sentence(said: str, match: str) -> None:
    """What a command said on stderr has one line of error, with `match` in it, and no traceback."""
    (line,) = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("scalr_jax: error: ")]
    assert match in line
    assert "Traceback" not in said
