"""Tables of names: our parameters beside those of a published PyTorch file.

Scanned layers are stacked in our tree and stand one by one in a file, so a row of a table says which row of the stack
it is; `to_ours` and `to_theirs` turn one array. Whatever does not fit is listed, all of it, and nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from scalr_jax.interop.finite import check_weights
from scalr_jax.interop.model import NORM, extra_weights, shapes_of
from scalr_jax.models.student import Student, Variables
from scalr_jax.runtime.errors import InputError


class Weight(NamedTuple):
    """One row of the table."""

    ours: str  # path below `kind`
    theirs: str
    layout: str  # see `to_ours`
    kind: str = "params"  # or "batch_stats"
    row: int | None = None  # of the stack, for layers that are stacked in our tree


def batch_norm(ours: str, theirs: str) -> list[Weight]:
    kinds = ("params", "params", "batch_stats", "batch_stats")
    return [Weight(f"{ours}/{x}", f"{theirs}.{y}", "same", k) for (x, y), k in zip(NORM, kinds, strict=True)]


def linear(ours: str, theirs: str) -> list[Weight]:
    return [Weight(f"{ours}/kernel", f"{theirs}.weight", "linear"), Weight(f"{ours}/bias", f"{theirs}.bias", "same")]


def layer_norm(ours: str, theirs: str) -> list[Weight]:
    return [Weight(f"{ours}/{x}", f"{theirs}.{y}", "same") for x, y in NORM[:2]]


_HEAD_NORM = batch_norm("head/norm", "classif.0")
HEADS = {
    "none": [],
    "segment": [*_HEAD_NORM, *linear("head", "classif.1")],
    # No published file has one; as Sequential(BatchNorm1d, Conv1d, ReLU, Conv1d) would name it.
    "mlp": [*_HEAD_NORM, *linear("head/hidden", "classif.1"), *linear("head", "classif.3")],
    "distill_mlp": [*linear("head/hidden", "classif.0"), *linear("head/out", "classif.2")],
    "distill": linear("head/out", "classif"),
    "linear": linear("head", "classif"),
}


def head_weights(student: Student) -> list[Weight]:
    return HEADS["distill_mlp" if student.head == "distill" and student.head_hidden else student.head]


def to_ours(array: np.ndarray, layout: str) -> np.ndarray:
    """same; linear: [out, in, 1...] -> [in, out]; matrix: [out, in]; depthwise: [C, 1, 3, 3] -> [9, C];
    flat: [C, 1, 1] -> [C]."""
    array = np.asarray(array, np.float32)
    if layout in ("linear", "matrix"):
        return np.ascontiguousarray(array.reshape(array.shape[:2]).T)
    if layout == "depthwise":
        return np.ascontiguousarray(array.reshape(len(array), 9).T)
    return array.reshape(-1) if layout == "flat" else array


def theirs_shape(shape: tuple[int, ...], weight: Weight) -> tuple[int, ...]:
    """PyTorch's shape of a weight of our `shape`.

    1x1 convolutions keep one axis of size 1 for [B, C, N], two inside the neighbourhood branch [B, C, N, K].
    """
    if weight.layout == "matrix":
        return shape[::-1]
    if weight.layout == "linear":
        return (*shape[::-1], *((1, 1) if weight.theirs.startswith("embed.conv2.") else (1,)))
    if weight.layout == "depthwise":
        return (shape[1], 1, 3, 3)
    return (*shape, 1, 1) if weight.layout == "flat" else shape


def to_theirs(array: np.ndarray, weight: Weight) -> np.ndarray:
    """The inverse of `to_ours`, float32."""
    array = np.asarray(array, np.float32)
    return np.ascontiguousarray(array.T).reshape(theirs_shape(array.shape, weight))


def state_dict(table: Sequence[Weight], variables: Variables) -> dict[str, np.ndarray]:
    """Our variables under PyTorch's names and shapes, with the counters that its batch norms have."""
    state: dict[str, np.ndarray] = {}
    arrays = {kind: flatten_dict(variables.get(kind, {}), sep="/") for kind in ("params", "batch_stats")}
    for weight in table:
        array = np.asarray(arrays[weight.kind][weight.ours])
        state[weight.theirs] = to_theirs(array if weight.row is None else array[weight.row], weight)
        if weight.theirs.endswith("running_var"):
            state[weight.theirs.replace("running_var", "num_batches_tracked")] = np.asarray(0, np.int64)
    return state


def convert(
    weights: Mapping[str, np.ndarray], student: Student, table: Sequence[Weight], num_features: int, name: str
) -> dict:
    """PyTorch weights by name -> {"params", "batch_stats"}. Lists what is missing, extra, misshapen or not finite."""
    known = {weight.theirs for weight in table}
    check_weights({key: weights[key] for key in known & weights.keys()}, name)
    shapes = shapes_of(student, num_features)
    problems, rows = [], {}
    stacked = {f"{weight.kind}/{weight.ours}" for weight in table if weight.row is not None}
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
            f"{name} does not fit a student of {student.backbone.describe()}, nothing was loaded: {'; '.join(problems)}"
        )
    flat = {path: np.stack(of) if path in stacked else of[0] for path, of in rows.items()}
    return {"params": {}, "batch_stats": {}} | unflatten_dict(flat, sep="/")
