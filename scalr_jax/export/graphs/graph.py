"""An ONNX graph that grows node by node, and what the backbones' graphs share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import helper

from scalr_jax.export.inputs import LEVELS
from scalr_jax.models.layers import LAYER_NORM_EPS


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
        return self.add("Gather", array, self.number(number), axis=1)

    def number(self, number: int) -> str:
        return self.constant(f"number_{number}", np.array(number, np.int64))

    def rows(self, array: str, begin: str, end: str) -> str:
        """Rows begin to end of a table; both are names of [1] int64."""
        return self.add("Slice", array, begin, end, self.integers(0))

    def levels(self, table: str, begins: str) -> list[str]:
        """The rows of each level of a tree of `export.inputs.sum_tree`."""
        edges = [self.rows(begins, self.integers(level), self.integers(level + 1)) for level in range(LEVELS + 1)]
        return [self.rows(table, edges[level], edges[level + 1]) for level in range(LEVELS)]

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

    def product(self, x: str, name: str, kernel: np.ndarray) -> str:
        """x @ kernel, [N, C_in] -> [N, C_out]."""
        return self.add("MatMul", x, self.constant(name, kernel))

    def layer_norm(self, x: str, name: str, norm: Mapping[str, np.ndarray]) -> str:
        scale, bias = (self.constant(f"{name}/{part}", norm[part]) for part in ("scale", "bias"))
        return self.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=LAYER_NORM_EPS)

    def with_zero_row(self, table: str, channels: int) -> str:
        """[M, C] -> [M + 1, C], so that index -1 reads zeros."""
        return self.add("Concat", table, self.constant("zero_row", np.zeros((1, channels), np.float32)), axis=0)
