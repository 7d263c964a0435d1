"""Published students of WaffleIron, in and out: ScaLR, ScaLR+ and WaffleIron itself.

What a file is made of is read off its names and shapes, by one table of names: ours beside PyTorch's. Scanned layers
are stacked in our tree and stand one by one in a file, so a row of the table says which row of the stack it is;
`to_ours` and `to_theirs` turn one array. Whatever does not fit is listed, all of it, and nothing is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from scalr_jax.config import get_config
from scalr_jax.data.scenes import PLANE_AXES
from scalr_jax.interop.finite import check_weights
from scalr_jax.interop.model import NORM, Published, extra_weights, shapes_of, student_of, unwrapped
from scalr_jax.interop.torch_file import read_weights_file, write_torch_file
from scalr_jax.models.student import Student, Variables
from scalr_jax.runtime.errors import InputError

CONTAINERS = ("model_point", "model_points", "net")  # of the published code
WRAPPED = ("state_dict", "model_state_dict", "model", "module")  # of Lightning and others
FIRST = "embed.conv1.weight"
UNSAID = ("intensity", "field_of_view", "grids")  # by any file


class Weight(NamedTuple):
    """One row of the table."""

    ours: str  # path below `kind`
    theirs: str
    layout: str  # see `to_ours`
    kind: str = "params"  # or "batch_stats"
    row: int | None = None  # of the stack, for layers that are stacked in our tree


def _batch_norm(ours: str, theirs: str) -> list[Weight]:
    kinds = ("params", "params", "batch_stats", "batch_stats")
    return [Weight(f"{ours}/{x}", f"{theirs}.{y}", "same", k) for (x, y), k in zip(NORM, kinds, strict=True)]


def _linear(ours: str, theirs: str) -> list[Weight]:
    return [Weight(f"{ours}/kernel", f"{theirs}.weight", "linear"), Weight(f"{ours}/bias", f"{theirs}.bias", "same")]


EMBEDDING = [
    *_batch_norm("embedding/norm", "embed.norm"),
    *_linear("embedding/point", "embed.conv1"),
    *_batch_norm("embedding/neighbor_norm_0", "embed.conv2.0"),
    Weight("embedding/neighbor_in", "embed.conv2.1.weight", "linear"),
    *_batch_norm("embedding/neighbor_norm_1", "embed.conv2.2"),
    Weight("embedding/neighbor_out", "embed.conv2.4.weight", "linear"),
    *_linear("embedding/final", "embed.final"),
]


def _norm(kind: str, ours: str, theirs: str) -> list[Weight]:
    if kind == "batch":
        return _batch_norm(f"{ours}/batch", theirs)
    return [Weight(f"{ours}/layer/{x}", f"{theirs}.{y}", "same") for x, y in NORM[:2]]


def _layer(kind: str, d: int) -> list[Weight]:
    spatial, channel = f"waffleiron.spatial_mix.{d}", f"waffleiron.channel_mix.{d}"
    return [
        *_norm(kind, "spatial/norm", f"{spatial}.norm"),
        *(Weight(f"spatial/kernel_{k}", f"{spatial}.ffn.{2 * k - 2}.weight", "depthwise") for k in (1, 2)),
        *(Weight(f"spatial/bias_{k}", f"{spatial}.ffn.{2 * k - 2}.bias", "same") for k in (1, 2)),
        Weight("spatial/scale", f"{spatial}.scale.weight", "flat"),
        *_norm(kind, "channel/norm", f"{channel}.norm"),
        *_linear("channel/linear_1", f"{channel}.mlp.0"),
        *_linear("channel/linear_2", f"{channel}.mlp.2"),
        Weight("channel/scale", f"{channel}.scale.weight", "flat"),
    ]


_HEAD_NORM = _batch_norm("head/norm", "classif.0")
HEADS = {
    "none": [],
    "segment": [*_HEAD_NORM, *_linear("head", "classif.1")],
    # No published file has one; as Sequential(BatchNorm1d, Conv1d, ReLU, Conv1d) would name it.
    "mlp": [*_HEAD_NORM, *_linear("head/hidden", "classif.1"), *_linear("head", "classif.3")],
    "distill_mlp": [*_linear("head/hidden", "classif.0"), *_linear("head/out", "classif.2")],
    "distill": _linear("head/out", "classif"),
    "linear": _linear("head", "classif"),
}


def weight_table(student: Student) -> list[Weight]:
    """Every weight of a student with a WaffleIron."""
    backbone: Any = student.backbone
    table = [*EMBEDDING, *HEADS["distill_mlp" if student.head == "distill" and student.head_hidden else student.head]]
    num_groups = backbone.depth // len(PLANE_AXES)
    for d in range(backbone.depth):
        group, plane = divmod(d, len(PLANE_AXES))
        where, row = ("groups", group) if group < num_groups else ("rest", None)
        for weight in _layer(backbone.norm, d):
            table.append(weight._replace(ours=f"backbone/{where}/plane_{plane}/{weight.ours}", row=row))
    return table


def to_ours(array: np.ndarray, layout: str) -> np.ndarray:
    """same; linear: [out, in, 1...] -> [in, out]; depthwise: [C, 1, 3, 3] -> [9, C]; flat: [C, 1, 1] -> [C]."""
    array = np.asarray(array, np.float32)
    if layout == "linear":
        return np.ascontiguousarray(array.reshape(array.shape[:2]).T)
    if layout == "depthwise":
        return np.ascontiguousarray(array.reshape(len(array), 9).T)
    return array.reshape(-1) if layout == "flat" else array


def theirs_shape(shape: tuple[int, ...], weight: Weight) -> tuple[int, ...]:
    """PyTorch's shape of a weight of our `shape`.

    1x1 convolutions keep one axis of size 1 for [B, C, N], two inside the neighbourhood branch [B, C, N, K].
    """
    if weight.layout == "linear":
        return (*shape[::-1], *((1, 1) if weight.theirs.startswith("embed.conv2.") else (1,)))
    if weight.layout == "depthwise":
        return (shape[1], 1, 3, 3)
    return (*shape, 1, 1) if weight.layout == "flat" else shape


def to_theirs(array: np.ndarray, weight: Weight) -> np.ndarray:
    """The inverse of `to_ours`, float32."""
    array = np.asarray(array, np.float32)
    return np.ascontiguousarray(array.T).reshape(theirs_shape(array.shape, weight))


def published_state_dict(student: Student, variables: Variables) -> dict[str, np.ndarray]:
    """Our variables under PyTorch's names and shapes, complete for a strict `load_state_dict`."""
    state: dict[str, np.ndarray] = {}
    arrays = {kind: flatten_dict(variables.get(kind, {}), sep="/") for kind in ("params", "batch_stats")}
    for weight in weight_table(student):
        array = np.asarray(arrays[weight.kind][weight.ours])
        state[weight.theirs] = to_theirs(array if weight.row is None else array[weight.row], weight)
        if weight.theirs.endswith("running_var"):
            state[weight.theirs.replace("running_var", "num_batches_tracked")] = np.asarray(0, np.int64)
    return state


def read(content: Mapping, name: str) -> Published:
    """The student in a file's content. Raises `InputError` that begins with `name`."""
    weights, container = published_weights(content, name)
    model = infer_model(weights, name, container=container)
    unsaid = UNSAID if "activation" in model else (*UNSAID, "activation")
    return Published(model, convert_weights(weights, student_of(model), name), unsaid=unsaid)


def published_weights(content: Mapping, name: str) -> tuple[dict[str, np.ndarray], str]:
    """The student's weights inside a published file and the one of `CONTAINERS` they stood under ("" for none).

    Where their names begin with a prefix ("model." in a file of Lightning), others are of other models, and are told.
    """
    container = next((key for key in (*CONTAINERS, *WRAPPED) if isinstance(content.get(key), Mapping)), "")
    content = content[container] if container else content
    arrays = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, np.ndarray)}
    if not arrays:
        hint = next(filter(None, (_hint(part) for part in content.values() if isinstance(part, Mapping))), "")
        raise InputError(f"{name} holds no weights, neither under {', '.join(CONTAINERS)} nor at its top{hint}")
    prefixes = [key.removesuffix(FIRST) for key in arrays if f".{key}".endswith(f".{FIRST}")]
    if len(prefixes) > 1:
        raise InputError(f"{name} holds {len(prefixes)} students, under {', '.join(prefixes)}; keep one of them")
    prefix = "".join(prefixes)
    weights = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    if others := sorted({key.split(".")[0] for key in arrays if not key.startswith(prefix)}):
        logging.warning("%s: weights of %s are no part of the student under %s", name, ", ".join(others), prefix)
    return weights, next((key for key in CONTAINERS if key in (container, *prefix.split("."))), "")


def infer_model(weights: Mapping[str, np.ndarray], name: str, *, container: str = "") -> dict:
    """The keys of `config.model` that names and shapes say, with `num_features`, `head` and `out_features`.

    `container` is the key the weights stood under: a plain convolution is a distillation head under `model_point`, and
    WaffleIron's segmentation head under `net`. There is no `activation` where the file does not say it.
    """
    first = weights.get(FIRST)
    layers = [re.match(r"waffleiron\.spatial_mix\.(\d+)\.", key) for key in weights]
    depth = 1 + max((int(match.group(1)) for match in layers if match), default=-1)
    if first is None or first.ndim < 2 or not 0 < depth <= len(weights):
        what = FIRST if first is None or first.ndim < 2 else "waffleiron.spatial_mix.N"
        raise InputError(
            f"{name} holds no WaffleIron student (no {what} among its {len(weights)} weights){_hint(weights)}"
        )
    channels, num_features = (int(n) for n in first.shape[:2])
    batch_norm = "waffleiron.spatial_mix.0.norm.running_mean" in weights
    head, hidden, out_features = "none", 0, 0
    activation = "relu" if batch_norm else ""  # the original WaffleIron is ReLU
    if "classif.2.weight" in weights:  # only ScaLR+'s distillation head has three layers, and ScaLR+ is GELU
        head, activation = "distill", "gelu"
        out_features, hidden = (len(weights[f"classif.{n}.weight"]) for n in (2, 0))
    elif "classif.3.weight" in weights:
        head, out_features = "mlp", len(weights["classif.3.weight"])
    elif "classif.1.weight" in weights:
        head, out_features = "segment", len(weights["classif.1.weight"])
    elif "classif.weight" in weights:
        distilled = container.startswith("model_point") or (not container and not batch_norm)
        head, out_features = "distill" if distilled else "linear", len(weights["classif.weight"])
        activation = "relu" if distilled else activation  # ScaLR
    model = {"name": "waffleiron", "channels": channels, "depth": depth, "norm": "batch" if batch_norm else "layer"}
    model |= {"num_neighbors": 16}  # of all that were published
    model |= {"num_features": num_features, "head": head, "head_hidden": hidden, "out_features": out_features}
    return model | ({"activation": activation} if activation else {})


def _hint(weights: Mapping) -> str:
    """What to say of a file with kernels of 3x3x3, as a sparse network's are: a list of 27 matrices, or five axes."""
    shapes = [array.shape for array in weights.values() if isinstance(array, np.ndarray)]
    if not any(len(shape) == 5 or (len(shape) == 3 and shape[0] == 27) for shape in shapes):
        return ""
    return "; it looks like a MinkUNet whose names are not known here (docs/weights.md, MinkUNets, says which are)"


def convert_weights(weights: Mapping[str, np.ndarray], student: Student, name: str) -> dict:
    """PyTorch weights by name -> {"params", "batch_stats"}. Lists what is missing, extra, misshapen or not finite."""
    table = weight_table(student)
    known = {weight.theirs for weight in table}
    check_weights({key: weights[key] for key in known & weights.keys()}, name)
    shapes = shapes_of(student, weights[FIRST].shape[1])
    problems, rows = [], {}
    for weight in table:
        array, expected = weights.get(weight.theirs), shapes[weight.kind][weight.ours]
        expected = expected if weight.row is None else expected[1:]
        if array is None:
            problems.append(f"{weight.theirs} is missing, needs {theirs_shape(expected, weight)}")
            continue
        try:
            converted = to_ours(array, weight.layout)
        except ValueError:
            converted = np.asarray(array)
        if converted.shape != expected:
            problems.append(f"{weight.theirs} has {array.shape}, needs {theirs_shape(expected, weight)}")
        rows.setdefault(f"{weight.kind}/{weight.ours}", []).append(converted)
    problems += extra_weights(weights, known)
    if problems:
        raise InputError(
            f"{name} does not fit a student of {student.backbone.depth} layers, {student.backbone.channels} wide, "
            f"nothing was loaded: {'; '.join(problems)}"
        )
    flat = {path: np.stack(of) if "/groups/" in path else of[0] for path, of in rows.items()}
    return {"params": {}, "batch_stats": {}} | unflatten_dict(flat, sep="/")


def load_torch_checkpoint(path: str | Path, *, activation: str | None = None) -> tuple[ConfigDict, dict]:
    """A published student, `.pth` or `.safetensors`: (model config, {"params", "batch_stats"} of NumPy arrays).

    The model config is `config.model` with `num_features`, `head` and `out_features` added. The file does not say
    intensity statistics, field of view and grids, which keep their defaults; `scalr_jax.load` asks for those.

    Raises:
      InputError: not a readable checkpoint, another model, weights that are missing, extra or of another shape (all
        are listed), or a file that does not say its activation and `activation` ("relu" or "gelu") is not given.
    """
    found = read(unwrapped(read_weights_file(path), str(path)), str(path))
    model = get_config().model.unlock()
    model.update(found.model_with(activation, str(path)))
    return model, found.variables


def save_torch_checkpoint(path: str | Path, model: Mapping, variables: Variables) -> None:
    """Writes a model, with its config as `load_torch_checkpoint` gives it, in the published layout."""
    write_published(path, student_of(model), variables)


def write_published(path: str | Path, student: Student, variables: Variables) -> None:
    """Writes the published layout: under `model_point` for distilled models, `net` for others, names with `module.`."""
    state = {f"module.{key}": value for key, value in published_state_dict(student, variables).items()}
    write_torch_file(path, {"model_point" if student.head == "distill" else "net": state})
