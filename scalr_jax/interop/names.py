"""Names and layouts of published student weights: one table, ours beside PyTorch's.

Scanned layers are stacked in our tree and stand one by one in a file, so a row of the table says which row of the
stack it is. `to_ours` and `to_theirs` turn one array.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

NUM_PLANES = 3


class Weight(NamedTuple):
    """One row of the table."""

    ours: str  # path below "params" or "batch_stats"
    theirs: str
    layout: str  # see `to_ours`
    stats: bool = False


def _batch_norm(ours: str, theirs: str) -> list[Weight]:
    return [
        Weight(f"{ours}/scale", f"{theirs}.weight", "same"),
        Weight(f"{ours}/bias", f"{theirs}.bias", "same"),
        Weight(f"{ours}/mean", f"{theirs}.running_mean", "same", stats=True),
        Weight(f"{ours}/variance", f"{theirs}.running_var", "same", stats=True),
    ]


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
    return [Weight(f"{ours}/layer/{x}", f"{theirs}.{y}", "same") for x, y in (("scale", "weight"), ("bias", "bias"))]


def _layer(kind: str, d: int) -> list[Weight]:
    spatial, channel = f"waffleiron.spatial_mix.{d}", f"waffleiron.channel_mix.{d}"
    return [
        *_norm(kind, "spatial/norm", f"{spatial}.norm"),
        Weight("spatial/kernel_1", f"{spatial}.ffn.0.weight", "depthwise"),
        Weight("spatial/bias_1", f"{spatial}.ffn.0.bias", "same"),
        Weight("spatial/kernel_2", f"{spatial}.ffn.2.weight", "depthwise"),
        Weight("spatial/bias_2", f"{spatial}.ffn.2.bias", "same"),
        Weight("spatial/scale", f"{spatial}.scale.weight", "flat"),
        *_norm(kind, "channel/norm", f"{channel}.norm"),
        *_linear("channel/linear_1", f"{channel}.mlp.0"),
        *_linear("channel/linear_2", f"{channel}.mlp.2"),
        Weight("channel/scale", f"{channel}.scale.weight", "flat"),
    ]


def _head(head: str) -> list[Weight]:
    if head == "segment":
        return [*_batch_norm("head/norm", "classif.0"), *_linear("head", "classif.1")]
    if head == "mlp":  # no published file has one; as Sequential(BatchNorm1d, Conv1d, ReLU, Conv1d) would name it
        return [
            *_batch_norm("head/norm", "classif.0"),
            *_linear("head/hidden", "classif.1"),
            *_linear("head", "classif.3"),
        ]
    if head == "distill_mlp":
        return [*_linear("head/hidden", "classif.0"), *_linear("head/out", "classif.2")]
    return _linear("head" if head == "linear" else "head/out", "classif")


class Entry(NamedTuple):
    """A weight of one model: where it lies in our tree and, for stacked layers, which row."""

    weight: Weight
    ours: str
    row: int | None


def weight_table(model: Mapping[str, Any]) -> list[Entry]:
    """Every weight of the model that `model` (a model config, see `load_torch_checkpoint`) describes."""
    depth, kind = model["depth"], model["norm"]
    head = "distill_mlp" if model["head"] == "distill" and model["head_hidden"] else model["head"]
    entries = [Entry(weight, weight.ours, None) for weight in [*EMBEDDING, *(_head(head) if head != "none" else [])]]
    num_groups = depth // NUM_PLANES
    for d in range(depth):
        group, plane = divmod(d, NUM_PLANES)
        where, row = ("groups", group) if group < num_groups else ("rest", None)
        for weight in _layer(kind, d):
            entries.append(Entry(weight, f"backbone/{where}/plane_{plane}/{weight.ours}", row))
    return entries


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


def published_state_dict(model: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our variables under PyTorch's names and shapes, complete for a strict `load_state_dict`."""
    state: dict[str, np.ndarray] = {}
    for entry in weight_table(model):
        node: Any = variables["batch_stats" if entry.weight.stats else "params"]
        for folder in entry.ours.split("/"):
            node = node[folder]
        array = np.asarray(node) if entry.row is None else np.asarray(node)[entry.row]
        state[entry.weight.theirs] = to_theirs(array, entry.weight)
        if entry.weight.theirs.endswith("running_var"):
            state[entry.weight.theirs.replace("running_var", "num_batches_tracked")] = np.asarray(0, np.int64)
    return state
