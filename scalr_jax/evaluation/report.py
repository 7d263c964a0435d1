"""Results of confusion matrices, tables for the terminal and files.

    IoU = TP / (TP + FP + FN)        mIoU: mean over the classes that are labelled or predicted
    recall = TP / (TP + FN)          accuracy = sum of TP / labelled points

A class that is neither labelled nor predicted has no IoU (null) and does not count in the mean; it is named.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scalr_jax.evaluation import metrics
from scalr_jax.runtime.storage import write_json

DIGITS = 4  # of an IoU by class


def results_of(confusion: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """`miou`, `class_accuracy`, `accuracy`, and by class `iou` (None where there is none) and `support` (points).

    confusion [classes, classes] counts, rows: labels.
    """
    iou = metrics.intersection_over_union(confusion)
    return {
        **metrics.summarize(confusion),
        "iou": {name: _rounded(value) for name, value in zip(names, iou, strict=True)},
        "support": {name: int(count) for name, count in zip(names, confusion.sum(axis=1), strict=True)},
        "empty_classes": [name for name, value in zip(names, iou, strict=True) if np.isnan(value)],
    }


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), DIGITS)


def ring_names(rings: Sequence[float]) -> list[str]:
    """As "0 to 10 m", ..., "beyond 50 m"."""
    edges = [0.0, *rings]
    names = [f"{low:g} to {high:g} m" for low, high in itertools.pairwise(edges)]
    return [*names, f"beyond {edges[-1]:g} m"]


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
    lines = [f"{'IoU %':<{width}}{'points %':>9}{'all':>7}" + "".join(f"{_short(ring):>8}" for ring in rings)]

    def row(name: str, share: str, values: Sequence[float | None]) -> str:
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
        return f"{name:<{width}}{share:>9}{cells[0]:>7}" + "".join(f"{cell:>8}" for cell in cells[1:])

    for name, value in results["iou"].items():
        share = f"{100 * results['support'][name] / total:.2f}"
        lines.append(row(name, share, [value, *(part["iou"][name] for part in rings.values())]))
    lines.append(row("mIoU", "", [results["miou"], *(part["miou"] for part in rings.values())]))
    lines.append(row("accuracy", "", [results["accuracy"], *(part["accuracy"] for part in rings.values())]))
    if results["empty_classes"]:
        lines.append(f"neither labelled nor predicted, not in the mean: {', '.join(results['empty_classes'])}")
    return "\n".join(lines)


def _short(ring: str) -> str:
    return ring.removesuffix(" m").replace(" to ", "-").replace("beyond ", ">")


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
    write_json(
        path,
        {
            "classes": list(names),
            "rows": "label",
            "columns": "prediction",
            "counts": confusion.sum(axis=0).tolist(),
            "by_range": {ring: counts.tolist() for ring, counts in zip(ring_names(rings), confusion, strict=True)},
        },
    )
