"""How a step's time should grow with the chips: compute, plus what the devices wait for each other. Nothing overlaps.

    python experiments/scaling_model.py
    python experiments/scaling_model.py --topologies=v6e:4x4,v6e:16x16 --slices=1,4 --mfu=0.05
    python experiments/scaling_model.py --picture=weak_scaling.png

Weak scaling, every chip with the scenes of one pack:

    compute         FLOPs of valid points and images, nothing counted twice, / (MFU x the chip's peak)
    all-reduce      of V bytes over n chips of a torus: 2 (n - 1)/n V / (sum over axes of 2 links, of 1 without a ring)
                    and for each of the collectives 2 x the hops to the farthest chip x 1 microsecond
    between slices  each chip's share V / n of S slices: 2 (S - 1)/S V/n / its DCN, 100 microseconds a collective, and
                    an all-gather within the slice, half an all-reduce
    efficiency      compute / (compute + all-reduce + between slices)
    cores           scenes a second of a chip / those that the loader makes on a core (--scenes_per_core)

(Austin et al., "How to Scale Your Model", chapters 2 and 3.) V and the number of collectives are read off the compiled
step (docs/measurements/scaling.md). Strong scaling keeps the scenes of a step and spreads them, down to one a chip.

Flags:
    --topologies   of one slice each, with commas between them (default: v5p from 4 to 1,024 chips)
    --slices       how many of each (default 1)
    --mfu          share of the chip's peak that a step alone reaches (default: the chip's, as predicted: `MFU`)
    --scenes_per_core   what the loader makes a second on one core (default 80: prepared records of the mixture)
    --batch        scenes of a step that strong scaling spreads (default 128)
    --picture      also draw the efficiency over the chips into this file
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from scalr_jax import recipes
from scalr_jax.bench.timing import Parser
from scalr_jax.models.flops import Sizes, flops, student_products, teacher_flops
from scalr_jax.models.vit import TEACHERS
from scalr_jax.runtime.chips import Topology, parse_topology
from scalr_jax.runtime.command_line import exit_codes
from scalr_jax.runtime.errors import InputError

HOP_SECONDS = 1e-6
DCN_SECONDS = 1e-4  # of one collective between slices; an assumption
# MFU of WI-48-768 with ViT-L, predicted: of GPUs docs/measurements/predicted.md ("before"), of TPUs the lower end of a
# roofline of the compiled step with its kernels' bundles (14 to 24 % on v5p, 5 to 9 % on v6e, 2026-11-28).
MFU = {"h100": 0.130, "h200": 0.163, "v5p": 0.14, "v6e": 0.05}
# A core makes 175, 51 and 50 samples a second of nuScenes, KITTI and PandaSet, records at 224 x 448
# (docs/measurements/loader.md, 2026-11-22): in the mixture's proportions so many.
SCENES_PER_CORE = 80.0
V5P = ("2x2x1", "2x2x2", "2x2x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")


class Step(NamedTuple):
    """Work and traffic of one chip in a step; the defaults are WI-48-768 with DINOv2 ViT-L, compiled 2026-11-23."""

    name: str = "WI-48-768, ViT-L, 224 x 448"
    scenes: float = recipes.PACK_MEAN
    points: float = 0.894 * recipes.PACK_POINTS  # valid ones (tests/data/fill_test.py)
    channels: int = 768
    teacher: str = "vitl14"
    image_size: tuple[int, int] = (224, 448)
    num_bytes: int = 240_241_968  # of all-reduces
    num_collectives: int = 38

    @property
    def flops(self) -> float:
        """A chip's, of valid points and images."""
        teacher = TEACHERS[self.teacher]
        sizes = Sizes(self.channels, 48, teacher.width)
        of_images = self.scenes * teacher_flops(teacher, 1, self.image_size)
        return self.points * flops(student_products(sizes), 1, backward=True) + of_images


class Times(NamedTuple):
    """Seconds of a step on `num_chips` chips."""

    num_chips: int
    compute: float
    within: float  # slices
    between: float

    @property
    def total(self) -> float:
        return self.compute + self.within + self.between

    @property
    def efficiency(self) -> float:
        return self.compute / self.total


def all_reduce_seconds(topology: Topology, num_bytes: float, count: int) -> float:
    """`count` all-reduces of `num_bytes` together, over the chips of one slice."""
    chip, n = topology.chip, topology.num_chips
    axes = [(dim, dim % chip.ring == 0) for dim in topology.dims if dim > 1]
    if not axes:
        return 0.0
    bandwidth = chip.link_bytes * sum(2 if ring else 1 for _, ring in axes)
    hops = sum(dim // 2 if ring else dim - 1 for dim, ring in axes)
    return 2 * (n - 1) / n * num_bytes / bandwidth + count * 2 * hops * HOP_SECONDS


def between_slices_seconds(topology: Topology, num_slices: int, num_bytes: float, count: int) -> float:
    """Extra seconds for several slices: each chip exchanges its share, and the slice gathers the whole again."""
    if num_slices == 1:
        return 0.0
    share = num_bytes / topology.num_chips
    crossing = 2 * (num_slices - 1) / num_slices * share / topology.chip.dcn_bytes + count * DCN_SECONDS
    return crossing + all_reduce_seconds(topology, num_bytes, count) / 2


def mfu_of(topology: Topology, given: float | None) -> float:
    """Raises `InputError` for a chip of which no MFU was predicted, where none is `given`."""
    if given is None and topology.kind not in MFU:
        raise InputError(f"no MFU was predicted for {topology.kind}, as for {', '.join(MFU)}; give one with --mfu")
    return MFU[topology.kind] if given is None else given


def weak(step: Step, topology: Topology, num_slices: int, mfu: float) -> Times:
    """Every chip computes `step`; a chip of two devices as one whose devices share its links."""
    chip = topology.chip
    compute = step.flops / (mfu * chip.flops * chip.devices)
    within = all_reduce_seconds(topology, step.num_bytes, step.num_collectives)
    between = between_slices_seconds(topology, num_slices, step.num_bytes, step.num_collectives)
    return Times(topology.num_chips * num_slices, compute, within, between)


def strong(step: Step, topology: Topology, batch: int, mfu: float) -> Times | None:
    """`batch` scenes spread over the chips of one slice; None where a chip would have less than one."""
    scenes = batch / topology.num_chips
    if scenes < 1:
        return None
    part = step._replace(scenes=scenes, points=step.points * scenes / step.scenes)
    return weak(part, topology, 1, mfu)


def weak_table(step: Step, topologies: list[Topology], slices: list[int], mfu: float | None, a_core: float) -> str:
    lines = [
        "| chips | topology | compute ms | all-reduce ms | between slices ms | efficiency | scenes a step | "
        "steps an epoch | an epoch | cores a chip |",
        "| --- " * 10 + "|",
    ]
    frames = sum(recipes.TRAIN_FRAMES.values())
    for num_slices in slices:
        for topology in topologies:
            times = weak(step, topology, num_slices, mfu_of(topology, mfu))
            scenes = step.scenes * times.num_chips
            name = f"{num_slices} x {topology.name}" if num_slices > 1 else topology.name
            lines.append(
                f"| {times.num_chips:,} | {name} | {1e3 * times.compute:.1f} | {1e3 * times.within:.2f} | "
                f"{1e3 * times.between:.2f} | {times.efficiency:.1%} | {scenes:,.0f} | {frames / scenes:,.1f} | "
                f"{frames / scenes * times.total:,.1f} s | {step.scenes / times.total / a_core:.1f} |"
            )
    return "\n".join(lines)


def strong_table(step: Step, topologies: list[Topology], batch: int, given: float | None) -> str:
    mfu = mfu_of(topologies[0], given)
    lines = ["| chips | scenes a chip | step ms | all-reduce ms | speed-up | efficiency |", "| --- " * 6 + "|"]
    alone = strong(step, Topology("", topologies[0].kind, (1,)), batch, mfu)
    assert alone is not None
    for topology in topologies:
        times = strong(step, topology, batch, mfu)
        if times is None:
            lines.append(f"| {topology.num_chips:,} | less than one | | | | |")
            continue
        speedup = alone.total / times.total
        lines.append(
            f"| {times.num_chips:,} | {batch / times.num_chips:g} | {1e3 * times.total:,.1f} | "
            f"{1e3 * times.within:.2f} | {speedup:,.1f} | {speedup / times.num_chips:.1%} |"
        )
    return "\n".join(lines)


def draw(step: Step, path: Path) -> None:
    """Predicted efficiency over the number of chips, for three MFUs, and of a fixed batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    topologies = [parse_topology(f"v5p:{dims}") for dims in V5P]
    chips = [topology.num_chips for topology in topologies]
    for mfu in (0.25, 0.4, 0.6):
        axes[0].plot(chips, [weak(step, t, 1, mfu).efficiency for t in topologies], marker="o", label=f"MFU {mfu:.0%}")
    axes[0].axhline(0.95, color="grey", linestyle=":", label="goal, 95 %")
    axes[0].set_title(f"the same scenes a chip ({step.scenes:g})")
    for batch in (8, 128, 1024):
        found = [(t.num_chips, strong(step, t, batch, 0.25)) for t in topologies]
        held = [(n, times.efficiency) for n, times in found if times is not None]
        axes[1].plot(*zip(*held, strict=True), marker="o", label=f"{batch:,} scenes")
    axes[1].set_title("the same scenes a step, MFU 25 %")
    for panel in axes:
        panel.set(xscale="log", xlabel="v5p chips", ylim=(0.5, 1.01))
        panel.set_xticks(chips, [f"{n:,}" for n in chips])
        panel.grid(alpha=0.3)
        panel.legend(loc="lower left")
    axes[0].set_ylabel("predicted efficiency")
    figure.suptitle(step.name)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("experiments/scaling_model.py", __doc__)
    parser.add_argument("--topologies", default=",".join(f"v5p:{dims}" for dims in V5P))
    parser.add_argument("--slices", default="1")
    parser.add_argument("--mfu", type=float)
    parser.add_argument("--scenes_per_core", type=float, default=SCENES_PER_CORE)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--picture", type=Path)
    found = parser.parse_args(arguments)
    if found.scenes_per_core <= 0:
        raise InputError(f"--scenes_per_core={found.scenes_per_core} must be above 0")
    if found.mfu is not None and not 0 < found.mfu <= 1:
        raise InputError(f"--mfu={found.mfu} is not a share in (0, 1]")
    slices = found.slices.split(",")
    if found.batch < 1 or not all(number.isdecimal() and int(number) for number in slices):
        raise InputError(f"--batch={found.batch} and --slices={found.slices} must be whole numbers from 1")
    found.slices = [int(number) for number in slices]
    found.topologies = [parse_topology(name) for name in found.topologies.split(",")]
    return found


def main(arguments: list[str]) -> None:
    with exit_codes():
        found, step = parse(arguments), Step()
        print(f"{step.name}: {step.flops / 1e12:.1f} TFLOP a chip, all-reduces of {step.num_bytes / 1e6:.0f} MB\n")
        print(weak_table(step, found.topologies, found.slices, found.mfu, found.scenes_per_core))
        print(f"\nthe same, {found.batch:,} scenes a step on one slice:\n")
        print(strong_table(step, found.topologies, found.batch, found.mfu))
        if found.picture:
            draw(step, found.picture)


if __name__ == "__main__":
    main(sys.argv[1:])
