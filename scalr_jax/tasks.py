"""What each `config.task` does: build the data and the model, train, write results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from scalr_jax.data.build import make_dataset
from scalr_jax.data.sensors import evaluated_classes, known_classes
from scalr_jax.data.transforms import FEATURES
from scalr_jax.evaluation import report
from scalr_jax.evaluation import robustness as robust
from scalr_jax.evaluation.features import checksum, make_cache
from scalr_jax.evaluation.nearest_neighbors import nearest_neighbors
from scalr_jax.evaluation.segmentation import Evaluator
from scalr_jax.evaluation.submission import Submission
from scalr_jax.evaluation.zero_shot import zero_shot
from scalr_jax.interop import minkunet as interop_minkunet
from scalr_jax.interop import student as interop
from scalr_jax.interop.layout import empty_batch
from scalr_jax.models.backbone import CachedFeatures
from scalr_jax.models.build import make_backbone, make_student
from scalr_jax.models.heads import segmentation_head
from scalr_jax.models.student import without_head
from scalr_jax.runtime import sharding
from scalr_jax.runtime import workdir as workdir_of_run
from scalr_jax.runtime.checkpoint import load_variables
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import flatten, write_json
from scalr_jax.train.loop import distillation_task, segmentation_task, train
from scalr_jax.train.state import TrainState, variables_of

PROBE_CHOICES = {
    "method": ("head", "knn", "zero_shot"),
    "head": ("linear", "mlp"),
    "features": ("augmented", "fixed", "cached"),
}


def streets_cache(workdir: Path) -> Path:
    return workdir / "streets"


def _dataset(config: Any, workdir: Path, split: str) -> Any:
    """The dataset of a split; prints the table of what was found."""
    dataset = make_dataset(config, split, cache=streets_cache(workdir))
    if jax.process_index() == 0 and hasattr(dataset, "describe"):
        print(dataset.describe(), flush=True)
    return dataset


def last_metrics(workdir: Path) -> dict:
    """The last line of metrics.jsonl that belongs to a step."""
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line][-1]


def distill(config: Any, workdir: Path) -> TrainState:
    """Distil the teacher into the student; results.json holds the last logged metrics."""
    dataset = _dataset(config, workdir, config.data.split)
    state = train(config, workdir, dataset, distillation_task(config))
    if jax.process_index() == 0:
        write_json(workdir / "results.json", last_metrics(workdir))
        from scalr_jax.figures.curves import draw_loss

        draw_loss(workdir)
    return state


def num_classes_of(config: Any, dataset: Any) -> int:
    """Of the dataset's labels. Raises `InputError` when `model.num_classes` says another number."""
    number = len(dataset.class_names)
    if config.model.num_classes not in (None, number):
        raise InputError(
            f"model.num_classes = {config.model.num_classes}, and {config.data.dataset} has {number} classes; leave it "
            "out"
        )
    return number


def load_backbone(config: Any) -> dict:
    """params and batch_stats of `config.checkpoint`: a workdir's newest checkpoint, or a published file.

    Raises `InputError` when it is neither, and with every setting in which it differs from `config.model`.
    """
    path = Path(config.checkpoint)
    if config.checkpoint and path.is_file() and interop_minkunet.is_minkunet(path):
        there, variables = interop_minkunet.load_minkunet(path)
        inputs = {"intensity": interop_minkunet.INTENSITY, "voxel_size": there["minkunet"]["voxel_size"]}
        _check_model(path, there, inputs, config)
        return variables
    if config.checkpoint and path.is_file():
        there, weights = interop.read_student(path)
        there.activation = there.activation or config.model.activation  # downstream files do not say theirs
        _check_model(path, there, {}, config)
        return interop.convert_weights(weights, there, str(path))
    if config.checkpoint and (path / "checkpoints").is_dir():
        if (path / "config.json").is_file():
            written = json.loads((path / "config.json").read_text())
            inputs = {"intensity": tuple(written["data"].get("intensity", ()))}
            _check_model(path, written["model"], inputs, config)
            return load_variables(path / "checkpoints")
        variables = load_variables(path / "checkpoints")
        _check_shapes(path, variables, config)
        return variables
    if config.checkpoint and (path / "results.json").is_file():
        raise InputError(
            f"{path} keeps no weights: it is a probe of probe.method knn or zero_shot, an evaluation, or a run that "
            "ended before its first checkpoint; give the run whose weights it used"
        )
    raise InputError(
        f"config.checkpoint = {config.checkpoint!r} is neither the workdir of a run nor a published student; give one "
        "with --config.checkpoint=PATH (docs/weights.md says which files there are)"
    )


def _check_model(path: Path, there: Any, inputs: dict[str, Any], config: Any) -> None:
    """Raises `InputError` that lists the settings in which a checkpoint's model (`config.model`) and the points that it
    was trained on (`inputs`, of `config.data`) differ from the config's."""
    settings = [{"name": "waffleiron", **flatten(model)} for model in (there, config.model)]
    keys = ("name", *make_backbone(config.model).weight_keys)
    found = [(key, *(of.get(key) for of in settings)) for key in keys]
    wrong = [f"{key} is {a} there, {b} in config.model" for key, a, b in found if a not in (None, b)]
    for key, value in inputs.items():
        here = config.data[key]
        if value != (tuple(here) if isinstance(value, tuple) else here):
            wrong.append(f"{key} is {value} there, {here} in config.data")
    if wrong:
        raise InputError(f"{path} holds another student: {'; '.join(wrong)}; set these keys as they are there")


def _check_shapes(path: Path, variables: dict, config: Any) -> None:
    """The like of a folder without config.json, of which only the weights' shapes tell."""
    student = make_student(config.model, head="none", out_features=0, platform=sharding.platform())
    batch = empty_batch(len(FEATURES), student.needs)
    wanted = jax.eval_shape(lambda batch: student.init(jax.random.key(0), batch, train=False), batch)
    if jax.tree.map(np.shape, without_head(variables)) != jax.tree.map(np.shape, dict(wanted)):
        raise InputError(
            f"{path} holds a backbone of other shapes than config.model, and no config.json that says which; give the "
            "model it was made with"
        )


def _segment(config: Any, workdir: Path, *, label: str, frozen: bool, initial: dict | None) -> dict:
    """Train a segmentation head (and the backbone unless `frozen`), evaluate, write results.json."""
    dataset = _dataset(config, workdir, "train")
    validation = _dataset(config, workdir, "validation")
    num_classes = num_classes_of(config, dataset)
    task = segmentation_task(config, num_classes, label=label, initial=initial, frozen=frozen)
    student = task.student
    if isinstance(student.backbone, CachedFeatures):
        student = student.clone(backbone=student.backbone.backbone)
        with workdir_of_run.claim(config, workdir):
            dataset = make_cache(config, workdir / "features", dataset, initial)
    state = train(config, workdir, dataset, task)
    return _report(config, workdir, validation, student, variables_of(state), num_classes, label)


def _report(config: Any, workdir: Path, validation: Any, student: Any, variables: Any, num_classes: int, label: str):
    """Evaluate and write results.json; `student` has `apply(variables, batch, train=False)` -> [D, P, classes]."""
    evaluator = Evaluator(config, student, variables, num_classes)
    confusion = evaluator.confusion(validation).sum(axis=0)
    if confusion.sum() == 0:
        raise InputError("the evaluation set has no labelled point; check data.split and the labels' folder")
    results = {**report.results_of(confusion, validation.class_names), **_scans(evaluator, validation)}
    if jax.process_index() == 0:
        write_json(workdir / "results.json", results)
        print(f"{label}: mIoU {results['miou']:.4f}", flush=True)
    return results


def _scans(evaluator: Evaluator, dataset: Any) -> dict[str, int]:
    """How many scans were evaluated, and how many could not be read."""
    return {"scans": evaluator.num_scans, "bad_scans": len(dataset) - evaluator.num_scans}


def probe(config: Any, workdir: Path) -> dict:
    """What the frozen backbone of `config.checkpoint` knows, by `config.probe.method`; see docs/downstream.md."""
    for key, known in PROBE_CHOICES.items():
        if config.probe[key] not in known:
            raise InputError(f"probe.{key} = {config.probe[key]!r} is none of {', '.join(known)}")
    backbone = load_backbone(config)
    if config.probe.method == "head":
        return _segment(config, workdir, label="probe", frozen=True, initial=backbone)
    dataset = _dataset(config, workdir, "train")
    validation = _dataset(config, workdir, "validation")
    num_classes = num_classes_of(config, dataset)
    with workdir_of_run.claim(config, workdir):
        if config.probe.method == "knn":
            student, variables = nearest_neighbors(config, dataset, backbone, num_classes)
        else:
            student, variables = zero_shot(config, dataset, backbone, num_classes)
        return _report(config, workdir, validation, student, variables, num_classes, config.probe.method)


def finetune(config: Any, workdir: Path) -> dict:
    """All parameters, from `config.checkpoint`, or from random weights when it is empty."""
    initial = load_backbone(config) if config.checkpoint else None
    return _segment(config, workdir, label="finetune", frozen=False, initial=initial)


def load_segmenter(config: Any) -> tuple[Any, dict, int]:
    """The student with the segmentation head of `config.checkpoint`, its variables, and its number of classes.

    Raises `InputError` when the checkpoint has no such head, or is of another model than `config.model`.
    """
    variables = load_backbone(config)
    head = segmentation_head(variables["params"])
    if head is None:
        raise InputError(f"{config.checkpoint} holds no segmentation head; give the workdir of a probe or fine-tuning")
    num_classes = variables["params"]["head"]["bias"].shape[0]
    student = make_student(config.model, head=head, out_features=num_classes, platform=sharding.platform())
    return student, variables, num_classes


def class_order(config: Any, dataset: Any, num_classes: int) -> np.ndarray:
    """The dataset's class [num_classes] of each class of the model in `config.checkpoint`, by name.

    A published file does not name its classes: those of the dataset are then taken in order. Raises `InputError` when
    the model and the dataset have other classes.
    """
    here, path = tuple(dataset.class_names), Path(config.checkpoint)
    there = here if len(here) == num_classes else ()
    if (path / "config.json").is_file():
        trained_on = json.loads((path / "config.json").read_text())["data"]["dataset"]
        there = known_classes(trained_on, num_classes, evaluated_classes(path)) or there
    if len(here) != num_classes or set(there) != set(here):
        described = f" ({', '.join(there)})" if there else ""
        raise InputError(
            f"{path} tells {num_classes} classes apart{described}, and {config.data.dataset} has {len(here)} "
            f"({', '.join(here)}); evaluate on a dataset with the classes of the training"
        )
    return np.array([here.index(name) for name in there])


def evaluate(config: Any, workdir: Path) -> dict:
    """The probed or fine-tuned run in `config.checkpoint` on `config.data`; docs/evaluation.md says what it writes."""
    student, variables, num_classes = load_segmenter(config)
    dataset = _dataset(config, workdir, config.data.split)
    order = class_order(config, dataset, num_classes)
    rings = report.check_rings(config.evaluate.rings)
    evaluator = Evaluator(config, student, variables, num_classes, votes=config.evaluate.votes, order=order)
    with workdir_of_run.claim(config, workdir):
        if config.evaluate.submission:
            with Submission(dataset, workdir / "submission", config.evaluate.submission_uses) as submission:
                confusion = evaluator.confusion(dataset, rings=rings, keep=submission.add)
                submission.finish()
        else:
            confusion = evaluator.confusion(dataset, rings=rings)
        if confusion.sum() == 0:
            if config.evaluate.submission:
                return {}
            raise InputError("the evaluation set has no labelled point; check data.split and the labels' folder")
        results = report.results_by_range(confusion, rings, dataset.class_names)
        results = {**results, "votes": config.evaluate.votes, **_scans(evaluator, dataset)}
        if jax.process_index() == 0:
            report.write_confusion(workdir / "confusion.json", confusion, rings, dataset.class_names)
            write_json(workdir / "results.json", results)
            title = f"{config.data.dataset}, {config.data.split}: mIoU {results['miou']:.1%}"
            from scalr_jax.figures.charts import draw_confusion

            draw_confusion(workdir / "figures" / "confusion.png", confusion.sum(axis=0), results, title)
            print(report.confusion_table(confusion.sum(axis=0), dataset.class_names), flush=True)
            print(f"\n{report.class_table(results)}", flush=True)
    return results


def robustness(config: Any, workdir: Path) -> dict:
    """What the run in `config.checkpoint` loses under `config.evaluate.corruptions`; see docs/robustness.md."""
    student, variables, num_classes = load_segmenter(config)
    dataset = _dataset(config, workdir, config.data.split)
    order = class_order(config, dataset, num_classes)
    evaluator = Evaluator(config, student, variables, num_classes, votes=config.evaluate.votes, order=order)
    weights = checksum(variables, head=True)
    with workdir_of_run.claim(config, workdir):
        results = robust.measure(config, workdir, evaluator, dataset, weights)
        if jax.process_index() == 0:
            write_json(workdir / "results.json", results)
            from scalr_jax.figures.charts import draw_robustness

            title = f"{config.data.dataset}: {config.checkpoint}"
            draw_robustness(workdir / "figures" / "robustness.png", results, title)
            print(robust.table(results), flush=True)
    return results


def demo(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Distil, probe, train with supervision, compare; see `demo.py`."""
    from scalr_jax.demo.run import run_demo

    run_demo(config, workdir)


def teacher(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Train the packaged demo teacher; see `demo_teacher.py`."""
    from scalr_jax.demo.teacher import train_teacher

    train_teacher(config, workdir)
