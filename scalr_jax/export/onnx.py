"""The student as an ONNX graph for onnxruntime, built node by node from the parameters (`export/graphs`).

Inputs are those of `export/inputs.py`; every count of rows is dynamic. Outputs are `features` [N, C] and, unless the
model has no head, `distilled` [N, C_teacher] or `logits` [N, classes], float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from scalr_jax.export.fold import norm_affine
from scalr_jax.export.graphs.graph import Graph
from scalr_jax.export.graphs.vavit import add_vavit
from scalr_jax.export.graphs.waffleiron import add_waffleiron
from scalr_jax.export.inputs import HEADS, input_table
from scalr_jax.models.student import Student, Variables
from scalr_jax.runtime.errors import InputError

OPSET, IR_VERSION = 20, 9  # the first opset with Gelu: onnxruntime from 1.17 on
LARGEST_FILE, NODES = 2**31, 2**25  # bytes: a limit of protocol buffers; room for what is no weight


def serialize(student: Student, variables: Variables, settings: Mapping) -> bytes:
    """The file's bytes, weights inside. Raises InputError as `build_model`."""
    return build_model(student, variables, settings).SerializeToString()


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
    """The ONNX model of a student with a WaffleIron or a VaViT. Raises InputError for more than a file can hold.

    Args:
      student: the Flax module.
      variables: {"params", "batch_stats"} of NumPy arrays.
      settings: the export's, which the file keeps.
    """
    graph, needs = Graph(), student.needs
    add: Callable[..., str] = add_waffleiron if needs.grids else add_vavit  # of a backbone that `exports` as ONNX
    x = add(graph, student.backbone, variables)
    graph.add("Identity", x, output="features")
    outputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", student.backbone.channels])]
    if student.head in HEADS:
        name = HEADS[student.head]
        graph.add("Identity", _head(graph, x, variables), output=name)
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", student.out_features]))
    num_features = len(variables["params"]["embedding"]["norm"]["scale"])
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
        for name, (dtype, shape, _) in input_table(needs, "onnx", num_features).items()
    ]
    size = sum(array.nbytes for array in graph.constants.values())
    if size >= LARGEST_FILE - NODES:
        raise InputError(f"the model is {size / 1e9:.1f} GB, and an ONNX file holds 2; take stablehlo")
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


def _head(graph: Graph, x: str, variables: Variables) -> str:
    params = variables["params"]["head"]
    if "norm" in params:
        x = graph.affine(x, "head/norm", *norm_affine(params["norm"], variables["batch_stats"]["head"]["norm"]))
    if "hidden" in params:
        x = graph.add("Relu", graph.linear(x, "head/hidden", params["hidden"]))
    return graph.linear(x, "head/out", params.get("out", params))
