"""How long the kernels of a compiled step would take on a chip (a roofline; nothing is measured).

    seconds = sum over kernels of max(bytes / (0.85 bandwidth), FLOPs / (0.68 peak)) + 2 us

cuDNN's attention reaches 0.35 of the peak forward and 0.28 backward instead. These constants are assumptions until a
measurement changes them (`bench device` fits them). On a TPU, whose compiler keeps a program's intermediate values on
the chip, and whose kernels start at no cost, the 2 us are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from scalr_jax.compile import hlo_cost
from scalr_jax.compile.hlo import Instruction, Program, called, walk
from scalr_jax.runtime.chips import Chip

CONSTANTS = {
    "bandwidth_share": 0.85,
    "peak_share": 0.68,
    "attention_forward_share": 0.35,
    "attention_backward_share": 0.28,
    "kernel_us": 2.0,
}
MOVES = ("gather", "scatter", "sort")


class Kernel(NamedTuple):
    """One instruction that runs by itself."""

    name: str  # of the instruction, as a profiler reports it
    category: str
    share: str  # the constant that its FLOPs count by
    seconds: float  # of one run, predicted
    bytes: int
    flops: int
    times: int


def kernels(program: Program, chip: Chip, constants: Mapping[str, float] = CONSTANTS) -> Iterator[Kernel]:
    """Every kernel of a step, with its predicted time."""
    bandwidth, started = constants["bandwidth_share"] * chip.bandwidth, constants["kernel_us"] * 1e-6 * bool(chip.gpu)
    for computation, instruction, times in walk(program):
        if not hlo_cost.runs(instruction):
            continue
        work, moved = hlo_cost.costs(program, computation, instruction)
        share = "peak_share"
        if attends(instruction):
            share = f"attention_{'backward' if 'Backward' in instruction.attributes else 'forward'}_share"
        seconds = max(moved / bandwidth, work / (constants[share] * chip.flops)) + started
        yield Kernel(instruction.name, category(program, instruction), share, seconds, moved, work, times)


def by_category(found: Iterable[Kernel]) -> dict[str, dict[str, float]]:
    """Milliseconds, bytes, FLOPs and kernels of a step by category, the longest first."""
    totals: dict[str, dict[str, float]] = {}
    for kernel in found:
        total = totals.setdefault(kernel.category, {"ms": 0.0, "bytes": 0, "flops": 0, "kernels": 0})
        total["ms"] += 1e3 * kernel.seconds * kernel.times
        total["bytes"] += kernel.bytes * kernel.times
        total["flops"] += kernel.flops * kernel.times
        total["kernels"] += kernel.times
    return dict(sorted(totals.items(), key=lambda item: -item[1]["ms"]))


def attends(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and hlo_cost.ATTENTION in instruction.attributes


def category(program: Program, instruction: Instruction) -> str:
    """One of teacher, attention, products, embedding, norms, gathers and scatters, optimiser, copies, other."""
    source, opcode = instruction.source, instruction.opcode
    inside = {opcode}
    for name in called(instruction, "calls") if opcode == "fusion" else ():
        inside |= {i.opcode for i in program.computations[name].instructions.values()}
    if re.search(r"(^|/)ViT/", source):
        return "teacher"
    if attends(instruction) or ("/attention/" in source and "dot" in inside):
        return "attention"
    if inside & {"dot", "convolution"} or "cublas" in instruction.attributes or "gemm" in instruction.attributes:
        return "products"
    if "embedding" in source:
        return "embedding"
    if opcode == "copy" or re.search(r"dynamic_(update_)?(index_in_dim|slice)", source):
        return "copies"  # of what a scan keeps
    if inside & set(MOVES):
        return "gathers and scatters"
    if "norm" in source or "rsqrt" in inside:
        return "norms"
    if "Student" not in source and "jvp" not in source and source:
        return "optimiser"
    return "copies" if opcode.startswith(("dynamic", "transpose", "slice", "concatenate")) else "other"
