"""Pictures of features: similarity to one point (ScaLR, figure 1), and colours by principal components.

similarity_i = f_i . f_q / (|f_i| |f_q|)
color_i = (A (f_i / |f_i| - m) - low) / (high - low),  A: the three first principal axes, low and high: 2 % and 98 %;
drawn from 50 to 255, so that no point vanishes on a dark ground
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.cluster import vq

SAMPLE = 20_000  # rows that axes and clusters are fitted to
NO_COLOR = 90  # grey of a point without features
DARKEST = 50
QUERY_DISTANCE = 40.0  # metres within which query points are chosen
MIN_CLASS_POINTS = 30


class ColorAxes(NamedTuple):
    """Principal axes of unit features, and the range of each that becomes dark to bright."""

    mean: np.ndarray  # [C] float32
    axes: np.ndarray  # [C, 3] float32, by falling variance
    low: np.ndarray  # [3] float32
    high: np.ndarray  # [3] float32


def normalize(features: np.ndarray) -> np.ndarray:
    """Rows of features [N, C] at length 1; rows of zeros stay."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def cosine_similarity(features: np.ndarray, query: int) -> np.ndarray:
    """Cosine [N] of every row of features [N, C] with row `query`; 0 for a row of zeros."""
    unit = normalize(features)
    return unit @ unit[query]


def fit_color_axes(features: np.ndarray) -> ColorAxes:
    """Axes for `color_by_axes` from features [N, C]; rows of zeros do not count. Each axis' largest entry is positive.

    With fewer than three channels the remaining axes are zero.
    """
    unit = normalize(_sample(features[np.any(features != 0, axis=1)])).astype(np.float64)
    if len(unit) == 0:
        unit = np.zeros((1, features.shape[1]))
    mean = unit.mean(axis=0)
    _, vectors = np.linalg.eigh((unit - mean).T @ (unit - mean))
    axes = np.zeros((len(mean), 3))
    found = vectors[:, ::-1][:, :3]  # by falling variance
    axes[:, : found.shape[1]] = found
    axes *= np.where(axes[np.abs(axes).argmax(axis=0), np.arange(3)] < 0, -1.0, 1.0)
    low, high = np.quantile((unit - mean) @ axes, (0.02, 0.98), axis=0)
    return ColorAxes(*(array.astype(np.float32) for array in (mean, axes, low, np.maximum(high, low + 1e-6))))


def color_by_axes(features: np.ndarray, fitted: ColorAxes) -> np.ndarray:
    """Colours [N, 3] uint8 of features [N, C]: like features, like colours. Grey for rows of zeros."""
    along = (normalize(features) - fitted.mean) @ fitted.axes
    colors = np.clip((along - fitted.low) / (fitted.high - fitted.low), 0.0, 1.0)
    colors = np.rint(DARKEST + (255 - DARKEST) * colors).astype(np.uint8)
    colors[~np.any(features != 0, axis=1)] = NO_COLOR
    return colors


def choose_queries(
    features: np.ndarray, xyz: np.ndarray, number: int, *, labels: np.ndarray | None = None, allowed: np.ndarray
) -> list[int]:
    """Points that stand for what is in the scene, at most `number`, to draw correlation maps of.

    Args:
      features: [N, C].
      xyz: [N, 3] metres; points within 40 m are chosen, when there are some.
      number: how many.
      labels: [N] classes or 255. With them one point a class, from the rarest to the most frequent class; without
        them one of each of `number` clusters (k-means of the unit features). It is the point most like their mean.
      allowed: [N] bool: the points to choose from.

    Returns:
      Indices of different points; none when no allowed point has features.
    """
    allowed = allowed & np.any(features != 0, axis=1)
    near = allowed & (np.linalg.norm(xyz, axis=1) < QUERY_DISTANCE)
    rows = np.flatnonzero(near if near.any() else allowed)
    if len(rows) == 0:
        return []
    unit = normalize(features[rows])
    group = np.full(len(rows), -1) if labels is None else _classes(labels[rows], number)
    if (group < 0).all():
        sample, rng = _sample(unit), np.random.default_rng(0)
        centres = sample[rng.choice(len(sample), min(number, len(sample)), replace=False)]
        centres, _ = vq.kmeans(sample, centres, iter=1)  # leaves out clusters that lose all their points
        group = vq.vq(unit, centres)[0]
    chosen = []
    for k in range(group.max() + 1):
        members = np.flatnonzero(group == k)
        if len(members):
            chosen.append(int(rows[members[np.argmax(unit[members] @ unit[members].mean(axis=0))]]))
    return list(dict.fromkeys(chosen))


def _classes(labels: np.ndarray, number: int) -> np.ndarray:
    """For each point the rank of its class among those chosen, evenly from the rarest to the most frequent, or -1."""
    classes, counts = np.unique(labels[labels < 255], return_counts=True)
    classes = classes[counts >= MIN_CLASS_POINTS][np.argsort(counts[counts >= MIN_CLASS_POINTS])]
    spread = np.unique(np.linspace(0, len(classes) - 1, min(number, len(classes))).round().astype(int))
    group = np.full(len(labels), -1)
    for rank, k in enumerate(spread):
        group[labels == classes[k]] = rank
    return group


def _sample(rows: np.ndarray) -> np.ndarray:
    """At most `SAMPLE` of the rows."""
    if len(rows) <= SAMPLE:
        return rows
    return rows[np.random.default_rng(0).choice(len(rows), SAMPLE, replace=False)]
