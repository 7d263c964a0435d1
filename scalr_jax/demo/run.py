"""The demo: does distillation from images teach a lidar network anything? Measured on streets it has not seen.

(a) a linear probe on the student with random weights (its batch norms have seen the data)
(b) the same probe on the distilled student, frozen
(c) the same student trained with full supervision, for as many steps as distillation and probe together,
    best of several learning rates

gap_closed = (b - a) / (c - a)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from scalr_jax import tasks
from scalr_jax.config import DataSettings, Settings
from scalr_jax.data.build import make_dataset, scene_settings
from scalr_jax.data.packing import choose_capacities, derive_capacities, pack_shard
from scalr_jax.data.pipeline import Pipeline
from scalr_jax.data.scenes import Dataset, Frame, SceneView
from scalr_jax.evaluation.report import results_of
from scalr_jax.figures.charts import draw_loss, read_curve
from scalr_jax.figures.colors import cosine_similarity
from scalr_jax.figures.pictures import Panel, draw_with_image
from scalr_jax.models.layers import MOMENTUM
from scalr_jax.models.student import Student, Variables
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import read_json, write_json
from scalr_jax.train.loop import Task, train
from scalr_jax.train.state import TrainState, variables_of

CALIBRATION_STEPS = 20


def run_demo(settings: Settings, workdir: Path) -> dict:
    """Everything above, each part in its own folder of `workdir`, so that running again resumes. Prints the figures."""
    started, part_names = time.monotonic(), _announced(settings.demo.supervised_learning_rates)
    dataset, validation = (
        make_dataset(settings.data, split, task="demo", seed=settings.run.seed, cache=workdir / "streets")
        for split in ("train", "validation")
    )
    part = part_settings(settings, "distill")
    task = tasks.distillation(part)
    next(part_names)
    state = _train(part, workdir / "distill", dataset, task)
    distilled = jax.device_get(variables_of(state))
    random = _random_backbone(part, task.student.clone(head="none"), dataset)

    def segment(name: str, part: Settings, *, frozen: bool, initial: dict | None) -> dict:
        folder = workdir / name
        next(part_names)
        if not (folder / "results.json").exists():
            num_classes = len(dataset.class_names)
            task = tasks.segmentation(part, num_classes, label=name, frozen=frozen, initial=initial)
            state = _train(part, folder, dataset, task)
            evaluator = tasks.make_evaluator(part, task.student, variables_of(state), num_classes)
            results = results_of(evaluator.confusion(validation).sum(axis=0), dataset.class_names)
            write_json(folder / "results.json", results)
            print(f"{name}: mIoU {results['miou']:.3f}", flush=True)
        results = read_json(folder / "results.json", again := "remove it, and the part is evaluated again")
        if not isinstance(results.get("miou"), float):
            raise InputError(f"{folder / 'results.json'} holds no miou; {again}")
        return results

    probe = part_settings(settings, "probe")
    results_random = segment("probe_random", probe, frozen=True, initial=random)
    results_distilled = segment("probe_distilled", probe, frozen=True, initial=distilled)
    supervised = {}
    for rate in settings.demo.supervised_learning_rates:
        part = part_settings(settings, "finetune")
        part = dataclasses.replace(part, optimizer=dataclasses.replace(part.optimizer, learning_rate=rate))
        supervised[rate] = segment(f"supervised_{rate:g}", part, frozen=False, initial=None)
    best = max(supervised, key=lambda rate: supervised[rate]["miou"])

    parts = {"random": results_random, "distilled": results_distilled, "supervised": supervised[best]}
    results = {
        **{f"miou_{name}": part["miou"] for name, part in parts.items()},
        "supervised_learning_rate": best,
        "gap_closed": gap_closed(*(part["miou"] for part in parts.values())),
        "seconds": add_seconds(workdir, time.monotonic() - started),
        "points_per_s": float(np.median(read_curve(workdir / "distill", "train/points_per_s")[1])),
        **{f"iou_{name}": part["iou"] for name, part in parts.items()},
    }
    write_json(workdir / "results.json", results)
    draw_loss(workdir / "distill", workdir / "figures" / "loss.png")
    draw_correlations(settings.data, task.student, validation, distilled, workdir / "figures")
    print(table(results), flush=True)
    return results


def _announced(rates: Sequence[float]) -> Iterator[None]:
    """Says what each part of the demo does when it is the part's turn."""
    parts = ["distilling the teacher, without labels", "a linear probe on random weights"]
    parts += ["a linear probe on the distilled student", *(f"all labels, learning rate {rate:g}" for rate in rates)]
    for number, part in enumerate(parts, 1):
        print(f"demo, part {number} of {len(parts)}: {part}", flush=True)
        yield


def _train(settings: Settings, workdir: Path, dataset: Dataset, task: Task) -> TrainState:
    """One part, in its own workdir."""
    with tasks.claimed(settings, workdir):
        tasks.save_settings(settings, workdir, task, dataset)
        return train(settings.training, workdir, dataset, task)


def gap_closed(random: float, distilled: float, supervised: float) -> float:
    """The share of the gap from random to supervised that distillation closes; NaN when there is no gap."""
    return (distilled - random) / (supervised - random) if supervised != random else float("nan")


def table(results: dict) -> str:
    """The figures, per class, for the terminal."""
    lines = [f"{'IoU':<14}{'random':>10}{'distilled':>11}{'supervised':>12}"]
    for name in results["iou_random"]:
        values = [results[f"iou_{kind}"][name] for kind in ("random", "distilled", "supervised")]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"{name:<14}{cells[0]:>10}{cells[1]:>11}{cells[2]:>12}")
    values = [results[f"miou_{kind}"] for kind in ("random", "distilled", "supervised")]
    lines.append(f"{'mIoU':<14}{values[0]:>10.3f}{values[1]:>11.3f}{values[2]:>12.3f}")
    lines.append(f"gap closed {results['gap_closed']:.2f}, {results['seconds']:.0f} s")
    return "\n".join(lines)


def part_settings(settings: Settings, task: str) -> Settings:
    """The settings of one part of the demo: "distill", "probe" or "finetune"."""
    replace, demo = dataclasses.replace, settings.demo
    run = replace(settings.run, task=task)
    if task == "distill":
        return replace(settings, run=run)
    sizes = {"points_per_shard": demo.segment_points_per_shard, "scenes_per_shard": demo.segment_scenes_per_shard}
    data = replace(settings.data, max_points=demo.segment_max_points, augmentation="consistent", **sizes)
    optimizer = replace(settings.optimizer, weight_decay=0.003)
    if task == "probe":
        run = replace(run, num_steps=demo.probe_steps)
        optimizer = replace(optimizer, learning_rate=demo.probe_learning_rate)
    else:
        run = replace(run, num_steps=run.num_steps + demo.probe_steps)
    return replace(settings, run=run, data=data, optimizer=optimizer)


def _random_backbone(settings: Settings, student: Student, dataset: Dataset) -> dict:
    """Random weights, with batch norms' statistics of some steps of data: else the probe would read raw metres."""
    scenes = scene_settings(settings.data, student.needs, task="distill", train=True)
    pipeline = Pipeline(dataset, scenes, seed=settings.run.seed + 1)
    sample = pipeline.sample()
    capacities = choose_capacities(settings.data, sample)
    variables = jax.jit(lambda batch: student.init(jax.random.key(settings.run.seed), batch, train=False))(
        jax.tree.map(jax.numpy.asarray, pipeline.empty_batch(capacities, sample[0]))
    )

    initial = variables["batch_stats"]

    @jax.jit
    def observe(variables, batch):
        _, updated = student.apply(
            variables, batch, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"]
        )
        return {**variables, **updated}

    steps = pipeline.steps(capacities, sample[0])
    for _ in range(CALIBRATION_STEPS):
        variables = observe(variables, jax.tree.map(jax.numpy.asarray, next(steps).batch))
    # The mean over the steps alone. A share of the initial variance of 1 in each norm of a chain of narrow layers would
    # make their features vanish, and the comparison with random weights too easy.
    share = (1 - MOMENTUM) ** CALIBRATION_STEPS
    only = lambda now, first: (now - share * first) / (1 - share)  # noqa: E731
    statistics = jax.tree.map(only, variables["batch_stats"], initial)
    return jax.device_get({**variables, "batch_stats": statistics})


def draw_correlations(
    data: DataSettings, student: Student, dataset: Dataset, variables: Variables, folder: Path, *, number: int = 2
) -> list[Path]:
    """Correlation maps of the distilled student for scenes with a car in view; query: the car's middle point."""
    scenes = scene_settings(data, student.needs, task="distill", train=False, fixed=True)
    pipeline = Pipeline(dataset, scenes, epochs=1)
    apply = jax.jit(lambda variables, batch: student.apply(variables, batch, train=False))
    car = dataset.class_names.index("car")
    drawn: list[Path] = []
    order = pipeline.order()
    for index in range(len(dataset)):
        scene = order[index]
        query = _query_point(scene, dataset.frame(index, np.random.default_rng(0)), car)
        if query is None:
            continue
        capacities = derive_capacities([scene], points=data.points_per_shard, scenes=1)
        batch = pack_shard([scene], capacities, scene, student.needs.grids)
        batch = jax.tree.map(lambda x: jax.numpy.asarray(x)[None], batch)
        features = np.asarray(apply(variables, batch))[0, : len(scene.feats)]
        panel = Panel("top view", cosine_similarity(features, query), label="cosine similarity to the star")
        title = "distilled student, unseen street: similarity to one point on a car"
        xyz, everywhere = scene.feats[:, 1:4], np.ones(len(scene.feats), bool)
        assert scene.image is not None and scene.pixels is not None, "a distillation scene has an image"  # noqa: PT018
        drawn.append(folder / f"correlation_{len(drawn)}.png")
        folder.mkdir(parents=True, exist_ok=True)
        image = scene.image.astype(np.uint8)
        draw_with_image(drawn[-1], xyz, title, panel, image, scene.pixels, everywhere, query=query)
        if len(drawn) == number:
            break
    return drawn


def _query_point(scene: SceneView, frame: Frame, car: int) -> int | None:
    """The point of the scene that is nearest to the middle of the largest car in view, or None."""
    if scene.error is not None:
        return None
    chosen = frame.visible & (frame.labels == car)
    if chosen.sum() < 40:
        return None
    points = frame.points[chosen, :3]
    near = points[np.linalg.norm(points - points[np.linalg.norm(points, axis=1).argmin()], axis=1) < 2.5]
    middle = near.mean(axis=0)
    xyz = scene.feats[:, 1:4]
    own = np.linalg.norm(xyz[:, None] - near[None], axis=-1).min(axis=1) < 0.15  # on the car itself
    distance = np.linalg.norm(xyz - middle, axis=1) + np.where(own, 0.0, 1e3)
    return int(distance.argmin())


def add_seconds(workdir: Path, seconds: float) -> float:
    """Seconds over all starts of the run in `workdir`, these included; kept in `seconds.json`."""
    path = workdir / "seconds.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # of a file that is not there, or damaged: a new sum
        seconds += json.loads(path.read_text())
    write_json(path, seconds)
    return seconds
