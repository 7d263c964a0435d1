"""How long a compiled step would take on a chip, predicted from its kernels (a roofline; nothing is measured).

    seconds = sum over kernels of max(bytes / (0.85 bandwidth), FLOPs / (0.68 peak)) + 2 us

cuDNN's attention reaches 0.35 of the peak forward and 0.28 backward instead. These constants are assumptions until a
measurement changes them. On a TPU, whose compiler keeps a program's intermediate values on the chip, and whose kernels
start at no cost, the 2 us are left out. The MFU counts the model's own FLOPs of valid rows alone (models/flops.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from scalr_jax import recipes
from scalr_jax.compile import hlo_cost
from scalr_jax.compile.hlo import Instruction, Program, called, walk
from scalr_jax.data.packing import Capacities
from scalr_jax.data.transforms import FEATURES
from scalr_jax.models.flops import Sizes, flops, head_products, student_products, teacher_flops, vavit_flops
from scalr_jax.models.student import Student
from scalr_jax.models.vavit import VaViTBackbone
from scalr_jax.models.vit import ViTConfig
from scalr_jax.models.waffleiron import WaffleIronBackbone
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

    category: str
    seconds: float  # of one run
    bytes: int
    flops: int
    times: int


def kernels(program: Program, chip: Chip) -> Iterator[Kernel]:
    """Every kernel of a step, with its predicted time."""
    bandwidth, peak = CONSTANTS["bandwidth_share"] * chip.bandwidth, chip.flops
    started = CONSTANTS["kernel_us"] * 1e-6 if chip.gpu else 0.0
    for computation, instruction, times in walk(program):
        if not hlo_cost.runs(instruction):
            continue
        work, moved = hlo_cost.costs(program, computation, instruction)
        share = CONSTANTS["peak_share"]
        if attends(instruction):
            share = CONSTANTS[f"attention_{'backward' if 'Backward' in instruction.attributes else 'forward'}_share"]
        seconds = max(moved / bandwidth, work / (share * peak)) + started
        yield Kernel(category(program, instruction), seconds, moved, work, times)


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


class Useful(NamedTuple):
    """Useful work of a step on one device: the model's own FLOPs, and scenes."""

    flops: int
    scenes: float


def useful(student: Student, teacher: ViTConfig | None, image_size: tuple[int, int], room: Capacities) -> Useful:
    """As full as a pack of the published mixture on average (`recipes`).

    Raises TypeError for a backbone whose FLOPs nobody counts.
    """
    mean, fill = (recipes.VAVIT_MEAN, recipes.VAVIT_FILL) if room.pillars else (recipes.PACK_MEAN, recipes.PACK_FILL)
    scenes = room.scenes * mean / recipes.PACK_SCENES
    points, backbone = int(fill * room.points), student.backbone
    if isinstance(backbone, VaViTBackbone):
        head = head_products(Sizes(backbone.channels, 0, student.out_features, student.head_hidden))
        pillars = int(points * recipes.PILLARS_A_POINT / scenes)
        counts = [pillars] * int(scenes) + [int(pillars * (scenes % 1))]
        own = vavit_flops(backbone, head, points, counts, len(FEATURES), backward=True)
    elif isinstance(backbone, WaffleIronBackbone):
        neighbors = backbone.needs.num_neighbors or 0
        widths = (backbone.channels, backbone.depth, student.out_features, student.head_hidden)
        own = flops(student_products(Sizes(*widths, neighbors, len(FEATURES))), points, backward=True)
    else:
        raise TypeError(f"nobody counts the FLOPs of {backbone.describe()}")
    if teacher is not None:
        own += int(teacher_flops(teacher, 1, image_size) * scenes)
    return Useful(own, scenes)


def predict(program: Program, chip: Chip, num_devices: int, work: Useful | None) -> dict:
    """Predicted time, MFU and scenes a second of all devices, and time, bytes and FLOPs by category."""
    by_category: dict[str, dict[str, float]] = {}
    for kernel in kernels(program, chip):
        total = by_category.setdefault(kernel.category, {"ms": 0.0, "bytes": 0, "flops": 0, "kernels": 0})
        total["ms"] += 1e3 * kernel.seconds * kernel.times
        total["bytes"] += kernel.bytes * kernel.times
        total["flops"] += kernel.flops * kernel.times
        total["kernels"] += kernel.times
    milliseconds = sum(total["ms"] for total in by_category.values())
    result: dict = {"predicted_ms": milliseconds, "predicted_mfu": None, "scenes_per_s": None}
    if work is not None:
        result["predicted_mfu"] = work.flops / (milliseconds * 1e-3) / chip.flops
        result["scenes_per_s"] = num_devices * work.scenes / (milliseconds * 1e-3)
    ordered = sorted(by_category.items(), key=lambda item: -item[1]["ms"])
    return {**result, "categories": dict(ordered), "constants": CONSTANTS}
