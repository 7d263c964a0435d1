"""Results of confusion matrices [classes, classes] (rows: labels, columns: predictions), tables and files.

    IoU = TP / (TP + FP + FN)        mIoU: mean over the classes that are labelled or predicted
    recall = TP / (TP + FN)          accuracy = sum of TP / labelled points

A class that is neither labelled nor predicted has no IoU (null) and does not count in the mean; it is listed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scalr_jax.data.scenes import IGNORE
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import write_json

DIGITS = 4  # of an IoU by class


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts [classes, classes] int64 over the points whose label is not 255. labels, predictions [N] integers.

    Raises `InputError` for a label that is neither a class nor 255.
    """
    valid = labels != IGNORE
    if (labels[valid] >= num_classes).any():
        raise InputError(
            f"a label is {labels[valid].max()}, and there are {num_classes} classes; prepare the labels again"
        )
    index = labels[valid].astype(np.int64) * num_classes + predictions[valid].astype(np.int64)
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """IoU [classes] float64; NaN for a class that is neither present nor predicted."""
    correct = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - correct
    return np.divide(correct, union, out=np.full(len(union), np.nan), where=union > 0)


def results_of(confusion: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """`miou`, `class_accuracy` (mean recall), `accuracy`, and by class `iou` (None where there is none) and `support`
    (labelled points)."""
    iou, labelled = intersection_over_union(confusion), confusion.sum(axis=1)
    recall = np.divide(np.diag(confusion), labelled, out=np.full(len(labelled), np.nan), where=labelled > 0)
    return {
        "miou": float(np.nanmean(iou)),
        "class_accuracy": float(np.nanmean(recall)),
        "accuracy": float(np.diag(confusion).sum() / max(confusion.sum(), 1)),
        "iou": {
            name: None if np.isnan(value) else round(float(value), DIGITS)
            for name, value in zip(names, iou, strict=True)
        },
        "support": {name: int(count) for name, count in zip(names, labelled, strict=True)},
        "empty_classes": [name for name, value in zip(names, iou, strict=True) if np.isnan(value)],
    }


def ring_names(rings: Sequence[float]) -> list[str]:
    """As "0 to 10 m", ..., "beyond 50 m"."""
    edges = [0.0, *rings]
    return [*(f"{low:g} to {high:g} m" for low, high in itertools.pairwise(edges)), f"beyond {edges[-1]:g} m"]


def results_by_range(confusion: np.ndarray, rings: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """`results_of` all points, and under `by_range` of the points of each ring that has labelled ones.

    confusion [len(rings) + 1, classes, classes].
    """
    rows = zip(ring_names(rings), confusion, strict=True)
    by_range = {ring: results_of(counts, names) for ring, counts in rows if counts.sum()}
    return {**results_of(confusion.sum(axis=0), names), "by_range": by_range}


def class_table(results: dict[str, Any]) -> str:
    """A row a class: its share of the labelled points, its IoU, and its IoU in each ring (percent)."""
    rings = results.get("by_range", {})
    total = max(sum(results["support"].values()), 1)
    width = max(len(name) for name in [*results["iou"], "mIoU"]) + 2
    short = [ring.removesuffix(" m").replace(" to ", "-").replace("beyond ", ">") for ring in rings]
    lines = [f"{'IoU %':<{width}}{'points %':>9}{'all':>7}" + "".join(f"{ring:>8}" for ring in short)]

    def row(name: str, share: str, values: Sequence[float | None]) -> str:
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
        return f"{name:<{width}}{share:>9}{cells[0]:>7}" + "".join(f"{cell:>8}" for cell in cells[1:])

    for name, value in results["iou"].items():
        share = f"{100 * results['support'][name] / total:.2f}"
        lines.append(row(name, share, [value, *(part["iou"][name] for part in rings.values())]))
    for name, key in (("mIoU", "miou"), ("accuracy", "accuracy")):
        lines.append(row(name, "", [part[key] for part in (results, *rings.values())]))
    if results["empty_classes"]:
        lines.append(f"neither labelled nor predicted, not in the mean: {', '.join(results['empty_classes'])}")
    return "\n".join(lines)


def confusion_table(confusion: np.ndarray, names: Sequence[str]) -> str:
    """Percent of each label's points that went to each prediction; a dot below 0.5 %."""
    width = max(len(name) for name in names) + 5
    lines = [f"{'label / prediction %':<{width}}" + "".join(f"{k:>4}" for k in range(len(names)))]
    for k, (name, counts) in enumerate(zip(names, confusion, strict=True)):
        percent = 100 * counts / counts.sum() if counts.sum() else np.zeros(len(counts))
        cells = "".join(f"{value:>4.0f}" if value >= 0.5 else f"{'.':>4}" for value in percent)
        lines.append(f"{k:>2} {name:<{width - 3}}" + cells)
    return "\n".join(lines)


def write_confusion(path: Path, confusion: np.ndarray, rings: Sequence[float], names: Sequence[str]) -> None:
    """confusion.json: counts by label (row) and prediction (column), of all points and of each ring."""
    by_range = {ring: counts.tolist() for ring, counts in zip(ring_names(rings), confusion, strict=True)}
    content = {"classes": list(names), "rows": "label", "columns": "prediction"}
    write_json(path, {**content, "counts": confusion.sum(axis=0).tolist(), "by_range": by_range})
