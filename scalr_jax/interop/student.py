"""Published checkpoints, in and out: ScaLR, ScaLR+ and WaffleIron here, DINO's ViTs in `interop_vit`.

What a file is made of is read off its names and shapes (`interop_names` holds the table). Whatever does not fit is
listed, all of it, and nothing is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from scalr_jax.config import get_config
from scalr_jax.interop.layout import empty_batch, student_of
from scalr_jax.interop.names import published_state_dict, theirs_shape, to_ours, weight_table
from scalr_jax.interop.torch_file import read_weights_file, write_torch_file
from scalr_jax.runtime.errors import InputError

CONTAINERS = ("model_point", "model_points", "net")


def infer_model(weights: Mapping[str, np.ndarray], activation: str | None, name: str, *, container: str = "") -> Any:
    """The model config (a ConfigDict) that names and shapes say.

    `container` is the key the weights stood under: a plain convolution is a distillation head under `model_point`, and
    WaffleIron's segmentation head under `net`. Its `activation` is "" when neither the file nor the caller says it.
    """
    first = weights.get("embed.conv1.weight")
    layers = [re.match(r"waffleiron\.spatial_mix\.(\d+)\.", key) for key in weights]
    depth = 1 + max((int(match.group(1)) for match in layers if match), default=-1)
    if first is None or first.ndim < 2 or not 0 < depth <= len(weights):
        what = "embed.conv1.weight" if first is None or first.ndim < 2 else "waffleiron.spatial_mix.N"
        raise InputError(
            f"{name} holds no WaffleIron student (no {what} among its {len(weights)} weights){_hint(weights)}"
        )
    model = get_config().model
    model.unlock()
    model.channels, model.num_features = (int(n) for n in first.shape[:2])
    model.depth = depth
    batch_norm = "waffleiron.spatial_mix.0.norm.running_mean" in weights
    model.norm = "batch" if batch_norm else "layer"
    model.head, model.head_hidden, model.out_features = "none", 0, 0
    implied = "relu" if batch_norm else ""  # the original WaffleIron is ReLU
    if "classif.2.weight" in weights:  # only ScaLR+'s distillation head has three layers, and ScaLR+ is GELU
        model.head, implied = "distill", "gelu"
        model.out_features, model.head_hidden = (len(weights[f"classif.{n}.weight"]) for n in (2, 0))
    elif "classif.3.weight" in weights:
        model.head, model.out_features = "mlp", len(weights["classif.3.weight"])
    elif "classif.1.weight" in weights:
        model.head, model.out_features = "segment", len(weights["classif.1.weight"])
    elif "classif.weight" in weights:
        distilled = container.startswith("model_point") or (not container and not batch_norm)
        model.head, model.out_features = "distill" if distilled else "linear", len(weights["classif.weight"])
        implied = "relu" if distilled else implied  # ScaLR
    if activation not in (None, "relu", "gelu"):
        raise InputError(f"activation = {activation!r} is none of 'relu', 'gelu'")
    model.activation = activation or implied
    return model


def _hint(weights: Mapping[Any, Any]) -> str:
    """What to say of a file with kernels of 3x3x3, as a sparse network's are: a list of 27 matrices, or five axes."""
    shapes = [array.shape for array in weights.values() if isinstance(array, np.ndarray)]
    if not any(len(shape) == 5 or (len(shape) == 3 and shape[0] == 27) for shape in shapes):
        return ""
    return "; it looks like a MinkUNet whose names are not known here (docs/weights.md, MinkUNets, says which are)"


def convert_weights(weights: Mapping[str, np.ndarray], model: Mapping[str, Any], name: str) -> dict:
    """PyTorch weights by name -> {"params", "batch_stats"}. All that is missing, extra or misshapen is listed."""
    entries = weight_table(model)
    shapes = _shapes(model)
    problems, rows = [], {}
    for entry in entries:
        array = weights.get(entry.weight.theirs)
        kind = "batch_stats" if entry.weight.stats else "params"
        wanted = shapes[kind][entry.ours] if entry.row is None else shapes[kind][entry.ours][1:]
        if array is None:
            problems.append(f"{entry.weight.theirs} is missing, needs {theirs_shape(wanted, entry.weight)}")
            continue
        try:
            converted = to_ours(array, entry.weight.layout)
        except ValueError:
            converted = np.asarray(array)
        if converted.shape != wanted:
            needed = theirs_shape(wanted, entry.weight)
            problems.append(f"{entry.weight.theirs} has {array.shape}, needs {needed}")
        rows.setdefault((kind, entry.ours), []).append(converted)
    known = {entry.weight.theirs for entry in entries}
    extra = sorted(key for key in weights if key not in known and not key.endswith("num_batches_tracked"))
    problems += [f"{key} {weights[key].shape} is not part of this model" for key in extra]
    if problems:
        student = f"a student of {model['depth']} layers, {model['channels']} wide"
        raise InputError(f"{name} does not fit {student}, nothing was loaded: {'; '.join(problems)}")
    variables: dict = {"params": {}, "batch_stats": {}}
    for (kind, path), arrays in rows.items():
        *folders, last = path.split("/")
        node = variables[kind]
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = np.stack(arrays) if "/groups/" in path else arrays[0]
    return variables


def _shapes(model: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of our own tree, by path, from the student itself."""
    student = student_of(model)
    batch = empty_batch(int(model["num_features"]), student.needs)
    variables = jax.eval_shape(lambda batch: student.init(jax.random.key(0), batch, train=False), batch)
    flat: dict[str, dict[str, tuple[int, ...]]] = {"params": {}, "batch_stats": {}}
    for kind in flat:
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get(kind, {})):
            flat[kind]["/".join(str(key.key) for key in path)] = leaf.shape
    return flat


def check_shapes(model: Mapping[str, Any], variables: Mapping[str, Any], name: str) -> None:
    """Raises InputError that lists what of {"params", "batch_stats"} a student of `model` lacks or has otherwise."""
    problems = []
    for kind, wanted in _shapes(model).items():
        leaves = jax.tree_util.tree_leaves_with_path(variables.get(kind, {}))
        found = {"/".join(str(key.key) for key in path): leaf.shape for path, leaf in leaves}
        for path in sorted({*wanted, *found}):
            if found.get(path) != wanted.get(path):
                problems.append(f"{kind}/{path} has {found.get(path, 'no value')}, needs {wanted.get(path, 'none')}")
    if problems:
        raise InputError(f"{name} does not fit its settings, nothing was loaded: {'; '.join(problems)}")


def published_weights(content: Mapping[str, Any], name: str) -> tuple[dict[str, np.ndarray], str]:
    """The student's weights inside a published file and the key they stood under ("" for the file itself)."""
    container = next((key for key in CONTAINERS if isinstance(content.get(key), Mapping)), "")
    content = content[container] if container else content
    arrays = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, np.ndarray)}
    if not arrays:
        hint = next(filter(None, (_hint(part) for part in content.values() if isinstance(part, Mapping))), "")
        raise InputError(f"{name} holds no weights, neither under {', '.join(CONTAINERS)} nor at its top{hint}")
    return {key.removeprefix("module."): value for key, value in arrays.items()}, container


def read_student(path: str | Path, *, activation: str | None = None) -> tuple[Any, dict[str, np.ndarray]]:
    """A published student's model config (`activation` "" when not said) and its weights by PyTorch's names."""
    weights, container = published_weights(read_weights_file(path), str(path))
    return infer_model(weights, activation, str(path), container=container), weights


def load_torch_checkpoint(path: str | Path, *, activation: str | None = None) -> tuple[ml_collections.ConfigDict, dict]:
    """A published student, `.pth` or `.safetensors`: (model config, {"params", "batch_stats"} of NumPy arrays).

    The model config is `config.model` with `num_features`, `head` and `out_features` added. The file does not say
    intensity statistics, field of view and grids, which keep their defaults; `scalr_jax.load` asks for those.

    Raises:
      InputError: not a readable checkpoint, another model, weights that are missing, extra or of another shape (all
        are listed), or a file that does not say its activation and `activation` ("relu" or "gelu") is not given.
    """
    model, weights = read_student(path, activation=activation)
    if not model.activation:
        raise InputError(
            f"{path} does not say its activation: downstream ScaLR (relu) and ScaLR+ (gelu) files have the same "
            "names and shapes; give activation='relu' or activation='gelu'"
        )
    return model, convert_weights(weights, model, str(path))


def save_torch_checkpoint(path: str | Path, model: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """Write the published layout: under `model_point` for distilled models, `net` for others, names with `module.`."""
    state = {f"module.{key}": value for key, value in published_state_dict(model, variables).items()}
    write_torch_file(path, {"model_point" if model["head"] == "distill" else "net": state})
