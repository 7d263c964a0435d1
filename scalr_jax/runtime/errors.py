"""Errors that are no defect: bad input, and frames that cannot be used."""

from __future__ import annotations


class BadFrameError(Exception):
    """One frame that cannot be used (truncated scan, unreadable image, nothing in view). The message names the file."""


class NothingVisibleError(BadFrameError):
    """No point of the scan projects into the image: a camera that looks elsewhere, or a wrong calibration."""


def too_many_bad(num_bad: int, num_frames: int) -> bool:
    """More than 1 % of the frames are bad, and more than one: then a run stops instead of skipping them."""
    return num_bad > max(1, 0.01 * num_frames)


class InputError(ValueError):
    """Something the user gave is wrong. `main` prints the message as one sentence and exits with code 2."""


def one_sentence(error: BaseException) -> str:
    """The message in one line."""
    text = str(error)
    if "Traceback (most recent call last)" in text:  # ml_collections hands on what a config file raised with its trace
        text = text.strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")
    return " ".join(text.split())
