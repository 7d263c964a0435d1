"""The runs behind docs/measurements/results.md: parts of one seed on generated streets, each in its own folder.

    python experiments/streets.py --output=runs/results --seed=0                     # everything of a seed
    python experiments/streets.py --output=runs/results --seed=0 --group=table --minutes=8
    python experiments/streets.py --output=runs/results --seed=0 --list
    python experiments/report.py --output=runs/results --figures=docs/images

Groups: "table" (probes of random and distilled students and supervised training with 1, 10 and 100 % of the labels),
"probes" (an MLP, nearest neighbours, image prototypes), "gap" and "corruptions" (the models with all labels on other
sensors, and under Robo3D's eight corruptions), "finetune" (the distilled student fine-tuned as the table's are trained,
and the same of it; after "corruptions"), "width", "depth", "teacher" and "sensors" (the three pillars at small scale),
"teachers" (two teachers that were taught different things, each alone and both at once).
Groups after the first start from parts of the table.

The same command again goes on where it stopped: a part is done when its results.json is there, and an
interrupted one resumes from its checkpoint. On one core, with another seed on the other, a part takes half a minute to
six minutes and all of a seed but finetune two and a half hours (table 50 minutes, sensors 40, teacher 16, width and
depth 10 each, the others 8 or less); --minutes begins no part after so long. `OUTPUT/seed_N/results.json` gathers
what is done.

The student, its distillation and the streets are those of configs/demo.py, with 400 streets in place of 192, so that
1 % of the labels are four scans. Probes take cached features and 1,200 steps; supervised training and fine-tuning 900.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import runpy
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from scalr_jax.demo.run import add_seconds, part_settings
from scalr_jax.interop.teacher import ASSET
from scalr_jax.main import run as run_task
from scalr_jax.runtime.command_line import exit_codes, use_cache
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import write_json
from scalr_jax.settings import read_settings

Config = Any  # an ml_collections.ConfigDict, whose attributes have no types

CONFIGS = Path(__file__).parent.parent / "configs"
GROUPS = ("table", "probes", "finetune", "gap", "corruptions", "width", "depth", "teacher", "sensors", "teachers")
PERCENTS = (1, 10, 100)
RATES = (4e-3, 1e-2, 2.5e-2)  # of supervised training and of fine-tuning; the report takes the best
NUM_SCENES = 400
# At the demo's 120 steps of a probe and 450 of supervision neither is done: on seed 0 the linear probe has 0.52 mIoU
# after 120 steps, 0.63 after 800 and 0.64 after 2,000 (2026-11-23).
PROBE_STEPS, SUPERVISED_STEPS = 1200, 900
RANDOM_STEPS = 40  # in which the batch norms of random weights see the data
WIDTHS = (16, 32, 96)  # besides the table's 64 channels
DEPTHS = (3, 12)  # besides 6 layers
TEACHER_WIDTHS = (16, 32, 64, 128)
TEACHER_STEPS, TEACHER_STREETS = 300, 150
UNTAUGHT = {"shapes": ("normal", "albedo"), "surfaces": ("length", "width", "tallness", "offset")}
CORRUPTED_SCENES = 16  # of the 48 for validation, each of them evaluated 25 times
SENSORS = ("beams32", "beams64", "solid")


class Part(NamedTuple):
    """One run: `make()` is its config, called when its turn has come."""

    group: str
    name: str  # of its folder
    make: Callable[[], Config]
    result: str = "results.json"  # the file that says that it is done


def parts(seed: int, folder: Path) -> Iterator[Part]:
    """All parts of a seed, each after those it starts from."""
    base = _load("demo.py")
    base.seed, base.task = seed, "distill"
    base.data.update(root=str(folder / "streets"), num_scenes=NUM_SCENES)
    yield from _table(base, folder)
    yield from _probes(base, folder)
    yield from _gap(base, folder)
    for group, key, values in (("width", "channels", WIDTHS), ("depth", "depth", DEPTHS)):
        for value in values:
            config = copy.deepcopy(base)
            config.model[key] = value
            yield from _distill_and_probe(group, f"{group}{value}", config, folder)
    yield from _teachers(base, folder)
    yield from _sensors(base, folder)
    yield from _several(base, folder)


def _load(name: str) -> Config:
    return runpy.run_path(str(CONFIGS / name))["get_config"]()


def _table(base: Config, folder: Path) -> Iterator[Part]:
    yield Part("table", "distill_random", lambda: _random(base))
    yield Part("table", "distill", lambda: base)
    for percent in PERCENTS:
        for start in ("random", "distilled"):
            config = _segment(base, "probe", folder / ("distill_random" if start == "random" else "distill"), percent)
            yield Part("table", f"probe_{start}_{percent}p", lambda config=config: config)
    for percent in reversed(PERCENTS):
        for rate in RATES:
            for group, name, start in (("table", "supervised", None), ("finetune", "finetuned", folder / "distill")):
                config = _segment(base, "finetune", start, percent)
                config.optimizer.learning_rate = rate
                yield Part(group, f"{name}_{percent}p_{rate:g}", lambda config=config: config)


def _probes(base: Config, folder: Path) -> Iterator[Part]:
    """Other probes than the table's, of the same students; random weights know nothing of image prototypes."""
    for start, name in (("random", "distill_random"), ("distilled", "distill")):
        mlp, knn = (_segment(base, "probe", folder / name) for _ in range(2))
        mlp.probe.head, knn.probe.method = "mlp", "knn"
        yield Part("probes", f"mlp_{start}", lambda mlp=mlp: mlp)
        yield Part("probes", f"knn_{start}", lambda knn=knn: knn)
    zero_shot = _segment(base, "probe", folder / "distill")
    zero_shot.probe.method = "zero_shot"
    yield Part("probes", "zero_shot_distilled", lambda: zero_shot)


def _random(base: Config) -> Config:
    """Random weights whose batch norms have seen the data: a distillation whose learning rate is zero."""
    config = copy.deepcopy(base)
    config.num_steps = config.checkpoint_every_steps = RANDOM_STEPS
    config.optimizer.update(learning_rate=0.0, schedule="constant")
    return config


def part_config(config: Config, task: str) -> Config:
    """The config of one part of the demo, which may be changed further."""
    nested = dataclasses.asdict(part_settings(read_settings(config), task))
    part = copy.deepcopy(config)
    part.update(nested.pop("run") | nested)
    return part


def _segment(base: Config, task: str, start: Path | None, percent: int = 100) -> Config:
    """A probe or fine-tuning from the workdir `start` (None: random weights), for longer than the demo's."""
    config = part_config(base, task)
    config.num_steps, config.log_every_steps = SUPERVISED_STEPS, 25
    if task == "probe":
        config.num_steps, config.probe.features = PROBE_STEPS, "cached"
        # Cached features are of one draw of points, so of all of a scan, as in the evaluation: with 4,000 points of
        # each scan the probes of all labels were worse than those of a tenth of them (58.5 and 62.7, two seeds).
        config.data.update(max_points=16_000, points_per_shard=16_384)
    config.checkpoint = str(start or "")
    config.data.label_fraction = percent / 100
    return config


def _gap(base: Config, folder: Path) -> Iterator[Part]:
    """The models trained with all labels, on validation scans of the other sensors, then on corrupted ones."""

    def evaluate(model: str, sensor: str) -> Config:
        config = copy.deepcopy(base)
        config.task = "evaluate"
        config.data.update(split="validation", sensors=(sensor,))
        config.checkpoint = str(folder / (best(folder, model)[0] if model in ("supervised", "finetuned") else model))
        return config

    def corrupt(model: str) -> Config:
        config = evaluate(model, SENSORS[0])
        config.task, config.data.num_validation_scenes = "robustness", CORRUPTED_SCENES
        config.evaluate.baseline = "auto" if model == "supervised" else str(folder / "corrupted_supervised")
        return config

    models = ("supervised", "finetuned", "probe_distilled_100p", "probe_random_100p")
    for model in models:
        for sensor in SENSORS[1:]:
            make = lambda model=model, sensor=sensor: evaluate(model, sensor)  # noqa: E731
            yield Part("finetune" if model == "finetuned" else "gap", f"gap_{model}_{sensor}", make)
    for model in models:
        group = "finetune" if model == "finetuned" else "corruptions"
        yield Part(group, f"corrupted_{model}", lambda model=model: corrupt(model))


def best(folder: Path, kind: str, percent: int = 100) -> tuple[str, float]:
    """The part of `kind` with the best mIoU over the learning rates, and its mIoU. Raises `InputError` before that."""
    names = [f"{kind}_{percent}p_{rate:g}" for rate in RATES]
    paths = [folder / name / "results.json" for name in names]
    if missing := [path for path in paths if not path.exists()]:
        raise InputError(f"{missing[0]} is not there yet; run the group table first")
    values = [json.loads(path.read_text())["miou"] for path in paths]
    return max(zip(names, values, strict=True), key=lambda pair: pair[1])


def _distill_and_probe(group: str, name: str, config: Config, folder: Path) -> Iterator[Part]:
    yield Part(group, f"distill_{name}", lambda: config)
    probe = _segment(config, "probe", folder / f"distill_{name}")
    yield Part(group, f"probe_{name}", lambda: probe)


def _teachers(base: Config, folder: Path) -> Iterator[Part]:
    """Teachers of several widths, all trained alike and for a fifth of the packaged one's steps."""
    for width in TEACHER_WIDTHS:
        teacher = _load("demo_teacher.py")
        teacher.seed, teacher.num_steps = base.seed, TEACHER_STEPS
        teacher.data.update(root=str(folder / "views"), num_scenes=TEACHER_STREETS)
        teacher.teacher_training.vit.update(width=width, num_heads=max(1, width // 32), hidden=4 * width)
        yield Part("teacher", f"teacher{width}", lambda teacher=teacher: teacher, ASSET)
        config = copy.deepcopy(base)
        config.teacher.checkpoint = str(folder / f"teacher{width}" / ASSET)
        yield from _distill_and_probe("teacher", f"by_teacher{width}", config, folder)


def _several(base: Config, folder: Path) -> Iterator[Part]:
    """A teacher of shapes and one of surfaces, each alone and both at once, standardised, for as many steps."""
    files = {}
    for name, untaught in UNTAUGHT.items():
        teacher = _load("demo_teacher.py")
        teacher.seed, teacher.num_steps = base.seed, TEACHER_STEPS
        teacher.data.update(root=str(folder / "views"), num_scenes=TEACHER_STREETS)
        teacher.teacher_training.vit.update(width=64, num_heads=2, hidden=256)
        teacher.teacher_training.weights.update(dict.fromkeys(untaught, 0.0))
        files[name] = str(folder / f"teacher_{name}" / ASSET)
        yield Part("teachers", f"teacher_{name}", lambda teacher=teacher: teacher, ASSET)
    for name, chosen in {**{name: (file,) for name, file in files.items()}, "both": (*files.values(),)}.items():
        config = copy.deepcopy(base)
        config.teacher.update(checkpoint="", normalize="standardize")
        config.teachers = tuple({"checkpoint": file} for file in chosen)
        yield from _distill_and_probe("teachers", f"by_{name}", config, folder)


def _sensors(base: Config, folder: Path) -> Iterator[Part]:
    """Pretraining on one, two and three sensors, as many scenes in all; each probed on every sensor."""
    for number in (2, 3):
        config = copy.deepcopy(base)
        config.data.sensors = SENSORS[:number]
        # As many scenes a step as with 32 beams, of which 9,600 points are four: with fewer, students were worse.
        config.data.update(points_per_shard=28_800, max_points=9_600)
        yield Part("sensors", f"distill_sensors{number}", lambda config=config: config)
    starts = {"random": "distill_random", "1": "distill", "2": "distill_sensors2", "3": "distill_sensors3"}
    for number, start in starts.items():
        for sensor in SENSORS:
            probe = _segment(base, "probe", folder / start)
            probe.data.sensors = (sensor,)
            yield Part("sensors", f"probe_sensors_{number}_{sensor}", lambda probe=probe: probe)


def run(part: Part, folder: Path) -> None:
    """One part, in its folder; a finished part is left alone."""
    workdir, started = folder / part.name, time.monotonic()
    print(f"== {part.name}", flush=True)
    config = part.make()
    run_task(config, workdir)
    shutil.rmtree(workdir / "features", ignore_errors=True)  # half a gigabyte a probe
    jax.clear_caches()  # hundreds of programs would stay in memory
    print(f"== {part.name}: {add_seconds(workdir, time.monotonic() - started):.0f} s", flush=True)


def gather(seed: int, folder: Path, known: Iterable[Part]) -> None:
    """`folder/results.json`: what the finished parts found, by name, and the seconds they took."""
    found = {}
    for part in known:
        path = folder / part.name / part.result
        if path.exists():
            found[part.name] = json.loads(path.read_text()) if path.suffix == ".json" else {}
            seconds = folder / part.name / "seconds.json"
            found[part.name]["seconds"] = json.loads(seconds.read_text()) if seconds.exists() else None
    write_json(folder / "results.json", {"seed": seed, "parts": found})


def make_parser(text: str, groups: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder of all seeds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group", choices=groups, action="append", help="only these groups (default: all)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no part after so long")
    parser.add_argument("--list", action="store_true", help="print the parts and whether they are done")
    return parser


def run_all(arguments: argparse.Namespace, folder: Path, known: Sequence[Part]) -> None:
    """The parts that are not done, in order, as the arguments of `make_parser` say."""
    logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    use_cache(arguments.output / "compiled")
    started = time.monotonic()
    chosen = [part for part in known if not arguments.group or part.group in arguments.group]
    todo = [part for part in chosen if not (folder / part.name / part.result).exists()]
    if arguments.list:
        for part in chosen:
            print(f"{part.group:<12}{part.name:<32}{'to do' if part in todo else 'done'}")
        return
    for number, part in enumerate(todo):
        if time.monotonic() - started > 60 * arguments.minutes:
            print(f"{len(todo) - number} of {len(chosen)} parts are left; the same command goes on", flush=True)
            return
        try:
            with exit_codes(interrupted="the same command goes on"):
                run(part, folder)
        finally:
            gather(arguments.seed, folder, known)
    print(f"all {len(chosen)} parts are done; python experiments/report.py --output={arguments.output} has the table")


def main() -> None:
    arguments = make_parser(__doc__ or "", GROUPS).parse_args()
    folder = arguments.output.absolute() / f"seed_{arguments.seed}"
    run_all(arguments, folder, list(parts(arguments.seed, folder)))


if __name__ == "__main__":
    sys.exit(main())
