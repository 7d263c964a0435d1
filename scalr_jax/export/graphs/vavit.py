"""A VaViT as nodes of an ONNX graph (`models/vavit.py`).

A pillar's maximum is a tree of gathers of eight rows. Attention's T x T logits are those of one head at a time, of all
heads they would take gigabytes. Batch norms, layer scales and the logits' scale are in the matrices beside them.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from scalr_jax.export.fold import norm_affine
from scalr_jax.export.graphs.graph import Graph
from scalr_jax.models.student import Variables
from scalr_jax.models.vavit import VaViTBackbone, rotary_frequencies


def add_vavit(graph: Graph, backbone: VaViTBackbone, variables: Variables) -> str:
    """The features [N, C] by their name in the graph."""
    params, stats = variables["params"], variables["batch_stats"]
    points, of_points = params["embedding"], stats["embedding"]
    near = [graph.column("neighbors", k) for k in range(backbone.needs.num_neighbors)]
    x = graph.affine("feats", "embedding/norm", *norm_affine(points["norm"], of_points["norm"]))
    for n in range(backbone.point_depth):
        layer = f"layer_{n}"
        x = _point_layer(graph, x, near, points[layer], of_points[layer], f"embedding/{layer}")
    pillars, turns = _pillar_max(graph, x), _turns(graph, backbone.width // backbone.num_heads)
    for d in range(backbone.depth):
        block = jax.tree.map(lambda weight, d=d: weight[d], params["backbone"]["blocks"])
        pillars = _block(graph, pillars, block, backbone.num_heads, turns, f"block_{d}")
    return _merge(graph, x, pillars, params["backbone"]["merge"], stats["backbone"]["merge"])


def _times(kernel: np.ndarray, factor: np.ndarray | float) -> np.ndarray:
    return (kernel.astype(np.float64) * factor).astype(np.float32)


def _normed(graph: Graph, x: str, params: Mapping, stats: Mapping, part: str, name: str) -> str:
    """relu(norm(x @ kernel))."""
    multiplier, shift = norm_affine(params[f"{part}_norm"], stats[f"{part}_norm"])
    layer = {"kernel": _times(params[part]["kernel"], multiplier), "bias": np.float32(shift)}
    return graph.add("Relu", graph.linear(x, f"{name}/{part}", layer))


def _gated(graph: Graph, x: str, gate: Mapping, name: str) -> str:
    """x * sigmoid(x @ kernel + bias)."""
    return graph.add("Mul", x, graph.add("Sigmoid", graph.linear(x, f"{name}/gate", gate)))


def _point_layer(graph: Graph, x: str, near: list[str], params: Mapping, stats: Mapping, name: str) -> str:
    """`ops/gated_neighbors.py`, one neighbour at a time."""
    point = _normed(graph, x, params, stats, "point", name)
    multiplier, shift = norm_affine(params["neighbor_norm"], stats["neighbor_norm"])
    u = graph.product(x, f"{name}/neighbor", _times(params["neighbor"]["kernel"], multiplier))
    own, best = graph.add("Sub", u, graph.constant(f"{name}/shift", np.float32(shift))), ""
    for column in near:
        r = graph.add("Relu", graph.add("Sub", graph.add("Gather", u, column), own))
        y = _gated(graph, r, params["gate"], name)
        best = graph.add("Max", best, y) if best else y
    return graph.product(graph.add("Concat", point, best, axis=1), f"{name}/final", params["final"]["kernel"])


def _pillar_max(graph: Graph, x: str) -> str:
    """[N, C] -> [T, C]"""
    maxima, below = [], x
    for level in graph.levels("maxima", "levels"):
        below = graph.add("ReduceMax", graph.add("Gather", below, level), graph.integers(1), keepdims=0)
        maxima.append(below)
    return graph.add("Gather", graph.add("Concat", *maxima, axis=0), "roots")


def _turns(graph: Graph, head: int) -> tuple[str, str]:
    """Cosine and sine of each pillar's angles, [T, 1, 2, head / 4]."""
    coordinates = graph.add("Unsqueeze", "coordinates", graph.integers(1, 3))
    angles = graph.add("Mul", coordinates, graph.constant("frequencies", rotary_frequencies(head)))
    return graph.add("Cos", angles), graph.add("Sin", angles)


def _block(graph: Graph, x: str, params: Mapping, num_heads: int, turns: tuple[str, str], name: str) -> str:
    """x + scale * attention(norm(x)), then x + scale * mlp(norm(x)), on [T, C]."""
    attention, mlp = params["attention"], params["mlp"]
    y = graph.layer_norm(x, f"{name}/norm_1", params["norm_1"]["layer"])
    y = _attend(graph, y, attention["qkv"]["kernel"], num_heads, turns, f"{name}/qkv")
    kernel = _times(attention["projection"]["kernel"], params["scale_1"])
    x = graph.add("Add", x, graph.product(y, f"{name}/projection", kernel))
    y = graph.layer_norm(x, f"{name}/norm_2", params["norm_2"]["layer"])
    y = graph.add("Gelu", graph.product(y, f"{name}/linear_1", mlp["linear_1"]["kernel"]))
    kernel = _times(mlp["linear_2"]["kernel"], params["scale_2"])
    return graph.add("Add", x, graph.product(y, f"{name}/linear_2", kernel))


def _attend(graph: Graph, x: str, qkv: np.ndarray, num_heads: int, turns: tuple[str, str], name: str) -> str:
    """[T, C] -> the heads' results side by side."""
    width, (cos, sin) = len(qkv), turns
    head = width // num_heads
    turning = np.concatenate([_times(qkv[:, :width], head**-0.5), qkv[:, width : 2 * width]], axis=1)
    shape = graph.integers(0, 2 * num_heads, 2, 2, head // 4)  # queries and keys; x and y; the two of a pair
    pairs = graph.add("Reshape", graph.product(x, f"{name}/turning", turning), shape)
    a, b = (graph.add("Gather", pairs, graph.number(n), axis=3) for n in (0, 1))
    first = graph.add("Sub", graph.add("Mul", a, cos), graph.add("Mul", b, sin))
    second = graph.add("Add", graph.add("Mul", b, cos), graph.add("Mul", a, sin))
    turned = graph.add("Concat", first, second, axis=3)
    rows = graph.add("Reshape", turned, graph.integers(0, 2 * num_heads, head))
    values = graph.product(x, f"{name}/values", qkv[:, 2 * width :])
    values = graph.add("Reshape", values, graph.integers(0, num_heads, head))
    heads = []
    for h in range(num_heads):
        q, k = (graph.add("Gather", rows, graph.number(n), axis=1) for n in (h, num_heads + h))
        weights = graph.add("Softmax", graph.add("Gemm", q, k, transB=1), axis=-1)
        heads.append(graph.add("MatMul", weights, graph.add("Gather", values, graph.number(h), axis=1)))
    return graph.add("Concat", *heads, axis=1)


def _merge(graph: Graph, points: str, pillars: str, params: Mapping, stats: Mapping) -> str:
    """Points [N, C] and pillars [T, C] -> [N, channels]"""
    pillar = graph.add("Gather", _normed(graph, pillars, params, stats, "pillar", "merge"), "pillar")
    both = graph.add("Concat", _normed(graph, points, params, stats, "point", "merge"), pillar, axis=1)
    return _normed(graph, _gated(graph, both, params["gate"], "merge"), params, stats, "out", "merge")
