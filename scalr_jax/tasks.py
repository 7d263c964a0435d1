"""The tasks of `config.task`: open the data, make the model, train, evaluate, write results.json.

Here the frozen settings of the config get what the sensor or the dataset decides (number of classes, their order,
intensities), and go on in parts: what is below takes the settings it needs, never the whole config.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scalr_jax.config import Settings, all_keys
from scalr_jax.data.build import make_dataset
from scalr_jax.data.scenes import Dataset
from scalr_jax.data.tokens.store import TokenStore
from scalr_jax.evaluation import report
from scalr_jax.evaluation import robustness as robust
from scalr_jax.evaluation.features import cache_key, checksum, make_cache
from scalr_jax.evaluation.nearest_neighbors import nearest_neighbors
from scalr_jax.evaluation.segmentation import Evaluator
from scalr_jax.evaluation.submission import Submission
from scalr_jax.evaluation.zero_shot import Images, zero_shot
from scalr_jax.figures.charts import draw_confusion, draw_loss, draw_robustness
from scalr_jax.interop.published import read_published
from scalr_jax.interop.saved import AGAIN, TEACHER, Saved, columns_of, read_saved, write_settings
from scalr_jax.interop.teacher import make_teacher, names_of, open_tokens, taught_by
from scalr_jax.models.backbone import CachedFeatures
from scalr_jax.models.build import make_backbone, make_student
from scalr_jax.models.heads import segmentation_head
from scalr_jax.models.student import Classifier, Student, Variables, without_head
from scalr_jax.models.vit import ViTConfig
from scalr_jax.runtime import sharding
from scalr_jax.runtime import workdir as workdirs
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.logging import read_metrics
from scalr_jax.runtime.storage import flatten, read_json, write_json
from scalr_jax.settings import record_of
from scalr_jax.train import steps
from scalr_jax.train.loop import Task, train
from scalr_jax.train.normalization import FILE as NORMALIZATIONS
from scalr_jax.train.normalization import read_normalizations, shapes
from scalr_jax.train.state import TrainState, variables_of
from scalr_jax.train.teachers import Source, Teacher, unmeasured

# ---- what every task needs


@contextlib.contextmanager
def claimed(settings: Settings, workdir: Path, tokens: Sequence[TokenStore | None] = ()) -> Iterator[None]:
    """Holds `workdir` for a run of these settings, and of each teacher's `tokens`; see `runtime.workdir.claim`."""
    record = record_of(settings)
    for teacher, store in zip(record["teachers"] or [record["teacher"]], tokens, strict=False):
        if store is not None:  # the cache may move, but not change
            teacher |= {"cache_digest": store.digest} | ({"cache": ""} if record["teachers"] else {})
    with workdirs.claim(workdir, record, all_keys()):
        yield


def open_dataset(settings: Settings, workdir: Path, split: str, tokens: Sequence[TokenStore | None] = ()) -> Dataset:
    """The dataset of a split, with each teacher's `tokens` where it has a cache; prints the table of what was found."""
    options = {"task": settings.run.task, "seed": settings.run.seed, "cache": workdir / "streets"}
    stores = [store for store in tokens if store]
    dataset = make_dataset(settings.data, split, **options, tokens=stores, images=len(stores) < len(tokens))
    if jax.process_index() == 0:
        print(dataset.describe(), flush=True)
    return dataset


def student_of(settings: Settings, head: str, out_features: int, *, frozen: bool = False) -> Student:
    """The student of `config.model` on this machine's devices."""
    platform = sharding.platform()
    return make_student(settings.model, head=head, out_features=out_features, platform=platform, frozen_backbone=frozen)


def step_options(settings: Settings) -> dict[str, int]:
    """Options of every training step."""
    group, size = settings.loss.scenes_per_group, settings.optimizer.batch_size
    return {"seed": settings.run.seed, "batch_size": size, "scenes_per_group": group}


def distillation(settings: Settings, given: Sequence[tuple[ViTConfig, dict] | int] = ()) -> Task:
    """The distillation of the config's teachers. `given`: of each its architecture and parameters (or their shapes),
    where the batch brings its tokens their channels, or 0; what is not given is made."""
    size, chosen, sources, arrays = settings.data.image_size, settings.teachers, [], []
    for name, options, made in zip(names_of(chosen), chosen, given or (0,) * len(chosen), strict=True):
        made = made or make_teacher(options, size, sharding.platform())
        width, vit_config, params = (made, None, None) if isinstance(made, int) else (made[0].width, *made)
        cache = sum(source.vit is None for source in sources)
        more = (options.feature, options.normalize, options.weight, name, cache)
        sources.append(Source(width, size, vit_config, *more))
        arrays.append(unmeasured(sources[-1], params))
    widths = tuple(source.width for source in sources)
    student = student_of(settings, "distill", sum(widths)).clone(teacher_widths=widths if len(widths) > 1 else ())
    run, options = settings.run, {"sources": tuple(sources), **step_options(settings)}
    options |= {"lines": (run.log_every_steps, run.checkpoint_every_steps, run.num_steps)}
    options |= {"teacher_dropping": settings.loss.teacher_dropping}
    step = partial(steps.make_distill_step, student, **options)
    return Task("distill", "distill", student, None, step, tuple(arrays), sources=tuple(sources))


def segmentation(settings: Settings, num_classes: int, *, label: str, frozen: bool, initial: Variables | None) -> Task:
    """Probing (`frozen`) or fine-tuning; `initial` holds a backbone's params and batch_stats, or None for random."""
    head = "mlp" if frozen and settings.probe.head == "mlp" else settings.model.segmentation_head
    student = student_of(settings, head, num_classes, frozen=frozen)
    fixed = settings.run.task == "probe" and settings.probe.features != "augmented"
    if frozen and initial is not None and settings.probe.features == "cached":
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), without_head(initial))
        student = student.clone(backbone=CachedFeatures(student.backbone, shapes))
    scene_task = "features" if isinstance(student.backbone, CachedFeatures) else "segment"
    trainable = ("head",) if frozen else None
    step = partial(steps.make_segment_step, student, trainable=trainable, **step_options(settings))
    return Task(label, scene_task, student, trainable, step, (), initial, num_classes, fixed)


def num_classes_of(settings: Settings, dataset: Dataset) -> int:
    """Number of the dataset's classes. Raises `InputError` when `model.num_classes` says another number."""
    number = len(dataset.class_names)
    if settings.model.num_classes not in (None, number):
        raise InputError(
            f"model.num_classes = {settings.model.num_classes}, and {settings.data.dataset} has {number} classes; "
            "leave it out"
        )
    return number


# ---- the checkpoint to start from


def load_backbone(settings: Settings) -> Saved:
    """`config.checkpoint`: a workdir's newest checkpoint, or a published file.

    Raises `InputError` for anything else, and with every setting in which it differs from the config.
    """
    path = Path(settings.run.checkpoint)
    if settings.run.checkpoint and path.is_file():
        found = read_published(path)
        saved, inputs = Saved(found.model, found.variables), found.data
    elif (settings.run.checkpoint and (path / "checkpoints").is_dir()) or (path / "results.json").is_file():
        saved, inputs = read_saved(path), {"intensity": _given_intensity(path)}
    else:
        raise InputError(
            f"config.checkpoint = {settings.run.checkpoint!r} is neither the workdir of a run nor a published student; "
            "give one with --config.checkpoint=PATH (docs/weights.md says which files there are)"
        )
    keys = ("name", *make_backbone(settings.model).weight_keys)
    there, here = flatten(saved.settings), flatten(dataclasses.asdict(settings.model))
    found = [(key, there.get(key), here[key]) for key in keys]
    wrong = [f"{key} is {a} there, {b} in config.model" for key, a, b in found if a not in (None, b)]
    data = [(key, a, getattr(settings.data, key)) for key, a in inputs.items()]
    wrong += [f"{key} is {a} there, {b} in config.data" for key, a, b in data if a != b]
    if wrong:
        raise InputError(f"{path} holds another student: {'; '.join(wrong)}; set these keys to its values")
    return saved


def _given_intensity(workdir: Path) -> tuple[float, ...]:
    """`data.intensity` of the run that wrote a workdir. Raises `InputError` for a damaged config.json."""
    path = workdir / "config.json"
    content = read_json(path, AGAIN) if path.exists() else {"data": {}}
    try:
        return tuple(content["data"].get("intensity", ()))
    except (KeyError, AttributeError, TypeError):
        raise InputError(f"{path}: data.intensity is not that of a run; {AGAIN}") from None


def load_segmenter(settings: Settings) -> tuple[Student, Saved]:
    """The student with the segmentation head of `config.checkpoint`. Raises `InputError` when it has no such head."""
    saved = load_backbone(settings)
    params = saved.variables["params"]
    head = segmentation_head(params)
    if head is None:
        raise InputError(
            f"{settings.run.checkpoint} holds no segmentation head; give the workdir of a probe or fine-tuning"
        )
    return student_of(settings, head, params["head"]["bias"].shape[0]), saved


def class_order(settings: Settings, class_names: Sequence[str], saved: Saved, num_classes: int) -> np.ndarray:
    """The dataset's class [num_classes] of each class of the model, by name.

    A published file does not name its classes: those of the dataset are then taken in order. Raises `InputError` when
    the model and the dataset have other classes.
    """
    here = tuple(class_names)
    there = tuple(saved.settings.get("class_names") or (here if len(here) == num_classes else ()))
    if len(here) != num_classes or set(there) != set(here):
        described = f" ({', '.join(there)})" if there else ""
        raise InputError(
            f"{settings.run.checkpoint} has {num_classes} classes{described}, and {settings.data.dataset} has "
            f"{len(here)} ({', '.join(here)}); evaluate on a dataset with the classes of the training"
        )
    return np.array([here.index(name) for name in there])


# ---- training


def distill(settings: Settings, workdir: Path) -> TrainState:
    """Distils the teacher into the student; results.json holds the last logged metrics."""
    tokens = [open_tokens(teacher, settings.data) for teacher in settings.teachers]
    with claimed(settings, workdir, tokens):
        # An impossible teacher is refused before streets are rendered.
        task = distillation(settings, [store.channels if store else 0 for store in tokens])
        dataset = open_dataset(settings, workdir, settings.data.split, tokens)
        save_settings(settings, workdir, task, dataset)
        state = train(settings.training, workdir, dataset, task)
        if jax.process_index() == 0:
            lines = [line for line in read_metrics(workdir / "metrics.jsonl") if "train/loss" in line]
            if not lines:
                raise InputError(f"{workdir / 'metrics.jsonl'} has no line with train/loss; {AGAIN}")
            write_json(workdir / "results.json", lines[-1])
            draw_loss(workdir)
    return state


def save_settings(settings: Settings, workdir: Path, task: Task, dataset: Dataset) -> None:
    """Writes settings.json, on process 0."""
    if jax.process_index() == 0:
        teachers = [{name: getattr(source, name) for name in TEACHER} for source in task.sources]
        write_settings(workdir, settings.model, settings.data, task.student, dataset, teachers)


def probe(settings: Settings, workdir: Path) -> dict:
    """Probes the frozen backbone of `config.checkpoint` by `config.probe.method`; see docs/downstream.md."""
    saved = load_backbone(settings)
    if settings.probe.method == "head":
        return _segment(settings, workdir, label="probe", frozen=True, initial=saved.variables)
    with claimed(settings, workdir):
        dataset = open_dataset(settings, workdir, "train")
        validation = open_dataset(settings, workdir, "validation")
        num_classes = num_classes_of(settings, dataset)
        if settings.probe.method == "knn":
            student = student_of(settings, "none", 0)
            classifier, variables = nearest_neighbors(
                settings.probe, settings.training, student, dataset, saved.variables, num_classes
            )
        else:
            classifier, variables = _zero_shot(settings, dataset, saved)
        return _report(settings, workdir, validation, classifier, variables, label=settings.probe.method)


def _zero_shot(settings: Settings, dataset: Dataset, saved: Saved) -> tuple[Classifier, Variables]:
    """The zero-shot classifier of a distilled student. Raises `InputError` without a teacher that taught it."""
    path, options, data = Path(settings.run.checkpoint), settings.teacher, settings.data
    head = saved.variables["params"].get("head", {})
    if "out" not in head:
        raise InputError(f"{path} holds no distillation head; zero-shot needs the workdir of a distillation")
    vit_config, params = make_teacher(options, data.image_size, sharding.platform())
    number, normalization, columns = 0, None, slice(0, head["out"]["kernel"].shape[1])
    if known := saved.settings.get("teachers"):
        number = taught_by(path / "config.json", options)
        like = [shapes(each["normalize"], each["width"]) for each in known]
        normalization = read_normalizations(path / NORMALIZATIONS, like)[number] if any(like) else None
        columns = columns_of(saved.settings, known[number]["name"])
    elif (path / "config.json").is_file():
        taught_by(path / "config.json", options)
    if vit_config.width != (width := columns.stop - columns.start):
        raise InputError(
            f"{path} was distilled from a teacher {width} wide, and teacher.checkpoint = {options.checkpoint!r} is "
            f"{vit_config.width} wide; give the one it was distilled from"
        )
    source = Source(width, data.image_size, vit_config, options.feature, options.normalize)
    out = {name: array[..., columns] for name, array in head["out"].items()}
    variables = {**saved.variables, "params": {**saved.variables["params"], "head": {**head, "out": out}}}
    hidden = head["hidden"]["kernel"].shape[1] if "hidden" in head else 0
    student = student_of(settings, "distill", width).clone(head_hidden=hidden)
    images = Images(data.image_size, data.antialias, settings.run.seed, data.image_dtype)
    return zero_shot(settings.probe, student, (source, Teacher(params, normalization)), dataset, variables, images)


def finetune(settings: Settings, workdir: Path) -> dict:
    """Trains all parameters, from `config.checkpoint`, or from random weights when it is empty."""
    initial = load_backbone(settings).variables if settings.run.checkpoint else None
    return _segment(settings, workdir, label="finetune", frozen=False, initial=initial)


def _segment(settings: Settings, workdir: Path, *, label: str, frozen: bool, initial: Variables | None) -> dict:
    """Trains a segmentation head (and the backbone unless `frozen`), evaluates, writes results.json."""
    with claimed(settings, workdir):
        dataset: Any = open_dataset(settings, workdir, "train")
        validation = open_dataset(settings, workdir, "validation")
        num_classes = num_classes_of(settings, dataset)
        task = segmentation(settings, num_classes, label=label, frozen=frozen, initial=initial)
        student = task.student
        save_settings(settings, workdir, task, dataset)
        if isinstance(student.backbone, CachedFeatures) and initial is not None:
            student = student.clone(backbone=student.backbone.backbone)
            key, dtype = cache_key(record_of(settings), dataset, initial), settings.probe.cache_dtype
            folder = workdir / "features"
            dataset = make_cache(settings.training, student, folder, dataset, initial, key=key, dtype=dtype)
        state = train(settings.training, workdir, dataset, task)
        return _report(settings, workdir, validation, student, variables_of(state), label=label)


# ---- evaluation


def make_evaluator(
    settings: Settings, classifier: Classifier, variables: Variables, num_classes: int, **more: Any
) -> Evaluator:
    """The evaluator of a classifier on this run's devices; `more` as `Evaluator` takes it."""
    mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp)
    return Evaluator(settings.data, mesh, classifier, variables, num_classes, seed=settings.run.seed, **more)


def _report(
    settings: Settings, workdir: Path, validation: Dataset, classifier: Classifier, variables: Variables, *, label: str
) -> dict:
    """Evaluates and writes results.json."""
    evaluator = make_evaluator(settings, classifier, variables, len(validation.class_names))
    confusion = _labelled(evaluator.confusion(validation)).sum(axis=0)
    results = {**report.results_of(confusion, validation.class_names), **_scans(evaluator, validation)}
    if jax.process_index() == 0:
        write_json(workdir / "results.json", results)
        print(f"{label}: mIoU {results['miou']:.4f}", flush=True)
    return results


def _labelled(confusion: np.ndarray) -> np.ndarray:
    """Confusion matrices that count a point. Raises `InputError` for others."""
    if confusion.sum() == 0:
        raise InputError("the evaluation set has no labelled point; check data.split and the labels' folder")
    return confusion


def _scans(evaluator: Evaluator, dataset: Dataset) -> dict[str, int]:
    """How many scans were evaluated, and how many could not be read."""
    return {"scans": evaluator.num_scans, "bad_scans": len(dataset) - evaluator.num_scans}


def evaluate(settings: Settings, workdir: Path) -> dict:
    """The probed or fine-tuned run in `config.checkpoint` on `config.data`; docs/evaluation.md says what it writes."""
    evaluator, dataset, _ = _open_evaluation(settings, workdir)
    rings, options = settings.evaluate.rings, settings.evaluate
    with claimed(settings, workdir):
        if options.submission:
            with Submission(dataset, workdir / "submission", options.submission_uses) as submission:
                confusion = evaluator.confusion(dataset, rings=rings, keep=submission.add)
                submission.finish()
            if confusion.sum() == 0:
                return {}
        else:
            confusion = _labelled(evaluator.confusion(dataset, rings=rings))
        results = report.results_by_range(confusion, rings, dataset.class_names)
        results = {**results, "votes": options.votes, **_scans(evaluator, dataset)}
        if jax.process_index() == 0:
            report.write_confusion(workdir / "confusion.json", confusion, rings, dataset.class_names)
            write_json(workdir / "results.json", results)
            title = f"{settings.data.dataset}, {settings.data.split}: mIoU {results['miou']:.1%}"
            draw_confusion(workdir / "figures" / "confusion.png", confusion.sum(axis=0), results, title)
            print(report.confusion_table(confusion.sum(axis=0), dataset.class_names), flush=True)
            print(f"\n{report.class_table(results)}", flush=True)
    return results


def _open_evaluation(settings: Settings, workdir: Path) -> tuple[Evaluator, Dataset, Variables]:
    """The model of `config.checkpoint`, ready to classify the scans of `config.data`, and its variables."""
    student, saved = load_segmenter(settings)
    dataset = open_dataset(settings, workdir, settings.data.split)
    order = class_order(settings, dataset.class_names, saved, student.out_features)
    votes = settings.evaluate.votes
    evaluator = make_evaluator(settings, student, saved.variables, student.out_features, votes=votes, order=order)
    return evaluator, dataset, saved.variables


def robustness(settings: Settings, workdir: Path) -> dict:
    """Evaluates the run in `config.checkpoint` under `config.evaluate.corruptions`; see docs/robustness.md."""
    evaluator, dataset, variables = _open_evaluation(settings, workdir)
    free = [*(row.name for row in all_keys() if row.resume), "data.image_dtype"]  # existing parts were made without it
    key = robust.part_key(record_of(settings), checksum(variables, head=True), free)
    with claimed(settings, workdir):
        results = robust.measure(settings.evaluate, settings.data, workdir, evaluator, dataset, key)
        if jax.process_index() == 0:
            write_json(workdir / "results.json", results)
            title = f"{settings.data.dataset}: {settings.run.checkpoint}"
            draw_robustness(workdir / "figures" / "robustness.png", results, title)
            print(robust.table(results), flush=True)
    return results
