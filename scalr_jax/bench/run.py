"""Measurements. The last line of each is one JSON object; a table for people comes before it.

    python -m scalr_jax.bench student --channels=256 --depth=6 --root=SAMPLES
    python -m scalr_jax.bench NAME --help

NAME:
    student       forward and training step of the student, beside the time of their matrix products alone
    step          a whole distillation step with its teacher
    teacher       the teacher's forward pass
    pipeline      scenes a second a core, beside the published steps written plainly
    formulations  the forms of spatial mixing, one beside the other
    predict       one whole scan from file to features, by stage, beside onnxruntime
    sparse_conv   sparse 3D convolutions beside their matrix products and dense ones
    published     the published PyTorch student, from a clone of it, beside ours

Exit codes: 0 done; 2 bad arguments or input (one sentence on stderr); 1 a defect.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import NoReturn

from scalr_jax.runtime.errors import BadFrameError, InputError

NAMES = ("student", "step", "teacher", "pipeline", "formulations", "predict", "sparse_conv", "published")


def fail(message: str) -> NoReturn:
    """Exit with code 2 and one sentence on stderr. (`main.fail` comes with flags that a bench must not define.)"""
    print(f"scalr_jax: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    if name not in NAMES:
        fail(f"there is no bench {name!r}; give one of {', '.join(NAMES)}")
    try:
        result = importlib.import_module(f"scalr_jax.bench.{name}").main(rest)
    except (InputError, BadFrameError) as error:
        fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        fail(str(error))
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = str(error).splitlines()[0]
        fail(f"the device's memory is too small ({line}); use --remat=group, fewer --channels or less --depth")
    if result is not None:
        print(json.dumps(result), flush=True)
