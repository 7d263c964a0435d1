"""The training steps that `bench device` measures, lowered from shapes: the same on the device and ahead of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from scalr_jax.bench import programs as bench_programs
from scalr_jax.bench.scenes import Scenes, resized
from scalr_jax.config import StudentSettings, VavitSettings
from scalr_jax.data.scenes import Batch, PackedTokens
from scalr_jax.models import vit
from scalr_jax.models.build import make_student
from scalr_jax.models.flops import step_flops, teacher_flops
from scalr_jax.models.vit import TEACHERS, ViTConfig
from scalr_jax.ops.tokens import encode
from scalr_jax.runtime import sharding
from scalr_jax.train import steps
from scalr_jax.train.state import TrainState
from scalr_jax.train.teachers import Source, Teacher

Arguments = tuple[TrainState, tuple[Teacher, ...], Batch]
CACHED, RESIDUAL, LIVE = "cached tokens", "bfloat16 residual", "live teacher"
# ScaLR+'s head and images for VaViTs, ScaLR's for WaffleIron, as in configs/pretrain/.
VAVIT = {"head_hidden": 2048, "drop_path": 0.2, "vavit": VavitSettings(channels=768)}
TINY = VavitSettings(16, 1, num_heads=2, hidden=16, point_hidden=8, point_depth=1, merge_hidden=8, channels=8)
TINY_TEACHER = ViTConfig(patch_size=14, width=24, depth=1, num_heads=2, hidden=24, position_grid=(2, 3))
STUDENTS: dict[str, tuple[dict, tuple[int, int], tuple[str, ...]]] = {  # model settings, image size, variants
    "vavit_b": (VAVIT, (448, 896), (CACHED, RESIDUAL, LIVE)),
    "waffleiron": ({}, (224, 448), (CACHED, RESIDUAL, LIVE)),
    "vavit_l": (VAVIT, (448, 896), (CACHED, RESIDUAL, LIVE)),
}


class Case(NamedTuple):
    """One step: a student and what varies."""

    student: str
    variant: str
    settings: StudentSettings
    image_size: tuple[int, int]
    teacher: ViTConfig

    @property
    def file(self) -> str:
        """The name of its compiled step."""
        return f"{self.student} {self.variant}".replace(" ", "_")


class Made(NamedTuple):
    """A lowered step."""

    case: Case
    lowered: Lowered
    arguments: Callable[[], Arguments]  # made on the mesh's devices
    flops: int  # useful ones


def cases_of(name: str, grids: tuple[tuple[int, int], ...], dtype: str, *, tiny: bool) -> list[Case]:
    """The steps of a student on these grids. tiny: of a few channels, whatever it is called."""
    model, image_size, variants = STUDENTS[name]
    settings = StudentSettings(**{"name": name, "dtype": dtype, "grids": grids, **model})  # type: ignore[arg-type]
    teacher = TEACHERS["vitl14"]
    if tiny:
        small = {"channels": 8, "depth": 3, "head_hidden": min(settings.head_hidden, 8), "vavit": TINY}
        settings, image_size, teacher = dataclasses.replace(settings, **small), (28, 42), TINY_TEACHER
    found = []
    for variant in variants:
        own = dataclasses.replace(settings, residual_dtype="bfloat16" if variant == RESIDUAL else "float32")
        found.append(Case(name, variant, own, image_size, teacher))
    return found


def lower(case: Case, scenes: Scenes, mesh: Mesh) -> Made:
    """The step of a case on `mesh`, whose devices need not be there."""
    platform = mesh.devices.flat[0].platform
    student = make_student(case.settings, head="distill", out_features=case.teacher.width, platform=platform)
    batch, live = resized(scenes.batch, case.image_size)._replace(labels=None), case.variant == LIVE
    useful = step_flops(student, batch) or 0
    if live:
        useful += teacher_flops(case.teacher, scenes.num_scenes, case.image_size)
    else:
        batch = batch._replace(images=None, tokens=jax.eval_shape(lambda: _tokens(case, batch)))
    sources = (Source(case.teacher.width, case.image_size, case.teacher if live else None),)
    init, step = bench_programs.training(student, steps.make_distill_step, sources=sources)
    make_teachers = lambda: (Teacher(_parameters(case) if live else None),)  # noqa: E731
    on_shards = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh))  # noqa: E731
    shapes = jax.tree.map(on_shards, batch)
    given = (jax.eval_shape(init, shapes), jax.eval_shape(make_teachers))
    places = sharding.parameter_shardings(given, mesh)
    placed = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), given, places)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(places[0], sharding.replicated(mesh)),
        compiler_options=steps.compiler_options(platform),
    )

    def arguments() -> Arguments:
        whole = batch if live else batch._replace(tokens=jax.jit(lambda: _tokens(case, batch))())
        whole = jax.device_put(whole, sharding.batch_sharding(mesh))
        teachers = jax.jit(make_teachers, out_shardings=places[1])()
        return jax.jit(init, out_shardings=places[0])(whole), teachers, whole

    return Made(case, jitted.lower(*placed, shapes), arguments, useful)


def running(made: Made, compiled: Compiled) -> Callable[[], object]:
    """A function that makes one step and returns its metrics."""
    state, teachers, batch = made.arguments()

    def run() -> object:
        nonlocal state
        state, metrics = compiled(state, teachers, batch)
        return metrics

    return run


def _parameters(case: Case) -> dict:
    """Random parameters in the dtype of the student's products."""
    dtype = jnp.float32 if case.settings.dtype == "float32" else jnp.bfloat16
    params = vit.init(case.teacher, jax.random.key(0), case.image_size)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _tokens(case: Case, batch: Batch) -> tuple[PackedTokens, ...]:
    """Random tokens of every image, as a cache stores them in bfloat16: [D, S, th, tw, C] uint16."""
    shape = (*batch.scene_points.shape, *vit.patch_grid(case.teacher, case.image_size), case.teacher.width)
    return (PackedTokens(*encode(jax.random.normal(jax.random.key(1), shape), "bfloat16")),)
