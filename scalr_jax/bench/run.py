"""Measurements. The last line of each is one JSON object; a table for people comes before it.

    python -m scalr_jax.bench student --channels=256 --depth=6 --root=SAMPLES
    python -m scalr_jax.bench NAME --help

NAME:
    student       forward and training step of the student, beside the time of their matrix products alone
    step          a whole distillation step with its teacher
    teacher       the teacher's forward pass
    pipeline      scenes a second a core, beside the published steps written plainly
    predict       one whole scan from file to features, by stage, beside onnxruntime
    published     the published PyTorch student, from a clone of it, beside ours
    device        all that a lent GPU should tell, in one command of a few minutes

Sparse convolutions and the forms of spatial mixing are measured by experiments/bench_*.py.

Exit codes: 0 done; 2 bad arguments or input (one sentence on stderr); 1 a defect.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from scalr_jax.runtime.command_line import exit_codes
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import json_text

NAMES = {name: name for name in ("student", "step", "teacher", "pipeline", "predict", "published")}
NAMES["device"] = "device.run"  # its module in this folder


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    with exit_codes():
        if name not in NAMES:
            raise InputError(f"there is no bench {name!r}; give one of {', '.join(NAMES)}")
        report(importlib.import_module(f"scalr_jax.bench.{NAMES[name]}").main, rest)


def report(measure: Callable[[list[str]], dict], arguments: list[str]) -> None:
    """Runs a bench and prints its result as the last line; exit code 2 and one sentence for bad arguments or input."""
    with exit_codes():
        try:
            result = measure(arguments)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            line = str(error).splitlines()[0]
            raise InputError(
                f"the device's memory is too small ({line}); use --remat=group, fewer --channels or less --depth"
            ) from error
    print(json_text(result), flush=True)
