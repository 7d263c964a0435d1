"""The forms of spatial mixing, as the TPU compiler sees them: no TPU needed (the `tpu` extra is).

    python experiments/bench_formulations.py --topology=v5p:2x2x1

Compiles one spatial mixing of one shard ahead of time, its norm left out, forward and with its gradient, in each form.
XLA's own estimate of time and bytes leaves out what custom kernels do and the time of a scatter, so the table counts
the instructions, and `kernel_bytes` adds up what the kernels read and write once.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from scalr_jax.bench.run import report
from scalr_jax.bench.timing import Parser
from scalr_jax.data.scenes import Plane
from scalr_jax.ops import cell_conv, cells, windows
from scalr_jax.runtime import sharding
from scalr_jax.runtime.chips import devices_of
from scalr_jax.runtime.sharding import per_shard

Array = jax.Array

COUNTED = ("gather", "scatter", "sort", "while", "custom-call")
GRID, NUM_SCENES = (256, 256), 8  # the top view


def mix_windows(x: Array, plane: Any, kernel1: Array, bias1: Array, kernel2: Array, bias2: Array) -> Array:
    """x [D, P, C], plane of `windows.make_windows` -> [D, P, C]."""
    halo = jax.nn.relu(windows.conv_up(windows.flatten(x, plane), plane, kernel1) + bias1)
    return windows.inflate(windows.conv_down(halo, plane, kernel2) + bias2, plane)


def mix_cells(x: Array, plane: Any, kernel1: Array, bias1: Array, kernel2: Array, bias2: Array) -> Array:
    def mix(x: Array, plane: Any) -> Array:
        halo = cell_conv.conv_taps(cells.flatten(x, plane), plane.halo_taps, plane.cell_taps, kernel1)
        table = cell_conv.conv_taps(jax.nn.relu(halo + bias1), plane.cell_taps, plane.halo_taps, kernel2)
        return cells.inflate(table + bias2, plane)

    return per_shard(mix, x, plane)


def mix_dense(x: Array, plane: Any, kernel1: Array, bias1: Array, kernel2: Array, bias2: Array) -> Array:
    def mix(x: Array, plane: Any) -> Array:
        grid = cells.flatten_dense(x, plane, grid=GRID, num_scenes=NUM_SCENES)
        grid = jax.nn.relu(cell_conv.conv_dense(grid, kernel1) + bias1)
        return cells.inflate_dense(cell_conv.conv_dense(grid, kernel2) + bias2, plane)

    return per_shard(mix, x, plane)


def with_gradient(mix: Callable) -> Callable:
    """mix -> (x, plane, gradient, parameters...) -> (output, gradients of x and the parameters)."""

    def both(x: Array, plane: Any, gradient: Array, *params: Array):
        out, pull = jax.vjp(lambda x, *params: mix(x, plane, *params), x, *params)
        return out, pull(gradient)

    return both


def count_instructions(text: str) -> dict[str, int]:
    """How often each of COUNTED occurs in a compiled program, `tpu_kernel` being the Mosaic kernels among the calls."""
    found = Counter(re.findall(rf"^.* = [^=]*? ({'|'.join(COUNTED)})\(%", text, re.MULTILINE))
    found.pop("custom-call", None)
    return {"tpu_kernel": text.count('custom_call_target="tpu_custom_call"'), **found}


def kernel_bytes(text: str) -> int:
    """Bytes of the operands and results of all Mosaic kernels, each counted once."""
    total = 0
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            result = line.split(" custom-call(")[0]
            operands = re.search(r"operand_layout_constraints=\{(.*?)\}, \w+=", line)
            for bits, dims in re.findall(r"[a-z](\d+)\[([\d,]*)\]", result + (operands.group(1) if operands else "")):
                total += math.prod(int(n) for n in dims.split(",") if n) * int(bits) // 8
    return total


def measure(function: Callable, arguments: tuple) -> dict[str, Any]:
    """Compile and report."""
    compiled = jax.jit(function).lower(*arguments).compile()
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    seconds = cost.get("optimal_seconds", 0.0)
    return {
        "xla_s": seconds if seconds > 0 else None,  # XLA prints a negative number where it does not know an instruction
        "xla_bytes": int(cost.get("bytes accessed", 0)),
        "kernel_bytes": kernel_bytes(text),
        "temp_bytes": memory.temp_size_in_bytes,
        **count_instructions(text),
    }


def main(argv: list[str]) -> dict[str, Any]:
    parser = Parser("experiments/bench_formulations.py", __doc__)
    parser.add_argument("--topology", default="v5p:2x2x1", help="a TPU topology; one of its devices is compiled for")
    parser.add_argument("--points", type=int, default=65_536, help="P")
    parser.add_argument("--cells", type=int, default=8_192, help="M, occupied cells")
    parser.add_argument("--halo", type=int, default=20_480, help="H, halo cells")
    parser.add_argument("--channels", type=int, default=768, help="C, in bfloat16")
    parser.add_argument("--only", default="", help="windows, cells or dense; default all three")
    sizes = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # nothing runs, and libtpu would look for a TPU
    mesh = sharding.make_mesh(devices=devices_of(sizes.topology)[:1])

    def array(*shape: int, dtype: Any = jnp.int32, spec: tuple = (("data", "fsdp"),)) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    P, M, H, C = sizes.points, sizes.cells, sizes.halo, sizes.channels
    plane = Plane(
        cell=array(1, P),
        grid_index=array(1, M),
        order=array(1, P),
        start=array(1, M + 1),
        inverse_count=array(1, M, dtype=jnp.float32),
        halo_index=array(1, H),
        halo_taps=array(1, H, 9),
        cell_taps=array(1, M, 9),
    )
    made = jax.eval_shape(lambda plane: windows.make_windows(plane, GRID), plane)
    made = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), made)
    x = array(1, P, C, dtype=jnp.bfloat16)
    params = [array(9, C, dtype=jnp.float32, spec=()), array(C, dtype=jnp.bfloat16, spec=())] * 2
    result: dict[str, Any] = {"device": sizes.topology, "jax": jax.__version__, "runs": 0}
    result["make_windows"] = measure(lambda plane: windows.make_windows(plane, GRID), (plane,))
    for name, mix, tables in (("windows", mix_windows, made), ("cells", mix_cells, plane), ("dense", mix_dense, plane)):
        if sizes.only not in ("", name):
            continue
        result[name] = measure(mix, (x, tables, *params))
        result[f"{name}_step"] = measure(with_gradient(mix), (x, tables, x, *params))
    show(result)
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{'':14} {'XLA ms':>8} {'XLA MB':>8} {'kernels MB':>10} {'temp MB':>8}  instructions")
    for name, row in result.items():
        if isinstance(row, dict):
            seconds = "" if row["xla_s"] is None else f"{row['xla_s'] * 1e3:.3f}"
            megabytes = [f"{row[key] / 1e6:.0f}" for key in ("xla_bytes", "kernel_bytes", "temp_bytes")]
            counts = ", ".join(f"{row[key]} {key}" for key in ("tpu_kernel", *COUNTED) if row.get(key))
            print(f"{name:14} {seconds:>8} {megabytes[0]:>8} {megabytes[1]:>10} {megabytes[2]:>8}  {counts}")


if __name__ == "__main__":
    report(main, sys.argv[1:])
