"""Pictures: loss curves and correlation maps (ScaLR, figure 1: one query point, colour by cosine similarity)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def read_curve(workdir: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key of metrics.jsonl; empty arrays when no line has it."""
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [(line["step"], line[key]) for line in lines if key in line]
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


def draw_loss(workdir: Path, output: Path | None = None) -> Path:
    """The loss over steps, with the best constant prediction beside it, into `figures/loss.png`."""
    output = output or workdir / "figures" / "loss.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(*read_curve(workdir, "train/loss"), label="student")
    steps, constant = read_curve(workdir, "train/loss_constant")
    if len(steps):
        axes.plot(steps, constant, "--", color="0.4", label="best constant prediction")
    axes.set(xlabel="step", ylabel="distillation loss" if len(steps) else "loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)
    plt.close(figure)
    return output


def cosine_similarity(features: np.ndarray, query: int) -> np.ndarray:
    """Cosine [N] of every row of features [N, C] with row `query`."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return unit @ unit[query]


def draw_correlation(
    output: Path, xyz: np.ndarray, similarity: np.ndarray, query: int, image: np.ndarray, pixels: np.ndarray, title: str
) -> Path:
    """Camera image with the points over it, beside the top view; both coloured by similarity to the query point.

    xyz [N, 3] metres, similarity [N], image [h, w, 3] uint8, pixels [N, 2] (row, column) of the same points.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(15, 4.2), layout="constrained", width_ratios=(1.6, 1.6, 1.2)
    )
    order = np.argsort(similarity)  # the most similar on top
    low, high = np.quantile(similarity, (0.02, 0.995))
    style: dict[str, Any] = {"c": similarity[order], "cmap": "turbo", "vmin": low, "vmax": high, "linewidths": 0}
    left.imshow(image)
    left.set_title("camera")
    middle.imshow(image, alpha=0.35)
    middle.scatter(pixels[order, 1], pixels[order, 0], s=7, **style)
    middle.plot(pixels[query, 1], pixels[query, 0], "*", color="white", markeredgecolor="black", markersize=14)
    middle.set_title("lidar points over the image")
    for axes in (left, middle):
        axes.set_axis_off()
    shown = right.scatter(xyz[order, 0], xyz[order, 1], s=4, **style)
    right.plot(xyz[query, 0], xyz[query, 1], "*", color="white", markeredgecolor="black", markersize=14)
    right.set(xlabel="x (m)", ylabel="y (m)", aspect="equal", title="top view")
    figure.colorbar(shown, ax=right, label="cosine similarity to the star")
    figure.suptitle(title)
    figure.savefig(output, dpi=110)
    plt.close(figure)
    return output
