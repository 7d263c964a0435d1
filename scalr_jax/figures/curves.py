"""A run's curves: read from metrics.jsonl, and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def read_curve(workdir: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key of metrics.jsonl; empty arrays when no line has it."""
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [(line["step"], line[key]) for line in lines if key in line]
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


def draw_loss(workdir: Path, output: Path | None = None) -> Path:
    """The loss over steps, with the best constant prediction beside it, into `figures/loss.png`."""
    output = output or workdir / "figures" / "loss.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
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
