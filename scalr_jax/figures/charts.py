"""Charts: a run's loss from metrics.jsonl; confusion, IoU by distance and mIoU under corruptions from results.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scalr_jax.runtime.logging import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # takes half a second, which a run spends at its end, not at its start

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path, title: str) -> None:
    from scalr_jax.figures.pictures import save_figure

    save_figure(figure, path, title)


def read_curve(workdir: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key of metrics.jsonl; empty arrays when no line has it."""
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if key in line]
    return np.array([line["step"] for line in lines]), np.array([line[key] for line in lines])


def draw_loss(workdir: Path, output: Path | None = None) -> Path:
    """The loss over steps, with the best constant prediction beside it, into `figures/loss.png`."""
    output = output or workdir / "figures" / "loss.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    figure = _figure(6, 3.6)
    axes = figure.subplots()
    axes.plot(*read_curve(workdir, "train/loss"), label="student")
    steps, constant = read_curve(workdir, "train/loss_constant")
    if len(steps):
        axes.plot(steps, constant, "--", color="0.4", label="best constant prediction")
    axes.set(xlabel="step", ylabel="distillation loss" if len(steps) else "loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)
    return output


def draw_confusion(path: Path, confusion: np.ndarray, results: Mapping, title: str) -> None:
    """A PNG: where each label's points went, and each class's IoU by distance.

    confusion [classes, classes] counts, rows: labels; results as `evaluation.report.results_by_range` makes them.
    """
    names, rings = list(results["iou"]), results["by_range"]
    size = len(names)
    percent = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    by_ring = np.array([[part["iou"][name] for part in (results, *rings.values())] for name in names], float) * 100
    side = max(3.2, 0.42 * size)
    figure = _figure(side + 0.62 * by_ring.shape[1] + 4.2, side + 1.8)
    axes = figure.subplots(1, 2, width_ratios=(size, 1.25 * by_ring.shape[1]), sharey=True)
    panels = (
        ("where the points of each label went, %", percent, names, "Blues"),
        ("IoU by distance, %", by_ring, ["all", *(ring.removesuffix(" m") for ring in rings)], "Greens"),
    )
    for ax, (text, values, columns, colors) in zip(axes, panels, strict=True):
        ax.imshow(np.nan_to_num(values), cmap=colors, vmin=0, vmax=100, aspect="auto")
        for i, j in np.ndindex(values.shape):
            shown = values[i, j]
            if np.isnan(shown) or shown >= 0.5 or colors == "Greens":
                text_of = "-" if np.isnan(shown) else f"{shown:.0f}"
                dark = not np.isnan(shown) and shown > 55
                ax.text(j, i, text_of, ha="center", va="center", fontsize=8, color="white" if dark else "0.25")
        ax.set_xticks(range(len(columns)), columns, rotation=60, ha="right")
        ax.set_title(text, fontsize=10, loc="left")
    axes[0].set_yticks(range(size), names)
    axes[0].set(xlabel="prediction", ylabel="label")
    axes[1].set_xlabel("metres from the lidar")
    _save(figure, path, title)


def draw_robustness(path: Path, results: Mapping, title: str) -> None:
    """A PNG: mIoU of each corruption and severity beside that of clear scans, from the results of task robustness."""
    found = results["robustness"]
    names, severities = list(found["corruptions"]), found["severities"]
    figure = _figure(2.2 + 1.25 * len(names), 4.6)
    axes = figure.subplots()
    width = 0.8 / len(severities)
    shades = ("#9ecae1", "#4292c6", "#08519c")[-len(severities) :]
    for k, (severity, shade) in enumerate(zip(severities, shades, strict=True)):
        values = [100 * found["corruptions"][name]["miou"][severity] for name in names]
        places = np.arange(len(names)) + (k - (len(severities) - 1) / 2) * width
        axes.bar(places, values, width, color=shade, label=severity)
        for place, value in zip(places, values, strict=True):
            text = axes.text(place, value + 0.4, f"{value:.0f}", ha="center", fontsize=8)
            text.set_bbox({"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5})
    clear = 100 * found["clear_miou"]
    axes.axhline(clear, color="0.2", linestyle="--", linewidth=1, label=f"clear: {clear:.1f}")
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.set(ylabel="mIoU, %", ylim=(0, max(clear, 1.0) * 1.12))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    means = [f"{name} {found[key]:.1f} %" for name, key in (("mCE", "mce"), ("mRR", "mrr")) if found[key] is not None]
    _save(figure, path, f"{title}\n{'; '.join([*means, 'corrupted by ' + found['corrupted_by']])}")
