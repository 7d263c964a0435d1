"""How much a segmentation model loses under corruptions: CE and RR of Robo3D (Kong et al., ICCV 2023, section 3).

    CE_i = sum over severities of (1 - mIoU) / the same sum of a baseline        mCE: mean over the corruptions i
    RR_i = sum over severities of mIoU / (3 * mIoU on clear scans)               mRR: mean over the corruptions i

in percent; low CE and high RR are good. Each part (one corruption at one severity) is kept in WORKDIR/robustness, so an
interrupted evaluation goes on at the next part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from scalr_jax.config import CORRUPTIONS, SEVERITIES, DataSettings, EvaluateSettings
from scalr_jax.data.readers.released import open_released
from scalr_jax.data.scenes import Dataset
from scalr_jax.evaluation.corruptions import Corrupted
from scalr_jax.evaluation.report import results_by_range, results_of
from scalr_jax.evaluation.segmentation import Evaluator
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import flatten, read_json, write_json

OWN = "scalr_jax's generators"


class Baseline(NamedTuple):
    """The errors that CE is relative to."""

    name: str
    miou: dict[str, float]  # by corruption, 0 to 1: the mean over the severities
    support: dict[str, int] | None = None  # labelled points of its clear scans by class; None: not known


class Part(NamedTuple):
    """One evaluation of clear scans, or of one corruption at one severity: counts [rings + 1, classes, classes] int64,
    and how many scans were evaluated or could not be read."""

    confusion: np.ndarray
    scans: int
    bad_scans: int


def _published(dataset: str, *percent: float) -> Baseline:
    values = dict(zip(CORRUPTIONS, (value / 100 for value in percent), strict=True))
    return Baseline(f"MinkUNet-18 on the released {dataset}, as published", values)


PUBLISHED = {
    "nuscenes_c": _published("nuScenes-C", 53.64, 73.91, 40.35, 73.39, 68.54, 26.58, 63.83, 50.95),
    "semantic_kitti_c": _published("SemanticKITTI-C", 55.87, 53.99, 53.28, 32.92, 56.32, 58.34, 54.43, 46.05),
}


def summarize(miou: Mapping[str, Mapping[str, float]], clear: float, baseline: Baseline | None) -> dict[str, Any]:
    """CE (None without a baseline) and RR (None where `clear` is 0) of each corruption, and their means.

    miou: corruption -> severity -> mIoU, 0 to 1; clear: mIoU on clear scans.
    """
    rows = {}
    for corruption, by_severity in miou.items():
        values, ce = list(by_severity.values()), None
        if baseline is not None:
            ce = 100 * sum(1 - value for value in values) / (len(values) * (1 - baseline.miou[corruption]))
        rr = 100 * sum(values) / (len(values) * clear) if clear else None
        rows[corruption] = {"miou": dict(by_severity), "ce": ce, "rr": rr}

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows.values()]
        return None if None in values else float(np.mean(values))

    return {
        "clear_miou": clear,
        "mce": mean("ce"),
        "mrr": mean("rr"),
        "baseline": None if baseline is None else baseline.name,
        "corruptions": rows,
    }


def find_baseline(evaluate: EvaluateSettings, data: DataSettings, corrupted_by: str) -> Baseline | None:
    """The baseline that `evaluate.baseline` names: a published one, another run's results, or by the dataset ("auto").

    The published ones are means over three severities of a released set: "auto" takes them for nothing else.

    Raises:
        InputError: none of these, a published one of another dataset or of other severities, or a run on other scans or
          with fewer corruptions or other severities.
    """
    given, all_severities = evaluate.baseline, sorted(evaluate.severities) == sorted(SEVERITIES)
    if given == "auto":
        released = corrupted_by != OWN and all_severities
        return PUBLISHED.get(f"{data.dataset}_c") if released else None
    if given in PUBLISHED:
        if given != f"{data.dataset}_c" or not all_severities:
            published = f"the mean over {', '.join(SEVERITIES)} on {given.removesuffix('_c')}"
            raise InputError(
                f"evaluate.baseline = {given!r} is {published}, and this run has {', '.join(evaluate.severities)} on "
                f"{data.dataset}; give the workdir of another robustness run, or leave it out"
            )
        return PUBLISHED[given]
    return _read_baseline(given, evaluate.corruptions, (_dataset_of(data), corrupted_by, evaluate.severities))


def _read_baseline(given: str, wanted: Sequence[str], here: tuple) -> Baseline:
    """The baseline in another run's results, for the corruptions `wanted`. `here`: dataset, origin of the corruptions
    and severities of this run."""
    path = Path(given) / "results.json" if Path(given).is_dir() else Path(given)
    if not path.is_file():
        raise InputError(
            f"evaluate.baseline = {given!r} is none of auto, {', '.join(PUBLISHED)}, nor the workdir of a robustness "
            "run"
        )
    try:
        content = read_json(path, "evaluate.baseline needs the results of a robustness run")
        found, support = content["robustness"], dict(content["support"])
        rows = {name: row["miou"] for name, row in found["corruptions"].items()}
        saved = (found["dataset"], found["corrupted_by"], tuple(found["severities"]))
        means = {name: float(np.mean(list(row.values()))) for name, row in rows.items()}
    except (KeyError, TypeError, AttributeError, np.exceptions.DTypePromotionError):
        raise InputError(f"{path} holds no results of task robustness, and evaluate.baseline needs some") from None
    if saved != here or any(name not in rows for name in wanted):
        raise InputError(
            f"evaluate.baseline = {given}: its scans are {', '.join(map(str, saved))} with {', '.join(rows)}, and this "
            f"run's are {', '.join(map(str, here))} with {', '.join(wanted)}; evaluate the baseline in the same way"
        )
    return Baseline(str(given), {name: means[name] for name in wanted}, support)


def _dataset_of(data: DataSettings) -> str:
    """The scans: dataset, sensors, split."""
    sensors = "+".join(data.sensors) if data.dataset in ("streets", "pandaset") else ""
    return " ".join(filter(None, (data.dataset, sensors, data.split)))


class _Parts:
    """Parts of one evaluation, each computed once and kept in a file."""

    def __init__(self, folder: Path, key: str, evaluator: Evaluator, rings: Sequence[float], names: Sequence[str]):
        self._folder, self._key, self._evaluator, self._rings, self._names = folder, key, evaluator, rings, names
        self._shape = (len(rings) + 1, len(names), len(names))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name.replace(' ', '_')}.json"

    def saved(self, name: str) -> Part | None:
        """A finished part; None when it is missing, cut short or of something else."""
        try:
            content = json.loads(self._path(name).read_text())
            part = Part(np.array(content["confusion"], np.int64), int(content["scans"]), int(content["bad_scans"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return part if content.get("key") == self._key and part.confusion.shape == self._shape else None

    def measure(self, name: str, scans: Any) -> Part:
        """The saved part, or a new one. Raises `InputError` when it has no labelled point."""
        part = self.saved(name)
        if part is None:
            confusion = self._evaluator.confusion(scans, rings=self._rings)
            part = Part(confusion, self._evaluator.num_scans, len(scans) - self._evaluator.num_scans)
            if jax.process_index() == 0:
                content = {"key": self._key, "classes": self._names, "confusion": confusion.tolist()}
                write_json(self._path(name), {**content, "scans": part.scans, "bad_scans": part.bad_scans})
        if part.confusion.sum() == 0:
            raise InputError(
                f"{name}: no labelled point is left; check data.split and the labels, or leave it out of "
                "evaluate.corruptions"
            )
        if jax.process_index() == 0:
            miou = results_of(part.confusion.sum(axis=0), self._names)["miou"]
            print(f"{name}: mIoU {100 * miou:.2f} %", flush=True)
        return part


def measure(
    evaluate: EvaluateSettings, data: DataSettings, workdir: Path, evaluator: Evaluator, dataset: Dataset, key: str
) -> dict[str, Any]:
    """Evaluates clear and corrupted scans of `dataset`, the clear validation set; returns what results.json holds.

    Finished parts are kept in WORKDIR/robustness; with another `key`, from `part_key`, they are computed again.

    Raises:
        InputError: a baseline that does not fit, no labelled points, or a released set that is missing.
    """
    names, severities, rings = tuple(dataset.class_names), evaluate.severities, evaluate.rings
    corrupted_by = evaluate.corrupted_root or OWN
    baseline = find_baseline(evaluate, data, corrupted_by)
    parts = _Parts(workdir / "robustness", key, evaluator, rings, names)
    scans = {
        (corruption, severity): open_released(dataset, Path(evaluate.corrupted_root), corruption, severity)
        if evaluate.corrupted_root
        else Corrupted(dataset, corruption, severity)
        for corruption in evaluate.corruptions
        for severity in severities
    }
    if not all(parts.saved(" ".join(kind)) is not None for kind in scans):
        evaluator.reserve([dataset, *(scans[corruption, severities[-1]] for corruption in evaluate.corruptions)])
    whole = parts.measure("clear", dataset)
    clear = results_by_range(whole.confusion, rings, names)
    clear |= {"votes": evaluate.votes, "scans": whole.scans, "bad_scans": whole.bad_scans}
    if baseline is not None and baseline.support is not None and baseline.support != clear["support"]:
        raise InputError(
            f"evaluate.baseline = {evaluate.baseline}: its clear scans have {sum(baseline.support.values())} labelled "
            f"points, and this run's {sum(clear['support'].values())}; evaluate the baseline on the same scans"
        )
    found: dict[str, dict[str, dict]] = {name: {} for name in ("miou", "iou", "scans", "bad_scans")}
    for (corruption, severity), corrupted in scans.items():
        part = parts.measure(f"{corruption} {severity}", corrupted)
        row = {**results_of(part.confusion.sum(axis=0), names), "scans": part.scans, "bad_scans": part.bad_scans}
        for name, by_corruption in found.items():
            by_corruption.setdefault(corruption, {})[severity] = row[name]
    summary = summarize(found.pop("miou"), clear["miou"], baseline)
    for corruption, row in summary["corruptions"].items():
        row |= {name: by_corruption[corruption] for name, by_corruption in found.items()}
    described = {"dataset": _dataset_of(data), "corrupted_by": corrupted_by, "severities": list(severities)}
    return {**clear, "robustness": {**described, **summary}}


def part_key(record: Mapping[str, Any], weights: str, free: Collection[str]) -> str:
    """The key of a part's results: the weights (a checksum) and every setting of scans and model in the `record`
    (config.json) but for `free` keys, which change no result."""
    settings = flatten(record)
    kept = {name: value for name, value in settings.items() if name.startswith(("data.", "model."))}
    kept |= {name: settings[name] for name in ("seed", "evaluate.votes", "evaluate.rings", "evaluate.corrupted_root")}
    kept = {name: value for name, value in kept.items() if name not in free}
    return hashlib.sha256(json.dumps([weights, kept], sort_keys=True).encode()).hexdigest()[:16]


def table(results: Mapping[str, Any]) -> str:
    """A row a corruption: mIoU at each severity, CE and RR (percent)."""
    found = results["robustness"]
    severities = found["severities"]
    percent = lambda value: "-" if value is None else f"{value:.2f}"  # noqa: E731
    lines = [f"{'mIoU %':<17}" + "".join(f"{name:>10}" for name in severities) + f"{'CE %':>9}{'RR %':>9}"]
    lines.append(f"{'clear':<17}{100 * found['clear_miou']:>10.2f}")
    for name, row in found["corruptions"].items():
        cells = "".join(f"{100 * row['miou'][severity]:>10.2f}" for severity in severities)
        lines.append(f"{name:<17}{cells}{percent(row['ce']):>9}{percent(row['rr']):>9}")
    blank = " " * 10 * len(severities)
    lines.append(f"{'mCE, mRR':<17}{blank}{percent(found['mce']):>9}{percent(found['mrr']):>9}")
    lines.append(f"corrupted by: {found['corrupted_by']}; CE against: {found['baseline'] or 'no baseline'}")
    if found["corrupted_by"] == OWN:
        lines.append("these figures compare models with one another; they are none of the published benchmarks'")
    return "\n".join(lines)
