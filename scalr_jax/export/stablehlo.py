"""The student as a StableHLO program that runs with JAX and NumPy alone, on CPU, CUDA and TPU.

    program = jax.export.deserialize(bytearray(Path("EXPORT/model.stablehlo").read_bytes()))
    weights = dict(np.load("EXPORT/weights.npz"))
    outputs = jax.jit(program.call)(weights, inputs)         # inputs of export.inputs.pad_inputs

Outputs are `features` [N, C] and, unless the model has no head, `distilled` or `logits`, float32, padded rows included.
The counts of points and the sizes of tables are symbols: any size runs, and each is compiled once. Weights are an
argument, because as constants they would be folded at each compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from scalr_jax.data.scenes import Batch, Pillars, Plane
from scalr_jax.export.inputs import HEADS, PLANES, input_table
from scalr_jax.models.minkunet import GivenTables
from scalr_jax.models.student import Student, Variables, outputs_of
from scalr_jax.ops import sparse_conv
from scalr_jax.ops.voxels import CENTRE, LEVELS

Array = jax.Array
Inputs = dict[str, Array]

PLATFORMS = ("cpu", "cuda", "tpu")


def flat_weights(variables: Variables) -> dict[str, np.ndarray]:
    """Variables by path, "params/head/out/kernel"."""
    return {path: np.asarray(leaf) for path, leaf in sorted(flatten_dict(dict(variables), sep="/").items())}


def make_program(student: Student) -> Callable[[Inputs, Inputs], Inputs]:
    """The pure function (weights, inputs) -> outputs by name; all are flat dicts of arrays."""
    needs = student.needs
    sparse = _pillar_batch if needs.voxel_size is None else _voxel_batch
    make_batch = _plane_batch if needs.grids else sparse

    def program(weights: Inputs, inputs: Inputs) -> Inputs:
        features, rows = outputs_of(student, unflatten_dict(weights, sep="/"), make_batch(inputs))
        return {"features": features} | ({HEADS[student.head]: rows[0]} if student.head in HEADS else {})

    return program


def _voxel_batch(inputs: Inputs) -> Batch[Array]:
    """One shard of one scene, D = S = 1, with its tables."""
    rows = [inputs[f"near_slots_{level}"].shape[0] for level in range(LEVELS)]

    def pairs(
        kind: str, level: int, element: Array, num_inputs: int, back: sparse_conv.Pairs | None = None
    ) -> sparse_conv.Pairs:
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
    scene, number = jnp.where(valid, 0, 1), valid.sum(dtype=jnp.int32)[None]
    batch = Batch(inputs["feats"], scene, number, jnp.zeros((1, 0), jnp.int32), ())
    batch = batch._replace(voxels=GivenTables(tables, inputs["offset"]))
    return jax.tree.map(lambda x: x[None], batch)


def _plane_batch(inputs: Inputs) -> Batch[Array]:
    """One shard of one scene, D = S = 1, of padded inputs. Tables that only the other forms read are left out."""
    valid = inputs["cell_xy"] >= 0
    planes, left_out = [], jnp.zeros(0, jnp.int32)
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
        scene=jnp.where(valid, 0, 1),
        scene_points=valid.sum(dtype=jnp.int32)[None],
        neighbors=inputs["neighbors"],
        planes=tuple(planes),
    )
    return jax.tree.map(lambda x: x[None], batch)


def _pillar_batch(inputs: Inputs) -> Batch[Array]:
    """One shard of one scene, D = S = 1, of padded inputs."""
    pillar, table = inputs["pillar"], inputs["coordinates"]
    valid = pillar >= 0
    pillars = Pillars(_none_to(table.shape[0], pillar), table, pillar.max(keepdims=True) + 1)
    scene, number = jnp.where(valid, 0, 1), valid.sum(dtype=jnp.int32)[None]
    batch = Batch(inputs["feats"], scene, number, inputs["neighbors"], (), pillars=pillars)
    return jax.tree.map(lambda x: x[None], batch)


def _none_to(row: int, rows: Array) -> Array:
    """-1 becomes `row`, the zero row of a table."""
    return jnp.where(rows < 0, row, rows)


def export_program(student: Student, weights: Mapping[str, np.ndarray], num_features: int) -> bytes:
    """The program, lowered for all platforms and serialised."""
    table, scope = input_table(student.needs, "stablehlo", num_features), jax.export.SymbolicScope()
    inputs = {
        name: jax.ShapeDtypeStruct(jax.export.symbolic_shape(", ".join(map(str, shape)), scope=scope), dtype)
        for name, (dtype, shape, _) in table.items()
    }
    abstract = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}
    exported = jax.export.export(jax.jit(make_program(student)), platforms=PLATFORMS)(abstract, inputs)
    return bytes(exported.serialize())
