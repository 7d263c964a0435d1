"""Output files of one scan, a row a point in the scan's order; every file is written whole or not at all.

.npz    `features` [N, C], `distilled` [N, C] or `labels` [N] int32, and `class_names`
.npy    the same array alone
.label  SemanticKITTI's: uint32 [N], labels only. The dataset's own numbers where the model's classes are those of
        SemanticKITTI, nuScenes or PandaSet (of a class with several the one of its name, else the lowest), else
        class ids; 255 or the dataset's number for "ignored" where a point has none
.ply    binary: x, y, z, intensity, red, green, blue, and `label`
.png    the top view, of a folder always of the same square
.mp4    of a folder: its .png files as a video (predict/video.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import plyfile

from scalr_jax.data.sensors import raw_labels
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import written_whole

FORMATS = ("npz", "npy", "label", "ply", "png", "mp4")


class Prediction(NamedTuple):
    """One scan with the result of every point."""

    name: str
    points: np.ndarray  # [N, 4] float32: x, y, z (metres, student's frame), raw intensity
    what: str  # "features", "distilled" or "labels"
    rows: np.ndarray  # [N, C] float16 or float32, or [N] int32
    colors: np.ndarray  # [N, 3] uint8
    class_names: Sequence[str]
    box: tuple[np.ndarray, float] | None = None  # the square that a top view shows, as `pictures.top_view_box`


def check_formats(formats: Sequence[str], what: str) -> None:
    """Raises InputError for a format that is unknown, or that cannot hold what is predicted."""
    if unknown := [name for name in formats if name not in FORMATS]:
        raise InputError(f"no output format .{', .'.join(unknown)}; there are .{', .'.join(FORMATS)}")
    if "label" in formats and what != "labels":
        raise InputError(f"a .label file holds classes, and {what} were asked for; take .npz or .npy")


def write(prediction: Prediction, path: Path) -> None:
    """Writes one file; its ending says what. Raises OSError."""
    with written_whole(path) as file:
        if path.suffix == ".npz":
            names = {"class_names": np.array(prediction.class_names)} if prediction.what == "labels" else {}
            np.savez(file, allow_pickle=False, **{prediction.what: prediction.rows, **names})
        elif path.suffix == ".npy":
            np.save(file, prediction.rows)
        elif path.suffix == ".label":
            file.write(raw_labels(prediction.rows, prediction.class_names)[0].tobytes())
        elif path.suffix == ".ply":
            _write_ply(file, prediction)
        else:
            _draw(file, prediction)


def _write_ply(file: IO[bytes], prediction: Prediction) -> None:
    fields = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("intensity", "<f4")]
    fields += [(name, "u1") for name in ("red", "green", "blue")]
    table = np.empty(len(prediction.points), fields + ([("label", "<i4")] if prediction.what == "labels" else []))
    for k, (name, _) in enumerate(fields[:4]):
        table[name] = prediction.points[:, k]
    for k, (name, _) in enumerate(fields[4:]):
        table[name] = prediction.colors[:, k]
    if prediction.what == "labels":
        table["label"] = prediction.rows
    plyfile.PlyData([plyfile.PlyElement.describe(table, "vertex")], text=False, byte_order="<").write(file)


def _draw(file: IO[bytes], prediction: Prediction) -> None:
    from scalr_jax.figures import pictures

    xyz = prediction.points[:, :3]
    title = f"{prediction.name}: {prediction.what} of {len(prediction.points):,} points, from above"
    legend: Sequence[tuple[str, str]] = ()
    if prediction.what == "labels":
        legend = pictures.class_legend(prediction.rows, prediction.class_names)
    else:
        title += "; colours: first three principal components"
    panel = pictures.Panel("", prediction.colors, legend)
    pictures.draw_frame(file, xyz, title, panel, prediction.box or pictures.top_view_box(xyz))
