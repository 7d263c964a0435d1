"""Export a student: weights in the published layout, or a program that runs without this package.

    python -m scalr_jax.export --model=runs/pretrain --format=onnx --output=exports/pretrain_onnx
    python -m scalr_jax.export --model=runs/probe --format=stablehlo --fold --output=exports/probe_stablehlo
    python -m scalr_jax.export --model=WI_768.pth --sensor=nuscenes --format=safetensors --output=exports/WI_768

--output is a folder: the weights or the program, config.json (all settings) and README.md (the model card, with the
lines of code that run it). It is written beside its place, loaded again, compared with the original on a scan, and only
then moved; a difference above 1e-4 (of the largest value, or of 1) is refused. docs/export.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from scalr_jax import api, export_card, interop
from scalr_jax.data.packing import pack_shard, static_capacities
from scalr_jax.data.scenes import InputError, SceneView
from scalr_jax.data.whole_scan import whole_scan
from scalr_jax.export_folder import FILES, READABLE, new_folder, save_example, write_weights
from scalr_jax.export_inputs import HEADS, pad_inputs, scene_inputs
from scalr_jax.fold import fold
from scalr_jax.command_line import fail, one_sentence

LARGEST_DIFFERENCE = 1e-4
CHECK_POINTS = 1_500

Outputs = dict[str, np.ndarray]  # by name: "features", "distilled", "logits"


def main(argv: list[str] | None = None) -> None:
    """The command; exit code 2 and one sentence for what is not a defect."""
    try:
        run(_parse(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        fail(one_sentence(error))
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        fail(one_sentence(error))
    except KeyboardInterrupt:
        fail("interrupted; nothing was written")


def run(arguments: argparse.Namespace) -> None:
    """Loads, exports and prints what was written."""
    output = Path(arguments.output)
    suffix = Path(FILES[arguments.format]).suffix
    if suffix and output.suffix == suffix:
        raise InputError(
            f"--output={output} is the folder that will hold {FILES[arguments.format]}; leave out the {suffix}"
        )
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = api.load(
            arguments.model,
            sensor=arguments.sensor,
            intensity=arguments.intensity,
            field_of_view=arguments.field_of_view and np.reshape(arguments.field_of_view, (2, 3)),
            grids=arguments.grids and np.reshape(arguments.grids, (3, 2)),
            activation=arguments.activation,
        )
        difference = export_model(
            model,
            arguments.format,
            output,
            folded=arguments.fold,
            overwrite=arguments.overwrite,
            licence=arguments.licence,
            source=Path(arguments.model),
        )
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"largest difference to the original: {difference:.2g}")
    print(f"{output}: {size / 1e6:.1f} MB; its README.md says how to run it")


def export_model(
    model: Any,
    form: str,
    output: Path,
    *,
    folded: bool = False,
    overwrite: bool = False,
    licence: str = "",
    source: Path | None = None,
) -> float:
    """Writes `output` and returns the largest difference to the original (relative to its largest value, or to 1).

    Args:
      model: a `scalr_jax.Model`.
      form: one of `FILES`.
      output: the folder to write.
      folded: fold batch norms and merge layer scales (`fold.py`).
      overwrite: replace an exported folder that is there.
      licence: of the weights, for the card.
      source: the workdir or file that the model is from, whose config and results the card tells.

    Raises:
      InputError: `output` cannot be written, the exported model differs, or a package is missing.
    """
    if form not in FILES:
        raise InputError(f"format = {form!r} is none of {', '.join(FILES)}")
    if form == "onnx":
        _need_onnx()
    settings = {**model.config.to_dict(), "format": form, "implementation": "cells"}
    original: dict = jax.tree.map(np.asarray, model.variables)
    variables = fold(original) if folded else original
    scene, _ = whole_scan(example_scan(settings), settings)
    wanted = reference(settings, original, scene)
    with new_folder(output, overwrite=overwrite) as folder:
        if form in READABLE:
            write_weights(folder, form, settings, variables)
        else:
            _write_program(folder, form, settings, variables)
            save_example(folder / "example.npz", _inputs(form, scene, settings), wanted)
        training, results = export_card.training_of(source) if source else (None, None)
        card = {
            "settings": settings,
            "source": source.name if source else "scalr_jax.Model",
            "folded": folded,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(original["params"])),
            "licence": export_card.licence_of(source or Path(), training, licence),
            "training": training,
            "results": results,
            "check": {"max_difference": 0.0, "max_value": 0.0, "points": len(scene.feats)},
        }
        export_card.write_card(folder, card, name=output.name)  # what loads an exported folder needs its settings
        found = _run_exported(folder, form, settings, scene)
        absolute = max(float(np.abs(found[name] - rows).max()) for name, rows in wanted.items())
        largest = max(float(np.abs(rows).max()) for rows in wanted.values())
        difference = absolute / max(1.0, largest)
        if not difference <= LARGEST_DIFFERENCE:  # NaN neither
            raise InputError(
                f"the exported model's outputs differ from the original's by {absolute:.3g} where the largest value is "
                f"{largest:.3g}, more than {LARGEST_DIFFERENCE} of it; nothing was written"
            )
        card["check"] |= {"max_difference": absolute, "max_value": largest}
        export_card.write_card(folder, card, name=output.name)
    return difference


def example_scan(settings: Mapping[str, Any], num_points: int = CHECK_POINTS) -> np.ndarray:
    """A seeded scan [N, 4] of uneven ground and of upright things, inside the field of view."""
    rng = np.random.default_rng(0)
    low, high = np.asarray(settings["field_of_view"], np.float64)
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


def reference(settings: Mapping[str, Any], variables: Mapping[str, Any], scene: SceneView) -> Outputs:
    """What the model itself makes of a scene, in float32: features [N, C] and the head's output by its name."""
    grids = [tuple(grid) for grid in settings["grids"]]
    shard = pack_shard([scene], static_capacities(scene, grids), scene, grids)
    batch = jax.tree.map(lambda x: x[None], shard)
    student = interop.make_student(settings, implementation="cells")
    outputs = {}
    for name, part in (("features", student.clone(head="none")), (HEADS.get(student.head), student)):
        if name:
            rows = jax.jit(lambda v, b, part=part: part.apply(v, b, train=False))(variables, batch)
            outputs[name] = np.asarray(rows)[0, : len(scene.feats)]  # type: ignore[index]
    return outputs


def _inputs(form: str, scene: SceneView, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    inputs = scene_inputs(scene, form)
    return pad_inputs(inputs, settings) if form == "stablehlo" else inputs


def _write_program(folder: Path, form: str, settings: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    path = folder / FILES[form]
    if form == "onnx":
        from scalr_jax.export_onnx import serialize

        path.write_bytes(serialize(settings, variables))
    else:
        from scalr_jax.export_stablehlo import export_program, flat_weights

        weights: Any = flat_weights(variables)
        path.write_bytes(export_program(settings, weights))
        with (folder / "weights.npz").open("wb") as file:
            np.savez(file, **weights)


def _run_exported(folder: Path, form: str, settings: Mapping[str, Any], scene: SceneView) -> Outputs:
    """The exported folder's outputs, by the way in which a user would load it."""
    if form in READABLE:
        loaded = api.load(folder)
        return reference(loaded.config, loaded.variables, scene)
    inputs = _inputs(form, scene, settings)
    if form == "onnx":
        from scalr_jax.export_onnx import open_session

        session = open_session(folder / FILES[form])
        return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True))
    program = jax.export.deserialize(bytearray((folder / FILES[form]).read_bytes()))
    with np.load(folder / "weights.npz") as file:
        weights = dict(file)
    outputs = jax.jit(program.call)(weights, inputs)
    return {name: np.asarray(rows)[: len(scene.feats)] for name, rows in outputs.items()}


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(f'--format=onnx needs the export extra, pip install "scalr_jax[export]" ({error})') from None


class _Parser(argparse.ArgumentParser):
    """Mistakes are `InputError`s, which become one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; python -m scalr_jax.export --help lists the arguments")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m scalr_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="a workdir, a published .pth or .safetensors, or an export")
    parser.add_argument("--format", required=True, choices=tuple(FILES), help="; ".join(FORMAT_HELP))
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument("--fold", action="store_true", help="fold batch norms and merge layer scales; equal outputs")
    parser.add_argument("--overwrite", action="store_true", help="replace an exported folder of that name")
    parser.add_argument("--licence", default="", help="of the weights, for the model card, as in --licence='CC BY 4.0'")
    parser.add_argument("--sensor", help="whose settings apply, as in scalr_jax.load: nuscenes, semantic_kitti, ...")
    parser.add_argument("--intensity", type=_numbers(2), help="mean,deviation of the raw intensity")
    parser.add_argument("--field_of_view", type=_numbers(6), help="x,y,z least and x,y,z most in metres")
    parser.add_argument("--grids", type=_numbers(6), help="rows,columns of the planes xy, xz, yz")
    parser.add_argument("--activation", choices=("relu", "gelu"), help="of a published file that does not say it")
    return parser.parse_args(argv)


FORMAT_HELP = (
    "torch: the published layout",
    "safetensors: the same names",
    "stablehlo: for JAX on CPU, CUDA and TPU",
    "onnx: for onnxruntime",
    "orbax: parameters alone",
)


def _numbers(count: int) -> Any:
    def numbers(text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count:
            raise argparse.ArgumentTypeError(f"{text!r} is not {count} numbers with commas between them")
        return values

    return numbers


if __name__ == "__main__":
    main()
