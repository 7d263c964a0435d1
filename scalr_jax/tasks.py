"""What each `config.task` does: build the data and the model, train, write results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections

from scalr_jax import build, interop, metrics
from scalr_jax import workdir as workdir_of_run
from scalr_jax.checkpoint import load_variables
from scalr_jax.data.scenes import InputError
from scalr_jax.evaluation.nearest_neighbors import nearest_neighbors
from scalr_jax.evaluation.segmentation import evaluate as evaluate_segmentation
from scalr_jax.evaluation.zero_shot import zero_shot
from scalr_jax.features import make_cache
from scalr_jax.logging import write_json
from scalr_jax.models.student import StudentOnFeatures
from scalr_jax.train import distillation_task, segmentation_task, train
from scalr_jax.train_state import TrainState, variables_of

PROBE_CHOICES = {
    "method": ("head", "knn", "zero_shot"),
    "head": ("linear", "mlp"),
    "features": ("augmented", "fixed", "cached"),
}


def streets_cache(workdir: Path) -> Path:
    return workdir / "streets"


def _dataset(config: Any, workdir: Path, split: str) -> Any:
    """The dataset of a split; prints the table of what was found."""
    dataset = build.make_dataset(config, split, cache=streets_cache(workdir))
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
        from scalr_jax.visualize import draw_loss

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
    if config.checkpoint and path.is_file():
        there, weights = interop.read_student(path)
        there.activation = there.activation or config.model.activation  # downstream files do not say theirs
        _check_model(path, there, config.model)
        return interop.convert_weights(weights, there, str(path))
    if config.checkpoint and (path / "checkpoints").is_dir():
        if (path / "config.json").is_file():
            _check_model(path, json.loads((path / "config.json").read_text())["model"], config.model)
        return load_variables(path / "checkpoints")
    raise InputError(
        f"config.checkpoint = {config.checkpoint!r} is neither the workdir of a run nor a published student; give one "
        "with --config.checkpoint=PATH (docs/weights.md says which files there are)"
    )


def _check_model(path: Path, there: Any, here: Any) -> None:
    """Raises `InputError` that lists the settings in which a checkpoint's model and `config.model` differ."""
    keys = [key for key in ("channels", "depth", "norm", "activation", "num_neighbors") if key in there]
    wrong = [f"{key} is {there[key]} there, {here[key]} in config.model" for key in keys if there[key] != here[key]]
    if wrong:
        raise InputError(f"{path} holds another student: {'; '.join(wrong)}")


def _segment(config: Any, workdir: Path, *, label: str, frozen: bool, initial: dict | None) -> dict:
    """Train a segmentation head (and the backbone unless `frozen`), evaluate, write results.json."""
    dataset = _dataset(config, workdir, "train")
    validation = _dataset(config, workdir, "validation")
    num_classes = num_classes_of(config, dataset)
    task = segmentation_task(config, num_classes, label=label, initial=initial, frozen=frozen)
    student = task.student
    if isinstance(student, StudentOnFeatures):
        student = student.student
        with workdir_of_run.claim(config, workdir):
            dataset = make_cache(config, workdir / "features", dataset, initial)
    state = train(config, workdir, dataset, task)
    return _report(config, workdir, validation, student, variables_of(state), num_classes, label)


def _report(config: Any, workdir: Path, validation: Any, student: Any, variables: Any, num_classes: int, label: str):
    """Evaluate and write results.json; `student` has `apply(variables, batch, train=False)` -> [D, P, classes]."""
    confusion = evaluate_segmentation(config, validation, student, variables, num_classes)
    results = segmentation_results(confusion, validation.class_names)
    if jax.process_index() == 0:
        write_json(workdir / "results.json", results)
        print(f"{label}: mIoU {results['miou']:.4f}", flush=True)
    return results


def segmentation_results(confusion: Any, names: Any) -> dict:
    """What results.json says of a confusion matrix: the means, and the IoU of each class by name."""
    iou = metrics.intersection_over_union(confusion)
    by_name = {name: round(float(value), 4) for name, value in zip(names, iou, strict=True)}
    return {**metrics.summarize(confusion), "iou": by_name}


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


def evaluate(config: Any, workdir: Path) -> dict:
    """mIoU of the probed or fine-tuned run in `config.checkpoint` on `config.data`."""
    variables = load_backbone(config)
    head = build.segmentation_head(variables["params"])
    if head is None:
        raise InputError(f"{config.checkpoint} holds no segmentation head; give the workdir of a probe or fine-tuning")
    dataset = _dataset(config, workdir, config.data.split)
    num_classes = variables["params"]["head"]["bias"].shape[0]
    student = build.make_student(config, head=head, out_features=num_classes)
    confusion = evaluate_segmentation(config, dataset, student, variables, num_classes)
    results = segmentation_results(confusion, dataset.class_names)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "results.json", results)
        print(json.dumps(results, indent=2))
    return results


def demo(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Distil, probe, train with supervision, compare; see `demo.py`."""
    from scalr_jax.demo import run_demo

    run_demo(config, workdir)


def teacher(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Train the packaged demo teacher; see `demo_teacher.py`."""
    from scalr_jax.demo_teacher import train_teacher

    train_teacher(config, workdir)
