"""An inspection's findings in figures: ranges, intensity, points, a fitting view, warnings; and the table of them.

Horizontal view: +-half, the 99th percentile of the voxels' distance to the z axis in steps of 16 m (the augmentation
turns scenes about z, so it is square); vertical: +-half, 99.5 % of |z| in steps of 4 m. Grids: cells of 0.5 m, as
published. All in the student's frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from scalr_jax.data.packing import table_size
from scalr_jax.data.scenes import Dataset

VOXEL_SIZE = 0.1  # metres
CELL = 0.5  # metres, of the published grids
PUBLISHED_VIEW = (64.0, 8.0)  # metres: half width, half height
PUBLISHED_GROUND = (-2.5, -1.0)  # metres: where the published frames have the ground
PERCENTILES = {"min": 0, "1%": 1, "50%": 50, "99%": 99, "max": 100}

Report = dict[str, Any]  # what inspect.json holds


class Seen(NamedTuple):
    """Figures that are kept of one frame."""

    xyz: np.ndarray  # [n, 3] float32: some of its points, student's frame
    intensity: np.ndarray  # [n] float32: their raw intensity
    voxels: np.ndarray  # [v, 3] float32: some of its points, one a voxel
    num_points: int
    num_dropped: int  # rows of the file that were no usable point
    num_voxels: int
    num_in_view: int | None  # voxels with a pixel; None without an image
    levels: np.ndarray  # [levels, 2]: voxels and pairs of neighbours of the points in one image, or else of all
    extent: np.ndarray  # [2, 4] min and max of x, y, z, radius of all points
    moments: np.ndarray  # [5] of the intensity: count, sum, sum of squares, min, max
    statistics: tuple[float, float]  # configured mean and standard deviation
    ground: float | None  # metres
    place: str | None  # what is odd about where the points are
    labels: np.ndarray | None  # [256] counts


def summarize(dataset: Dataset, seen: Sequence[Seen], bad: Mapping[str, str]) -> Report:
    """The figures of inspect.json; lengths in metres."""
    voxels, num_voxels = np.concatenate([frame.voxels for frame in seen]), [frame.num_voxels for frame in seen]
    grounds = [frame.ground for frame in seen if frame.ground is not None]
    in_view = [frame.num_in_view for frame in seen if frame.num_in_view is not None]
    best = suggest(voxels, in_view or num_voxels)
    report: Report = {
        "frames": {"in_dataset": len(dataset), "read": len(seen), "bad": dict(bad)},
        "points": spread([frame.num_points for frame in seen]),
        "rows_dropped": spread([frame.num_dropped for frame in seen]),
        "voxels": spread(num_voxels),
        "voxels_in_one_image": spread(in_view) if in_view else None,
        "minkunet_levels": _levels(seen),
        "ranges": _ranges(seen),
        "intensity": _intensity(seen),
        "ground_height": round(float(np.median(grounds)), 2) if grounds else None,
        "suggestion": best | suggest_levels(seen, best),
        "published_view_covers": round(covered(voxels, *PUBLISHED_VIEW), 4),
        "labels": _labels(dataset, seen),
    }
    places = [frame.place for frame in seen if frame.place][:1]
    return report | {"warnings": _warnings(report, [*dataset.warnings, *places])}


def spread(values: Sequence[int]) -> dict[str, int]:
    """min, mean and max."""
    return {"min": int(min(values)), "mean": round(float(np.mean(values))), "max": int(max(values))}


def suggest(voxels: np.ndarray, counts: Sequence[int]) -> Report:
    """A field of view and grids for points [n, 3], one a voxel, and limits for scenes of `counts` points."""
    reach, height = np.percentile(np.hypot(voxels[:, 0], voxels[:, 1]), 99), np.percentile(np.abs(voxels[:, 2]), 99.5)
    half = float(np.clip(16 * np.ceil(reach / 16), 32, 128))
    upper = float(np.clip(4 * np.ceil(height / 4), 4, 32))
    cells, layers = (int(2 * length / CELL) for length in (half, upper))
    limit = min(20_000, 1_000 * int(np.ceil(1.1 * max(counts) / 1_000)))
    return {
        "field_of_view": ((-half, -half, -upper), (half, half, upper)),
        "grids": ((cells, cells), (cells, layers), (cells, layers)),
        "covers": round(covered(voxels, half, upper), 4),
        "max_points": limit,
        "points_per_shard": 1_024 * int(np.ceil(max(8 * min(float(np.mean(counts)), limit), limit) / 1_024)),
        "scenes_per_shard": 12,
    }


def suggest_levels(seen: Sequence[Seen], best: Report) -> dict[str, tuple[int, ...]]:
    """Room of a MinkUNet's levels in packs of the suggested points and scenes, as a run derives it from its sample."""
    counts = np.stack([frame.levels for frame in seen], axis=-1)  # [levels, 2, frames]: voxels and pairs
    points, scenes = best["points_per_shard"], best["scenes_per_shard"]
    num_points = counts[0, 0].tolist()  # one a voxel of the finest level
    sizes = [[table_size(row.tolist(), num_points, points=points, scenes=scenes) for row in level] for level in counts]
    voxels, pairs = (tuple(of) for of in zip(*sizes, strict=True))
    return {"voxels_per_shard": tuple(min(size, points) for size in voxels), "pairs_per_shard": pairs}


def covered(voxels: np.ndarray, half: float, height: float) -> float:
    """The share of points [n, 3] within +-half (x, y) and +-height (z)."""
    return float((np.abs(voxels) < np.array([half, half, height])).all(axis=1).mean())


def _ranges(seen: Sequence[Seen]) -> dict[str, dict[str, float]]:
    xyz = np.concatenate([frame.xyz for frame in seen])
    columns = np.column_stack([xyz, np.linalg.norm(xyz, axis=1)])
    table = np.percentile(columns, list(PERCENTILES.values()), axis=0)  # [5, 4]
    table[0] = np.min([frame.extent[0] for frame in seen], axis=0)
    table[-1] = np.max([frame.extent[1] for frame in seen], axis=0)
    rows = zip(("x", "y", "z", "radius"), table.T.astype(float), strict=True)
    return {
        name: {key: round(float(value), 3) for key, value in zip(PERCENTILES, row, strict=True)} for name, row in rows
    }


def _levels(seen: Sequence[Seen]) -> list[Report]:
    """Voxels a scene and occupied neighbours of each voxel, by level of a MinkUNet."""
    levels = []
    for voxels, pairs in np.stack([frame.levels for frame in seen], axis=-1):  # [frames] each, level by level
        near = float((pairs.sum() / voxels.sum()).round(2))
        levels.append({"voxels": spread(voxels.tolist()), "pairs": spread(pairs.tolist()), "neighbours": near})
    return levels


def _intensity(seen: Sequence[Seen]) -> list[Report]:
    """Measured and configured statistics, one entry for each sensor (that is, for each configured pair)."""
    entries = []
    for statistics in dict.fromkeys(frame.statistics for frame in seen):
        moments = np.array([frame.moments for frame in seen if frame.statistics == statistics])
        count, total, squares = moments[:, :3].sum(axis=0)
        mean = total / count
        std = float(np.sqrt(max(squares / count - mean**2, 0.0)))
        known, measured = ([round(float(value), 5) for value in pair] for pair in (statistics, (mean, std)))
        low, high = float(moments[:, 3].min()), float(moments[:, 4].max())
        entries.append({"configured": known, "measured": measured, "min": low, "max": high, "frames": len(moments)})
    return entries


def _labels(dataset: Dataset, seen: Sequence[Seen]) -> dict[str, float] | None:
    counts = [frame.labels for frame in seen if frame.labels is not None]
    if not counts:
        return None
    shares = np.sum(counts, axis=0) / np.sum(counts)
    names = {**dict(enumerate(dataset.class_names)), 255: "ignored"}
    return {name: round(float(shares[k]), 5) for k, name in names.items()}


def _warnings(report: Report, known: Sequence[str]) -> list[str]:
    texts = list(known)
    for entry in report["intensity"]:
        (mean, std), (own_mean, own_std) = entry["configured"], entry["measured"]
        if own_std == 0:
            texts.append(f"the intensity is {own_mean:g} for every point: the student learns nothing from it")
        elif abs(own_mean - mean) > 0.5 * std or not 0.6 < own_std / std < 1.6:
            texts.append(
                f"the intensity has mean {own_mean:.4g} and std {own_std:.4g}, and is normalised with {mean:.4g} and "
                f"{std:.4g}: another sensor, release or scale?"
            )
    ground = report["ground_height"]
    if ground is not None and not PUBLISHED_GROUND[0] < ground < PUBLISHED_GROUND[1]:
        texts.append(
            f"the ground lies at z = {ground:.1f} m of the student's frame, and at about -1.7 m in the published data: "
            "check the sensor's height and axes"
        )
    in_view, voxels = report["voxels_in_one_image"], report["voxels"]
    if in_view and in_view["mean"] < 0.01 * voxels["mean"]:
        texts.append(f"only {in_view['mean']} of {voxels['mean']} voxels have a pixel: check the calibration")
    if bad := report["frames"]["bad"]:
        texts.append(f"{len(bad)} bad frames: {next(iter(bad.values()))}")
    return texts


def format_report(report: Report) -> str:
    """The table that is printed."""
    frames, best = report["frames"], report["suggestion"]
    lines = [f"{frames['read']} reads of {frames['in_dataset']} frames, {len(frames['bad'])} bad", ""]
    lines.append("metres, student's frame" + "".join(f"{key:>10}" for key in PERCENTILES))
    for name, row in report["ranges"].items():
        lines.append(f"  {name:<21}" + "".join(f"{row[key]:>10.2f}" for key in PERCENTILES))
    lines += ["", f"{'points a scan':<23}" + "".join(f"{key:>10}" for key in ("min", "mean", "max"))]
    titles = ("read", "dropped (NaN, no echo)", "one a 0.1 m voxel", "of these in one image")
    for key, title in zip(("points", "rows_dropped", "voxels", "voxels_in_one_image"), titles, strict=True):
        if row := report[key]:
            lines.append(f"  {title:<21}" + "".join(f"{row[kind]:>10,}" for kind in ("min", "mean", "max")))
    lines += ["", f"{'MinkUNet, a scene':<23}" + "".join(f"{key:>12}" for key in ("min", "mean", "max", "neighbours"))]
    for k, level in enumerate(report["minkunet_levels"]):
        row = (*level["voxels"].values(), level["neighbours"])
        title = f"voxels of {VOXEL_SIZE * 2**k:g} m"
        lines.append(f"  {title:<21}" + "".join(f"{value:>12,}" for value in row))
    lines.append("")
    for entry in report["intensity"]:
        (mean, std), (given_mean, given_std) = entry["measured"], entry["configured"]
        lines.append(
            f"intensity  mean {mean:.5g}, std {std:.5g}, {entry['min']:g} to {entry['max']:g}; normalised with "
            f"{given_mean:.5g}, {given_std:.5g}"
        )
    ground = report["ground_height"]
    lines.append(f"ground     {'not found' if ground is None else f'z = {ground:.2f} m'}")
    if report["labels"]:
        shares = sorted(report["labels"].items(), key=lambda item: -item[1])
        lines.append("labels     " + ", ".join(f"{name} {share:.1%}" for name, share in shares))
    lines += ["", f"fits this sensor (covers {best['covers']:.1%} of the voxels; the published +-64, +-8 m "]
    lines[-1] += f"{report['published_view_covers']:.1%}):"
    lines += [f"  config.model.{key} = {best[key]}" for key in ("field_of_view", "grids")]
    lines += [f"  config.data.{key} = {best[key]:_}" for key in ("max_points", "points_per_shard", "scenes_per_shard")]
    lines.append(
        f"a MinkUNet's levels from {VOXEL_SIZE} m on, with data.scenes_per_step = 0 (left out, a run derives the like):"
    )
    lines += [f"  config.data.{key} = {best[key]}" for key in ("voxels_per_shard", "pairs_per_shard")]
    lines += [f"WARNING: {text}" for text in report["warnings"]]
    return "\n".join(lines)
