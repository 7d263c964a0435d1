"""A WaffleIron as nodes of an ONNX graph: the `cells` form.

A cell's mean is a tree of gathers and sums of eight rows (`export.inputs.sum_tree` says why), a convolution gathers
nine rows of a table whose last row is zero. Batch norms are a multiplier and a shift; what is one or zero, as after
`--fold`, leaves no node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from scalr_jax.export.fold import norm_affine
from scalr_jax.export.graphs.graph import Graph
from scalr_jax.export.inputs import PLANES
from scalr_jax.models.student import Variables
from scalr_jax.models.waffleiron import WaffleIronBackbone


def add_waffleiron(graph: Graph, backbone: WaffleIronBackbone, variables: Variables) -> str:
    """The features [N, C] by their name in the graph."""
    depth = backbone.depth
    planes = [_plane(graph, name) for name in PLANES]
    x = _embedding(graph, backbone.needs.num_neighbors, variables)
    for d in range(depth):
        params = _layer(variables["params"], d, depth)
        stats = _layer(variables["batch_stats"], d, depth) if backbone.norm == "batch" else {}
        plane, activation = planes[d % len(planes)], "Relu" if backbone.activation == "relu" else "Gelu"
        x = _spatial_mix(graph, activation, x, params["spatial"], stats.get("spatial"), plane, f"layer_{d}/spatial")
        x = _channel_mix(graph, activation, x, params["channel"], stats.get("channel"), f"layer_{d}/channel")
    return x


def _layer(tree: Mapping, d: int, depth: int) -> dict:
    """The parameters or statistics of layer d. Whole groups of planes are stacked, the rest is not."""
    group, plane = divmod(d, len(PLANES))
    scanned = group < depth // len(PLANES)
    layer = tree["backbone"]["groups" if scanned else "rest"][f"plane_{plane}"]
    return jax.tree.map(lambda x: x[group], layer) if scanned else layer


class Plane(NamedTuple):
    """Tables that the layers of a plane share, by names in the graph."""

    cell: str
    halo_taps: list[str]  # by column
    cell_taps: list[str]
    levels: list[str]  # of the tree of sums
    roots: str
    inverse_count: str  # [M, 1]
    filled: str  # [M, 1]: n / (n + 1e-6) of a cell of n points, what `_flatten` makes of ones


def _plane(graph: Graph, p: str) -> Plane:
    inverse_count = graph.add("Unsqueeze", f"inverse_count_{p}", graph.integers(1))
    missing = graph.add("Mul", inverse_count, graph.constant("1e-6", np.full(1, 1e-6, np.float32)))
    return Plane(
        cell=f"cell_{p}",
        halo_taps=[graph.column(f"halo_taps_{p}", t) for t in range(9)],
        cell_taps=[graph.column(f"cell_taps_{p}", t) for t in range(9)],
        levels=graph.levels(f"sums_{p}", f"levels_{p}"),
        roots=f"roots_{p}",
        inverse_count=inverse_count,
        filled=graph.add("Sub", graph.constant("one", np.ones(1, np.float32)), missing),
    )


def _embedding(graph: Graph, num_neighbors: int, variables: Variables) -> str:
    """`models/embedding.py`: final([linear(n_i), max over neighbours j of MLP(n_j - n_i)])."""
    params, stats = (variables[kind]["embedding"] for kind in ("params", "batch_stats"))
    norms = ("norm", "neighbor_norm_0", "neighbor_norm_1")
    (scale, shift), (scale_0, shift_0), (scale_1, shift_1) = (norm_affine(params[n], stats[n]) for n in norms)
    points = graph.linear(graph.affine("feats", "embedding/norm", scale, shift), "embedding/point", params["point"])
    kernel = params["neighbor_in"].astype(np.float64)
    matrix, bias = (scale * scale_0)[:, None] * kernel * scale_1, shift_0 @ kernel * scale_1 + shift_1
    folded = {"kernel": matrix.astype(np.float32), "bias": bias.astype(np.float32)}
    kernel = graph.constant("embedding/neighbor_out", params["neighbor_out"])
    best = ""
    for k in range(num_neighbors):  # one at a time: [N, K, C] of a whole scan is a gigabyte
        offset = graph.add("Sub", graph.add("Gather", "feats", graph.column("neighbors", k)), "feats")
        hidden = graph.add("Relu", graph.linear(offset, "embedding/neighbor_in", folded))
        value = graph.add("MatMul", hidden, kernel)
        best = graph.add("Max", best, value) if best else value
    return graph.linear(graph.add("Concat", points, best, axis=1), "embedding/final", params["final"])


def _spatial_mix(
    graph: Graph, activation: str, x: str, params: Mapping, stats: Mapping | None, plane: Plane, name: str
) -> str:
    """x + scale * inflate(conv3x3(activation(conv3x3(flatten(norm(x))))))."""
    channels = len(params["scale"])
    if stats is not None:  # on cells, where it costs nothing; an empty cell stays zero
        multiplier, shift = norm_affine(params["norm"]["batch"], stats["norm"]["batch"])
        table = graph.scaled(_flatten(graph, x, plane, channels), f"{name}/norm/multiplier", multiplier)
        if np.any(shift):
            shifts = graph.add("Mul", plane.filled, graph.constant(f"{name}/norm/shift", np.float32(shift)))
            table = graph.add("Add", table, shifts)
    else:
        points = graph.layer_norm(x, f"{name}/norm", params["norm"]["layer"])
        table = _flatten(graph, points, plane, channels)
    halo = _conv(graph, table, plane.halo_taps, params["kernel_1"], f"{name}/kernel_1")
    halo = graph.add(activation, graph.add("Add", halo, graph.constant(f"{name}/bias_1", params["bias_1"])))
    table = _conv(graph, halo, plane.cell_taps, params["kernel_2"], f"{name}/kernel_2")
    table = graph.add("Add", table, graph.constant(f"{name}/bias_2", params["bias_2"]))
    return graph.add("Add", x, graph.add("Gather", graph.scaled(table, f"{name}/scale", params["scale"]), plane.cell))


def _flatten(graph: Graph, x: str, plane: Plane, channels: int) -> str:
    """Mean of the points of each cell, [N, C] -> [M, C]."""
    sums, below = [], x
    for level in plane.levels:
        rows = graph.add("Gather", graph.with_zero_row(below, channels), level)  # [Q_l, 8, C]
        below = graph.add("ReduceSum", rows, graph.integers(1), keepdims=0)
        sums.append(below)
    cells = graph.add("Gather", graph.add("Concat", *sums, axis=0), plane.roots)
    return graph.add("Mul", cells, plane.inverse_count)


def _conv(graph: Graph, table: str, taps: list[str], kernel: np.ndarray, name: str) -> str:
    """Sum over t of kernel[t] * table[taps[:, t]]."""
    table, total = graph.with_zero_row(table, kernel.shape[1]), ""
    for t in range(9):
        product = graph.add("Mul", graph.add("Gather", table, taps[t]), graph.constant(f"{name}_{t}", kernel[t]))
        total = graph.add("Add", total, product) if total else product
    return total


def _channel_mix(graph: Graph, activation: str, x: str, params: Mapping, stats: Mapping | None, name: str) -> str:
    """x + scale * linear(activation(linear(norm(x))))."""
    if stats is not None:
        y = graph.affine(x, f"{name}/norm", *norm_affine(params["norm"]["batch"], stats["norm"]["batch"]))
    else:
        y = graph.layer_norm(x, f"{name}/norm", params["norm"]["layer"])
    y = graph.add(activation, graph.linear(y, f"{name}/linear_1", params["linear_1"]))
    y = graph.linear(y, f"{name}/linear_2", params["linear_2"])
    return graph.add("Add", x, graph.scaled(y, f"{name}/scale", params["scale"]))
