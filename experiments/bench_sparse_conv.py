"""Sparse 3x3x3 convolutions beside the products they are made of, and beside dense ones where these fit.

    python experiments/bench_sparse_conv.py --root=SAMPLES
    python experiments/bench_sparse_conv.py --batch=mix.npz --channels=64,128

SAMPLES holds nuscenes/, semantic_kitti/ and pandaset/; without --root scenes are generated. Voxels twice as wide from
level to level. Every time is the median of --runs turns in which programs that are compared run one after the other:

    forward_s       one submanifold convolution, C to C channels, of all scenes
    step_s          the same with the gradients of features and kernel
    products_s      the floor: one matrix product of as many rows as there are pairs (input voxel, output voxel), C by C
    products_step_s with its two of the backward pass
    rate            products_s / forward_s; step_rate likewise
    bytes           temporary buffers and outputs of forward and backward by XLA's plan; dense_bytes of the dense form
    dense_s         forward and backward of a dense convolution of the whole grid, run once, where it takes at most
                    --dense_gib; else null
    tables_s        finding all levels' voxels and pairs, on the device
    network         with --network=minkunet14 (or 18, 34): that network on the same scenes, tables included: forward_s,
                    step_s with the gradients of its parameters, step_bytes
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scalr_jax.bench import scenes as bench_scenes
from scalr_jax.bench.run import report
from scalr_jax.bench.timing import Parser, header, interleave, positive, show_times, working_bytes
from scalr_jax.config import get_config
from scalr_jax.data.scenes import Batch, PackedVoxels
from scalr_jax.models import build
from scalr_jax.models.minkunet import BLOCKS
from scalr_jax.ops import sparse_conv
from scalr_jax.ops.voxels import LEVELS, Sizes, count_levels, extent_of, sizes_for
from scalr_jax.runtime.errors import InputError
from scalr_jax.train import steps

LOW, HIGH = np.array([-64.0, -64.0, -8.0]), np.array([64.0, 64.0, 8.0])  # metres
F32 = jnp.float32


def channels_of(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def main(argv: list[str]) -> dict[str, Any]:
    """Measures, prints a table and returns the object of the last line."""
    parser = Parser("experiments/bench_sparse_conv.py", __doc__)
    bench_scenes.add_arguments(parser)
    parser.add_argument("--channels", type=channels_of, default=[64, 128, 256], help="as in 64,128")
    parser.add_argument("--voxel_size", type=float, default=0.1, help="metres, of the finest level")
    parser.add_argument("--levels", type=positive, default=5)
    parser.add_argument("--dense_gib", type=float, default=0.6, help="the largest dense form to run, once")
    parser.add_argument("--network", choices=sorted(BLOCKS), default=None, help="also time this MinkUNet")
    parser.add_argument("--runs", type=positive, default=5, help="turns, of which the median counts")
    arguments = parser.parse_args(argv)
    if arguments.voxel_size <= 0:
        raise InputError(f"--voxel_size={arguments.voxel_size} is not positive")
    if arguments.network and arguments.levels != LEVELS:
        raise InputError(f"--network has {LEVELS} levels; leave --levels out")
    return measure(bench_scenes.get_scenes(arguments), arguments)


def measure(scenes: bench_scenes.Scenes, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures for one pack."""
    batch, runs = scenes.batch, arguments.runs
    num_scenes = batch.scene_points.shape[1]
    extent = extent_of((LOW, HIGH), arguments.voxel_size)
    coordinates = np.floor((batch.feats[0, :, 1:4] - LOW) / arguments.voxel_size).astype(np.int32)
    coordinates, scene = np.clip(coordinates, 0, np.array(extent) - 1), np.asarray(batch.scene[0])
    inside = [coordinates[scene == s] for s in range(num_scenes)]
    counts = np.sum([count_levels(each, arguments.levels) for each in inside if len(each)], axis=0)
    sizes = sizes_for(counts)
    limits = {"num_scenes": num_scenes, "extent": extent}
    make = jax.jit(functools.partial(sparse_conv.make_levels, sizes=sizes, **limits))
    voxels = jax.block_until_ready(make(coordinates, scene))
    if int(voxels.missing):
        raise AssertionError(f"no room for {int(voxels.missing)} voxels and pairs that were counted")
    tables = interleave({"tables": lambda: make(coordinates, scene)}, runs=runs)["tables"]
    print(f"{len(inside)} {scenes.source} scenes, {scenes.num_points} points; {arguments.voxel_size} m voxels")
    rows, shown = [], {"tables": (tables, "")}
    for depth, (level, size) in enumerate(zip(voxels.levels, sizes, strict=True)):
        number, pairs = (int(n) for n in counts[depth])
        print(f"level {depth}: {number} voxels, {pairs / number:.1f} neighbours each, {size.pairs} slots for {pairs}")
        for channels in arguments.channels:
            programs, taken = convolutions(level, size, channels, number + pairs)
            times, dense_taken = interleave(programs, runs=runs), None
            grid = num_scenes * int(np.prod(-(-np.array(extent) // 2**depth)))
            if 4 * grid * channels * 4 <= arguments.dense_gib * 2**30:
                program, dense_taken = dense(-(-np.array(extent) // 2**depth), num_scenes, channels)
                times |= interleave({"dense": program}, runs=1)
            label = f"level {depth}, {channels}"
            shown.update({f"{label} {name}": (value, "") for name, value in times.items()})
            medians = {f"{name}_s": value.median for name, value in times.items()}
            rows.append(
                {
                    "level": depth,
                    "channels": channels,
                    "voxels": number,
                    "pairs": number + pairs,
                    "dense_s": None,
                    **medians,
                    "rate": medians["products_s"] / medians["forward_s"],
                    "step_rate": medians["products_step_s"] / medians["step_s"],
                    "bytes": taken,
                    "dense_bytes": dense_taken,
                }
            )
    of_network = None
    if arguments.network:
        of_network, times = network(arguments, batch, extent, sizes)
        shown |= {f"{arguments.network} {name}": (value, "") for name, value in times.items()}
    show_times(shown)
    for row in rows:
        print(f"level {row['level']}, {row['channels']} channels: rate {row['rate']:.2f}, step {row['step_rate']:.2f}")
    results = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    return {
        **header(runs),
        "points": scenes.num_points,
        "source": scenes.source,
        "voxel_size": arguments.voxel_size,
        "tables_s": float(f"{tables.median:.6g}"),
        "least_rate": min(row["rate"] for row in results),
        "least_step_rate": min(row["step_rate"] for row in results),
        "convolutions": results,
        "network": of_network,
    }


def network(
    arguments: argparse.Namespace, batch: Batch, extent: tuple[int, int, int], sizes: tuple[Sizes, ...]
) -> tuple[dict, dict]:
    """A whole MinkUNet with tables of these sizes: its part of the last line, and the times."""
    config = get_config()
    config.model.name, config.model.minkunet.voxel_size = arguments.network, arguments.voxel_size
    config.model.field_of_view = (tuple(LOW.tolist()), tuple(HIGH.tolist()))
    student: Any = build.make_student(config.model, head="none", out_features=0, platform=jax.default_backend())
    coordinates = (batch.feats[..., 1:4] - LOW) / arguments.voxel_size
    coordinates = np.clip(coordinates, 0, np.array(extent) - 0.1).astype(np.float32)
    options = steps.compiler_options(jax.default_backend())

    def forward(variables: dict, batch: Batch) -> jax.Array:
        return student.apply(variables, batch, train=False)

    def step(variables: dict, batch: Batch) -> dict:
        def loss(params: dict) -> jax.Array:
            out, _ = student.apply({**variables, "params": params}, batch, train=True, mutable=["batch_stats"])
            return jnp.square(out).mean()

        return jax.grad(loss)(variables["params"])

    given = Batch(batch.feats, batch.scene, batch.scene_points, batch.neighbors[..., :0], ())
    given = jax.device_put(given._replace(voxels=PackedVoxels(coordinates, sizes)))
    init = jax.jit(functools.partial(student.init, train=False), compiler_options=options)
    variables = init(jax.random.key(0), given)
    compiled = {
        name: jax.jit(function, compiler_options=options).lower(variables, given).compile()
        for name, function in (("forward", forward), ("step", step))
    }
    programs = {name: functools.partial(program, variables, given) for name, program in compiled.items()}
    times = interleave(programs, runs=arguments.runs)
    seconds = {f"{name}_s": float(f"{value.median:.6g}") for name, value in times.items()}
    return {"name": arguments.network, **seconds, "step_bytes": working_bytes(compiled["step"])}, times


def with_gradient(function: Callable) -> Callable:
    """function(x, kernel) -> (x, kernel, gradient) -> (output, gradients)."""

    def both(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> tuple:
        out, pull = jax.vjp(function, x, kernel)
        return out, pull(gradient)

    return both


def convolutions(
    level: sparse_conv.Level, size: Sizes, channels: int, num_pairs: int
) -> tuple[dict[str, Callable], int | None]:
    """The sparse convolution and its floor, forward and with gradients; bytes of the former."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, gradient = (jax.random.normal(key, (size.voxels, channels), F32) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (27, channels, channels), F32)
    a, d = (jax.random.normal(key, (num_pairs, channels), F32) for key in keys[2:])
    forward = jax.jit(lambda x, kernel, level: sparse_conv.submanifold(x, level, kernel))
    step = jax.jit(
        lambda x, kernel, gradient, level: with_gradient(lambda x, kernel: sparse_conv.submanifold(x, level, kernel))(
            x, kernel, gradient
        )
    )
    product, product_step = jax.jit(jnp.matmul), jax.jit(with_gradient(jnp.matmul))
    compiled = step.lower(x, kernel, gradient, level).compile()
    return (
        {
            "forward": lambda: forward(x, kernel, level),
            "products": lambda: product(a, kernel[0]),
            "step": lambda: compiled(x, kernel, gradient, level),
            "products_step": lambda: product_step(a, kernel[0], d),
        },
        working_bytes(compiled),
    )


def dense(extent: np.ndarray, num_scenes: int, channels: int) -> tuple[Callable, int | None]:
    """A dense convolution of every cell of every scene, forward and backward, and its bytes."""
    grid = jnp.zeros((num_scenes, *(int(n) for n in extent), channels), F32)
    kernel = jnp.ones((3, 3, 3, channels, channels), F32)

    def convolve(grid: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            grid, kernel, (1, 1, 1), "SAME", dimension_numbers=("NXYZC", "XYZIO", "NXYZC")
        )

    compiled = jax.jit(with_gradient(convolve)).lower(grid, kernel, grid).compile()
    return (lambda: compiled(grid, kernel, grid)), working_bytes(compiled)


if __name__ == "__main__":
    report(main, sys.argv[1:])
