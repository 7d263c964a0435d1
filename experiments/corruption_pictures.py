"""A picture of the eight corruptions of one scan: eight top views.

python experiments/corruption_pictures.py --dataset=streets --root=CACHE --output=corruptions.png
python experiments/corruption_pictures.py --dataset=pandaset --root=PANDASET --severity=light --output=a.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from scalr_jax.config import CORRUPTIONS, SEVERITIES
from scalr_jax.data.scenes import IGNORE
from scalr_jax.evaluation.corruptions import Corrupted, check_corruption
from scalr_jax.figures.pictures import BACKGROUND, color_labels, top_view_box
from scalr_jax.runtime.command_line import exit_codes
from scalr_jax.runtime.storage import written_whole

CLUTTER = (255, 255, 255)  # of points without a class, which stand out here


def draw_corruptions(output: Path, dataset: Any, index: int, severity: str) -> None:
    """A PNG of frame `index` of a dataset under each corruption, by class; points without a class in white."""
    check_corruption(CORRUPTIONS[0], severity)
    clear = dataset.frame(index, np.random.default_rng(0))
    turn, shift = clear.to_ego[:3, :3], clear.to_ego[:3, 3]
    (left, bottom), side = top_view_box(clear.points[:, :3] @ turn.T + shift)
    figure = Figure(figsize=(20, 10.6), layout="constrained")
    for axes, corruption in zip(figure.subplots(2, 4).flat, CORRUPTIONS, strict=True):
        frame = Corrupted(dataset, corruption, severity).frame(index, np.random.default_rng(0))
        xyz, labels = frame.points[:, :3] @ turn.T + shift, np.asarray(frame.labels)
        colors = color_labels(labels, dataset.class_names)
        colors[labels == IGNORE] = CLUTTER
        order = np.argsort(xyz[:, 2])
        size = float(np.clip(40_000 / max(len(order), 1), 0.5, 4.0))
        axes.scatter(xyz[order, 0], xyz[order, 1], s=size, c=colors[order] / 255.0, linewidths=0)
        axes.set(xlim=(left, left + side), ylim=(bottom, bottom + side), aspect="equal", facecolor=BACKGROUND)
        share = len(labels) / max(len(clear.points), 1)
        axes.set_title(f"{corruption}: {share:.0%} of the points, {(labels == IGNORE).mean():.0%} without class")
    figure.suptitle(f"{dataset.name(index)}, {severity}; white: no class; metres")
    with written_whole(output) as file:
        figure.savefig(file, dpi=80, format="png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("streets", "pandaset"), default="streets")
    parser.add_argument("--root", required=True, help="PandaSet, or the cache of generated streets")
    parser.add_argument("--sensor", default="", help="beams32, beams64, solid; pandar64, pandargt")
    parser.add_argument("--index", type=int, default=0, help="number of the frame")
    parser.add_argument("--severity", default=SEVERITIES[2], help="light, moderate or heavy")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    with exit_codes():
        draw_corruptions(given.output, _open(given), given.index, given.severity)


def _open(given: argparse.Namespace) -> Any:
    if given.dataset == "pandaset":
        from scalr_jax.data.readers.pandaset import PandaSet

        return PandaSet(given.root, sensor=given.sensor or "pandar64", split="all", labels=True)
    from scalr_jax.data.streets.streets import Streets

    streets = Streets(given.root, split="validation", num_scenes=given.index + 1, sensors=(given.sensor or "beams32",))
    streets.render_missing()
    return streets


if __name__ == "__main__":
    main()
