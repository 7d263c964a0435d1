"""A whole distillation step, as `main` trains: the teacher on the images, the student on the points, the update.

    python -m scalr_jax.bench step --channels=768 --depth=48 --teacher=vitl14 --batch=mix.npz
    python -m scalr_jax.bench step --channels=64 --depth=3 --teacher=demo --root=SAMPLES

Weights are random, in the published shapes. Medians of --runs turns, seconds of one call:

    step_s            the step
    teacher_s         the teacher's features at the paired pixels alone
    student_step_s    the rest of the step alone, for random targets
    cached_step_s     with --cache: the whole step with stored tokens in the batch in place of teacher and images
    flops, mfu        matrix products of valid points and of images, nothing counted twice (models/flops.py)
    peak_bytes        arguments (teacher and optimiser included), outputs and temporary buffers by XLA's plan;
                      device_peak_bytes: what the device reports, where it does
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from scalr_jax.bench import programs as bench_programs
from scalr_jax.bench import scenes as bench_scenes
from scalr_jax.bench.student import add_student_arguments, described, student_of
from scalr_jax.bench.teacher import add_teacher_arguments, teacher_of
from scalr_jax.bench.timing import Parser, interleave, ranges, rounded, show_times
from scalr_jax.data.scenes import Batch, PackedTokens
from scalr_jax.data.tokens.store import DTYPES
from scalr_jax.models.flops import step_flops, teacher_flops
from scalr_jax.models.student import Student
from scalr_jax.models.vit import ViTConfig, patch_grid
from scalr_jax.ops.tokens import encode
from scalr_jax.runtime.chips import device_bytes, utilisation
from scalr_jax.runtime.errors import InputError
from scalr_jax.train import steps
from scalr_jax.train.teachers import Source, Teacher, features

FEATURE = "x_pre_norm"


def main(argv: list[str]) -> dict[str, Any]:
    """Measures, prints a table and returns the object of the last line."""
    parser = Parser("-m scalr_jax.bench step", __doc__)
    bench_scenes.add_arguments(parser)
    add_student_arguments(parser)
    add_teacher_arguments(parser)
    parser.add_argument("--cache", choices=tuple(DTYPES), default=None, help="also a step with tokens stored like this")
    arguments = parser.parse_args(argv)
    scenes = bench_scenes.get_scenes(arguments)
    if scenes.batch.images is None:
        raise InputError("the batch has no images, which the teacher needs; save it again")
    image_size = (int(scenes.batch.images.shape[2]), int(scenes.batch.images.shape[3]))
    vit_config, teacher = teacher_of(arguments, image_size)
    arguments.out_features = vit_config.width
    student = student_of(arguments, scenes.grids)
    result = measure(scenes, student, vit_config, teacher, arguments.runs, arguments.cache)
    return rounded({**result, "teacher": arguments.teacher, "image_size": list(image_size)})


def measure(
    scenes: bench_scenes.Scenes, student: Student, vit_config: ViTConfig, teacher: Any, runs: int, cache: str | None
) -> dict[str, Any]:
    """All figures of one student and teacher on one batch."""
    batch, images = jax.device_put(scenes.batch), scenes.batch.images
    assert images is not None
    size = (images.shape[2], images.shape[3])
    source, teacher = Source(vit_config.width, size, vit_config, FEATURE), Teacher(teacher)
    init, make = bench_programs.training(student, steps.make_distill_step, sources=(source,))
    step, plan_bytes = bench_programs.compiled_step(init, make, (teacher,), batch)
    jax.block_until_ready(step())
    peak_on_device = device_bytes()  # before other programs raise it
    target = jax.jit(lambda teacher, batch: features(source, teacher, batch))
    programs = {
        "step_s": step,
        "teacher_s": lambda: target(teacher, batch),
        "student_step_s": bench_programs.training_step(student, batch._replace(images=None, pixels=None))[0],
    }
    if cache is not None:
        programs["cached_step_s"] = _cached_step(student, vit_config, batch, cache)
    times = interleave(programs, runs=runs)
    show_times({name: (value, "") for name, value in times.items()})
    of_student = step_flops(student, scenes.batch) or 0
    of_teacher = teacher_flops(vit_config, scenes.num_scenes, size)
    begin, seconds = described(scenes, student, runs), times["step_s"].median
    result = {
        **begin,
        **{name: value.median for name, value in times.items()},
        "scenes_per_s": scenes.num_scenes / seconds,
        "points_per_s": scenes.num_points / seconds,
        "peak_bytes": plan_bytes,
        "device_peak_bytes": peak_on_device,
        "flops": of_student + of_teacher,
        "teacher_flops": of_teacher,
        "mfu": utilisation(of_student + of_teacher, seconds, begin["device"]),
        "ranges_s": ranges(times),
    }
    print(f"{result['scenes_per_s']:.2f} scenes/s, {result['points_per_s']:,.0f} points/s")
    if cache is not None:
        result["cached_ratio"] = seconds / times["cached_step_s"].median
        print(f"with {cache} tokens {result['cached_ratio']:.2f} times as many")
    return result


def _cached_step(student: Student, vit_config: ViTConfig, batch: Batch[jax.Array], dtype: str) -> Callable[[], object]:
    """A step on random tokens, stored as `dtype`."""
    assert batch.images is not None
    size = (batch.images.shape[2], batch.images.shape[3])
    shape = (*batch.images.shape[:2], *patch_grid(vit_config, size), vit_config.width)
    values, scale = encode(jax.random.normal(jax.random.key(1), shape), dtype)
    batch = batch._replace(images=None, tokens=(PackedTokens(values, scale),))
    sources = (Source(vit_config.width, size),)
    made = bench_programs.training(student, steps.make_distill_step, sources=sources)
    return bench_programs.compiled_step(*made, (Teacher(),), batch)[0]
