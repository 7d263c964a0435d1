"""The training loop, told as a story. The same for distillation, probing and fine-tuning.

Order of resuming: (1) the config is compared with the workdir's; (2) capacities are derived again from the same first
scenes; (3) the state's shapes and shardings; (4) the newest readable checkpoint fills them, or fresh values do;
(5) metrics.jsonl is cut to the checkpoint's step; (6) every data stream starts at its first unfinished scene.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scalr_jax.data.build import check_labels, make_mixing, make_settings
from scalr_jax.data.packing import Capacities, choose_capacities
from scalr_jax.data.pipeline import Pipeline, prefetch
from scalr_jax.data.scenes import SceneView
from scalr_jax.interop.teacher import make_teacher
from scalr_jax.models.backbone import CachedFeatures
from scalr_jax.models.build import make_student
from scalr_jax.models.student import Student, without_head
from scalr_jax.runtime import distributed, sharding
from scalr_jax.runtime import workdir as workdir_of_run
from scalr_jax.runtime.checkpoint import Checkpoints
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.logging import MetricWriter
from scalr_jax.train import optim, steps
from scalr_jax.train.state import AveragedState, TrainState, init_state, start_average


class Task(NamedTuple):
    """What distinguishes one kind of training from another."""

    label: str  # begins each line of progress
    scene_task: str  # "distill", "segment" or "features"
    student: Student
    trainable: tuple[str, ...] | None  # top-level parameters that are trained; None: all
    make_step: Callable  # (optimizer, schedule) -> step(state, teacher, batch)
    teacher: Any = None  # frozen parameters, an argument of the step
    initial: dict | None = None  # parameters and batch statistics to start from, by top-level name
    num_classes: int = 0  # of the labels; 0: none are used


def distillation_task(config: Any, teacher: tuple[Any, Any] | None = None) -> Task:
    """`teacher`: (vit_config, parameters or their shapes) in place of what `config.teacher` names."""
    vit_config, params = teacher or make_teacher(config)
    student = make_student(config.model, head="distill", out_features=vit_config.width, platform=sharding.platform())

    def make_step(optimizer, schedule):
        return steps.make_distill_step(
            student,
            vit_config,
            optimizer,
            schedule,
            seed=config.seed,
            batch_size=config.optimizer.batch_size,
            which=config.teacher.feature,
        )

    return Task("distill", "distill", student, None, make_step, params)


def segmentation_task(config: Any, num_classes: int, *, label: str, initial: dict | None, frozen: bool) -> Task:
    """Probing (`frozen`) or fine-tuning; `initial` holds a backbone's params and batch_stats, or None for random."""
    head = "mlp" if frozen and config.probe.head == "mlp" else config.model.segmentation_head
    student = make_student(
        config.model, head=head, out_features=num_classes, frozen_backbone=frozen, platform=sharding.platform()
    )
    trainable = ("head",) if frozen else None
    cached = frozen and initial is not None and config.probe.features == "cached"
    if cached and initial is not None:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), without_head(initial))
        student = student.clone(backbone=CachedFeatures(student.backbone, shapes))

    def make_step(optimizer, schedule):
        step = steps.make_segment_step(
            student,
            optimizer,
            schedule,
            seed=config.seed,
            batch_size=config.optimizer.batch_size,
            trainable=trainable,
        )
        return lambda state, teacher, batch: step(state, batch)

    scene_task = "features" if cached else "segment"
    return Task(label, scene_task, student, trainable, make_step, None, initial, num_classes)


def train(config: Any, workdir: Path, dataset: Any, task: Task) -> TrainState:
    """Train to `config.num_steps`, resuming when `workdir` holds a run of the same config. Returns the last state."""
    with workdir_of_run.claim(config, workdir):
        return _train(config, workdir, dataset, task)


def _train(config: Any, workdir: Path, dataset: Any, task: Task) -> TrainState:
    # Devices, data and the static sizes of a pack.
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    pipeline = _make_pipeline(config, dataset, task, mesh, workdir)
    sample = pipeline.sample()
    if task.num_classes:
        check_labels(sample, dataset.class_names, task.num_classes)
    capacities = choose_capacities(config, sample, exactly=pipeline.exactly)
    expected = expected_scenes(sample, capacities, config.data.scenes_per_step, mesh.size)

    # The step, and where its state lies.
    batch = sharding.put_batch(pipeline.empty_batch(capacities, sample[0]), mesh)
    program = make_program(config, task, batch, mesh, expected)
    teacher = jax.device_put(task.teacher, sharding.parameter_shardings(task.teacher, mesh))

    # Resume, or begin.
    writer = MetricWriter(workdir, num_steps=config.num_steps, active=jax.process_index() == 0, label=task.label)
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        every=config.checkpoint_every_steps,
        keep=config.keep_checkpoints,
        keep_every=config.keep_every_steps,
    )
    positions = np.array(pipeline.shards, np.int32)
    global_positions = sharding.put_batch(positions, mesh)
    restored = checkpoints.restore(program.state, _abstract(global_positions))
    if restored is not None:
        state, global_positions = restored
        positions = sharding.local_rows(global_positions)
        writer.resume(int(state.step))
        print(f"{task.label} resumed at step {int(state.step)} of {config.num_steps}", flush=True)
    else:
        state = jax.jit(program.fresh, out_shardings=program.shardings)(batch)
        if task.initial is not None:
            state = _start_from(state, task.initial, program.shardings)
    del batch

    # The loop. Its order matters: read, step, save what the step finished, log.
    number, stopped = int(state.step), False
    source = prefetch(iter(pipeline.steps(capacities, sample[0], positions.tolist())), config.data.prefetch)
    log = _Log(writer, capacities, mesh.size, config.log_every_steps)
    # Whatever ends the loop, a save that was begun is finished.
    closing = contextlib.closing
    with distributed.Preemption() as preemption, closing(writer), closing(checkpoints), closing(source):
        while number < config.num_steps and not stopped:
            item = next(source)
            batch = sharding.put_batch(item.batch, mesh)
            with jax.transfer_guard("disallow"):
                state, metrics = program.step(state, teacher, batch)
            number += 1
            stopped = preemption.reached(number)
            global_positions = sharding.put_batch(item.positions.astype(np.int32), mesh)
            last = number == config.num_steps or stopped
            checkpoints.save(number, state, global_positions, force=last)
            # Where a resumed run begins, so does its next line.
            log.add(number, metrics, item.bad_frames, now=last or number % config.checkpoint_every_steps == 0)
        checkpoints.wait()
    if number < config.num_steps:
        raise distributed.Preempted(
            f"{task.label} stopped as asked after step {number} of {config.num_steps}; the same command resumes"
        )
    return state


class Program(NamedTuple):
    """What is compiled, and where its state lies: all that `compile.py` needs, made without a device or an array."""

    fresh: Callable  # batch -> TrainState
    state: TrainState  # abstract, with shardings
    shardings: Any
    step: Any  # jitted: (state, teacher, batch) -> (state, metrics); the state is donated


def make_program(config: Any, task: Task, batch: Any, mesh: Any, expected: float) -> Program:
    """The jitted step for batches like `batch` (arrays or shapes, with shardings) of `expected` scenes."""
    total = config.optimizer.total_updates or config.num_steps * expected / config.optimizer.batch_size
    optimizer = optim.make_optimizer(config.optimizer, task.student.backbone)
    step = task.make_step(optimizer, optim.make_schedule(config.optimizer, total))
    if config.optimizer.ema:
        step = steps.averaged(step, config.optimizer.ema)
    key = jax.random.key(config.seed)

    def fresh(batch):
        state = init_state(task.student, batch, optimizer, task.trainable, key)
        return start_average(state, task.trainable or tuple(state.params)) if config.optimizer.ema else state

    shapes = jax.eval_shape(fresh, batch)
    shardings = sharding.parameter_shardings(shapes, mesh)
    state = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, shardings
    )
    step = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
        compiler_options=steps.compiler_options(mesh.devices.flat[0].platform),
    )
    return Program(fresh, state, shardings, step)


def expected_scenes(sample: list[SceneView], capacities: Capacities, scenes_per_step: int, num_shards: int) -> float:
    """Scenes a step over all shards: exact with `scenes_per_step`, else from the sample's mean number of points."""
    if scenes_per_step:
        return float(scenes_per_step)
    mean_points = sum(len(scene.feats) for scene in sample) / len(sample)
    return num_shards * min(capacities.scenes, max(1.0, capacities.points / mean_points - 0.5))


def _make_pipeline(config: Any, dataset: Any, task: Task, mesh: Any, workdir: Path) -> Pipeline:
    settings = make_settings(config, task.student.needs, task=task.scene_task, train=True)
    if task.num_classes:
        settings = dataclasses.replace(settings, mixing=make_mixing(config, dataset, workdir / "instances"))
    return Pipeline(
        dataset,
        settings,
        seed=config.seed,
        num_shards=mesh.size,
        shards=sharding.local_shards(mesh),
        num_workers=config.data.num_workers,
        scenes_per_step=config.data.scenes_per_step or None,
    )


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _start_from(state: TrainState, initial: dict, shardings: Any) -> TrainState:
    """Replace the top-level parameters and statistics that `initial` has (embedding and backbone)."""
    initial = without_head(initial)
    params, statistics = {**state.params, **initial["params"]}, {**state.batch_stats, **initial["batch_stats"]}
    given, wanted = (jax.tree.map(jnp.shape, tree) for tree in (params, state.params))
    if given != wanted:
        raise InputError(
            "the checkpoint's backbone has other shapes than config.model; give the model it was made with"
        )
    state = dataclasses.replace(state, params=params, batch_stats=statistics)
    if isinstance(state, AveragedState):
        state = start_average(state, tuple(state.average["params"]))
    return jax.device_put(state, shardings)


class _Log:
    """Gathers metrics on the device and writes their means every few steps."""

    def __init__(self, writer: MetricWriter, capacities: Capacities, num_shards: int, every: int):
        self._writer, self._every = writer, every
        self._points = capacities.points * num_shards
        self._scenes = capacities.scenes * num_shards
        self._pending: list[dict] = []
        self._since = time.monotonic()

    def add(self, step: int, metrics: dict, bad_frames: int, *, now: bool) -> None:
        self._pending.append(metrics)
        if step % self._every and not now:
            return
        rows = jax.device_get(self._pending)
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        seconds = time.monotonic() - self._since
        points, scenes = mean.pop("points"), mean.pop("scenes")
        values = {f"train/{key}": value for key, value in mean.items()}
        values["train/points_per_s"] = points * len(rows) / seconds
        values["train/scenes_per_step"] = scenes
        values["train/point_fill"] = points / self._points
        values["train/scene_fill"] = scenes / self._scenes
        values["train/bad_frames"] = bad_frames
        self._writer.write(step, values)
        self._pending, self._since = [], time.monotonic()
