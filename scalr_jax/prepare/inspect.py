"""Looks at a dataset before anything is trained on it: reads some frames of any reader, draws and sums up."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import numpy as np

from scalr_jax.data import grids, transforms
from scalr_jax.data.scan_checks import check_place, ground_height
from scalr_jax.data.scenes import Dataset, Frame
from scalr_jax.ops.voxels import count_levels
from scalr_jax.prepare.summary import VOXEL_SIZE, Report, Seen, format_report, summarize
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.runtime.storage import write_json

SAMPLE = 5_000  # points a frame kept for percentiles and histograms
PICTURES = 2  # frames drawn for each camera


def inspect_dataset(dataset: Dataset, output: Path, *, num_frames: int = 50, seed: int = 0) -> Report:
    """Reads frames of any reader, prints a table, writes `inspect.json` (returned; lengths in metres) and pictures.

    Args:
      dataset: a reader, several joined, or a part of one.
      output: folder for inspect.json, top_view.png, histograms.png and, for each camera, over_<camera>_<n>.png.
      num_frames: how many frames to read, drawn without repetition; a short dataset is read once for each camera.
      seed: of the draw.

    Raises InputError: no frame of those drawn can be read.
    """
    output.mkdir(parents=True, exist_ok=True)
    seen, kept, bad = _read(dataset, num_frames, np.random.default_rng(seed))
    report = summarize(dataset, seen, bad)
    from scalr_jax.prepare import inspect_pictures

    report["pictures"] = inspect_pictures.draw_all(output, kept, seen, report)
    write_json(output / "inspect.json", report)
    print(dataset.describe())
    print(format_report(report))
    hint = ": edges of near things must lie on the edges in the images" if report["voxels_in_one_image"] else ""
    print(f"pictures and inspect.json are in {output}{hint}")
    return report


def _read(
    dataset: Dataset, num_frames: int, rng: np.random.Generator
) -> tuple[list[Seen], dict[str, list[Frame]], dict[str, str]]:
    """Frames seen, those to draw by camera, and bad frames with their errors."""
    order = rng.permutation(len(dataset))
    number = min(num_frames, len(dataset) * max(1, len(dataset.cameras)))
    seen, kept, bad = [], {}, {}
    started = said = time.monotonic()
    for done in range(number):
        index = int(order[done % len(order)])
        try:
            frame = dataset.frame(index, rng)
            seen.append(look(dataset, index, frame, rng))
            _keep(kept, frame)
        except BadFrameError as error:
            bad.setdefault(dataset.name(index), str(error))
        now = time.monotonic()
        if now - said > 2.0 or done + 1 == number:
            said = now
            print(f"inspect: {done + 1} of {number} frames, {now - started:.0f} s", file=sys.stderr)
    if not seen:
        raise InputError(f"none of {number} frames can be read; the last one: {list(bad.values())[-1]}")
    for camera in dataset.cameras:  # one that the draws left out gets a picture, too
        for index in order[: 0 if camera in kept else 5]:
            with contextlib.suppress(BadFrameError, InputError):  # the latter: another of several datasets has it
                _keep(kept, dataset.frame(int(index), camera=camera))
                break
    return seen, kept, bad


def _keep(kept: dict[str, list[Frame]], frame: Frame) -> None:
    """Keeps the first frames of each camera, and the first without an image."""
    camera = frame.name.rsplit("/", 1)[-1] if frame.image is not None else ""
    frames = kept.setdefault(camera, [])
    if len(frames) < (PICTURES if camera else 1):
        frames.append(frame)


def look(dataset: Dataset, index: int, frame: Frame, rng: np.random.Generator) -> Seen:
    """Figures that are kept of a frame."""
    if len(frame.points) == 0:
        raise BadFrameError(f"{frame.name}: the scan has no points")
    xyz = transforms.to_ego(frame.points, frame.to_ego)
    refused, told = check_place(xyz)
    if refused:
        raise BadFrameError(f"{frame.name}: {refused}")
    intensity = frame.points[:, 3].astype(np.float64)
    radius = np.linalg.norm(xyz, axis=1)
    voxels = grids.one_a_voxel(frame, VOXEL_SIZE, rng)
    some = rng.permutation(len(xyz))[:SAMPLE]
    with_radius = np.column_stack([xyz, radius])
    used = voxels if frame.visible is None or not frame.visible[voxels].any() else voxels[frame.visible[voxels]]
    return Seen(
        xyz=xyz[some],
        intensity=frame.points[some, 3].astype(np.float32),
        voxels=xyz[rng.permutation(voxels)[:SAMPLE]],
        num_points=len(xyz),
        num_dropped=frame.num_dropped,
        num_voxels=len(voxels),
        num_in_view=None if frame.visible is None else int(frame.visible[voxels].sum()),
        levels=count_levels(np.floor(xyz[used] / VOXEL_SIZE)),
        extent=np.stack([with_radius.min(axis=0), with_radius.max(axis=0)]),
        moments=np.array([len(xyz), intensity.sum(), (intensity**2).sum(), intensity.min(), intensity.max()]),
        statistics=dataset.intensity(index),
        ground=ground_height(xyz),
        place=told,
        labels=None if frame.labels is None else np.bincount(frame.labels, minlength=256),
    )
