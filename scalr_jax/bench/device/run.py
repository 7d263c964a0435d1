"""All that a GPU lent for a few minutes should tell, in one command.

    python -m scalr_jax.bench device --prepare=inputs --root=SAMPLES      anywhere; without --root scenes are generated
    python -m scalr_jax.bench device --prepared=inputs --output=results   on the device: JAX, Flax and no data libraries

Parts run one after the other, each in a process of its own. Every result is a line of OUTPUT/results.jsonl as soon as
it is known; what fails, or finds no time left, is one sentence there, and the rest goes on. OUTPUT/report.md has it all
as tables, OUTPUT/profile_*.tar.gz the XProf traces (unpack one as a log directory) and the compiled programs.

    goldens          outputs and gradients beside the published code's, in float32 and bfloat16
    vavit_b, vavit_l, waffleiron (48 x 768)   milliseconds a step, memory and MFU with cached tokens of a ViT-L; time by
                     kind of kernel beside the predicted one, from which the constants of compile/roofline.py are fitted
    vavit_b_variants, ...   the residual in bfloat16; the teacher in the step
    published_vavit, published_waffleiron     bench published, where --vavit and --waffleiron name clones

--topology=h200:1 with --prepare also compiles the steps for that GPU (the cuda extra, no GPU); they are used where JAX
has the same version.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from scalr_jax.bench.device.names import BATCH, LIMITS, PARTS, PUBLISHED, record, results
from scalr_jax.bench.timing import Parser, positive
from scalr_jax.runtime.command_line import use_cache
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import check_writable

BUDGET = 540  # seconds
LEAST = 15  # seconds that a part is started with


def main(argv: list[str]) -> dict:
    """Prepares, or measures and prints the report; returns the object of the last line."""
    parser = Parser("-m scalr_jax.bench device", __doc__)
    parser.add_argument("--prepare", type=Path, help="write the inputs to this folder")
    parser.add_argument("--root", default="", help="with --prepare: nuscenes, semantic_kitti and pandaset to read")
    parser.add_argument("--goldens", type=Path, default=Path("tests/golden"), help="with --prepare: student_*.npz")
    parser.add_argument("--topology", default="", help="with --prepare: compile the steps for it, as h200:1")
    parser.add_argument("--prepared", type=Path, help="the folder that --prepare wrote")
    parser.add_argument("--output", type=Path, help="where the results go")
    parser.add_argument("--budget", type=positive, default=BUDGET, help="seconds; what finds none left is skipped")
    parser.add_argument("--only", default="", help="these parts, with commas between them")
    parser.add_argument("--vavit", default="", help="a clone of valeoai/VaViT")
    parser.add_argument("--waffleiron", default="", help="a clone of valeoai/WaffleIron")
    parser.add_argument("--cache", default=None, help="folder of compiled programs; none: they are not kept")
    parser.add_argument("--tiny", action="store_true", help="students of a few channels: to try the command on a CPU")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)  # of the processes it starts
    arguments = parser.parse_args(argv)
    if (arguments.prepare is None) == (arguments.prepared is None):
        raise InputError("give --prepare=FOLDER to make inputs, or --prepared=FOLDER and --output=FOLDER to measure")
    if arguments.prepare is not None:
        from scalr_jax.bench.device import prepare

        return prepare.prepare(arguments)
    if arguments.output is None:
        raise InputError("--output=FOLDER is required with --prepared: the results go there")
    if not arguments.prepared.is_dir():
        raise InputError(f"--prepared={arguments.prepared} is no folder; make it with --prepare={arguments.prepared}")
    check_writable(arguments.output)
    chosen = [name for name in (arguments.part or arguments.only).split(",") if name] or [*PARTS]
    if unknown := [name for name in chosen if name not in PARTS]:
        raise InputError(f"--only={arguments.only}: {unknown[0]!r} is no part; they are {', '.join(PARTS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        return run_part(arguments)
    return measure(arguments, argv, chosen)


def run_part(arguments: argparse.Namespace) -> dict:
    """One part in this process."""
    from scalr_jax.bench.device import parts

    if arguments.cache or "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        use_cache(arguments.cache)
    deadline = time.monotonic() + arguments.budget
    parts.run(arguments.part, parts.Place(arguments.prepared, arguments.output, deadline, arguments.tiny))
    return {"part": arguments.part}


def measure(arguments: argparse.Namespace, argv: list[str], chosen: list[str]) -> dict:
    """Every part in a process of its own, then the report."""
    from scalr_jax.bench.device import report

    deadline = time.monotonic() + arguments.budget
    for part in chosen:
        left = deadline - time.monotonic()
        if part in PUBLISHED and not getattr(arguments, PUBLISHED[part]):
            record(arguments.output, part, skipped=f"--{PUBLISHED[part]} names no clone")
        elif left < LEAST:
            record(arguments.output, part, skipped=f"{max(0.0, left):.0f} s of --budget={arguments.budget} were left")
        elif part in PUBLISHED:
            _published(part, arguments, left)
        else:
            limit = min(left, LIMITS.get(part, left))
            command = ["device", *argv, f"--part={part}", f"--budget={max(1, int(limit))}"]
            _process(part, command, arguments.output, limit)
    text, summary = report.report(results(arguments.output))
    (arguments.output / "report.md").write_text(text)
    print(text)
    return summary


def _published(part: str, arguments: argparse.Namespace, left: float) -> None:
    """`bench published` on the prepared batch, with the sizes of our students."""
    name = "vavit_b" if part == "published_vavit" else "waffleiron"
    command = ["published", f"--clone={getattr(arguments, PUBLISHED[part])}", f"--name={name}", "--runs=3"]
    command += [f"--batch={arguments.prepared / BATCH}"]
    if arguments.tiny:
        command += ["--channels=16", "--depth=3"]
    lines = _process(part, command, arguments.output, left)
    if lines:
        record(arguments.output, part, **json.loads(lines[-1]))


def _process(part: str, command: list[str], output: Path, left: float) -> list[str]:
    """The lines that `scalr_jax.bench` printed; [] where it failed, which is then a result."""
    print(f"-- {part}, {left:.0f} s left", flush=True)
    command = [sys.executable, "-m", "scalr_jax.bench", *command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired as error:
        record(output, part, failed=f"ended after {left:.0f} s, for its time was over")
        print(error.stdout or "")
        return []
    print(done.stdout, end="", flush=True)
    print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode:
        told = done.stderr.strip().splitlines()[-1:] or ["no message"]
        record(output, part, failed=f"exit code {done.returncode}: {told[0]}")
        return []
    return done.stdout.splitlines()
