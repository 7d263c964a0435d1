"""Reads a student from a folder: one loader for the workdir of a run and for an exported folder.

A run writes WORKDIR/settings.json when training starts. It holds what an export's config.json holds under "settings":

    name, channels, ...      `config.model`
    head, head_hidden, out_features, num_features, voxel_size    of a head for several teachers: all together
    teachers                 of a distillation: name, width and normalize of each, in the order of the outputs
    intensities              (mean, deviation) of the raw intensity of each sensor that was trained on
    class_names, label_map   of a segmentation model: its classes, and the class of each label number of the dataset
    versions                 of the packages that trained it
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scalr_jax.config import DataSettings, StudentSettings
from scalr_jax.data import sensors
from scalr_jax.data.scenes import FEATURES, Dataset
from scalr_jax.interop.exported import check_settings, is_export, read_export
from scalr_jax.interop.finite import check_weights
from scalr_jax.interop.model import check_shapes, student_of
from scalr_jax.models.heads import joined_heads
from scalr_jax.models.student import Student, Variables
from scalr_jax.runtime.checkpoint import load_variables
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.keys import problems
from scalr_jax.runtime.storage import read_json, write_json

FILE = "settings.json"
REQUIRED = ("name", "head", "out_features", "num_features", "voxel_size", "intensities")
AGAIN = "copy the workdir again"
TEACHER = ("name", "width", "normalize")
PACKAGES = ("scalr_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


class Saved(NamedTuple):
    """A student as a folder holds it."""

    settings: dict[str, Any]
    variables: Variables


def write_settings(
    workdir: Path,
    model: StudentSettings,
    data: DataSettings,
    student: Student,
    dataset: Dataset,
    teachers: Sequence[Mapping[str, str | int]] = (),
) -> None:
    """Writes settings.json of a run that trains `student` on `dataset`, by `teachers` with the keys `TEACHER`."""
    segments = student.head != "distill"
    settings = {
        **dataclasses.asdict(model),
        **{name: getattr(student, name) for name in ("head", "out_features")},
        "head_hidden": student.head_hidden * max(1, len(student.teacher_widths)),
        "teachers": list(teachers),
        "num_features": len(FEATURES),
        "voxel_size": data.voxel_size,
        "intensities": sensors.trained_intensities(data, dataset),
        "class_names": list(dataset.class_names) if segments else [],
        "label_map": sensors.label_map_of(data, dataset) if segments else None,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_json(workdir / FILE, settings)


def read_saved(folder: Path) -> Saved:
    """The student of a workdir or of an exported folder.

    Raises:
        InputError: the folder is neither, keeps no weights, its files are damaged or of another version, or weights
            are not finite.
    """
    if is_export(folder):
        return Saved(*read_export(folder))
    if not (folder / "checkpoints").is_dir():
        raise InputError(_without_weights(folder))
    settings, variables = _read_settings(folder / FILE), load_variables(folder / "checkpoints")
    variables = {**variables, "params": joined_heads(variables["params"])}
    check_weights(variables, f"the newest checkpoint in {folder}")
    _check(folder / FILE, settings, variables)
    return Saved(settings, variables)


def _check(path: Path, settings: Mapping[str, Any], variables: Variables) -> None:
    """Raises `InputError` for a settings.json of wrong values, or of other weights than lie beside it."""
    try:
        check_settings(settings)
        if any(problems(settings["intensities"], dict[str, tuple[float, float]])):
            raise ValueError(f"intensities are {settings['intensities']!r}, no (mean, deviation) by sensor")
        student = student_of(settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: {error}; {AGAIN}") from None
    check_shapes(student, settings["num_features"], variables, str(path))


def _read_settings(path: Path) -> dict[str, Any]:
    """settings.json of a workdir. Raises `InputError` when it is missing or damaged."""
    if not path.is_file():
        raise InputError(
            f"{path} is missing: an older version trained this, or the file was not copied; run the training command "
            "again with this --workdir, which writes it (a run that was finished trains no further)"
        )
    settings = read_json(path, AGAIN)
    if missing := [key for key in REQUIRED if key not in settings]:
        raise InputError(f"{path} lacks {', '.join(missing)}; {AGAIN}")
    return settings


def _without_weights(folder: Path) -> str:
    """Why a folder holds no student."""
    if (folder / "results.json").is_file():
        return (
            f"{folder} keeps no weights: it is a probe of probe.method knn or zero_shot, an evaluation, or a run that "
            "ended before its first checkpoint; give the run whose weights it used"
        )
    inside = sorted(child.parent.name for child in folder.glob("*/checkpoints"))
    hint = f", such as its folders {', '.join(inside)}" if inside else ""
    return (
        f"{folder} is no workdir of a run (it has no checkpoints) and no exported folder (it has no config.json of "
        f"one); give a workdir of distill, probe or finetune{hint}, or an exported folder"
    )


def choose_intensity(settings: Mapping[str, Any], path: Path, sensor: str | None) -> tuple[float, float]:
    """The intensity statistics to use: of `sensor`, or of the only one that the student was trained on.

    Raises `InputError` when neither says them.
    """
    trained = settings["intensities"]
    if sensor is not None:
        return tuple(trained[sensor]) if sensor in trained else sensors.intensity_of(sensor)
    if len(trained) != 1:
        raise InputError(f"{path} was trained on several sensors ({', '.join(trained)}); give sensor=, one of them")
    (found,) = trained.values()
    return tuple(found)


def columns_of(settings: Mapping[str, Any], teacher: str) -> slice:
    """Which outputs of a distillation head are those of one of its teachers. Raises `InputError` for an unknown one."""
    start, names = 0, []
    for each in settings.get("teachers") or ():
        if each["name"] == teacher:
            return slice(start, start + each["width"])
        names.append(each["name"])
        start += each["width"]
    raise InputError(
        f"teacher = {teacher!r} is none of the student's ({', '.join(names) or 'their names are not kept'})"
    )
