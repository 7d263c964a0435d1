"""Published numbers on this device: outputs and gradients of tests/golden/student_*.npz.

output      the largest difference of the output, in prediction, relative to its largest value
gradient    the same of the worst parameter's gradient, of the mean squared error in training
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scalr_jax.data.scenes import Batch
from scalr_jax.interop import vavit, waffleiron
from scalr_jax.interop.layout import published_batch
from scalr_jax.interop.model import student_of
from scalr_jax.interop.published import published_state_dict
from scalr_jax.models.student import Variables

Array = jax.Array
FILES = ("student_scalr_full.npz", "student_vavit.npz")
DTYPES = ("float32", "bfloat16")
ROUNDING = 1e-6  # a gradient below is zero but for rounding
VAVIT = ("feat", "neighbors", "xy_bev", "idx_bev", "splits_bev", "idx_pad")
WAFFLEIRON = ("feat", "cell_ind", "occupied_cells", "neighbors_emb", "grids")


class Golden(NamedTuple):
    """A batch, and what the published student makes of it."""

    name: str
    model: dict
    variables: Variables
    batch: Batch
    layout: Callable[[Array], Array]  # the output [1, P, C] as the published code has it
    expected: np.ndarray  # of the output every n-th along the last axis
    target: np.ndarray | None  # None: no gradients are known
    gradients: dict[str, np.ndarray]


def read(path: Path) -> Iterator[Golden]:
    """The goldens of one file."""
    with np.load(path) as file:
        arrays = dict(file)
    weights = {name.removeprefix("param/"): value for name, value in arrays.items() if name.startswith("param/")}
    yield from (_vavit if "vavit" in path.name else _waffleiron)(path.stem, arrays, weights)


def _gradients(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _waffleiron(name: str, arrays: dict, weights: dict) -> Iterator[Golden]:
    model = {**waffleiron.infer_model(weights, name), "grids": arrays["grids"].tolist(), "drop_path": 0.0}
    variables = waffleiron.convert_weights(weights, student_of(model), name)
    num_scenes, num_points = arrays["occupied_cells"].shape
    layout = lambda out: out.reshape(num_scenes, num_points, -1).transpose(0, 2, 1)  # noqa: E731
    batch = published_batch(*(arrays[key] for key in WAFFLEIRON))
    known = (arrays["out_eval"], arrays["target"], _gradients(arrays, "grad/"))
    yield Golden(name, model, variables, batch, layout, *known)


def _vavit(name: str, arrays: dict, weights: dict) -> Iterator[Golden]:
    """One scene; the same packed with others, which changes nothing; and these with the published padding tokens."""
    found = vavit.read({"net": weights}, name)
    batches = {tag: vavit.published_batch(*(arrays[f"{tag}/{key}"] for key in VAVIT)) for tag in ("scene", "batch")}
    padded = {**found.model, "vavit": {**found.model["vavit"], "padding_tokens": "published"}}
    alone, expected = (arrays["scene/target"], _gradients(arrays, "scene/grad/")), arrays["scene/out_eval"]
    for what, model, tag, places, known in (
        ("scene", found.model, "scene", batches["scene"][1], (expected, *alone)),
        ("packed", found.model, "batch", batches["scene"][1], (expected, None, {})),
        ("padded", padded, "batch", batches["batch"][1], (arrays["batch/out_eval"], None, {})),
    ):
        layout = lambda out, places=places: out[0][places]  # noqa: E731
        yield Golden(f"{name}, {what}", model, found.variables, batches[tag][0], layout, *known)


def compare(golden: Golden, dtype: str) -> dict[str, float | None]:
    """`output` and `gradient` with matrix products in `dtype`; float32 means all of its digits."""
    student = student_of(golden.model, dtype=dtype)
    precision = "highest" if dtype == "float32" else "default"

    def loss_of(params: dict, target: Array) -> Array:
        variables = {**golden.variables, "params": params}
        out, _ = student.apply(variables, golden.batch, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(golden.layout(out.astype(jnp.float32)) - target))

    with jax.default_matmul_precision(precision):
        out = jax.jit(functools.partial(student.apply, train=False))(golden.variables, golden.batch)
        every = -(-golden.layout(out).shape[-1] // golden.expected.shape[-1])
        found: dict[str, float | None] = {"output": _error(golden.layout(out)[..., ::every], golden.expected)}
        found["gradient"] = None
        if golden.target is None:
            return found
        gradient = jax.jit(jax.grad(loss_of))(golden.variables["params"], golden.target)
    ours = published_state_dict(student, {**golden.variables, "params": gradient})
    errors = [_error(ours[key], theirs) for key, theirs in golden.gradients.items() if np.abs(theirs).max() > ROUNDING]
    return {**found, "gradient": max(errors)}


def _error(ours: Array | np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())
