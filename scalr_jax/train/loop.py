"""The training loop, the same for distillation, probing and fine-tuning.

Order of resuming: (1) the workdir is claimed, and the config compared with its own; (2) capacities are derived again
from the same first scenes; (3) the state's shapes and shardings; (4) the newest readable checkpoint fills them, or
fresh values do; (5) metrics.jsonl is cut to the checkpoint's step; (6) statistics of the teacher's features are read,
or measured anew; (7) every data stream starts at its first unfinished scene.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from scalr_jax.config import DataSettings, TrainSettings
from scalr_jax.data.build import check_labels, make_mixing, scene_settings, with_views
from scalr_jax.data.packing import Capacities, choose_capacities, in_buckets
from scalr_jax.data.pipeline import Pipeline, Step, prefetch
from scalr_jax.data.scenes import Batch, Dataset, FinishedScenes, SceneView
from scalr_jax.models.flops import step_flops, teacher_flops
from scalr_jax.models.student import Student, Variables, without_head
from scalr_jax.runtime import chips, distributed, sharding, stopping
from scalr_jax.runtime.checkpoint import Checkpoints
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.logging import MetricWriter
from scalr_jax.train import executables, optim, steps
from scalr_jax.train.state import AveragedState, TrainState, init_state, start_average
from scalr_jax.train.teachers import Source, Teacher, first_batches, with_statistics
from scalr_jax.train.trace import Trace
from scalr_jax.train.watch import Made, Watch, explain


class Task(NamedTuple):
    """The parts in which kinds of training differ."""

    label: str  # begins each line of progress
    scene_task: str  # "distill", "segment" or "features"
    student: Student
    trainable: tuple[str, ...] | None  # top-level parameters that are trained; None: all
    make_step: Callable  # (optimizer, schedule) -> step(state, teachers, batch)
    teachers: tuple[Teacher, ...] = ()  # their frozen arrays, an argument of the step
    initial: Variables | None = None  # parameters and batch statistics to start from, by top-level name
    num_classes: int = 0  # of the labels; 0: none are used
    fixed: bool = False  # the same scenes in every epoch, not augmented
    sources: tuple[Source, ...] = ()  # of the teachers


def train(settings: TrainSettings, workdir: Path, dataset: Dataset | FinishedScenes, task: Task) -> TrainState:
    """Trains to `num_steps`, resuming when `workdir`, claimed for this run, holds a checkpoint. Returns the last state.

    Raises:
        InputError: data that cannot be trained on, or a checkpoint of another run.
        stopping.Preempted: the run was asked to stop, and has saved its state.
    """
    # Devices, data and the static sizes of a pack.
    run = settings.run
    saved = executables.read(run.executable)
    mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp)
    pipeline = _make_pipeline(settings, dataset, task, mesh, workdir)
    sample = pipeline.sample()
    if task.num_classes:
        check_labels(sample, dataset.class_names, task.num_classes)
    capacities = choose_capacities(settings.data, sample, exactly=pipeline.exactly)
    expected = expected_scenes(sample, capacities, settings.data.scenes_per_step, mesh.size)

    # The step, and where its state lies.
    batch = sharding.put_batch(pipeline.empty_batch(capacities, sample[0]), mesh)
    program = make_program(settings, task, batch, mesh, expected)
    _check_memory(program.state)

    # Resume, or begin.
    active = jax.process_index() == 0
    writer = MetricWriter(workdir, num_steps=run.num_steps, active=active, label=task.label, project=run.wandb)
    keep = {"keep": run.keep_checkpoints, "keep_every": run.keep_every_steps}
    checkpoints = Checkpoints(workdir / "checkpoints", every=run.checkpoint_every_steps, **keep)
    positions = pipeline.beginning()
    global_positions = sharding.put_batch(positions.astype(np.int32), mesh)
    shapes = jax.ShapeDtypeStruct(global_positions.shape, global_positions.dtype, sharding=global_positions.sharding)
    restored = checkpoints.restore(program.state, shapes)
    if restored is not None:
        state, global_positions = restored
        positions = sharding.local_rows(global_positions)
        writer.resume(int(state.step))
    else:
        writer.restart()
        state = jax.jit(program.fresh, out_shardings=program.shardings)(batch)
        state = _start_from(state, task.initial, program.shardings)
    first = first_batches(pipeline, capacities, sample[0], expected, mesh)
    teachers = with_statistics(task.sources, task.teachers, workdir, first, mesh, resumed=restored is not None)
    step = executables.choose(saved, program.step, (program.state, teachers, batch), mesh)
    del batch

    # The loop. Its order matters: read, step, save what the step finished, log.
    number, stopped = int(state.step), False
    source = _batches(pipeline, capacities, sample[0], positions, settings.data, mesh)
    trace = Trace(run.profile, workdir / "profile")
    log, watch = _Log(writer, task, capacities, mesh.size, run.log_every_steps), Watch()
    # Whatever ends the loop, a save that was begun is finished.
    with distributed.preemption() as reached, closing(writer), closing(checkpoints), closing(source), closing(trace):
        while number < run.num_steps and not stopped:
            item, batch = next(source)
            trace.before(number, state)
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, teachers, batch)
            number += 1
            stopped = reached(number)
            global_positions = sharding.put_batch(item.positions.astype(np.int32), mesh)
            last = number == run.num_steps or stopped
            if (bad := watch.add(Made(number, item, metrics), last=last)) is not None:
                variables = {"params": state.params, "batch_stats": state.batch_stats}
                raise InputError(explain(bad, task.student, variables, sharding.put_batch(bad.item.batch, mesh)))
            checkpoints.save(number, state, global_positions, force=last)
            # Where a resumed run begins, so does its next line.
            log.add(number, metrics, item, now=last or number % run.checkpoint_every_steps == 0)
        checkpoints.wait()
    if number < run.num_steps:
        raise stopping.Preempted(
            f"{task.label} stopped as asked after step {number} of {run.num_steps}; the same command resumes"
        )
    stopping.check()
    if not optax.tree.get(state.opt_state, "count"):
        raise InputError(
            f"each of the {run.num_steps} steps in {workdir} was skipped because of values that are not finite; lower "
            "optimizer.learning_rate, or look at the data, and train in another --workdir"
        )
    return state


def _check_memory(state: TrainState) -> None:
    if sharding.platform() != "cpu":  # whose memory the system grants until it kills
        return
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    remedy = "lower model.channels or model.depth (of a VaViT model.vavit.width or model.vavit.depth)"
    chips.check_room(needed, "the training state of the student", remedy)


def _make_pipeline(
    settings: TrainSettings, dataset: Dataset | FinishedScenes, task: Task, mesh: Mesh, workdir: Path
) -> Pipeline:
    """The training scenes of this process's shards."""
    scenes = scene_settings(settings.data, task.student.needs, task=task.scene_task, train=True, fixed=task.fixed)
    if task.scene_task == "distill" and not isinstance(dataset, FinishedScenes):
        scenes = with_views(scenes, settings.data, dataset)
    if task.num_classes and not isinstance(dataset, FinishedScenes):
        scenes = dataclasses.replace(scenes, mixing=make_mixing(settings.data, dataset, workdir / "instances"))
    shards: dict = {"num_shards": mesh.size, "shards": sharding.local_shards(mesh)}
    options: dict = {"num_workers": settings.data.num_workers, "scenes_per_step": settings.data.scenes_per_step or None}
    options["lookahead"] = settings.data.lookahead
    return Pipeline(dataset, scenes, seed=settings.run.seed, **shards, **options)


def _batches(
    pipeline: Pipeline,
    capacities: Capacities,
    template: SceneView,
    positions: np.ndarray,
    data: DataSettings,
    mesh: Mesh,
) -> Generator[tuple[Step, Batch], None, None]:
    """Steps with their batch on the devices, in the smallest of `data.buckets` that holds it on every process."""
    rooms, agree = in_buckets(capacities, data.buckets), distributed.agreement()
    steps = iter(pipeline.steps(capacities, template, positions, data.buckets))
    with closing(prefetch(steps, data.prefetch)) as source:
        for item in source:
            if len(rooms) > 1 and (bucket := agree(item.bucket)) > item.bucket:
                item = item._replace(batch=pipeline.batch(item.scenes, rooms[bucket], template))
            yield item, sharding.put_batch(item.batch, mesh)


class Program(NamedTuple):
    """A compiled step and where its state lies: all that `compile` needs, made without a device or an array."""

    fresh: Callable  # batch -> TrainState
    state: TrainState  # abstract, with shardings
    shardings: Any
    step: Any  # jitted: (state, teachers, batch) -> (state, metrics); the state is donated


def make_program(settings: TrainSettings, task: Task, batch: Any, mesh: Mesh, expected: float) -> Program:
    """The jitted step for batches like `batch` (arrays or shapes, with shardings) of `expected` scenes."""
    optimizer_settings, seed = settings.optimizer, settings.run.seed
    total = optimizer_settings.total_updates or settings.run.num_steps * expected / optimizer_settings.batch_size
    optimizer = optim.make_optimizer(optimizer_settings, task.student.backbone)
    step = task.make_step(optimizer, optim.make_schedule(optimizer_settings, total))
    if optimizer_settings.ema:
        step = steps.averaged(step, optimizer_settings.ema)
    key = jax.random.key(seed)

    def fresh(batch):
        state = init_state(task.student, batch, optimizer, task.trainable, key)
        return start_average(state, task.trainable or tuple(state.params)) if optimizer_settings.ema else state

    shapes = jax.eval_shape(fresh, batch)
    shardings = sharding.parameter_shardings(shapes, mesh)
    state = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, shardings
    )
    platform = mesh.devices.flat[0].platform
    step = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
        compiler_options=steps.compiler_options(platform, deterministic=settings.run.deterministic),
    )
    return Program(fresh, state, shardings, step)


def expected_scenes(sample: list[SceneView], capacities: Capacities, scenes_per_step: int, num_shards: int) -> float:
    """Scenes a step over all shards: exact with `scenes_per_step`, else from the sample's mean number of points."""
    if scenes_per_step:
        return float(scenes_per_step)
    mean_points = sum(len(scene.feats) for scene in sample) / len(sample)
    return num_shards * min(capacities.scenes, max(1.0, capacities.points / mean_points - 0.5))


def _start_from(state: TrainState, initial: Variables | None, shardings: Any) -> TrainState:
    """Replaces the top-level parameters and statistics that `initial` has (embedding and backbone), if it is given."""
    if initial is None:
        return state
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
    """Gathers metrics on the device and writes their means every few steps, of the steps that were not skipped.

    Rates leave out the first step, which waits for the compiler, but where they are asked of it alone.
    """

    def __init__(self, writer: MetricWriter, task: Task, capacities: Capacities, num_shards: int, every: int):
        self._writer, self._task, self._every = writer, task, every
        self._num_shards, self._scenes = num_shards, capacities.scenes * num_shards
        self._image = sum(teacher_flops(source.vit, 1, source.image_size) for source in task.sources if source.vit)
        self._pending: list[dict] = []
        self._rows = 0  # of points, of the pending steps
        self._flops: list[float] = []  # of one device, in each step that is timed
        self._since, self._first = time.monotonic(), True

    def add(self, step: int, metrics: dict, item: Step, *, now: bool) -> None:
        self._pending.append(metrics)
        self._rows += item.batch.scene.shape[1] * self._num_shards
        self._flops.append(self._count(item.batch))
        first, self._first, now = self._first, False, now or step % self._every == 0
        if first:
            jax.block_until_ready(metrics)
            self._writer.compiled(step)
        if now:
            self._write(step, item.bad_frames)
        if now or first:
            self._flops, self._since = [], time.monotonic()

    def _write(self, step: int, bad_frames: int) -> None:
        rows = jax.device_get(self._pending)
        kept = [row for row in rows if not row["skipped_steps"]]
        read = {key: rows if key in ("points", "scenes") else kept or rows for key in rows[0]}
        constants = [row for row in kept if np.isfinite(row.get("loss_constant", np.nan))] or rows
        read |= {key: constants for key in read if key.startswith("loss_constant")}
        mean = {key: float(np.mean([row[key] for row in of])) for key, of in read.items()}
        mean["skipped_steps"] = len(rows) - len(kept)
        timed = len(self._flops) / (time.monotonic() - self._since)  # steps a second
        points, scenes = mean.pop("points"), mean.pop("scenes")
        mean |= {"points_per_s": points * timed, "examples_per_s": scenes * timed, "scenes_per_step": scenes}
        mean |= {"point_fill": points * len(rows) / self._rows, "scene_fill": scenes / self._scenes}
        mean["bad_frames"] = bad_frames
        kind, num_flops = jax.local_devices()[0].device_kind, float(np.mean(self._flops))
        if num_flops and (share := chips.utilisation(num_flops * timed, 1.0, kind)) is not None:
            mean["mfu"] = share
        if (peak := chips.device_bytes()) is not None:
            mean["device_peak_bytes"] = peak
        self._writer.write(step, {f"train/{key}": value for key, value in mean.items()})
        self._pending, self._rows = [], 0

    def _count(self, batch: Batch) -> float:
        """The model's own FLOPs in a step of one of the batch's devices, as `models.flops` counts them; 0 where it does
        not know the student."""
        student, images = step_flops(self._task.student, batch), int(np.count_nonzero(batch.scene_points))
        return 0.0 if student is None else (student + self._image * images) / len(batch.scene_points)
