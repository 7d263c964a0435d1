"""The student alone: forward pass and training step, beside the time of their matrix products.

    python -m scalr_jax.bench student --channels=256 --depth=6 --root=SAMPLES
    python -m scalr_jax.bench student --batch=mix.npz --channels=768 --depth=12
    python -m scalr_jax.bench student --channels=64 --compile=12,48

SAMPLES holds nuscenes/, semantic_kitti/ and pandaset/; without --root scenes are generated. Every time is the median
of --runs turns in which programs that are compared run one after the other (seconds of one call):

    forward_s              student and head, as in prediction
    step_s                 forward, backward and AdamW for random targets, by the code that trains
    layer_forward_s        a third of three layers alone, one a plane
    layer_step_s           what a layer adds to the step: a third of the difference of two depths three apart, from
                           --depth or 9 on (layer_step_depths), so with its share of AdamW
    layer_step_direct_s    a third of three layers alone, forward and backward: outside a loop, see LOOPED
    layer_matmul_s         the two products of a layer alone
    layer_matmul_step_s    with their four of the backward pass
    matmul_step_s          all products of the step alone (embedding, layers, head)
    spatial_s              flatten, two convolutions, inflate of one layer on the top view, forward and backward,
                           without the norm before; spatial_dense_s on the whole grid
    spatial_layer_s        the mean of the three planes; spatial_share is its part of layer_step_direct_s
    spatial_peak_bytes     temporary buffers and outputs of that program by XLA's plan
    peak_bytes             the step: arguments, outputs and temporary buffers by XLA's plan;
                           device_peak_bytes: what the device reports, where it does
    flops, mfu             matrix products of valid points in a step, nothing counted twice (models/flops.py)

Of a VaViT (--name=vavit_b) forward_s, step_s, matmul_step_s (attention's products for the pairs of each scene among
them), peak_bytes, flops and mfu.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scalr_jax.bench import products as bench_products
from scalr_jax.bench import programs as bench_programs
from scalr_jax.bench import scenes as bench_scenes
from scalr_jax.bench import timing
from scalr_jax.bench.programs import OF_THREE, PLANES
from scalr_jax.config import StudentSettings, VavitSettings
from scalr_jax.models.build import make_student
from scalr_jax.models.flops import sizes_of, step_flops
from scalr_jax.models.student import Student
from scalr_jax.models.vavit import SIZES
from scalr_jax.runtime import sharding
from scalr_jax.runtime.chips import device_bytes, utilisation
from scalr_jax.runtime.errors import InputError

# A layer's cost is the difference of two depths whose loops both have three or more trips, as in real students. On CPU
# the backbone's gradient (64 channels, 62,555 points) takes 0.26, 0.73, 2.6, 3.3 s of CPU time at 3, 6, 9, 12 layers
# (2 shared cores, 2026-11-22): from 6 to 9 the loop itself becomes slow, which is no layer's cost. Why is not known.
LOOPED = 3 * PLANES
DESCRIBED = ("channels", "width", "depth", "implementation", "remat")
HEADS = {"linear": 0, "mlp": 2048}  # hidden channels of ScaLR's head and of ScaLR+'s
IMPLEMENTATIONS = ("auto", "cells", "windows", "dense")


def main(argv: list[str]) -> dict[str, Any]:
    """Measures, prints a table and returns the object of the last line."""
    parser = timing.Parser("-m scalr_jax.bench student", __doc__)
    bench_scenes.add_arguments(parser)
    add_student_arguments(parser)
    parser.add_argument("--out_features", type=timing.positive, default=1024, help="of the head: the teacher's width")
    parser.add_argument("--compile", default="", help="only compile steps of two depths, as in 12,48, and time that")
    parser.add_argument("--no_dense", action="store_true", help="do not time the dense grid (12 GB at 256 channels)")
    arguments = parser.parse_args(argv)
    if arguments.compile:
        return compile_times(arguments)
    scenes = bench_scenes.get_scenes(arguments)
    student = student_of(arguments, scenes.grids)
    if student.needs.pillar_size is not None:
        return measure_vavit(scenes, student, arguments.runs)
    return measure(scenes, student, arguments.runs, dense=not arguments.no_dense)


def add_student_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `student_of` reads, and --runs."""
    parser.add_argument("--name", choices=("waffleiron", *SIZES), default="waffleiron", help="the backbone")
    parser.add_argument("--channels", type=timing.positive, help="wide; none: 768, of a VaViT its name's")
    parser.add_argument("--depth", type=timing.positive, help="layers; none: 48, of a VaViT its name's")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="auto", help="of spatial mixing")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of matrix products")
    parser.add_argument("--remat", choices=("none", "layer", "group"), default="none", help="what is computed again")
    parser.add_argument("--head", choices=tuple(HEADS), default="linear", help="linear: ScaLR; mlp: ScaLR+")
    parser.add_argument("--norm", choices=("layer", "batch"), default="layer")
    parser.add_argument("--activation", choices=("relu", "gelu"), default="relu")
    parser.add_argument("--drop_path", type=float, default=0.0)
    parser.add_argument("--runs", type=timing.positive, default=5, help="turns, of which the median counts")


def student_of(arguments: argparse.Namespace, grids: Any) -> Student:
    """The student that the arguments describe."""
    if not 0 <= arguments.drop_path < 1:
        raise InputError(f"--drop_path={arguments.drop_path} is not in [0, 1)")
    names = ("norm", "activation", "drop_path", "implementation", "remat")
    settings = {name: getattr(arguments, name) for name in names}
    if arguments.name == "waffleiron":
        settings |= {"channels": arguments.channels or 768, "depth": arguments.depth or 48, "grids": tuple(grids)}
    else:
        settings["vavit"] = vavit_settings(arguments.channels, arguments.depth)
    hidden = HEADS[arguments.head]
    model = StudentSettings(name=arguments.name, head_hidden=hidden, dtype=arguments.dtype, **settings)
    return make_student(model, head="distill", out_features=arguments.out_features, platform=sharding.platform())


def vavit_settings(width: int | None, depth: int | None) -> VavitSettings:
    """A VaViT's settings by --channels and --depth, with heads of 64 channels and an MLP of 4 times the width."""
    if width is None:
        return VavitSettings(depth=depth or 0)
    return VavitSettings(width=width, depth=depth or 0, num_heads=max(1, width // 64), hidden=4 * width)


def of_depth(student: Student, depth: int) -> Student:
    return student.clone(backbone=dataclasses.replace(student.backbone, depth=depth))  # type: ignore[type-var]


def measure(scenes: bench_scenes.Scenes, student: Student, runs: int, *, dense: bool = True) -> dict[str, Any]:
    """All figures of one student on one batch; `spatial_dense_s` is null when not `dense`."""
    batch = jax.device_put(scenes.batch._replace(images=None, pixels=None, labels=None))
    sizes, num_rows = sizes_of(student, batch), batch.scene.size
    step, plan_bytes = bench_programs.training_step(student, batch)
    jax.block_until_ready(step())
    peak_on_device = device_bytes()  # before other programs raise it
    first = max(student.backbone.depth, LOOPED)
    depths = (first, first + PLANES)
    looped = {f"step_{depth}": bench_programs.training_step(of_depth(student, depth), batch)[0] for depth in depths}
    spatial, spatial_bytes = bench_programs.spatial_alone(student, batch)
    dense_grid = spatial.pop("spatial_dense")
    turns = [
        {
            "step": step,
            **looped,
            "forward": bench_programs.forward_pass(student, batch),
            "matmul_step": bench_programs.step_products(sizes, num_rows, student.dtype),
        },
        {**bench_programs.layers_alone(student, batch), **bench_programs.layer_products(student, num_rows), **spatial},
        {"spatial_dense": dense_grid} if dense else {},
    ]
    # What is compared is in one rotation. The dense grid comes alone and last: beside it on CPU, whose gigabytes go to
    # the system each time, spatial mixing on cells took 0.18 to 0.70 s (2026-11-22).
    raw = {name: value.seconds for programs in turns for name, value in timing.interleave(programs, runs=runs).items()}
    short, long = (raw.pop(name) for name in looped)
    seconds = {f"{name}_s": values / (PLANES if name in OF_THREE else 1) for name, values in raw.items()}
    seconds["layer_step_s"] = (long - short) / PLANES  # turn by turn
    times = {name: timing.Times(values) for name, values in seconds.items()}
    timing.show_times({name: (value, "") for name, value in times.items()})
    medians = {name: value.median for name, value in times.items()}
    result = {
        **described(scenes, student, runs),
        "rows": num_rows,
        "spatial_dense_s": None,
        **medians,
        "layer_step_depths": list(depths),
        "spatial_share": medians["spatial_layer_s"] / medians["layer_step_direct_s"],
        **spatial_bytes,
        **of_step(scenes, student, medians["step_s"], plan_bytes, peak_on_device),
        "ranges_s": timing.ranges(times),
    }
    show_result(result)
    return timing.rounded(result)


def measure_vavit(scenes: bench_scenes.Scenes, student: Student, runs: int) -> dict:
    """All figures of a VaViT on one batch."""
    if scenes.batch.pillars is None:
        raise InputError("the batch has no pillars; save it again")
    batch = jax.device_put(scenes.batch._replace(images=None, pixels=None, labels=None))
    step, plan_bytes = bench_programs.training_step(student, batch)
    jax.block_until_ready(step())
    peak_on_device = device_bytes()
    programs = {
        "step": step,
        "forward": bench_programs.forward_pass(student, batch),
        "matmul_step": bench_products.vavit_step(student, batch),
    }
    times = {f"{name}_s": value for name, value in timing.interleave(programs, runs=runs).items()}
    timing.show_times({name: (value, "") for name, value in times.items()})
    medians = {name: value.median for name, value in times.items()}
    result = {
        **described(scenes, student, runs),
        **medians,
        "scenes_per_s": scenes.num_scenes / medians["step_s"],
        **of_step(scenes, student, medians["step_s"], plan_bytes, peak_on_device),
        "ranges_s": timing.ranges(times),
    }
    ratio = medians["step_s"] / medians["matmul_step_s"]
    print(f"{result['scenes_per_s']:.2f} scenes/s; the step takes {ratio:.2f} times its products")
    return timing.rounded(result)


def of_step(
    scenes: bench_scenes.Scenes, student: Student, seconds: float, plan_bytes: int | None, peak_on_device: int | None
) -> dict:
    """Memory and rates of a training step."""
    num_flops = step_flops(student, scenes.batch) or 0
    return {
        "peak_bytes": plan_bytes,
        "device_peak_bytes": peak_on_device,
        "points_per_s": scenes.num_points / seconds,
        "flops": num_flops,
        "mfu": utilisation(num_flops, seconds, jax.local_devices()[0].device_kind),
    }


def described(scenes: bench_scenes.Scenes, student: Student, runs: int) -> dict[str, Any]:
    """The first keys of the result of a student on scenes."""
    return {
        **timing.header(runs),
        "points": scenes.num_points,
        "num_scenes": scenes.num_scenes,
        "source": scenes.source,
        "backbone": student.backbone.describe(),
        **{name: x for name, x in vars(student.backbone).items() if name in DESCRIBED},
        "dtype": jnp.dtype(student.dtype).name,
    }


def compile_times(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to trace and compile the step at two depths, in turn; nothing is run."""
    depths = [int(depth) if depth.isdecimal() else 0 for depth in arguments.compile.split(",")]
    if len(depths) != 2 or depths[0] == depths[1] or not min(depths):
        raise InputError(f"--compile={arguments.compile} is not two depths, as in 12,48")
    scenes = bench_scenes.get_scenes(arguments)
    batch = jax.eval_shape(lambda: scenes.batch._replace(images=None, pixels=None, labels=None))
    target = jax.ShapeDtypeStruct((*batch.scene.shape, arguments.out_features), jnp.float32)
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    try:
        for _ in range(arguments.runs + 1):  # the first turn warms up
            for depth in depths:
                student = of_depth(student_of(arguments, scenes.grids), depth)
                start = time.perf_counter()
                init, step = bench_programs.student_step(student)
                state = jax.eval_shape(init, batch)
                bench_programs.jit_step(step).lower(state, target, batch).compile()
                seconds[depth].append(time.perf_counter() - start)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    times = {depth: timing.Times(np.array(values[1:])) for depth, values in seconds.items()}
    timing.show_times({f"compile, depth {depth}": (value, "") for depth, value in times.items()})
    ratio = times[depths[1]].median / times[depths[0]].median
    print(f"ratio {ratio:.3f}")
    compile_s = {str(depth): value.median for depth, value in times.items()}
    result = {"channels": arguments.channels, "compile_s": compile_s, "compile_ratio": ratio}
    return timing.rounded({**timing.header(arguments.runs), **result})


def show_result(result: dict[str, Any]) -> None:
    """Prints a table of the times and their ratios."""
    best = "" if result["mfu"] is None else f", {result['mfu']:.1%} of the chip's peak"
    print(f"{result['points_per_s']:,.0f} points/s; {result['flops'] / result['step_s'] / 1e12:.3g} TFLOP/s{best}")
    layer = result["layer_step_s"] / result["layer_matmul_step_s"]
    step = result["step_s"] / result["matmul_step_s"]
    print(
        f"a layer of the step takes {layer:.2f} times its products, the step {step:.2f} times; of a layer "
        f"{result['spatial_share']:.1%} is spatial mixing"
    )
    for name in ("peak_bytes", "device_peak_bytes", "spatial_peak_bytes", "spatial_dense_peak_bytes"):
        if result[name] is not None:
            print(f"{name:<26}{result[name] / 2**20:>12,.1f} MiB")
