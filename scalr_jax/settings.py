"""From a config to frozen settings: every key is checked at once, alone and against the others (`config.py` has the
table)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from scalr_jax.config import (
    DATASETS,
    MERGED,
    SECTIONS,
    DataSettings,
    RunSettings,
    Settings,
    StudentSettings,
    read_teachers,
)
from scalr_jax.runtime import keys
from scalr_jax.runtime.errors import InputError

if TYPE_CHECKING:  # reading settings, as a bench of a saved batch does, needs no config library
    from ml_collections import ConfigDict


def read_settings(config: ConfigDict) -> Settings:
    """The settings of a config. Raises `InputError` that lists every key that is missing, unknown or wrong."""
    problems: list[str] = []
    values = config.copy_and_resolve_references().to_dict()
    top = {name: value for name, value in values.items() if name not in SECTIONS}
    parts = {name: keys.read(table, values.get(name), problems, f"{name}.") for name, table in SECTIONS.items()}
    settings = Settings(keys.read(RunSettings, top, problems), **parts)
    problems += _problems(settings)
    if problems:
        raise InputError(f"config: {keys.listed(problems)}; docs/config.md lists every key")
    return settings


def student_settings(model: Mapping[str, Any]) -> StudentSettings:
    """The settings of a model config, which may have other keys or lack newer ones. Raises `InputError`."""
    defaults, problems = dataclasses.asdict(StudentSettings()), []
    values = defaults | {name: value for name, value in model.items() if name in defaults}
    for name, default in defaults.items():  # nested ones, which may lack newer keys too
        given: Any = values[name]
        if isinstance(default, dict) and callable(getattr(given, "items", None)):  # a dict, or a ConfigDict
            values[name] = {**default, **dict(given.items())}
    settings = keys.read(StudentSettings, values, problems, "model.")
    if problems:
        raise InputError(keys.listed(problems))
    return settings


def record_of(settings: Settings) -> dict[str, Any]:
    """The content of config.json: the keys, nested as in a config, in JSON's types."""
    nested = dataclasses.asdict(settings)
    return json.loads(json.dumps(nested.pop("run") | nested))


def dataset_names(data: DataSettings) -> tuple[str, ...]:
    """The datasets that `data.dataset` joins."""
    return MERGED if data.dataset == "merged" else tuple(data.dataset.split("+"))


def _problems(settings: Settings) -> Iterator[str]:
    """Contradictions between keys."""
    yield from (*_data_problems(settings), *_frame_problems(settings))
    model, optimizer, evaluate = settings.model, settings.optimizer, settings.evaluate
    if not all(low < high for low, high in zip(*model.field_of_view, strict=True)):
        yield f"model.field_of_view = {model.field_of_view} (expected: a lowest corner below the highest)"
    if optimizer.learning_rate == 0 and optimizer.schedule == "cosine":
        yield "optimizer.learning_rate = 0 with optimizer.schedule = 'cosine' (give the schedule 'constant')"
    if list(evaluate.rings) != sorted(set(evaluate.rings)):
        yield f"evaluate.rings = {evaluate.rings} (expected: ascending distances in metres)"
    if settings.run.task == "robustness" and not (evaluate.corruptions and evaluate.severities):
        yield "evaluate.corruptions and evaluate.severities (expected: at least one of each)"
    if evaluate.votes > 1 and settings.data.augmentation == "none":
        yield f"evaluate.votes = {evaluate.votes} with data.augmentation = 'none' (give 'published' or 'consistent')"
    if settings.data.augmentation == "vavit" and settings.run.task in ("distill", "demo"):
        yield "data.augmentation = 'vavit' with an image (it is for labelled scans alone; give 'published')"
    yield from _teacher_problems(settings)
    profile = settings.run.profile
    if profile and not (len(profile) == 2 and 0 <= profile[0] < profile[1]):
        yield f"profile = {profile} (expected: two steps, the first, from 0, before the second)"
    if settings.run.executable and settings.data.buckets:
        yield f"executable with data.buckets = {settings.data.buckets} (it is one program; leave one of them out)"
    if settings.run.wandb and importlib.util.find_spec("wandb") is None:
        yield f"wandb = {settings.run.wandb!r} without its package (pip install 'scalr_jax[wandb]')"
    if settings.mesh.data == 0:
        yield "mesh.data = 0 (expected: -1, or at least 1)"


def _teacher_problems(settings: Settings) -> Iterator[str]:
    """Contradictions between teachers."""
    task, teacher, given = settings.run.task, settings.teacher, settings.run.teachers
    if teacher.cache and task == "demo":
        yield f"teacher.cache = {teacher.cache!r} with task 'demo' (it is for distill; leave it out)"
    wrong: list[str] = []
    read_teachers(given, teacher, wrong)
    yield from wrong
    if task == "demo" and any(each.get("cache") for each in given):
        yield "teachers with a cache, with task 'demo' (it is for distill; give checkpoints)"
    if given and task == "distill" and (teacher.checkpoint or teacher.cache):
        yield f"teacher.checkpoint = {teacher.checkpoint!r} beside teachers (name each one in teachers alone)"
    if settings.loss.teacher_dropping and len(given) < 2:
        yield f"loss.teacher_dropping = {settings.loss.teacher_dropping} with one teacher (give several in teachers)"


def _data_problems(settings: Settings) -> Iterator[str]:
    """Which datasets, sensors and classes go together."""
    data, task = settings.data, settings.run.task
    names = dataset_names(data)
    if unknown := [name for name in names if name not in DATASETS]:
        yield f"data.dataset = {data.dataset!r} ({unknown[0]!r} is none of {', '.join(DATASETS)}, merged)"
    if len(names) > 1 and task != "distill":
        yield f"data.dataset = {data.dataset!r} (task {task!r} takes one: several datasets have several classes)"
    if data.weights and len(data.weights) != len(names):
        yield f"data.weights = {data.weights} (expected: one number for each of {', '.join(names)})"
    known, chosen = {"streets", "pandaset"} & set(names), set(data.sensors) - set(names)
    if chosen and not known and data.sensors != DataSettings.sensors:
        yield f"data.sensors = {data.sensors} with data.dataset = {data.dataset!r} (leave data.sensors out)"
    if data.intensity and not (len(data.intensity) == 2 and data.intensity[1] > 0):
        yield f"data.intensity = {data.intensity} (expected: mean and standard deviation of the raw intensity)"
    if bool(data.cutmix) != bool(data.cutmix_ground):
        yield f"data.cutmix = {data.cutmix} with data.cutmix_ground = {data.cutmix_ground} (give both, or none)"
    if data.pairs_per_point > 1 and data.cameras_per_scan == 1:
        yield f"data.pairs_per_point = {data.pairs_per_point} with data.cameras_per_scan = 1 (give several cameras)"
    mixed, features = data.polarmix or data.cutmix or data.pillarmix, settings.probe.features
    if mixed and task == "probe" and features != "augmented":
        yield f"data.polarmix, data.cutmix, data.pillarmix with probe.features = {features!r} (use 'augmented')"
    if len(data.buckets) > 3:
        yield f"data.buckets = {data.buckets} (expected: at most 3 shares, as for each the step is compiled)"
    if 0 < data.pillarmix < 0.05:
        yield f"data.pillarmix = {data.pillarmix} (expected: 0, or at least 0.05 metres)"


def _frame_problems(settings: Settings) -> Iterator[str]:
    """Which frames are trained on."""
    data, task = settings.data, settings.run.task
    share, n = data.label_fraction, round(1 / data.label_fraction)
    if share < 1 and task not in ("probe", "finetune", "evaluate", "robustness"):
        yield f"data.label_fraction = {share} with task {task!r} (expected: 1; it is for probes and fine-tuning)"
    if abs(n * share - 1) > 0.01:
        yield f"data.label_fraction = {share} (expected: 1/n, as 0.01, 0.05, 0.1 or 0.25)"
    if share < 1 and data.frame_list:
        yield "data.frame_list and data.label_fraction (both choose training frames; give one of them)"
    for name, frames in (("frames", data.frames), ("validation_frames", data.validation_frames)):
        if not all(str(frame).isdecimal() for frame in frames):
            yield f"data.{name} = {frames} (expected: frame numbers, as in --config.data.{name}='(45, 48)')"
            return
    train, validation = (set(map(int, frames)) for frames in (data.frames, data.validation_frames))
    if validation and (not train or train & validation):
        yield f"data.validation_frames = {data.validation_frames} (expected: other frames than data.frames)"
