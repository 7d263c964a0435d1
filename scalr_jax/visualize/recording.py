"""Frames one after another for Rerun's viewer (rerun.io): in 3-D features, classes and labels, and the camera image
with its points over it. `rerun FILE` opens what is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalr_jax.data.scenes import Frame
from scalr_jax.figures.colors import ColorAxes, color_by_axes, fit_color_axes
from scalr_jax.figures.pictures import color_labels
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import written_beside

RADIUS = 0.05  # metres, of a point
MISSING = "--rerun needs its package: pip install 'scalr_jax[rerun]'"


class Seen(NamedTuple):
    """A frame and what a model makes of it: N finite points."""

    points: np.ndarray  # [N, 4] float32: x, y, z (metres), raw intensity
    frame: Frame  # these points alone; pixels in those of the image as it is
    features: np.ndarray  # [N, C]
    predictions: np.ndarray | None  # [N] classes
    labels: np.ndarray | None  # [N] classes or 255


def check_rerun() -> None:
    """Raises InputError when the package is not installed."""
    try:
        import rerun  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(MISSING) from None


def write_recording(path: Path, frames: Iterable[Seen], names: Sequence[str], label_names: Sequence[str]) -> int:
    """Writes a .rrd, whole or not at all; returns how many frames it holds. Colours of features are by the principal
    axes of the first frame; names are the classes of predictions, label_names those of labels. Raises OSError."""
    import rerun as rr  # pyright: ignore[reportMissingImports]

    number, axes = 0, None
    with written_beside(path) as partial, rr.RecordingStream("scalr_jax") as stream:
        stream.save(partial)
        stream.log("scan", rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        for number, seen in enumerate(frames, 1):
            axes = axes or fit_color_axes(seen.features)
            stream.set_time("frame", sequence=number - 1)
            colors = _colors(seen, axes, names, label_names)
            for name, of_points in colors.items():
                stream.log(f"scan/{name}", rr.Points3D(seen.points[:, :3], colors=of_points, radii=RADIUS))
            stream.log("name", rr.TextDocument(seen.frame.name))
            image, pixels, visible = seen.frame.image, seen.frame.pixels, seen.frame.visible
            if image is not None and pixels is not None and visible is not None:
                stream.log("camera", rr.Image(image))
                over = rr.Points2D(pixels[visible][:, ::-1], colors=colors["features"][visible], radii=1.5)
                stream.log("camera/points", over)
        stream.flush()
        stream.disconnect()
    return number


def _colors(seen: Seen, axes: ColorAxes, names: Sequence[str], label_names: Sequence[str]) -> dict[str, np.ndarray]:
    """[N, 3] uint8 for each way to colour the points."""
    found = {"features": color_by_axes(seen.features, axes)}
    if seen.predictions is not None:
        found["predictions"] = color_labels(seen.predictions, names)
    if seen.labels is not None:
        found["labels"] = color_labels(seen.labels, label_names)
    return found
