"""Export a student: weights in the published layout, or a program that runs without this package's model code.

    python -m scalr_jax.export --model=runs/pretrain --format=onnx --output=exports/pretrain_onnx
    python -m scalr_jax.export --model=runs/probe --format=stablehlo --fold --output=exports/probe_stablehlo
    python -m scalr_jax.export --model=WI_768.pth --sensor=nuscenes --format=safetensors --output=exports/WI_768

The output is a folder: the weights or the program, config.json (all settings) and README.md (the model card, with the
lines of code that run it). It is written beside its place, loaded again, compared with the original on a scan, and only
then moved; a difference above 1e-4 (of the largest value, or of 1) is refused. docs/export.md says more.

Flags:
{model}
    --format         torch (the published layout), safetensors (its names), orbax (parameters alone): read by
                     scalr_jax.load; stablehlo (for JAX on CPU, CUDA and TPU), onnx (for onnxruntime): programs;
                     of a MinkUNet orbax or stablehlo, of a VaViT all
    --output         the folder to write
    --fold           fold batch norms and merge layer scales where that is exact; outputs are equal
    --overwrite      replace an exported folder of that name
    --licence        of the weights, for the model card, as in --licence="CC BY 4.0"
    --push           hf://OWNER/NAME: upload the folder there, too, into a private repository if there is none

Exit codes: 0 done; 2 bad arguments or input, no space, or interrupted (one sentence on stderr); 1 a defect.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from absl import flags

from scalr_jax import api
from scalr_jax.data.packing import pack_shard, static_capacities
from scalr_jax.data.scenes import SceneView
from scalr_jax.data.whole_scan import whole_scan
from scalr_jax.export import card as export_card
from scalr_jax.export.fold import fold
from scalr_jax.export.folder import check_output, new_folder, save_example, write_weights
from scalr_jax.export.inputs import HEADS, needs_of, pad_inputs, scene_inputs
from scalr_jax.interop.exported import FILES, READABLE
from scalr_jax.interop.finite import check_outputs
from scalr_jax.interop.model import student_of
from scalr_jax.models.student import Student, Variables, outputs_of
from scalr_jax.runtime import hub
from scalr_jax.runtime.command_line import define_model, exit_codes, model_arguments, parse_flags, require, use_cache
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import checksums, write_arrays

LARGEST_DIFFERENCE = 1e-4
CHECK_POINTS = 1_500
LARGEST_HALF = (64.0, 64.0, 8.0)  # metres to each side of the middle, where a check's points are in a view without end

Outputs = dict[str, np.ndarray]  # by name: "features", "distilled", "logits"

FLAGS = flags.FlagValues()  # its own: `scalr_jax.main` defines flags of the same names
define_model(FLAGS)
flags.DEFINE_enum("format", None, tuple(FILES), "What to write.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "The folder to write.", flag_values=FLAGS)
flags.DEFINE_boolean("fold", False, "Fold batch norms and merge layer scales.", flag_values=FLAGS)
flags.DEFINE_boolean("overwrite", False, "Replace an exported folder.", flag_values=FLAGS)
flags.DEFINE_string("licence", "", "Of the weights.", flag_values=FLAGS)
flags.DEFINE_string("push", "", "Repository to upload to.", flag_values=FLAGS)


def run(arguments: list[str]) -> None:
    """The command. Raises InputError and what the operating system raises."""
    parse_flags(FLAGS, arguments, __doc__)
    example = "--model=runs/pretrain --format=onnx --output=exports/a"
    require(FLAGS, "model", "format", "output", example=example)
    if FLAGS.push:
        hub.check_repository(FLAGS.push)
    output, suffix = Path(FLAGS.output), Path(FILES[FLAGS.format]).suffix
    if suffix and output.suffix == suffix:
        raise InputError(f"--output={output} is the folder that will hold {FILES[FLAGS.format]}; leave out {suffix}")
    check_output(output, overwrite=FLAGS.overwrite)
    _need_packages(FLAGS.format)
    use_cache(FLAGS.cache)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        difference = export_model(
            api.load(**model_arguments(FLAGS)),
            FLAGS.format,
            output,
            folded=FLAGS.fold,
            overwrite=FLAGS.overwrite,
            licence=FLAGS.licence,
            source=Path(FLAGS.model),
        )
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"largest difference to the original: {difference:.2g} of the largest value (or of 1)")
    print(f"{output}: {size / 1e6:.1f} MB; its README.md says how to use it")
    if FLAGS.push:
        export_card.add_front_matter(output)
        print(f"pushed to {hub.push(output, FLAGS.push, f'scalr_jax.export --format={FLAGS.format}')}")


def main(arguments: list[str]) -> None:
    """`run`, with exit codes."""
    with exit_codes(interrupted="nothing was written"):
        run(arguments)


def export_model(
    model: api.Model,
    form: str,
    output: Path,
    *,
    folded: bool = False,
    overwrite: bool = False,
    licence: str = "",
    source: Path | None = None,
) -> float:
    """Writes `output` and returns the largest difference to the original (relative to its largest value, or to 1).

    `form` is one of `FILES`; `source` is the workdir or file that the model is from, whose config and results the card
    tells. The rest are the command's flags.

    Raises:
      InputError: `output` cannot be written, the model's outputs are not finite, the exported model's differ, or a
        package is missing.
    """
    if form not in FILES:
        raise InputError(f"format = {form!r} is none of {', '.join(FILES)}")
    backbone = model.student.backbone
    if form not in backbone.exports or (folded and not backbone.folds):
        folds = "" if backbone.folds else ", and not folded; give one of these as --format, and no --fold"
        raise InputError(f"a {model.config.name} is exported as {' or '.join(backbone.exports)}{folds}")
    _need_packages(form)
    settings = {**model.config.to_dict(), "format": form, "implementation": "cells"}
    student = student_of(settings)
    if form not in READABLE:
        settings["needs"] = {name: x for name, x in student.needs._asdict().items() if name != "field_of_view"}
    original: dict = jax.tree.map(np.asarray, model.variables)
    variables = fold(original) if folded else original
    scene, _ = whole_scan(example_scan(settings), student.needs, settings["intensity"], settings["voxel_size"])
    reference = make_reference(cast(Any, student))  # hashable
    wanted = reference(original, scene)
    for name, rows in wanted.items():
        check_outputs(rows, name)
    with new_folder(output, overwrite=overwrite) as folder:
        if form in READABLE:
            write_weights(folder, form, student, variables)
        else:
            _write_program(folder, form, student, settings, variables)
        if form not in READABLE or export_card.has_loader(form, student):
            save_example(folder / "example.npz", _inputs(form, scene, settings), wanted)
        if source is not None and settings["head"] == "distill":
            export_card.copy_statistics(source, folder)
        training, results = export_card.training_of(source) if source else (None, None)
        card = {
            "settings": settings,
            "source": source.name if source else "scalr_jax.Model",
            "folded": folded,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(original["params"])),
            "licence": export_card.licence_of(source or Path(), training, licence),
            "training": training,
            "results": results,
            "files": checksums(folder),
            "check": {"max_difference": 0.0, "max_value": 0.0, "points": len(scene.feats)},
        }
        export_card.write_card(folder, card, student, name=output.name)  # loading needs the settings in it
        if form in READABLE:
            loaded = api.load(folder)
            if json.dumps(loaded.config.to_dict(), sort_keys=True) != json.dumps(settings, sort_keys=True):
                raise InputError(f"the settings of {folder} are not those of the model; nothing was written")
            found = reference(loaded.variables, scene)
        else:
            found = _run_program(folder, form, settings, scene)
        absolute = float(np.max([np.abs(found[name] - rows).max() for name, rows in wanted.items()]))  # NaN if one is
        largest = max(float(np.abs(rows).max()) for rows in wanted.values())
        difference = absolute / max(1.0, largest)
        if not difference <= LARGEST_DIFFERENCE:  # NaN neither
            raise InputError(
                f"the exported model's outputs differ from the original's by {absolute:.3g} where the largest value is "
                f"{largest:.3g}, more than {LARGEST_DIFFERENCE} of it; nothing was written"
            )
        card["check"] |= {"max_difference": absolute, "max_value": largest}
        export_card.write_card(folder, card, student, name=output.name)
    return difference


def example_scan(settings: Mapping, num_points: int = CHECK_POINTS) -> np.ndarray:
    """A seeded scan [N, 4] of uneven ground and of upright things, inside the field of view."""
    rng = np.random.default_rng(0)
    low, high = np.asarray(settings["field_of_view"], np.float64)
    middle, half = (low + high) / 2, np.minimum((high - low) / 2, LARGEST_HALF)
    low, high = middle - half, middle + half
    mean, deviation = settings["intensity"]
    across = rng.uniform(-0.95, 0.95, (num_points, 2)) * rng.uniform(0, 1, (num_points, 1))  # denser in the middle
    post = rng.integers(0, 30, num_points)
    upright = rng.random(num_points) < 0.3
    across[upright] = across[post[upright]] + rng.normal(0, 0.005, (upright.sum(), 2))
    height = np.where(upright, rng.uniform(0.1, 0.9, num_points), 0.1 + 0.05 * np.sin(9 * across[:, 0]))
    unit = np.concatenate([(np.clip(across, -0.99, 0.99) + 1) / 2, height[:, None]], axis=1)
    xyz = low + unit * (high - low)
    intensity = mean + deviation * rng.standard_normal(num_points)
    return np.concatenate([xyz, intensity[:, None]], axis=1).astype(np.float32)


@functools.lru_cache(maxsize=4)  # a model that is exported in several formats is compiled once
def make_reference(student: Student) -> Callable[[Variables, SceneView], Outputs]:
    """The model itself: (variables, scene) -> features [N, C] and the head's output by its name."""
    apply = jax.jit(lambda variables, batch: outputs_of(student, variables, batch))

    def reference(variables: Variables, scene: SceneView) -> Outputs:
        grids = student.needs.grids
        shard = pack_shard([scene], static_capacities(scene, grids), scene, grids)
        features, rows = apply(variables, jax.tree.map(lambda x: x[None], shard))
        outputs = {"features": features} | ({HEADS[student.head]: rows[0]} if student.head in HEADS else {})
        return {name: np.asarray(rows)[: len(scene.feats)] for name, rows in outputs.items()}

    return reference


def _inputs(form: str, scene: SceneView, settings: Mapping) -> dict[str, np.ndarray]:
    inputs = scene_inputs(scene, needs_of(settings), form)
    return pad_inputs(inputs, settings) if form == "stablehlo" else inputs


def _write_program(folder: Path, form: str, student: Student, settings: Mapping, variables: Variables) -> None:
    path = folder / FILES[form]
    if form == "onnx":
        from scalr_jax.export.onnx import serialize

        path.write_bytes(serialize(student, variables, settings))
    else:
        from scalr_jax.export.stablehlo import export_program, flat_weights

        weights = flat_weights(variables)
        path.write_bytes(export_program(student, weights, settings["num_features"]))
        write_arrays(folder / "weights.npz", weights)


def _run_program(folder: Path, form: str, settings: Mapping, scene: SceneView) -> Outputs:
    """An exported program's outputs, by the way in which a user would run it."""
    inputs = _inputs(form, scene, settings)
    if form == "onnx":
        from scalr_jax.export.onnx import open_session

        session = open_session(folder / FILES[form])
        found: Any = session.run(None, inputs)
        return dict(zip([output.name for output in session.get_outputs()], found, strict=True))
    program = jax.export.deserialize(bytearray((folder / FILES[form]).read_bytes()))
    with np.load(folder / "weights.npz") as file:
        weights = dict(file)
    outputs = jax.jit(program.call)(weights, inputs)
    return {name: np.asarray(rows)[: len(scene.feats)] for name, rows in outputs.items()}


def _need_packages(form: str) -> None:
    """Raises InputError when a package that writes `form` is not installed."""
    needed = {"onnx": ("onnx", "onnxruntime"), "stablehlo": ("flatbuffers",)}  # the latter is jax.export's
    try:
        for package in needed.get(form, ()):
            importlib.import_module(package)
    except Exception as error:  # also what packages raise that do not fit each other's versions
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f'--format={form} needs the export extra, pip install "scalr_jax[export]" ({reason})'
        ) from None
