"""The programs that `bench student` times, each as a function without arguments that starts one call.

What is timed is what trains: the step of `steps.py`, the layers of `models/waffleiron.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scalr_jax.bench import products as bench_products
from scalr_jax.bench.timing import compiled_bytes, working_bytes
from scalr_jax.config import OptimizerSettings
from scalr_jax.data.scenes import PLANE_AXES, Batch
from scalr_jax.models.flops import Sizes
from scalr_jax.models.layers import Norm, to_rows
from scalr_jax.models.student import Student
from scalr_jax.models.waffleiron import SpatialMix, WaffleIron, WaffleIronBackbone
from scalr_jax.ops.windows import make_windows
from scalr_jax.train import optim, steps
from scalr_jax.train.state import init_state

PLANES = len(PLANE_AXES)
OF_THREE = ("layer_forward", "layer_step_direct", "spatial_layer")  # programs of a layer a plane: a third is a layer's
OPTIMIZER = OptimizerSettings(schedule="constant", warmup_share=0.0)


def student_step(student: Student) -> tuple[Callable, Callable]:
    """(init(batch) -> state, step(state, target, batch) -> (state, metrics)), as in training."""
    return training(student, steps.make_student_step)


def training(student: Student, make_step: Callable, *arguments: Any, **settings: Any) -> tuple[Callable, Callable]:
    """(init, step) with one of the `steps.make_*_step`, which takes `arguments` after the student, and `settings`."""
    optimizer, schedule = optim.make_optimizer(OPTIMIZER, student.backbone), optim.make_schedule(OPTIMIZER, 1.0)
    step = make_step(student, *arguments, optimizer, schedule, seed=0, batch_size=8, **settings)
    return lambda batch: init_state(student, batch, optimizer, None, jax.random.key(0)), step


def training_step(student: Student, batch: Batch) -> tuple[Callable[[], Any], int | None]:
    """`compiled_step` for random targets."""
    target = jax.random.normal(jax.random.key(1), (*batch.scene.shape, student.out_features))
    return compiled_step(*student_step(student), target, batch)


def compiled_step(init: Callable, step: Callable, given: Any, batch: Batch) -> tuple[Callable[[], Any], int | None]:
    """A function that makes one step, and what a step needs in memory by XLA's plan. `given`: targets or a teacher."""
    state = jax.jit(init)(batch)
    compiled = jit_step(step).lower(state, given, batch).compile()

    def run() -> Any:
        nonlocal state
        state, metrics = compiled(state, given, batch)
        return metrics

    return run, compiled_bytes(compiled)


def jit_step(step: Callable) -> Any:
    """A step under `jax.jit`, compiled as in training."""
    return jax.jit(step, donate_argnums=0, compiler_options=steps.compiler_options(jax.default_backend()))


def forward_pass(student: Student, batch: Batch) -> Callable[[], Any]:
    """A function that runs the student as prediction does."""
    variables = jax.jit(lambda batch: student.init(jax.random.key(0), batch, train=False))(batch)
    predict = jax.jit(steps.make_predict_step(student))
    return lambda: predict(variables, batch)


def layers_alone(student: Student, batch: Batch) -> dict[str, Callable[[], Any]]:
    """Three layers, one a plane: forward, and forward with the gradients of input and parameters."""
    num_scenes, x = batch.scene_points.shape[1], _rows(student, batch, jnp.float32)
    model = WaffleIron(dataclasses.replace(_backbone(student), depth=PLANES), student.dtype)
    variables = jax.jit(
        lambda x, batch: model.init(jax.random.key(0), x, batch.planes, batch.scene, num_scenes, train=False)
    )(x, batch)
    rest = {name: value for name, value in variables.items() if name != "params"}

    def apply(params: Any, x: Any, batch: Batch, train: bool) -> Any:
        rngs, mutable = ({"dropout": jax.random.key(0)}, ["batch_stats"]) if train else (None, False)
        inputs = ({"params": params, **rest}, x, batch.planes, batch.scene, num_scenes)
        out: Any = model.apply(*inputs, train=train, rngs=rngs, mutable=mutable)
        return out[0] if train else out

    def both(params: Any, x: Any, gradient: Any, batch: Batch) -> Any:
        out, pull_back = jax.vjp(lambda params, x: apply(params, x, batch, True), params, x)
        return out, pull_back(gradient)

    forward = jax.jit(apply, static_argnums=3)
    step = jax.jit(both, compiler_options=steps.compiler_options(jax.default_backend()))
    params, gradient = variables["params"], _rows(student, batch, jnp.float32, seed=1)
    return {
        "layer_forward": lambda: forward(params, x, batch, False),
        "layer_step_direct": lambda: step(params, x, gradient, batch),
    }


def _backbone(student: Student) -> WaffleIronBackbone:
    assert isinstance(student.backbone, WaffleIronBackbone)
    return student.backbone


def _rows(student: Student, batch: Batch, dtype: Any, seed: int = 0) -> Any:
    """Random rows [D * P, C]."""
    shape = (batch.scene.size, student.backbone.channels)
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def layer_products(student: Student, num_rows: int) -> dict[str, Callable[[], Any]]:
    """The products of one layer, in the layer's dtype."""
    keys = jax.random.split(jax.random.key(0), 4)
    c, dtype = student.backbone.channels, student.dtype
    kernels = tuple(bench_products.unit_gain(key, c, c, dtype=dtype) for key in keys[:2])
    x, gradient = (jax.random.normal(key, (num_rows, c)).astype(dtype) for key in keys[2:])
    forward, both = jax.jit(bench_products.forward), jax.jit(bench_products.forward_backward)
    return {"layer_matmul": lambda: forward(x, kernels), "layer_matmul_step": lambda: both(x, kernels, gradient)}


def step_products(sizes: Sizes, num_rows: int, dtype: Any) -> Callable[[], Any]:
    """All products of a step."""
    operands, run = bench_products.step_operands(sizes, num_rows, dtype), jax.jit(bench_products.step_products)
    return lambda: run(operands)


def spatial_alone(student: Student, batch: Batch) -> tuple[dict[str, Callable[[], Any]], dict[str, int | None]]:
    """Spatial mixing without its norm, forward and backward: top view, top view dense, all planes."""
    num_scenes, mask = batch.scene_points.shape[1], to_rows(batch.scene < batch.scene_points.shape[1])
    x, gradient = (_rows(student, batch, student.dtype, seed) for seed in (0, 1))
    backbone = _backbone(student).on(jax.default_backend())
    grids = backbone.needs.grids

    def make(planes: tuple[int, ...], backbone: WaffleIronBackbone) -> Any:
        mixes = [SpatialMix(grids[k], backbone, student.dtype) for k in planes]
        tables: list[Any] = [batch.planes[k] for k in planes]
        if backbone.implementation == "windows":  # made once a step, so not part of what is timed
            tables = [jax.jit(make_windows, static_argnums=1)(tables[n], grids[k]) for n, k in enumerate(planes)]

        def mix_all(all_params: list, x: Any, tables: list) -> Any:
            with nn.intercept_methods(_without_norm):
                for table, mix, params in zip(tables, mixes, all_params, strict=True):
                    x = mix.apply({"params": params}, x, table, mask, num_scenes, train=False)
            return x

        def both(all_params: list, x: Any, gradient: Any, tables: list) -> Any:
            out, pull_back = jax.vjp(lambda params, x: mix_all(params, x, tables), all_params, x)
            return out, pull_back(gradient)

        with nn.intercept_methods(_without_norm):
            all_params = [
                mix.init(jax.random.key(k), x, table, mask, num_scenes, train=False)["params"]
                for k, mix, table in zip(planes, mixes, tables, strict=True)
            ]
        compiled = jax.jit(both).lower(all_params, x, gradient, tables).compile()
        return (lambda: compiled(all_params, x, gradient, tables)), working_bytes(compiled)

    chosen, chosen_bytes = make((0,), backbone)
    dense, dense_bytes = make((0,), dataclasses.replace(backbone, implementation="dense"))
    every, _ = make(tuple(range(PLANES)), backbone)
    programs = {"spatial": chosen, "spatial_dense": dense, "spatial_layer": every}
    return programs, {"spatial_peak_bytes": chosen_bytes, "spatial_dense_peak_bytes": dense_bytes}


def _without_norm(call: Callable, arguments: tuple, keywords: dict, context: nn.module.InterceptorContext) -> Any:
    """Norms leave their rows as they are: mean 0, deviation 1, scale 1, bias 0."""
    if not isinstance(context.module, Norm):
        return call(*arguments, **keywords)
    zeros, ones = jnp.zeros(arguments[0].shape[-1]), jnp.ones(arguments[0].shape[-1])
    return (zeros, ones), ones, zeros
