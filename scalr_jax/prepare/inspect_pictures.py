"""Pictures of a dataset: points over each camera's images, the top view, histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import patches
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure  # not pyplot: a notebook's own plots keep their backend
from pykdtree.kdtree import KDTree

from scalr_jax.data import grids, transforms
from scalr_jax.data.scenes import Frame
from scalr_jax.figures.pictures import plain_text
from scalr_jax.prepare.summary import Report, Seen

WIDTH = 13.0  # inches of a picture
NEAREST, FARTHEST = 3.0, 80.0  # metres between which the colours run
EDGE = 0.15  # of its distance that a point's neighbour in the image must be farther, at an edge


def draw_all(output: Path, frames: Mapping[str, Sequence[Frame]], seen: Sequence[Seen], report: Report) -> list[str]:
    """All pictures of an inspection, into `output`. Returns the files' names."""
    figures = {}
    for camera, some in frames.items():
        for number, frame in enumerate(some if camera else ()):
            name = "".join(c if c.isalnum() or c in "-_." else "_" for c in camera)
            figures[f"over_{name}_{number}.png"] = draw_over_image(frame)
    first = next(some[0] for some in frames.values() if some)
    figures["top_view.png"] = draw_top_view(first, report["suggestion"]["field_of_view"][1][0])
    figures["histograms.png"] = draw_histograms(seen, report)
    for name, figure in figures.items():
        with plain_text(figure):
            figure.savefig(output / name, dpi=110)
    return list(figures)


def draw_over_image(frame: Frame) -> Figure:
    """Two panels: the visible points over the image, by distance; and those at the edges of near things only.

    The frame has an image. Distances are in metres from the student's origin.
    """
    assert frame.image is not None and frame.pixels is not None and frame.visible is not None  # noqa: PT018
    kept = grids.one_a_voxel(frame, 0.1)
    kept = kept[frame.visible[kept]]
    rows, columns = frame.image_shape or frame.image.shape[:2]
    pixels = frame.pixels[kept] * (np.array(frame.image.shape[:2]) / (rows, columns))
    distance = np.linalg.norm(transforms.to_ego(frame.points[kept], frame.to_ego), axis=1)
    dimmed = 25 + 0.68 * frame.image.mean(axis=2)  # [h, w]
    height, width = frame.image.shape[:2]
    figure = Figure(figsize=(WIDTH, 2 * WIDTH * height / width + 0.9), layout="constrained")
    panels = figure.subplots(2, 1)
    edge = find_edges(pixels, distance, width)
    dot = float(np.clip(40_000 / max(len(kept), 1), 3, 11))  # points squared: sparse scans need larger dots
    colors = ScalarMappable(LogNorm(NEAREST, FARTHEST), "turbo_r")
    outlines = "where something farther begins beside a point: these must lie on the outlines of things"
    for axes, chosen, size, title in (
        (panels[0], np.arange(len(kept)), dot, f"{len(kept):,} points, one a 0.1 m voxel"),
        (panels[1], np.flatnonzero(edge), 2 * dot, outlines),
    ):
        chosen = chosen[np.argsort(-distance[chosen])]  # the nearest on top
        axes.imshow(dimmed, cmap="gray", vmin=0, vmax=255)
        rows, columns = pixels[chosen].T
        axes.scatter(columns, rows, s=size, c=distance[chosen], cmap=colors.cmap, norm=colors.norm, linewidths=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axes.set_axis_off()
    bar = figure.colorbar(colors, ax=panels, label="distance (m)", pad=0.01, aspect=40, extend="both")
    bar.set_ticks([3, 5, 10, 20, 40, 80], labels=["3", "5", "10", "20", "40", "80"])
    bar.ax.minorticks_off()
    figure.suptitle(frame.name, fontsize=11)
    return figure


def find_edges(pixels: np.ndarray, distance: np.ndarray, width: int) -> np.ndarray:
    """Mask [N] of the points beside which, in the image, something clearly farther begins.

    pixels [N, 2] (row, column), distance [N] metres, width of the image in pixels (neighbours are within 2 % of it).
    """
    if len(pixels) < 9:
        return np.zeros(len(pixels), bool)
    pixels = np.ascontiguousarray(pixels, np.float64)
    apart, found = KDTree(pixels).query(pixels, k=9)
    farther = distance[found] - distance[:, None]  # [N, 9]
    return ((farther > np.maximum(1.0, EDGE * distance)[:, None]) & (apart < 0.02 * width)).sum(axis=1) >= 2


def draw_top_view(frame: Frame, half: float) -> Figure:
    """A scan from above, by height, with circles of distance and the suggested view, +-half metres."""
    xyz = transforms.to_ego(frame.points, frame.to_ego)
    order = np.argsort(xyz[:, 2])
    low, high = np.percentile(xyz[:, 2], (2, 98))
    figure = Figure(figsize=(10.5, 9.5), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("#10141c")
    x, y, z = xyz[order].T
    shown = axes.scatter(x, y, s=1.2, c=z, cmap="viridis", vmin=low, vmax=high, linewidths=0)
    for radius in range(20, int(1.4 * half), 20):
        axes.add_patch(patches.Circle((0, 0), radius, fill=False, color="white", alpha=0.25, linewidth=0.6))
        text = axes.text(0, radius, f"{radius} m", color="white", alpha=0.6, fontsize=8, ha="center", va="bottom")
        text.set_clip_on(True)
    square = patches.Rectangle((-half, -half), 2 * half, 2 * half, fill=False, color="#ff9f1c", linewidth=1.4)
    axes.add_patch(square)
    axes.text(-half, half, f" suggested view +-{half:g} m", color="#ff9f1c", fontsize=9, va="top")
    axes.annotate("", (8, 0), (0, 0), arrowprops={"arrowstyle": "-|>", "color": "#ff4d6d", "linewidth": 2})
    axes.text(9, 0, "x", color="#ff4d6d", fontsize=9, va="center")
    limits = (-1.1 * half, 1.1 * half)
    axes.set(xlabel="x (m)", ylabel="y (m)", aspect="equal", xlim=limits, ylim=limits)
    axes.set_title(f"{frame.name}: {len(xyz):,} points from above, student's frame", fontsize=10)
    figure.colorbar(shown, ax=axes, label="z (m)", shrink=0.8, extend="both")
    return figure


def draw_histograms(seen: Sequence[Seen], report: Report) -> Figure:
    """Normalised intensity, distance and height of the points of all frames."""
    xyz = np.concatenate([frame.xyz for frame in seen])
    normalized = [(frame.intensity - frame.statistics[0]) / frame.statistics[1] for frame in seen]
    intensity = np.concatenate(normalized)
    radius, best = np.linalg.norm(xyz, axis=1), report["suggestion"]["field_of_view"]
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    panels = figure.subplots(1, 3)
    low, high = np.percentile(intensity, (0.1, 99.5)) + np.array([-0.5, 0.5])
    below, above = np.percentile(xyz[:, 2], (0.05, 99.95))
    for axes, values, bins, title, label in (
        (panels[0], np.clip(intensity, low, high), 80, "intensity as the student sees it", "(intensity - mean) / std"),
        (panels[1], np.minimum(radius, 150), 75, "distance", "m from the origin"),
        (panels[2], np.clip(xyz[:, 2], below, above), 80, "height", "z (m)"),
    ):
        axes.hist(values, bins=bins, color="#2a6f97", density=True)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel=label, yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].axvline(0, color="0.3", linewidth=1)
    panels[1].axvline(best[1][0], color="#ff9f1c", linewidth=1.6, label="suggested view")
    if report["ground_height"] is not None:
        panels[2].axvline(report["ground_height"], color="#588157", linewidth=1.6, label="ground")
    for k, limit in enumerate((best[0][2], best[1][2])):
        if below < limit < above:
            panels[2].axvline(limit, color="#ff9f1c", linewidth=1.6, label="suggested view" if k else None)
    for axes in panels:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{len(seen)} frames", fontsize=11)
    return figure
