"""A step's kernels as a profiler times them, beside the roofline's prediction (`compile/roofline.py`), and the
roofline's constants fitted to them.

A kernel's time is that of its instruction in the compiled program; what the device does between kernels is `idle_ms`.
"""

from __future__ import annotations

import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from scalr_jax.compile import hlo
from scalr_jax.compile.roofline import CONSTANTS, Kernel, by_category, kernels
from scalr_jax.runtime.chips import Chip

STEPS = 3
SMALL, LARGE = 2**16, 2**20  # bytes of a kernel that is all start, and of one whose start counts little


class Profile(NamedTuple):
    """Time of one step, a mean over the traced ones."""

    seconds: Mapping[str, float]  # by instruction, of all its runs
    step: float  # seconds from step to step, traced
    folder: Path  # of the XProf trace


def trace(run: Callable[[], object], names: set[str], folder: Path) -> Profile:
    """Runs `STEPS` steps under XProf; `names` are those of the program's instructions."""
    jax.block_until_ready(run())
    with jax.profiler.trace(folder):
        began, made = time.perf_counter(), None
        for _ in range(STEPS):
            made = run()
        jax.block_until_ready(made)
        seconds = (time.perf_counter() - began) / STEPS
    (file,) = folder.rglob("*.xplane.pb")
    return Profile(_by_instruction(file, names), seconds, folder)


def instructions(text: str) -> set[str]:
    """The names of a compiled program's instructions."""
    return {name for computation in hlo.parse(text).computations.values() for name in computation.instructions}


def _by_instruction(file: Path, names: set[str]) -> dict[str, float]:
    """Seconds a step by the name of an instruction, of the devices' lines, or on a CPU of its threads'."""
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    total: defaultdict[str, float] = defaultdict(float)
    for plane in devices or planes:
        for line in plane.lines:
            for event in line.events:
                name = event.name.split(" ", 1)[0].lstrip("%")
                if devices:  # JAX 0.12.0 aborts on the statistics of some events of a CPU
                    name = dict(event.stats).get("hlo_op") or name
                if name in names:
                    total[name] += event.duration_ns
    return {name: 1e-9 * nanoseconds / STEPS for name, nanoseconds in total.items()}


def compare(text: str, profile: Profile, chip: Chip) -> dict:
    """Milliseconds measured and predicted by category, the fitted constants, and the kernels that take longest."""
    program = hlo.parse(text)
    found = list(kernels(program, chip))
    seconds = {kernel.name: profile.seconds.get(kernel.name, 0.0) / kernel.times for kernel in found if kernel.times}
    constants = fit(found, seconds, chip)
    measured = by_category(kernel._replace(seconds=seconds.get(kernel.name, 0.0)) for kernel in found)
    assumed, fitted = by_category(found), by_category(kernels(program, chip, constants))
    busy = sum(total["ms"] for total in measured.values())
    rows = {
        name: {
            "measured_ms": total["ms"],
            "predicted_ms": assumed[name]["ms"],
            "fitted_ms": fitted[name]["ms"],
            "gb": total["bytes"] / 1e9,
            "tflop": total["flops"] / 1e12,
            "kernels": total["kernels"],
        }
        for name, total in measured.items()
    }
    return {
        "traced_ms": 1e3 * profile.step,
        "busy_ms": busy,
        "idle_ms": max(0.0, 1e3 * profile.step - busy),
        "predicted_ms": sum(total["ms"] for total in assumed.values()),
        "unseen_kernels": sum(kernel.times for kernel in found if kernel.name not in profile.seconds),
        "categories": rows,
        "constants": dict(CONSTANTS),
        "fitted": constants,
    }


def fit(found: Sequence[Kernel], seconds: Mapping[str, float], chip: Chip) -> dict[str, float]:
    """The roofline's constants by which its kernels take these seconds a run; one that no kernel tells stays assumed.

    The start is the median of kernels that move less than 64 KiB. Each share is the work of the kernels that it bounds
    over what the chip would do in their time less their starts, of kernels that move at least 1 MiB.
    """
    timed = [kernel for kernel in found if seconds.get(kernel.name, 0.0) > 0]
    constants = dict(CONSTANTS)
    starts = [1e6 * seconds[k.name] for k in timed if k.bytes < SMALL and not k.flops]
    if starts and chip.gpu:
        constants["kernel_us"] = float(np.median(starts))
    start = constants["kernel_us"] * 1e-6 * bool(chip.gpu)
    work: defaultdict[str, float] = defaultdict(float)  # by constant
    room: defaultdict[str, float] = defaultdict(float)
    for kernel in timed:
        net = (seconds[kernel.name] - start) * kernel.times
        if kernel.bytes < LARGE or net <= 0:
            continue
        by_bytes = kernel.bytes / (CONSTANTS["bandwidth_share"] * chip.bandwidth)
        bound = "bandwidth_share" if by_bytes > kernel.flops / (CONSTANTS[kernel.share] * chip.flops) else kernel.share
        moved = bound == "bandwidth_share"
        work[bound] += (kernel.bytes if moved else kernel.flops) * kernel.times
        room[bound] += net * (chip.bandwidth if moved else chip.flops)
    return {**constants, **{name: work[name] / room[name] for name in work}}


def pack(folder: Path, text: str, file: Path) -> None:
    """The trace and the compiled program's text in one .tar.gz; unpacked it is a log directory of XProf."""
    with tempfile.TemporaryDirectory() as temporary, tarfile.open(file, "w:gz") as archive:
        program = Path(temporary) / "program.hlo.txt"
        program.write_text(text)
        archive.add(program, program.name)
        archive.add(folder / "plugins", "plugins")
