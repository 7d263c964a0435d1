"""Compiles a config's training step for accelerators that are not there: does it fit, how fast would it be, and what
do the devices send each other?

    python -m scalr_jax.compile --config=configs/pretrain/scalr_packed_wi48_768.py:1024 --topology=v5p:8x8x16
    python -m scalr_jax.compile --config=configs/pretrain/scalr_packed_wi48_768.py:512 --topology=v6e:16x16 --slices=2
    python -m scalr_jax.compile --config=configs/pretrain/scalr_packed_wi48_768.py:16 --topology=v5e:4x4 \\
        --teacher=vit7b16 --config.mesh.fsdp=16
    python -m scalr_jax.compile --config=configs/finetune/nuscenes_100p.py --topology=v4:2x2x1
    python -m scalr_jax.compile --config=configs/pretrain/vavit_b.py:8 --topology=h100:8

The step is the one that trains, with its shardings; shapes stand for weights and data, so neither is needed, nor a
chip: any machine with the tpu or the cuda extra will do. A table comes first, one JSON object last:

    topology, devices       devices of JAX, of all slices: a chip is one of them, of TPU7x two
    peak_bytes_per_device   arguments, results, temporary buffers and the program; hbm_bytes: the device's memory
    fits                    exit code 2 and the shortfall when false
    flops_per_device        of a step's matrix products as compiled, cuBLAS's and cuDNN's too (padding and what remat
                            computes again included, inside of other custom kernels not), read off the program with
                            loops times their trips (of a VaViT's attention those of scenes of one size)
    bytes_per_device        traffic of the main memory in a step
    predicted_ms            of a step, by compile/roofline.py: bytes and FLOPs of each kernel against the chip's, times
                            `constants`, communication left out; categories: the same by kind of kernel
    predicted_mfu           useful FLOPs, of as many points and scenes as a pack has on average, over the peak
    scenes_per_s            of all devices
    xla_ms                  v5e, v5p: by the compiler's own estimate, without Pallas kernels and collectives
    collectives             kind -> count a step, and bytes of the whole arrays
    parameter_bytes         the student's
    saved_bytes             with --save: of its file
    compile_s               lowering and compiling

Flags:
    --config     a config file of configs/; any key can be set: --config.model.remat=none
    --topology   CHIP:AxBxC, chips along each axis of one slice: v4, v5p and tpu7x have three, v5e and v6e two; h100:N
                 and h200:N are N GPUs
    --slices     number of slices, joined by the data-centre network (default 1)
    --teacher    vits14, vitb14, vitl14, vitg14 (DINOv2), vit7b16 (DINOv3), their width, or demo (default: what
                 teacher.checkpoint is called, else vitl14)
    --cached_teacher   its tokens come with the batch, as with teacher.cache; no cache is needed
    --text       also write the compiled program here, as text
    --save       also write the compiled step here, for `scalr_jax.main --config.executable=FILE` on such devices and
                 the same JAX (GPU: kernels were not tried out, so what the GPU itself compiles may be faster)

Exit codes: 0 it fits; 2 it does not, or bad arguments (one sentence on stderr); 1 a defect.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from scalr_jax.compile import hlo, hlo_cost
from scalr_jax.config import Settings
from scalr_jax.runtime.chips import ENVIRONMENT, Topology, devices_of, parse_topology
from scalr_jax.runtime.command_line import exit_codes, parse_flags, require
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import check_writable, json_text
from scalr_jax.settings import read_settings

FLAGS = flags.FlagValues()  # its own: `scalr_jax.main` defines flags of the same names
CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a config file.", flag_values=FLAGS)
flags.DEFINE_string("topology", None, "CHIP:AxBxC.", flag_values=FLAGS)
flags.DEFINE_integer("slices", 1, "How many.", flag_values=FLAGS)
flags.DEFINE_string("teacher", None, "The teacher's architecture.", flag_values=FLAGS)
flags.DEFINE_bool("cached_teacher", False, "Tokens instead of a teacher.", flag_values=FLAGS)
flags.DEFINE_string("text", None, "Where to write the compiled program.", flag_values=FLAGS)
flags.DEFINE_string("save", "", "Where to write the compiled step.", flag_values=FLAGS)

MEASURED = ("flops_per_device", "bytes_per_device", "predicted_ms", "predicted_mfu", "scenes_per_s", "categories")
MEASURED += ("xla_ms", "constants", "collectives")
UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_step(
    settings: Settings, topology: Topology, slices: int, teacher: str | None, *, cached: bool = False, save: str = ""
) -> tuple[dict, str]:
    """The result and the compiled program's text, "" when it does not fit. Raises `InputError`.

    save: where the compiled step is written, if it fits.
    """
    import jax

    from scalr_jax.compile import predict
    from scalr_jax.compile.abstract import compiling_for, make_run
    from scalr_jax.runtime import sharding
    from scalr_jax.train import executables

    mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp, devices=devices_of(topology.name, slices))
    room, peak, text, compiled = topology.chip.hbm_bytes, 0, "", None
    measured: dict = dict.fromkeys(MEASURED)
    with compiling_for(topology.chip) as options:
        run = make_run(settings, mesh, teacher, cached=cached)
        began = time.monotonic()
        lowered = run.lower()
        try:
            compiled = lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            peak = needed_bytes(str(error))
    work = None
    if (student := run.student).backbone.needs.voxel_size is None:
        work = predict.useful(student, run.teacher_config, settings.data.image_size, run.capacities)
    result: dict = {"topology": topology.name, "slices": slices, "devices": mesh.size}
    if compiled is not None:
        plan = compiled.memory_analysis()
        results = plan.output_size_in_bytes - plan.alias_size_in_bytes
        held = plan.argument_size_in_bytes + results + plan.generated_code_size_in_bytes
        peak, text = held + plan.temp_size_in_bytes, compiled.as_text() or ""
        program = hlo.parse(text)
        measured = {
            "flops_per_device": hlo_cost.flops(program),
            "bytes_per_device": hlo_cost.hbm_bytes(program),
            **predict.predict(program, topology.chip, mesh.size, work),
            "collectives": hlo.summary(hlo.collectives(program)),
        }
    result |= {"peak_bytes_per_device": int(peak), "hbm_bytes": room, "fits": bool(text) and peak <= room, **measured}
    result |= {"parameter_bytes": run.parameter_bytes, "compile_s": round(time.monotonic() - began, 1)}
    if save and compiled is not None and result["fits"]:
        result["saved_bytes"] = executables.save(Path(save), lowered, compiled, list(mesh.devices.flat))
    return {**result, "jax": jax.__version__}, text


def needed_bytes(message: str) -> int:
    """Bytes that a program too large for a device needs, by its message. Raises RuntimeError for another."""
    found = re.search(r"total memory required.*?\(([\d.]+)([BKMGT])\)|Used ([\d.]+)([BKMGT]) of", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        raise RuntimeError(f"the compiler failed: {message}")
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * UNITS[unit])


def show(result: dict, mesh: str) -> None:
    """The printed table."""
    gib = 2**30
    rows = [
        ("devices", f"{result['devices']:,} ({mesh})"),
        ("memory a device", f"{result['peak_bytes_per_device'] / gib:.2f} of {result['hbm_bytes'] / gib:.2f} GiB"),
        ("parameters", f"{result['parameter_bytes'] / 1e6:.1f} MB"),
    ]
    if result["collectives"] is not None:
        rows += [
            ("FLOPs a device", f"{result['flops_per_device'] / 1e12:.2f} T"),
            ("memory traffic", f"{result['bytes_per_device'] / 1e9:.1f} GB"),
        ]
        for kind, total in result["categories"].items():
            figures = f"{total['ms']:.2f} ms, {total['bytes'] / 1e9:.2f} GB, {total['flops'] / 1e12:.2f} TFLOP"
            rows.append((f"  {kind}", f"{figures} in {total['kernels']:,} kernels"))
        rows.append(("predicted", f"{result['predicted_ms']:.1f} ms a step; {_speed(result)}"))
        if result["xla_ms"] is not None:
            rows.append(("  by XLA's estimate", f"{result['xla_ms']:.1f} ms, without Pallas kernels and collectives"))
        rows.append(
            ("  by the constants", ", ".join(f"{name} {value:g}" for name, value in result["constants"].items()))
        )
        for kind, total in result["collectives"].items():
            rows.append((kind, f"{total['count']:,} of {total['bytes'] / 1e6:.1f} MB together"))
    rows.append(("compiled in", f"{result['compile_s']:.0f} s"))
    if "saved_bytes" in result:
        rows.append(("saved", f"{result['saved_bytes'] / 1e6:.1f} MB"))
    for name, text in rows:
        print(f"{name:<28}{text}")


def _speed(result: dict) -> str:
    if result["predicted_mfu"] is None:
        return "its useful FLOPs are not counted"
    return f"MFU {100 * result['predicted_mfu']:.1f} %, {result['scenes_per_s']:.0f} scenes/s"


def run(arguments: list[str]) -> dict:
    """Compiles, prints and returns the result. Raises `InputError`."""
    parse_flags(FLAGS, arguments, __doc__)
    require(FLAGS, "config", "topology", example="--config=configs/smoke.py --topology=v5e:2x2")
    settings = read_settings(CONFIG.value)
    topology = parse_topology(FLAGS.topology)
    if FLAGS.save:
        check_writable(Path(FLAGS.save), "--save")
    options = {"cached": FLAGS.cached_teacher, "save": FLAGS.save}
    result, text = compile_step(settings, topology, FLAGS.slices, FLAGS.teacher, **options)
    if FLAGS.text and text:
        Path(FLAGS.text).write_text(text)
    show(result, f"{FLAGS.slices} x {topology.name}, mesh.fsdp = {settings.mesh.fsdp}")
    print(json_text(result), flush=True)
    return result


def main(arguments: list[str]) -> None:
    # Before JAX is imported: this process compiles on the CPU, whatever devices there are.
    os.environ.update({"JAX_PLATFORMS": "cpu", **ENVIRONMENT})
    with exit_codes():
        result = run(arguments)
        if not result["fits"]:
            lacking = (result["peak_bytes_per_device"] - result["hbm_bytes"]) / 2**30
            raise InputError(
                f"it does not fit: a device of {result['topology']} lacks {lacking:.2f} GiB; raise config.mesh.fsdp, "
                "lower config.data.points_per_shard, or set config.model.remat=group"
            )
