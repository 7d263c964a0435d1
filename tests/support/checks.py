"""Small assertions that many tests share."""

import re
from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """A value that must not be None."""
    assert value is not None
    return value


def mentions(*parts: object) -> str:
    """A pattern, for `match`, of any text that has all the parts: keys, files and numbers, in any order.

    Numbers are whole ones: 5 is not found in 50.
    """
    patterns = (rf"(?<![\w.]){part}(?!\w|\.\d)" if isinstance(part, int) else re.escape(str(part)) for part in parts)
    return r"(?s)\A" + "".join(f"(?=.*{pattern})" for pattern in patterns)


def assert_one_sentence(said: str, *parts: object) -> None:
    """Asserts that a command's stderr has one line of error, with all parts in it, and no traceback."""
    (line,) = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("scalr_jax: error: ")]
    assert re.search(mentions(*parts), line), line
    assert "Traceback" not in said
