"""Prints the tables and draws the plots of docs/measurements/results.md, from what experiments/streets.py has run.

    python experiments/report.py --output=runs/results --figures=docs/images
    python experiments/report.py --output=runs/results_pandaset --classes    # of experiments/pandaset.py

Means over the seeds that have a part, with the smallest and the largest value in parentheses when there are several.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from scalr_jax.runtime.command_line import fail

PERCENTS = (1, 10, 100)
KINDS = {
    "probe_random": "linear probe, random",
    "probe_distilled": "linear probe, distilled",
    "finetuned": "fine-tuned from distilled",
    "supervised": "supervised from random",
}


def read_seeds(output: Path) -> list[dict]:
    """The parts of each seed, by name."""
    return [json.loads(path.read_text())["parts"] for path in sorted(output.glob("seed_*/results.json"))]


def mious(seeds: Sequence[dict], name: str) -> list[float]:
    """mIoU in percent of one part, of every seed that has it."""
    return [100 * seed[name]["miou"] for seed in seeds if "miou" in seed.get(name, {})]


def best_mious(seeds: Sequence[dict], kind: str, percent: int) -> list[float]:
    """The same of the best of a kind's learning rates in each seed."""
    pattern = re.compile(rf"{kind}_{percent}p(_[\d.e-]+)?")
    found = [[100 * part["miou"] for name, part in seed.items() if pattern.fullmatch(name)] for seed in seeds]
    return [max(values) for values in found if values]


def cell(values: Sequence[float]) -> str:
    """Mean (smallest to largest), or a dash."""
    if not values:
        return "-"
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label_table(seeds: Sequence[dict]) -> str:
    """Random, distilled and supervised with each share of the labels."""
    rows = [[text, *(cell(best_mious(seeds, kind, p)) for p in PERCENTS)] for kind, text in KINDS.items()]
    return table(["mIoU %", *(f"{percent} % of the labels" for percent in PERCENTS)], rows)


def class_table(seeds: Sequence[dict]) -> str:
    """IoU of each class with all labels."""
    names: dict[str, list[list[float]]] = {}
    for column, kind in enumerate(KINDS):
        for seed in seeds:
            found = [part for name, part in seed.items() if re.fullmatch(rf"{kind}_100p(_[\d.e-]+)?", name)]
            if found:
                for name, value in max(found, key=lambda part: part["miou"])["iou"].items():
                    columns = names.setdefault(name, [[] for _ in KINDS])
                    if value is not None:  # a class that is neither labelled nor predicted
                        columns[column].append(100 * value)
    rows = [["**mean**", *(cell(best_mious(seeds, kind, 100)) for kind in KINDS)]]
    rows += [[name, *map(cell, columns)] for name, columns in names.items()]
    return table(["IoU %, all labels", *KINDS.values()], rows)


def probe_table(seeds: Sequence[dict]) -> str:
    """Each kind of probe, of random and of distilled weights, with all labels."""
    kinds = {"linear (batch norm, trained)": "probe_{}_100p", "MLP": "mlp_{}", "20 nearest neighbours": "knn_{}"}
    kinds["logistic regression on the teacher's features of labelled image regions"] = "zero_shot_{}"
    rows = [
        [text, *(cell(mious(seeds, name.format(start))) for start in ("random", "distilled"))]
        for text, name in kinds.items()
    ]
    return table(["mIoU % of a probe", "random weights", "distilled"], rows)


def gap_table(seeds: Sequence[dict]) -> str:
    """Models trained on 32 beams, evaluated on each sensor."""
    rows = []
    for kind, text in KINDS.items():
        model = f"{kind}_100p" if kind.startswith("probe") else kind
        rows.append([text, cell(best_mious(seeds, kind, 100))])
        rows[-1] += [cell(mious(seeds, f"gap_{model}_{sensor}")) for sensor in ("beams64", "solid")]
    return table(["mIoU %, trained on 32 beams", "32 beams", "64 beams", "solid state"], rows)


def corruption_table(seeds: Sequence[dict]) -> str:
    """mIoU under each corruption, mean over severities; CE against the supervised student, RR against clear scans."""
    columns = {}
    for kind in KINDS:
        name = f"corrupted_{kind}_100p" if kind.startswith("probe") else f"corrupted_{kind}"
        columns[kind] = [seed[name]["robustness"] for seed in seeds if name in seed]
    names = next((list(found[0]["corruptions"]) for found in columns.values() if found), [])
    rows = [["clear", *(cell([100 * one["clear_miou"] for one in found]) for found in columns.values())]]
    for name in names:
        values = [
            [100 * float(np.mean(list(one["corruptions"][name]["miou"].values()))) for one in found]
            for found in columns.values()
        ]
        rows.append([name.replace("_", " "), *map(cell, values)])
    for key, text in (("mce", "mCE %, of the supervised"), ("mrr", "mRR %")):
        values = [[one[key] for one in found if one[key] is not None] for found in columns.values()]
        rows.append([text, *map(cell, values)])
    return table(["mIoU %, all labels, 16 scans", *KINDS.values()], rows)


def sensor_table(seeds: Sequence[dict]) -> str:
    """Pretraining on one to three sensors, probed on each."""
    rows = []
    for number in ("random", "1", "2", "3"):
        names = [f"probe_sensors_{number}_{sensor}" for sensor in ("beams32", "beams64", "solid")]
        rows.append([number, *(cell(mious(seeds, name)) for name in names)])
    return table(["sensors in pretraining", "probe on 32 beams", "on 64 beams", "on solid state"], rows)


_DISTILLED = "probe_distilled_100p"  # 64 channels, 6 layers, the packaged teacher
SWEEPS = {  # by the label of their axis: value -> part
    "channels of the student": {16: "probe_width16", 32: "probe_width32", 64: _DISTILLED, 96: "probe_width96"},
    "layers of the student": {3: "probe_depth3", 6: _DISTILLED, 12: "probe_depth12"},
    "channels of the teacher (300 steps each)": {width: f"probe_by_teacher{width}" for width in (16, 32, 64, 128)},
}


def sweep_table(seeds: Sequence[dict], label: str) -> str:
    """A column each seed that has the whole sweep, and their mean."""
    points = SWEEPS[label]
    whole = {number: seed for number, seed in enumerate(seeds) if all(name in seed for name in points.values())}
    rows = []
    for value, name in points.items():
        found = mious(list(whole.values()), name)
        rows.append([str(value), *(f"{one:.1f}" for one in found), f"{np.mean(found):.1f}" if found else "-"])
    return table([label, *(f"seed {number}" for number in whole), "mean, mIoU % of a linear probe"], rows)


def draw_sweeps(seeds: Sequence[dict], output: Path) -> None:
    """One panel a sweep, a line for each seed."""
    figure, all_axes = plt.subplots(1, len(SWEEPS), figsize=(3.6 * len(SWEEPS), 3.2), layout="constrained", sharey=True)
    for axes, (label, points) in zip(all_axes, SWEEPS.items(), strict=True):
        for number, seed in enumerate(seeds):
            if all(name in seed for name in points.values()):
                axes.plot([mious([seed], name)[0] for name in points.values()], "o-", alpha=0.7, label=f"seed {number}")
        axes.set(xlabel=label, xticks=range(len(points)), xticklabels=[str(value) for value in points])
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    all_axes[0].set_ylabel("mIoU of a linear probe, %")
    _save(figure, output)


def draw_labels(seeds: Sequence[dict], output: Path) -> None:
    """mIoU over the share of the labels, a line for each kind of training."""
    figure, axes = plt.subplots(figsize=(5.2, 4.0), layout="constrained")
    for color, (kind, text) in enumerate(KINDS.items()):
        found = {p: values for p in PERCENTS if (values := best_mious(seeds, kind, p))}
        if not found:
            continue
        axes.plot(list(found), [np.mean(values) for values in found.values()], "-", color=f"C{color}", label=text)
        for percent, values in found.items():
            axes.plot([percent] * len(values), values, "o", color=f"C{color}", alpha=0.6)
    axes.set(xscale="log", xlabel="labelled scans, % of 400", ylabel="mIoU, %", xticks=PERCENTS, xticklabels=PERCENTS)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    _save(figure, output)


def draw_sensors(seeds: Sequence[dict], output: Path) -> None:
    """A group of bars for each sensor that is probed, a bar for each number of sensors in pretraining."""
    figure, axes = plt.subplots(figsize=(5.4, 3.9), layout="constrained")
    for k, number in enumerate(("random", "1", "2", "3")):
        found = [mious(seeds, f"probe_sensors_{number}_{sensor}") for sensor in ("beams32", "beams64", "solid")]
        places = np.arange(3) + 0.2 * (k - 1.5)
        label = "random weights" if number == "random" else f"{number} sensor{'s' if number > '1' else ''}"
        means = [float(np.mean(values)) if values else 0.0 for values in found]
        axes.bar(places, means, 0.18, label=label, color=f"C{k}")
        for place, values in zip(places, found, strict=True):
            axes.plot([place] * len(values), values, ".", color="k")
    axes.set(xticks=range(3), xticklabels=["32 beams", "64 beams", "solid state"], ylabel="mIoU of a linear probe, %")
    figure.legend(loc="outside lower center", ncols=4, title="pretraining", columnspacing=1.0)
    axes.grid(axis="y", alpha=0.3)
    _save(figure, output)


def _save(figure: Figure, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def report(seeds: Sequence[dict], figures: Path | None) -> str:
    """All tables as Markdown; the plots go into `figures`."""
    texts = [label_table(seeds), class_table(seeds), probe_table(seeds), gap_table(seeds), corruption_table(seeds)]
    texts += [sweep_table(seeds, label) for label in SWEEPS]
    texts.append(sensor_table(seeds))
    seconds = sum(part["seconds"] or 0 for seed in seeds for part in seed.values())
    texts.append(f"{sum(map(len, seeds))} parts of {len(seeds)} seeds, {seconds / 3600:.1f} hours in all.")
    if figures is not None:
        draw_labels(seeds, figures / "results_labels.png")
        draw_sweeps(seeds, figures / "results_pillars.png")
        draw_sensors(seeds, figures / "results_sensors.png")
    return "\n\n".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="what streets.py was given")
    parser.add_argument("--figures", type=Path, help="folder for the plots (default: none are drawn)")
    parser.add_argument("--classes", action="store_true", help="only mIoU and the classes' IoU with all labels")
    arguments = parser.parse_args()
    seeds = read_seeds(arguments.output)
    if not seeds:
        fail(f"{arguments.output} has no seed_N/results.json; run experiments/streets.py first")
    print(class_table(seeds) if arguments.classes else report(seeds, arguments.figures))


if __name__ == "__main__":
    main()
