"""The parts of `bench device`, each run in a process of its own. A part records its results as they come."""

from __future__ import annotations

import gc
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from scalr_jax.bench import scenes as bench_scenes
from scalr_jax.bench.device import cases, goldens, profile
from scalr_jax.bench.device.names import BATCH, EXECUTABLES, GOLDEN, record
from scalr_jax.bench.timing import Times, compiled_bytes, header, seconds_a_call
from scalr_jax.compile import hlo
from scalr_jax.compile.roofline import kernels
from scalr_jax.models.build import compute_dtype
from scalr_jax.runtime import sharding
from scalr_jax.runtime.chips import CHIPS, Chip, device_bytes, utilisation
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import reason
from scalr_jax.train import executables

RUNS, CALLS = 5, 4  # turns, and steps of each
# In a CUDA graph a profiler does not see which instruction a kernel is of.
GRAPHS_OFF: dict[str, str | bool] = {"xla_gpu_enable_command_buffer": "", "xla_gpu_graph_min_graph_size": "1000000"}


class Place(NamedTuple):
    """Where a part reads and writes, and how long it has."""

    prepared: Path
    output: Path
    deadline: float  # of `time.monotonic`
    tiny: bool

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, part: str, variant: str, /, **values: object) -> None:
        record(self.output, part, variant, **values)

    def attempt(self, part: str, variant: str, measure: Callable[[], dict]) -> None:
        """Records what `measure` returns, or one sentence why it returns nothing."""
        try:
            self.record(part, variant, **measure())
        except Exception as error:  # whatever fails, the other parts go on
            if not isinstance(error, InputError | jax.errors.JaxRuntimeError):
                traceback.print_exc()
            self.record(part, variant, failed=f"{type(error).__name__}: {reason(error)}")
        gc.collect()


def chip_of(device_kind: str) -> Chip | None:
    """The figures of a GPU by its name; None for a device without any."""
    return next((chip for chip in CHIPS.values() if chip.gpu and device_kind.startswith(chip.gpu)), None)


def run(part: str, place: Place) -> None:
    """Runs one part in this process."""
    if part == "goldens":
        run_goldens(place)
    else:
        run_student(part.removesuffix("_variants"), place, variants=part.endswith("_variants"))


def run_goldens(place: Place) -> None:
    """Every golden in both dtypes."""
    files = [place.prepared / GOLDEN / name for name in goldens.FILES]
    for file in files:
        if not file.is_file():
            place.record("goldens", file.stem, skipped=f"{file} is not there")
            continue
        for golden in goldens.read(file):
            for dtype in goldens.DTYPES:
                name = f"{golden.name}, {dtype}"
                place.attempt("goldens", name, lambda golden=golden, dtype=dtype: goldens.compare(golden, dtype))


def run_student(part: str, place: Place, *, variants: bool) -> None:
    """The time of the step with cached tokens, and its kernels; or those of its variants."""
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    scenes = bench_scenes.load(place.prepared / BATCH)
    dtype = np.dtype(compute_dtype("auto", sharding.platform())).name
    longest = 0.0
    for case in cases.cases_of(part, scenes.grids, dtype, tiny=place.tiny):
        if variants == (case.variant == cases.CACHED):
            continue
        if place.left < 1.2 * longest:
            place.record(part, case.variant, skipped=f"{place.left:.0f} s were left, and the last took {longest:.0f}")
            continue
        began = time.monotonic()
        place.attempt(part, case.variant, lambda case=case: measure(case, scenes, mesh, place))
        longest = max(longest, time.monotonic() - began)
        if case.variant == cases.CACHED and place.left > longest:
            place.attempt(part, "profile", lambda case=case: measure_kernels(case, scenes, mesh, place))


def measure(case: cases.Case, scenes: bench_scenes.Scenes, mesh: Mesh, place: Place) -> dict:
    """The step's time, memory and MFU."""
    made, began = cases.lower(case, scenes, mesh), time.monotonic()
    compiled, how = compiled_or_loaded(made, mesh, place.prepared / EXECUTABLES)
    compile_s = time.monotonic() - began
    step = cases.running(made, compiled)
    for _ in range(2):
        jax.block_until_ready(step())
    calls, runs = (1, 1) if place.tiny else (CALLS, RUNS)
    times = Times(np.array([seconds_a_call(step, calls) for _ in range(runs)]))
    start = header(runs)
    chip = chip_of(start["device"])
    predicted = None
    if chip is not None:
        predicted = 1e3 * sum(k.seconds * k.times for k in kernels(hlo.parse(compiled.as_text() or ""), chip))
    return {
        **start,
        "step_ms": 1e3 * times.median,
        "range_ms": [1e3 * times.low, 1e3 * times.high],
        "predicted_ms": predicted,
        "scenes_per_s": scenes.num_scenes / times.median,
        "flops": made.flops,
        "mfu": utilisation(made.flops, times.median, start["device"]),
        "peak_bytes": compiled_bytes(compiled),
        "device_peak_bytes": device_bytes(),
        "compile_s": compile_s,
        "executable": how,
    }


def compiled_or_loaded(made: cases.Made, mesh: Mesh, folder: Path) -> tuple[Compiled, str]:
    """The step as it was prepared, where it fits this device, else compiled here; and which of the two, or why."""
    file = folder / made.case.file
    try:
        saved = executables.read(file if file.is_file() else "")
        if saved is not None:
            return executables.load(saved, made.lowered, list(mesh.devices.flat)), "loaded"
        return made.lowered.compile(), "compiled"
    except InputError as error:
        return made.lowered.compile(), f"compiled, for {error}"


def measure_kernels(case: cases.Case, scenes: bench_scenes.Scenes, mesh: Mesh, place: Place) -> dict:
    """Measured beside predicted by category; the trace goes to the output."""
    device = mesh.devices.flat[0]
    made = cases.lower(case, scenes, mesh)
    compiled = made.lowered.compile(GRAPHS_OFF if device.platform == "gpu" else None)
    text = compiled.as_text() or ""
    with tempfile.TemporaryDirectory() as folder:
        found = profile.trace(cases.running(made, compiled), profile.instructions(text), Path(folder))
        profile.pack(found.folder, text, place.output / f"profile_{case.student}.tar.gz")
    chip = chip_of(device.device_kind)
    if chip is None:
        busy = 1e3 * sum(found.seconds.values())
        return {"traced_ms": 1e3 * found.step, "busy_ms": busy, "note": f"{device.device_kind} has no known bandwidth"}
    return profile.compare(text, found, chip)
