"""Does a scan fit what a model was trained on? One sentence for each way in which it does not. NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from scalr_jax.data.whole_scan import find_usable

# Over the frames of nuScenes, KITTI, PandaSet and generated streets (2026-11-23) the mean lies within 0.4 trained
# deviations and the deviation between 0.73 and 1.56 times the trained one; at least 91 % of the points are in view, and
# the ground at -1.6 to -2.0 m. A nuScenes scan read with 4 instead of 5 columns has 59 % in view.
MEAN_WITHIN = 1.5  # trained standard deviations
STD_WITHIN = (0.4, 2.5)  # times the trained one
MIN_IN_VIEW = 0.8
GROUND = (-3.2, -0.6)  # metres


def check_scan(points: np.ndarray, settings: Mapping[str, Any]) -> dict[str, str]:
    """What does not fit: one sentence by kind ("finite", "usable", "intensity", "view", "ground"), or nothing.

    points: [N, 4] float32, in the frame of the training data: x, y, z in metres and raw intensity. settings:
    `intensity` and `field_of_view`, as in `Model.config`.
    """
    located, usable = find_usable(points)
    found = {}
    if not located.all():
        found["finite"] = (
            f"{(~located).sum():,} of {len(points):,} points have coordinates that are no finite numbers, and get "
            "features 0 and class 255"
        )
    if number := int((located & ~usable).sum()):
        found["usable"] = (
            f"{number:,} of {len(points):,} points have an intensity that is no finite number, or lie 10 km away, and "
            "get the result of the nearest other point"
        )
    if not usable.any():
        return found
    if text := _check_intensity(points[usable, 3].astype(np.float64), *settings["intensity"]):
        found["intensity"] = text
    low, high = (np.asarray(corner) for corner in settings["field_of_view"])
    share = float(((points[usable, :3] > low) & (points[usable, :3] < high)).all(axis=1).mean())
    if share < MIN_IN_VIEW:
        box = ", ".join(f"{axis} {a:g} to {b:g}" for axis, a, b in zip("xyz", low, high, strict=True))
        found["view"] = (
            f"{share:.0%} of the points lie in the model's field of view, {box} m, and the others only get the result "
            "of the nearest of these: are they metres in the lidar's frame, and the columns right?"
        )
    ground = ground_height(points[usable, :3])
    if ground is not None and not GROUND[0] < ground < GROUND[1]:
        found["ground"] = (
            f"the ground seems to lie at z = {ground:.1f} m, and at about -1.7 m in the frame that models are trained "
            "in: shift the points unless yours was trained so"
        )
    return found


def _check_intensity(intensity: np.ndarray, trained_mean: float, trained_std: float) -> str | None:
    mean, std, largest = intensity.mean(), intensity.std(), intensity.max()
    if std == 0.0:
        return f"the intensity is {mean:g} for every point, and the model was trained to use it"
    if abs(mean - trained_mean) < MEAN_WITHIN * trained_std and STD_WITHIN[0] < std / trained_std < STD_WITHIN[1]:
        return None
    remedy = "another sensor or scale?"
    if largest <= 1.0 < trained_mean:
        remedy = "it runs from 0 to 1 where the model knows 0 to 255; scale it"
    elif trained_mean < 1.0 < 2.0 < largest:
        remedy = "the model knows 0 to 1; divide it by its full scale, often 255"
    return (
        f"the intensity has mean {mean:.3g}, standard deviation {std:.3g} and maximum {largest:.3g}, and the model was "
        f"trained with mean {trained_mean:.3g} and standard deviation {trained_std:.3g}: {remedy}"
    )


def ground_height(xyz: np.ndarray) -> float | None:
    """The median over cells of 1 m, 4 to 20 m away, of the lowest point's z; None when fewer than 20 have points."""
    distance = np.hypot(xyz[:, 0], xyz[:, 1])
    near = xyz[(distance > 4) & (distance < 20)]
    cells = (np.floor(near[:, 0]) + 32) * 64 + np.floor(near[:, 1]) + 32
    lowest = np.full(64 * 64, np.inf)
    np.minimum.at(lowest, cells.astype(np.int64), near[:, 2])
    lowest = lowest[np.isfinite(lowest)]
    return float(np.median(lowest)) if len(lowest) >= 20 else None
