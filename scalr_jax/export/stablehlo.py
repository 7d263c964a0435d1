"""The student as a StableHLO program that runs with JAX and NumPy alone, on CPU, CUDA and TPU.

    program = jax.export.deserialize(bytearray(Path("EXPORT/model.stablehlo").read_bytes()))
    weights = dict(np.load("EXPORT/weights.npz"))
    outputs = jax.jit(program.call)(weights, inputs)         # inputs of export_inputs.pad_inputs

Outputs are `features` [N, C] and, unless the model has no head, `distilled` or `logits`, float32, padded rows included.
The counts of points and the sizes of tables are symbols: any size runs, and each is compiled once. Weights are an
argument, because as constants they would be folded at each compilation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from scalr_jax.data.scenes import Batch, Plane
from scalr_jax.export.inputs import HEADS, PLANES
from scalr_jax.export.voxel_tables import BLOCK
from scalr_jax.interop.model import student_of
from scalr_jax.models.minkunet import GivenTables, MinkUNet
from scalr_jax.models.waffleiron import WaffleIron
from scalr_jax.ops import sparse_conv
from scalr_jax.ops.voxels import CENTRE, LEVELS

PLATFORMS = ("cpu", "cuda", "tpu")


def flat_weights(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Variables by path, "params/head/out/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}


def _nested(weights: Mapping[str, Any]) -> dict:
    """The inverse of `flat_weights`."""
    variables: dict = {}
    for path, leaf in weights.items():
        *folders, name = path.split("/")
        node = variables
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return variables


def make_program(model: Mapping[str, Any]) -> Any:
    """The pure function (weights, inputs) -> outputs by name; all are flat dicts of arrays."""
    student = student_of(model, implementation="cells")
    sparse = student.needs.voxel_size is not None

    def program(weights: dict, inputs: dict) -> dict:
        rows, state = student.apply(  # type: ignore[misc]
            _nested(weights),
            _sparse_batch(inputs) if sparse else _batch(inputs),
            train=False,
            capture_intermediates=lambda module, _: isinstance(module, WaffleIron | MinkUNet),
        )
        outputs = {"features": state["intermediates"]["backbone"]["__call__"][0]}
        if student.head in HEADS:
            outputs[HEADS[student.head]] = rows[0]
        return outputs

    return program


def _sparse_batch(inputs: Mapping[str, Any]) -> Batch:
    """One shard of one scene, D = S = 1, with its tables."""
    rows = [inputs[f"near_slots_{level}"].shape[0] for level in range(LEVELS)]

    def pairs(kind: str, level: int, element: Any, num_inputs: Any, back: Any = None) -> sparse_conv.Pairs:
        source = _none_to(num_inputs, inputs[f"{kind}_source_{level}"])
        slots = _none_to(source.shape[0] - 1, inputs[f"{kind}_slots_{level}"])  # the last is never used
        target, of_source = (back.source, back.of_target) if back else (source, slots)
        return sparse_conv.Pairs(source, target, element, of_source, slots)

    levels = []
    for level in range(LEVELS):
        element = inputs[f"near_element_{level}"]  # of 26, without the centre
        near = down = pairs("near", level, element + (element >= CENTRE), rows[level])
        if level + 1 < LEVELS:
            element = inputs[f"down_element_{level}"]
            up = pairs("up", level, element, rows[level + 1])
            down = pairs("down", level, element, rows[level], up)
        neighbors = inputs["neighbors"] if level == 0 else inputs[f"near_slots_{level}"]  # of coarser ones not read
        levels.append(sparse_conv.Level(inputs["number"][level], near, down, _none_to(rows[level], neighbors)))
    tables = sparse_conv.Voxels(
        cell=_none_to(rows[0], inputs["cell"]),
        order=inputs["order"],
        inverse_count=inputs["inverse_count"],
        levels=tuple(levels),
        missing=jnp.zeros((), jnp.int32),
    )
    valid = inputs["cell"] >= 0
    scene: Any = jnp.where(valid, 0, 1)
    none: Any = jnp.zeros((1, 0), jnp.int32)
    batch: Any = Batch(inputs["feats"], scene, valid.sum(dtype=jnp.int32)[None], none, ())
    batch = batch._replace(voxels=GivenTables(tables, inputs["offset"]))
    return jax.tree.map(lambda x: x[None], batch)


def _batch(inputs: Mapping[str, Any]) -> Batch:
    """One shard of one scene, D = S = 1, of padded inputs. Tables that only the other forms read are left out."""
    valid = inputs["cell_xy"] >= 0
    scene: Any = jnp.where(valid, 0, 1)
    planes, left_out = [], np.zeros(0, np.int32)
    for p in PLANES:
        num_cells, num_halo = (inputs[f"{taps}_taps_{p}"].shape[0] for taps in ("cell", "halo"))
        planes.append(
            Plane(
                cell=_none_to(num_cells, inputs[f"cell_{p}"]),
                grid_index=left_out,
                order=inputs[f"order_{p}"],
                start=left_out,
                inverse_count=inputs[f"inverse_count_{p}"],
                halo_index=left_out,
                halo_taps=_none_to(num_cells, inputs[f"halo_taps_{p}"]),
                cell_taps=_none_to(num_halo, inputs[f"cell_taps_{p}"]),
            )
        )
    batch = Batch(
        feats=inputs["feats"],
        scene=scene,
        scene_points=valid.sum(dtype=jnp.int32)[None],
        neighbors=inputs["neighbors"],
        planes=tuple(planes),
    )
    return jax.tree.map(lambda x: x[None], batch)


def _none_to(row: Any, rows: Any) -> Any:
    """-1 becomes `row`, the zero row of a table."""
    return jnp.where(rows < 0, row, rows)


def export_program(model: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> bytes:
    """The program, lowered for all platforms and serialised."""
    sparse = student_of(model).needs.voxel_size is not None
    shapes = _sparse_shapes(model) if sparse else _plane_shapes(model)
    inputs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
    abstract = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
    exported = jax.export.export(jax.jit(make_program(model)), platforms=PLATFORMS)(abstract, inputs)
    return bytes(exported.serialize())


def _sparse_shapes(model: Mapping[str, Any]) -> dict[str, tuple[tuple, Any]]:
    """Shape and dtype of every input of a MinkUNet."""
    names = [*(f"V_{level}" for level in range(LEVELS)), *(f"B_{level}" for level in range(LEVELS))]
    names += [f"D_{level}" for level in range(LEVELS - 1)]
    num_points, *sizes = jax.export.symbolic_shape(", ".join(["N", *names]))
    rows, near, down = sizes[:LEVELS], sizes[LEVELS : 2 * LEVELS], sizes[2 * LEVELS :]
    shapes: dict[str, tuple[tuple, Any]] = {
        "feats": ((num_points, model["num_features"]), jnp.float32),
        "offset": ((num_points, 3), jnp.float32),
        "cell": ((num_points,), jnp.int32),
        "order": ((num_points,), jnp.int32),
        "inverse_count": ((rows[0],), jnp.float32),
        "number": ((LEVELS,), jnp.int32),
        "neighbors": ((rows[0], 27), jnp.int32),
    }
    for level in range(LEVELS):
        shapes[f"near_source_{level}"] = ((BLOCK * near[level],), jnp.int32)
        shapes[f"near_element_{level}"] = ((near[level],), jnp.int32)
        shapes[f"near_slots_{level}"] = ((rows[level], 26), jnp.int32)
        if level + 1 < LEVELS:
            shapes[f"down_source_{level}"] = shapes[f"up_source_{level}"] = ((BLOCK * down[level],), jnp.int32)
            shapes[f"down_element_{level}"] = ((down[level],), jnp.int32)
            shapes[f"down_slots_{level}"] = ((rows[level + 1], 8), jnp.int32)
            shapes[f"up_slots_{level}"] = ((rows[level], 1), jnp.int32)
    return shapes


def _plane_shapes(model: Mapping[str, Any]) -> dict[str, tuple[tuple, Any]]:
    """Shape and dtype of every input of a WaffleIron."""
    sizes = jax.export.symbolic_shape(", ".join(["N", *(f"{n}_{p}" for p in PLANES for n in ("M", "H"))]))
    shapes: dict[str, tuple[tuple, Any]] = {
        "feats": ((sizes[0], model["num_features"]), jnp.float32),
        "neighbors": ((sizes[0], model["num_neighbors"]), jnp.int32),
    }
    for k, p in enumerate(PLANES):
        num_cells, num_halo = sizes[1 + 2 * k : 3 + 2 * k]
        shapes[f"cell_{p}"] = ((sizes[0],), jnp.int32)
        shapes[f"inverse_count_{p}"] = ((num_cells,), jnp.float32)
        shapes[f"halo_taps_{p}"] = ((num_halo, 9), jnp.int32)
        shapes[f"cell_taps_{p}"] = ((num_cells, 9), jnp.int32)
        shapes[f"order_{p}"] = ((sizes[0],), jnp.int32)
    return shapes
