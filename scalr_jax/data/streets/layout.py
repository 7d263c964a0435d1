"""A generated street's parts: classes, materials, ground, shapes. NumPy only; `builder` makes one.

A street is ground whose surface follows from x and y alone, and unit shapes (box, cylinder, ellipsoid) that are
scaled, turned about z and moved. World frame: metres, z up, the carriageway at z = 0, the main road along x.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    import jax  # a type alone: data workers start no JAX

CLASSES = (
    *("road", "pavement", "terrain", "building", "fence", "vegetation"),
    *("trunk", "pole", "person", "car", "van", "bus"),
)
ROAD, PAVEMENT, TERRAIN, BUILDING, FENCE, VEGETATION, TRUNK, POLE, PERSON, CAR, VAN, BUS = range(len(CLASSES))

# What a surface is made of: decides texture and reflectance. The first three are the ground's and equal its classes.
MATERIALS = (
    *("asphalt", "paving", "grass", "facade", "planks", "bricks", "leaves", "bark", "metal", "sign"),
    *("clothes", "skin", "body", "cabin", "van", "bus"),
)
ASPHALT, PAVING, GRASS, FACADE, PLANKS, BRICKS, LEAVES, BARK, METAL, SIGN, CLOTHES, SKIN, BODY, CABIN, VAN_BODY, \
    BUS_BODY = range(len(MATERIALS))  # fmt: skip

BOX, CYLINDER, ELLIPSOID = range(3)
CAPACITY = 512  # shapes
REACH = 62.0  # metres from the origin: nothing stands further away
NUM_PATCHES = 6  # objects 0 to 5 are the ground: carriageway, paved left and right, unpaved left, right and verges
KERB_HEIGHT = 0.12  # metres: everything but the carriageway lies this high
NO_CROSSING = 1e4  # metres
STYLES = ("town", "suburb", "park")

A = TypeVar("A", float, np.ndarray, "jax.Array")


class Ground(NamedTuple):
    """The ground's surface as numbers. Pairs are for the right (y < 0) and the left side of the main road; metres."""

    curvature: float  # 1 / metres: the main road's axis is y = curvature * x**2 / 2
    half_width: float  # of the carriageway
    verge: np.ndarray  # [2] grass between kerb and pavement
    walk: np.ndarray  # [2] width of the pavement
    cross_at: float  # x of the crossing road's axis
    cross_half_width: float
    cross_walk: float
    lane_width: float
    color: np.ndarray  # [3, 3] colour of asphalt, paving, grass, 0 to 1


class Shapes(NamedTuple):
    """K shapes, padded to `CAPACITY`, boxes first, then cylinders, then ellipsoids."""

    center: np.ndarray  # [K, 3] metres, world
    half: np.ndarray  # [K, 3] half sizes, metres
    yaw: np.ndarray  # [K] radians
    label: np.ndarray  # [K] class
    material: np.ndarray  # [K]
    instance: np.ndarray  # [K] row of `Street.size`
    color: np.ndarray  # [K, 3] 0 to 1
    ragged: np.ndarray  # [K] 0 to 1: how torn the outline is (leaves)


class Geometry(NamedTuple):
    """Shapes that rays may hit; every array has the same shape on every street, so that the renderer compiles once."""

    ground: Ground
    shapes: Shapes
    ends: tuple[int, int, int]  # rows after the last box, cylinder, ellipsoid


class Street(NamedTuple):
    """One street."""

    geometry: Geometry
    size: np.ndarray  # [I, 3] length, width, height of each object, metres
    middle: np.ndarray  # [I, 3] centre of each object, metres
    ego: np.ndarray  # [3] x, y (metres) and heading (radians) of the vehicle that carries the sensors


def surface(ground: Ground, x: A, y: A, xp: ModuleType = np) -> tuple[A, A]:
    """Class (ROAD, PAVEMENT, TERRAIN) and patch (below NUM_PATCHES) of the ground at x, y (metres); `xp` np or jnp."""
    across = y - 0.5 * ground.curvature * x * x
    left = across > 0
    verge, walk = (xp.where(left, pair[1], pair[0]) for pair in (ground.verge, ground.walk))
    from_main = xp.abs(across) - ground.half_width
    from_cross = xp.abs(x - ground.cross_at) - ground.cross_half_width
    road = (from_main < 0) | (from_cross < 0)
    paved = ((from_main >= verge) & (from_main < verge + walk)) | (from_cross < ground.cross_walk)
    label = xp.where(road, ROAD, xp.where(paved, PAVEMENT, TERRAIN))
    unpaved = xp.where(from_main < verge, 5, 3 + left)
    return label, xp.where(road, 0, xp.where(paved, 1 + left, unpaved))


def make_ground(rng: np.random.Generator, styles: list[str]) -> Ground:
    """Widths that suit the styles [right, left]."""
    widths = {"town": (3.0, 5.5), "suburb": (1.8, 3.0), "park": (2.0, 3.5)}
    verge = [rng.uniform(1.0, 2.2) if rng.random() < {"town": 0.15, "suburb": 0.5, "park": 0.6}[s] else 0.0
             for s in styles]  # fmt: skip
    crossing = rng.random() < 0.6
    asphalt = rng.uniform(0.26, 0.38) + rng.uniform(-0.015, 0.015, 3)
    paving = rng.uniform(0.45, 0.6) + np.array([0.03, 0.0, -0.04]) * rng.uniform(-0.5, 1.5)
    grass = np.array([0.3, 0.4, 0.16]) * rng.uniform(0.8, 1.15) + np.array([0.1, 0.03, 0.0]) * rng.uniform(0, 1)
    lane_width = rng.uniform(3.0, 3.5)
    return Ground(
        curvature=rng.uniform(-1, 1) / 250,
        half_width=lane_width + rng.choice([0.0, 2.3, lane_width]),
        verge=np.array(verge),
        walk=np.array([rng.uniform(*widths[s]) for s in styles]),
        cross_at=rng.choice([-1, 1]) * rng.uniform(14, 40) if crossing else NO_CROSSING,
        cross_half_width=rng.uniform(3.0, 5.0),
        cross_walk=rng.uniform(1.8, 3.0),
        lane_width=lane_width,
        color=np.stack([asphalt, paving, grass]),
    )
