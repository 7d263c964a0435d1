"""FLOPs and bytes of a compiled program, loops times their trips.

XLA's own analysis of a compiled program takes the body of a loop once, and of a scan over sixteen groups of layers that
is a sixteenth.
"""

from __future__ import annotations

import functools
import math
import re

from scalr_jax.compile.hlo import CONTROL, Array, Computation, Instruction, Program, called, walk

# Instructions that move nothing, or whose start has been counted.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id", "replica-id", "recv")
FREE += ("after-all", "optimization-barrier", "domain", *CONTROL)
ATTENTION = "fmhaSoftmax"  # in the names of cuDNN's kernels, forward and backward
SLICES = ("dynamic-slice", "slice", "gather")  # read what they return and not their whole operand


def flops(program: Program) -> int:
    """FLOPs of products and convolutions, fused or not, cuBLAS's and cuDNN's too; a convolution's padded positions
    do not count."""
    total = 0
    for computation, instruction, times in walk(program):
        total += times * _flops(program, computation, instruction)
    return total


def costs(program: Program, computation: Computation, instruction: Instruction) -> tuple[int, int]:
    """FLOPs of one instruction, and bytes of the main memory that it reads and writes."""
    moved = _read(program, computation, instruction) + _written(program, computation, instruction)
    return _flops(program, computation, instruction), moved


def runs(instruction: Instruction) -> bool:
    """Whether it moves or computes anything, and was not counted at its start."""
    return instruction.opcode not in FREE and not instruction.opcode.endswith(("-done", "-update"))


def estimated_cycles(program: Program) -> int | None:
    """Cycles of a step as the TPU's compiler estimates them, loops times their trips; kernels of Pallas and collectives
    are not in it. None where it says none, as of a GPU."""
    found = [
        times * int(cycles[1])
        for _, instruction, times in walk(program)
        if runs(instruction) and (cycles := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes))
    ]
    return sum(found) if found else None


def _flops(program: Program, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "fusion":
        inner = program.computations[called(instruction, "calls")[0]]
        return sum(_flops(program, inner, i) for i in inner.instructions.values())
    if instruction.opcode == "custom-call":
        return _library_flops(computation, instruction)
    if instruction.opcode == "dot":
        dims = computation.operands(instruction)[0].arrays[0].dims
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(n) for n in contracted[1].split(",") if n] if contracted else []
        return 2 * math.prod(instruction.arrays[0].dims) * math.prod(dims[axis] for axis in axes)
    if instruction.opcode == "convolution":
        left, right = (operand.arrays[0].dims for operand in computation.operands(instruction))
        return _convolution_flops(left, right, instruction.arrays[0].dims, instruction.attributes)
    return 0


def _library_flops(computation: Computation, instruction: Instruction) -> int:
    """cuBLAS's products; cuDNN's attention (five products backward) for scenes of one size where it has several."""
    text = instruction.attributes
    if "__cublas" in text:
        dims = computation.operands(instruction)[0].arrays[0].dims
        contracted = re.search(r'"lhs_contracting_dimensions":\["(\d+)"\]', text)
        return 2 * math.prod(instruction.arrays[0].dims) * dims[int(contracted[1])] if contracted else 0
    if ATTENTION in text:
        shape = re.search(r'"intermediate_tensor_shape".*?"dimensions": ?\[(.*?)\]', text)
        segments = re.search(r'"max_seg_per_batch": ?(\d+)', text)
        logits = math.prod(int(n) for n in re.findall(r"\d+", shape[1])) if shape else 0
        width = computation.operands(instruction)[0].arrays[0].dims[-1]
        return (10 if "Backward" in text else 4) * logits * width // int(segments[1] if segments else 1)
    return 0


def _convolution_flops(left: tuple, right: tuple, out: tuple, attributes: str) -> int:
    """2 x batch x features out x features in of a group x pairs of a position and a kernel's element that meet."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if not labels:
        return 0
    window = re.search(r"window=\{(.*?)\}", attributes)
    settings = dict(item.split("=") for item in window[1].split()) if window else {}
    pairs = 1
    for n in range(sum(label.isdigit() for label in labels[2])):
        part = {key: value.split("x")[n] for key, value in settings.items()}
        low = int(part.get("pad", "0_0").split("_")[0])
        stride, spaced, dilation = (int(part.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        size, kernel, positions = (
            dims[names.index(str(n))] for dims, names in zip((left, right, out), labels.groups(), strict=True)
        )
        pairs *= _meetings(size, kernel, positions, stride, low, spaced, dilation)
    features_in = right[labels[2].index("i")]
    return 2 * out[labels[3].index("b")] * out[labels[3].index("f")] * features_in * pairs


@functools.cache
def _meetings(size: int, kernel: int, positions: int, stride: int, low: int, spaced: int, dilation: int) -> int:
    """Along one axis: how often an element of the kernel meets one of the input, which has `low` rows of padding before
    it and lies `spaced` apart. XLA writes batched matrix products as such convolutions."""
    places = ((position * stride - low + k * dilation) for position in range(positions) for k in range(kernel))
    return sum(at >= 0 and at % spaced == 0 and at // spaced < size for at in places)


def hbm_bytes(program: Program) -> int:
    """Operands and results in the main memory, of every instruction, as often as it runs.

    A slice of an array counts as what it returns, an update in place as what it writes; fusions are looked into.
    """
    total = 0
    for computation, instruction, times in walk(program):
        if runs(instruction):
            total += times * costs(program, computation, instruction)[1]
    return total


def _hbm(arrays: list[Array]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _read(program: Program, computation: Computation, instruction: Instruction) -> int:
    operands = computation.operands(instruction)
    if instruction.opcode == "fusion":
        inner = program.computations[called(instruction, "calls")[0]]
        return sum(_read_inside(program, inner, n, _hbm(operand.arrays)) for n, operand in enumerate(operands))
    if instruction.opcode in SLICES:
        return min(_hbm(operands[0].arrays), sum(array.bytes for array in instruction.arrays))
    if instruction.opcode == "dynamic-update-slice":
        return _hbm(operands[1].arrays)
    return sum(_hbm(operand.arrays) for operand in operands)


def _read_inside(program: Program, inner: Computation, number: int, whole: int) -> int:
    """Bytes that a fusion reads of operand `number`: `whole`, or fewer where it reads only slices."""
    name = next(
        (i.name for i in inner.instructions.values() if i.opcode == "parameter" and i.operands == (str(number),)), ""
    )
    users = [i for i in inner.instructions.values() if name in i.operands and i.opcode != "parameter"]
    total = 0
    for user in users:
        first = user.operands[0] == name
        if user.opcode in SLICES and first:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode == "dynamic-update-slice" and first:
            continue
        elif user.opcode == "fusion":
            within = program.computations[called(user, "calls")[0]]
            total += _read_inside(program, within, user.operands.index(name), whole)
        else:
            return whole
    return min(whole, total)


def _written(program: Program, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode.endswith("-start"):  # the type holds operands, results and flags
        return _hbm(instruction.arrays[:1]) if instruction.opcode == "copy-start" else 0
    if "__cublas" in instruction.attributes:  # the second result is its workspace
        return _hbm(instruction.arrays[:1])
    if instruction.opcode in ("dynamic-update-slice", "fusion"):
        return min(_hbm(instruction.arrays), _updated(program, computation, instruction))
    return _hbm(instruction.arrays)


def _updated(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Bytes an instruction writes: of an update in place the update's, through fusions, tuples and bitcasts."""
    operands = computation.operands(instruction)
    if instruction.opcode == "fusion":
        inner = program.computations[called(instruction, "calls")[0]]
        return _updated(program, inner, inner.root)
    if instruction.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in operands[1].arrays)
    if instruction.opcode in ("tuple", "bitcast"):
        return sum(_updated(program, computation, operand) for operand in operands)
    return sum(array.bytes for array in instruction.arrays)
