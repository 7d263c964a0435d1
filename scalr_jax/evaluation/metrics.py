"""Segmentation metrics from a confusion matrix [classes, classes] (rows: truth, columns: prediction), in NumPy."""

from __future__ import annotations

import numpy as np

from scalr_jax.data.scenes import IGNORE
from scalr_jax.runtime.errors import InputError


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


def class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Recall [classes] float64; NaN for a class that is not present."""
    total = confusion.sum(1)
    return np.divide(np.diag(confusion), total, out=np.full(len(total), np.nan), where=total > 0)


def summarize(confusion: np.ndarray) -> dict[str, float]:
    """mIoU over the classes present or predicted, mean class accuracy and overall accuracy."""
    return {
        "miou": float(np.nanmean(intersection_over_union(confusion))),
        "class_accuracy": float(np.nanmean(class_accuracy(confusion))),
        "accuracy": float(np.diag(confusion).sum() / max(confusion.sum(), 1)),
    }
