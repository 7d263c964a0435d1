"""The student as an ONNX graph for onnxruntime: the `cells` form, built node by node from the parameters.

Inputs are those of `export/inputs.py`; every count of rows is dynamic. Outputs are `features` [N, C] and, unless the
model has no head, `distilled` [N, C_teacher] or `logits` [N, classes], float32.

A cell's mean is a tree of gathers and sums of eight rows (`export.inputs.sum_tree` says why), a convolution gathers
nine rows of a table whose last row is zero. Batch norms are a multiplier and a shift; what is one or zero, as after
`--fold`, leaves no node.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
import onnxruntime
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

from scalr_jax.export.fold import norm_affine
from scalr_jax.export.inputs import HEADS, LEVELS, PLANES, input_table
from scalr_jax.models.layers import LAYER_NORM_EPS
from scalr_jax.models.student import Student, Variables
from scalr_jax.models.waffleiron import WaffleIronBackbone
from scalr_jax.runtime.errors import InputError

OPSET, IR_VERSION = 20, 9  # the first opset with Gelu: onnxruntime from 1.17 on
LARGEST_FILE = 2**31  # bytes: a limit of protocol buffers


class Graph:
    """Nodes and constants in the order they were added. A value is known by its name."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Adds a node of one output and returns the output's name, which is the node's too: onnxruntime before 1.22
        fuses gathers under names that it makes of theirs, and refuses the file where two are alike."""
        output = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, array: ArrayLike) -> str:
        """A constant; a name that was there before must stand for the same array."""
        self.constants[name] = np.asarray(array)
        return name

    def integers(self, *values: int) -> str:
        return self.constant("integers_" + "_".join(map(str, values)), np.array(values, np.int64))

    def column(self, array: str, number: int) -> str:
        """[R, Q] -> [R]."""
        return self.add("Gather", array, self.constant(f"column_{number}", np.array(number, np.int64)), axis=1)

    def rows(self, array: str, begin: str, end: str) -> str:
        """Rows begin to end of a table; both are names of [1] int64."""
        return self.add("Slice", array, begin, end, self.integers(0))

    def scaled(self, x: str, name: str, multiplier: np.ndarray) -> str:
        """x * multiplier [C]; x itself where all are one."""
        return self.add("Mul", x, self.constant(name, np.float32(multiplier))) if np.any(multiplier != 1) else x

    def affine(self, x: str, name: str, multiplier: np.ndarray, shift: np.ndarray) -> str:
        """x * multiplier [C] + shift [C], without what changes nothing."""
        x = self.scaled(x, f"{name}/multiplier", multiplier)
        return self.add("Add", x, self.constant(f"{name}/shift", np.float32(shift))) if np.any(shift) else x

    def linear(self, x: str, name: str, layer: Mapping[str, np.ndarray]) -> str:
        """x @ kernel + bias, [N, C_in] -> [N, C_out]."""
        kernel, bias = (self.constant(f"{name}/{part}", layer[part]) for part in ("kernel", "bias"))
        return self.add("Gemm", x, kernel, bias)

    def layer_norm(self, x: str, name: str, norm: Mapping[str, np.ndarray]) -> str:
        scale, bias = (self.constant(f"{name}/{part}", norm[part]) for part in ("scale", "bias"))
        return self.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=LAYER_NORM_EPS)

    def with_zero_row(self, table: str, channels: int) -> str:
        """[M, C] -> [M + 1, C], so that index -1 reads zeros."""
        return self.add("Concat", table, self.constant("zero_row", np.zeros((1, channels), np.float32)), axis=0)


def serialize(student: Student, variables: Variables, settings: Mapping) -> bytes:
    """The file's bytes, weights inside. Raises InputError for more than a file can hold."""
    content = build_model(student, variables, settings)
    if content.ByteSize() >= LARGEST_FILE:
        raise InputError(f"the model is {content.ByteSize() / 1e9:.1f} GB, and an ONNX file holds 2; take stablehlo")
    return content.SerializeToString()


def open_session(model: Path | bytes, *, threads: int = 0) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU, of a file or its bytes; `threads` 0: as many as there are cores.

    Raises InputError when this onnxruntime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    content = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        reason = str(error).splitlines()[0][:200]
        raise InputError(
            f"onnxruntime {onnxruntime.__version__} cannot load the exported model ({reason}); "
            "pip install --upgrade onnxruntime, or take --format=stablehlo"
        ) from error


def build_model(student: Student, variables: Variables, settings: Mapping) -> onnx.ModelProto:
    """The ONNX model of a student with a WaffleIron.

    Args:
      student: the Flax module.
      variables: {"params", "batch_stats"} of NumPy arrays.
      settings: the export's, which the file keeps.
    """
    backbone = student.backbone
    assert isinstance(backbone, WaffleIronBackbone), "no other backbone is exported as ONNX"
    graph, channels, depth = Graph(), backbone.channels, backbone.depth
    planes = [_plane(graph, name) for name in PLANES]
    x = _embedding(graph, backbone.needs.num_neighbors, variables)
    for d in range(depth):
        params = _layer(variables["params"], d, depth)
        stats = _layer(variables["batch_stats"], d, depth) if backbone.norm == "batch" else {}
        plane, activation = planes[d % len(planes)], "Relu" if backbone.activation == "relu" else "Gelu"
        x = _spatial_mix(graph, activation, x, params["spatial"], stats.get("spatial"), plane, f"layer_{d}/spatial")
        x = _channel_mix(graph, activation, x, params["channel"], stats.get("channel"), f"layer_{d}/channel")
    graph.add("Identity", x, output="features")
    outputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", channels])]
    if student.head in HEADS:
        name = HEADS[student.head]
        graph.add("Identity", _head(graph, x, variables), output=name)
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", student.out_features]))
    num_features = len(variables["params"]["embedding"]["norm"]["scale"])
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
        for name, (dtype, shape, _) in input_table(backbone.needs, "onnx", num_features).items()
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in graph.constants.items()]
    content = helper.make_model(
        helper.make_graph(graph.nodes, "scalr_jax", inputs, outputs, constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="scalr_jax",
    )
    helper.set_model_props(content, {"settings": json.dumps(dict(settings))})  # a file alone knows its preprocessing
    onnx.checker.check_model(content)
    return content


def _layer(tree: Mapping, d: int, depth: int) -> dict:
    """The parameters or statistics of layer d. Whole groups of planes are stacked, the rest is not."""
    group, plane = divmod(d, len(PLANES))
    scanned = group < depth // len(PLANES)
    layer = tree["backbone"]["groups" if scanned else "rest"][f"plane_{plane}"]
    return jax.tree.map(lambda x: x[group], layer) if scanned else layer


class Plane(NamedTuple):
    """What the layers of a plane share, by names in the graph."""

    cell: str
    halo_taps: list[str]  # by column
    cell_taps: list[str]
    levels: list[str]  # of the tree of sums
    roots: str
    inverse_count: str  # [M, 1]
    filled: str  # [M, 1]: n / (n + 1e-6) of a cell of n points, what `_flatten` makes of ones


def _plane(graph: Graph, p: str) -> Plane:
    edges = [graph.rows(f"levels_{p}", graph.integers(level), graph.integers(level + 1)) for level in range(LEVELS + 1)]
    inverse_count = graph.add("Unsqueeze", f"inverse_count_{p}", graph.integers(1))
    missing = graph.add("Mul", inverse_count, graph.constant("1e-6", np.full(1, 1e-6, np.float32)))
    return Plane(
        cell=f"cell_{p}",
        halo_taps=[graph.column(f"halo_taps_{p}", t) for t in range(9)],
        cell_taps=[graph.column(f"cell_taps_{p}", t) for t in range(9)],
        levels=[graph.rows(f"sums_{p}", edges[level], edges[level + 1]) for level in range(LEVELS)],
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


def _head(graph: Graph, x: str, variables: Variables) -> str:
    params = variables["params"]["head"]
    if "norm" in params:
        x = graph.affine(x, "head/norm", *norm_affine(params["norm"], variables["batch_stats"]["head"]["norm"]))
    if "hidden" in params:
        x = graph.add("Relu", graph.linear(x, "head/hidden", params["hidden"]))
    return graph.linear(x, "head/out", params.get("out", params))
