"""Timing for the benches: medians of interleaved runs on a synchronised device.

Everything that is compared is run in turn, A B C A B C, so that a noisy machine disturbs all alike. A program that is
shorter than `SHORTEST` is called several times a run and divided, so that an accelerator's queue hides the host.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

import jax
import numpy as np
from jax.stages import Compiled

from scalr_jax.runtime.errors import InputError

SHORTEST = 0.02  # seconds a run
MOST_CALLS = 200  # a run


class Times(NamedTuple):
    """Seconds of one call, over the runs."""

    seconds: np.ndarray  # [runs]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def low(self) -> float:
        return float(self.seconds.min())

    @property
    def high(self) -> float:
        return float(self.seconds.max())


def interleave(functions: Mapping[str, Callable[[], object]], *, runs: int, warmup: int = 1) -> dict[str, Times]:
    """Times `functions`, each of which starts work and returns arrays to wait for; the n-th run of all is one turn.

    `warmup` calls of each come first, and one more by which the number of calls a run is chosen.
    """
    calls = {}
    for name, function in functions.items():
        for _ in range(warmup):
            jax.block_until_ready(function())
        calls[name] = min(MOST_CALLS, math.ceil(SHORTEST / max(seconds_a_call(function, 1), 1e-6)))
    rows = [{name: seconds_a_call(function, calls[name]) for name, function in functions.items()} for _ in range(runs)]
    return {name: Times(np.array([row[name] for row in rows])) for name in functions}


def seconds_a_call(function: Callable[[], object], calls: int) -> float:
    """Seconds of one of `calls` calls, which a device may queue."""
    start = time.perf_counter()
    result = None
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def ranges(times: Mapping[str, Times], scale: float = 1.0) -> dict[str, list[float]]:
    """The least and the most of each, times `scale`, to four digits."""
    return {name: [float(f"{scale * edge:.4g}") for edge in (value.low, value.high)] for name, value in times.items()}


def compiled_bytes(compiled: Compiled) -> int | None:
    """Peak memory of the program in XLA's plan: arguments, outputs and temporary buffers, shared ones once."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return int(held + plan.temp_size_in_bytes)


def working_bytes(compiled: Compiled) -> int | None:
    """Temporary buffers and outputs by XLA's plan: what a program needs beside its arguments."""
    plan = compiled.memory_analysis()
    return None if plan is None else int(plan.temp_size_in_bytes + plan.output_size_in_bytes)


def header(runs: int) -> dict:
    """The first keys of every result."""
    return {"device": jax.local_devices()[0].device_kind, "jax": jax.__version__, "runs": runs}


def rounded(values: Mapping) -> dict:
    """Floats to six digits: more would be noise."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}


def show_times(rows: Mapping[str, tuple[Times, str]]) -> None:
    """name -> (times, what it is), as a table in milliseconds."""
    print(f"{'':<26}{'median ms':>12}{'least':>11}{'most':>11}")
    for name, (times, what) in rows.items():
        print(f"{name:<26}{1e3 * times.median:>12.3f}{1e3 * times.low:>11.3f}{1e3 * times.high:>11.3f}  {what}")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `InputError`s: one sentence, exit code 2."""

    def __init__(self, program: str, doc: str | None):
        super().__init__(
            prog=f"python {program}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists the arguments")


def positive(text: str) -> int:
    """An argument that is a number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def two_sizes(text: str) -> tuple[int, int]:
    """An argument "rows,columns"."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not rows,columns, as in 224,448")
    return int(parts[0]), int(parts[1])
