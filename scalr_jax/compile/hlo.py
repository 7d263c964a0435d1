"""A compiled program as text: its instructions, how often each runs, and its collectives.

    program = parse(compiled.as_text())
    collectives(program)    every collective of a step, with its arrays

What stands in a loop runs as often as the loop (nested loops multiply). `hlo_cost.py` adds up FLOPs and bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute", "collective-broadcast")
BETWEEN_SLICES = "all-reduce-between-slices"  # its part that crosses the data-centre network
CONTROL = {  # instructions that run other computations, and what these are called by
    "while": ("body",),
    "call": ("to_apply",),
    "call-start": ("to_apply",),  # TPU7x lets its SparseCores reduce
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "async-start": ("calls",),
}


class Array(NamedTuple):
    """One array of an instruction's type."""

    bits: int  # of an element
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * self.bits // 8


class Instruction(NamedTuple):
    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]  # names within the same computation; of a constant its value, of a parameter its number
    attributes: str  # what follows the operands
    is_root: bool

    @property
    def arrays(self) -> list[Array]:
        return arrays_of(self.type)

    @property
    def source(self) -> str:
        """The path of names in the Python program that it comes from, as far as XLA kept it."""
        found = re.search(r'op_name="(.*?)"', self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    name: str
    instructions: dict[str, Instruction]  # by name

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: str


class Collective(NamedTuple):
    kind: str  # one of COLLECTIVES or BETWEEN_SLICES
    arrays: tuple[Array, ...]  # whole: of a gather the results, of a reduce-scatter the operands
    times: int
    source: str  # the path of names it comes from

    @property
    def bytes(self) -> int:
        return self.times * sum(array.bytes for array in self.arrays)


def parse(text: str) -> Program:
    """The text of `jax.stages.Compiled.as_text()`. Raises ValueError when it has no entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[header[2]] = Computation(header[2], {})
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the text holds no ENTRY computation, so it is no compiled program")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*\d*)\((.*)$", line)
    if not found:
        return None
    root, name, kind, opcode, rest = found.groups()
    end = _closing(rest)
    operands = [rest[:end]] if opcode in ("constant", "parameter") else re.findall(r"%([\w.\-]+)", rest[:end])
    return Instruction(name, opcode, kind, tuple(operands), rest[end + 1 :], bool(root))


def _closing(text: str) -> int:
    """The index of the parenthesis that closes one opened before `text`."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i
    return len(text)


def arrays_of(text: str) -> list[Array]:
    """The arrays of a type, tuples flattened. S(n) in a layout is a memory other than the main one."""
    found = re.findall(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\](\{[^}]*\})?", text)
    return [
        Array(
            8 if kind == "pred" else int(re.sub(r"\D", "", kind)),
            tuple(int(n) for n in dims.split(",") if n),
            not re.search(r"S\([1-9]\d*\)", layout),
        )
        for kind, dims, layout in found
    ]


def called(instruction: Instruction, *keys: str) -> list[str]:
    """The computations an instruction names under `keys`."""
    found = []
    for key in keys:
        for group in re.findall(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes):
            found += re.findall(r"[\w.\-]+", group)
    return found


def walk(program: Program) -> Iterator[tuple[Computation, Instruction, int]]:
    """Every instruction that runs by itself (not inside a fusion), in which computation, and how often."""

    def visit(name: str, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
        computation = program.computations[name]
        for instruction in computation.instructions.values():
            yield computation, instruction, times
            trips = trip_count(program, computation, instruction) if instruction.opcode == "while" else 1
            if instruction.opcode == "conditional" and "seldom/" in instruction.source:
                continue  # not of an ordinary step
            for inner in called(instruction, *CONTROL.get(instruction.opcode, ())):
                yield from visit(inner, times * trips)

    yield from visit(program.entry, 1)


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int:
    """How often a loop runs: as XLA notes it, else what its counter, which rises by 1 as JAX's do, has to go.

    The counter starts above 0 where XLA has moved the first rounds before the loop. A loop whose trips depend on the
    data gives about how many in the scope around it. Raises ValueError for any other that does not go from one
    constant to another.
    """
    if about := re.search(r"/about_(\d+)_trips/while$", loop.source):
        return int(about[1])
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = program.computations[called(loop, "condition")[0]]
    root = condition.root
    compare = program.computations[called(root, "calls")[0]].root if root.opcode == "fusion" else root
    limits = [i for i in condition.operands(root) if i.opcode == "constant"]
    counters = [i for i in condition.operands(root) if i.opcode == "get-tuple-element"]
    if "direction=LT" not in compare.attributes or len(limits) != 1 or len(counters) != 1:
        raise ValueError(f"the loop {loop.name} does not count up to a constant")
    index = re.search(r"index=(\d+)", counters[0].attributes)
    start = _element(computation, loop.operands[0], int(index[1])) if index else None
    if start is None or start.opcode != "constant":
        raise ValueError(f"the counter of the loop {loop.name} does not start at a constant")
    return int(limits[0].operands[0]) - int(start.operands[0])


def _element(computation: Computation, name: str, index: int) -> Instruction | None:
    """Where element `index` of a tuple comes from, through copies."""
    made = computation.instructions[name]
    if made.opcode != "tuple":
        return None
    found = computation.instructions.get(made.operands[index])
    while found is not None and found.opcode in ("copy", "copy-start", "copy-done", "bitcast"):
        found = computation.instructions.get(found.operands[0])
    return found


def collectives(program: Program) -> list[Collective]:
    """Every collective of one step. TPUs have a reduce-scatter as a fusion that slices what an all-reduce returns."""
    found = []
    for computation, instruction, times in walk(program):
        made = instruction
        if instruction.opcode == "fusion":
            computation = program.computations[called(instruction, "calls")[0]]
            made = next((i for i in computation.instructions.values() if i.opcode in COLLECTIVES), instruction)
        kind, given = made.opcode.removesuffix("-start"), computation.operands(made)
        if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
            kind = "reduce-scatter"
        if kind == "send" and 'transfer_type="ALL_REDUCE"' in made.attributes:
            kind, given = BETWEEN_SLICES, given[:1]
        elif kind not in COLLECTIVES:
            continue
        arrays = [array for operand in given for array in operand.arrays]
        if kind == "all-gather":  # its results; the type of a start begins with the operands
            arrays = made.arrays[len(arrays) :] if made.opcode.endswith("-start") else made.arrays
        found.append(Collective(kind, tuple(arrays), times, instruction.source or made.source))
    return found


def summary(found: list[Collective]) -> dict[str, dict[str, int]]:
    """kind -> how many run in a step, and the bytes of their arrays."""
    result: dict[str, dict[str, int]] = {}
    for collective in sorted(found, key=lambda c: c.kind):
        total = result.setdefault(collective.kind, {"count": 0, "bytes": 0})
        total["count"] += collective.times
        total["bytes"] += collective.bytes
    return result
