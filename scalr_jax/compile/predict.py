"""A compiled step's predicted time, and what it does for the model: its MFU and scenes a second.

The MFU counts the model's own FLOPs of valid rows alone (models/flops.py); the time is the kernels' (roofline.py).
"""

from __future__ import annotations

from typing import NamedTuple

from scalr_jax import recipes
from scalr_jax.compile import hlo_cost
from scalr_jax.compile.hlo import Program
from scalr_jax.compile.roofline import CONSTANTS, by_category, kernels
from scalr_jax.data.packing import Capacities
from scalr_jax.data.scenes import FEATURES
from scalr_jax.models.flops import Sizes, flops, head_products, student_products, teacher_flops, vavit_flops
from scalr_jax.models.student import Student
from scalr_jax.models.vavit import VaViTBackbone
from scalr_jax.models.vit import ViTConfig
from scalr_jax.models.waffleiron import WaffleIronBackbone
from scalr_jax.runtime.chips import Chip


class Useful(NamedTuple):
    """Useful work of a step on one device: the model's own FLOPs, and scenes."""

    flops: int
    scenes: float


def useful(student: Student, teacher: ViTConfig | None, image_size: tuple[int, int], room: Capacities) -> Useful:
    """As full as a pack of the published mixture on average (`recipes`).

    Raises TypeError for a backbone whose FLOPs are not counted.
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
    categories = by_category(kernels(program, chip))
    milliseconds = sum(total["ms"] for total in categories.values())
    result: dict = {"predicted_ms": milliseconds, "predicted_mfu": None, "scenes_per_s": None, "xla_ms": None}
    if chip.clock and (cycles := hlo_cost.estimated_cycles(program)) is not None:
        result["xla_ms"] = 1e3 * cycles / chip.clock
    if work is not None:
        result["predicted_mfu"] = work.flops / (milliseconds * 1e-3) / chip.flops
        result["scenes_per_s"] = num_devices * work.scenes / (milliseconds * 1e-3)
    return {**result, "categories": categories, "constants": CONSTANTS}
