"""What a sparse student needs of its voxels before a step runs, in NumPy: coordinates, counts and sizes of tables.

Voxels are those of `model.voxel_size` metres, counted from the lower corner of the field of view, and on each further
level twice as wide. The tables themselves are made on the device (`ops.sparse_conv`), in room of static size. How much
they need is counted here, scene by scene: counts of scenes add up to those of their pack.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

LEVELS = 5  # of a MinkUNet
NEIGHBORS = tuple((i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1))
CENTRE = NEIGHBORS.index((0, 0, 0))  # of 27: its pairs are the voxels themselves, and need no table
# Of two neighbours one is the other's in one of these; in the opposite direction they are the same pair, turned round.
DIRECTIONS = NEIGHBORS[CENTRE + 1 :]
# How many pairs lidar has in each, over the mean (eight frames of four lidars, 2026-11-28: by |x| + |y| and |z|).
SHARES = tuple(
    {(1, 0): 1.8, (2, 0): 1.3, (0, 1): 1.2, (1, 1): 0.8, (2, 1): 0.6}[abs(i) + abs(j), abs(k)] for i, j, k in DIRECTIONS
)
# Slots of one kernel element are whole blocks, which some devices multiply in batches (`ops.sparse_conv`).
BLOCKS = (1024, 512, 256, 128)


class Sizes(NamedTuple):
    """Static sizes of a level: rows of its table; slots of its pairs in each of the 13 `DIRECTIONS`, whole blocks."""

    voxels: int
    pairs: tuple[int, ...]


def extent_of(field_of_view: tuple, voxel_size: float) -> tuple[int, int, int]:
    """Voxels of the finest level along x, y, z. field_of_view ((low x, y, z), (high x, y, z)) in metres."""
    low, high = np.asarray(field_of_view, np.float64)
    x, y, z = np.ceil((high - low) / voxel_size - 1e-6).astype(int).tolist()
    return x, y, z


def coordinates_in(xyz: np.ndarray, field_of_view: tuple, voxel_size: float) -> np.ndarray:
    """[N, 3] float32: metres -> voxels from the lower corner of the field of view; the integer part is the voxel."""
    coordinates = (np.asarray(xyz, np.float64) - np.asarray(field_of_view[0])) / voxel_size
    return coordinates.astype(np.float32)


def count_levels(coordinates: np.ndarray, num_levels: int = LEVELS) -> np.ndarray:
    """What one scene needs: [levels, 1 + 13] int64, voxels and pairs in each of `DIRECTIONS`. coordinates [N, 3] int.

    Of several scenes in a pack these add up.
    """
    counts = []
    coordinates = np.asarray(coordinates, np.int64)
    for _ in range(num_levels):
        low = coordinates.min(axis=0) - 1
        extent = coordinates.max(axis=0) - low + 2
        strides = np.array([extent[1] * extent[2], extent[2], 1])
        keys = np.unique((coordinates - low) @ strides)
        steps = np.array(DIRECTIONS) @ strides
        counts.append([len(keys), *(np.isin(keys + step, keys, assume_unique=True).sum() for step in steps)])
        columns, z = np.divmod(keys, extent[2])
        x, y = np.divmod(columns, extent[1])
        coordinates = (np.stack([x, y, z], axis=1) + low) // 2
    return np.array(counts, np.int64)


def spread(pairs: float) -> tuple[int, ...]:
    """So many pairs, each counted both ways, over the 13 `DIRECTIONS`, as lidar has them."""
    return tuple(math.ceil(pairs * share / 26) for share in SHARES)


def sizes_for(counts: np.ndarray) -> tuple[Sizes, ...]:
    """The smallest sizes with room for `counts` [levels, 1 + 13] of `count_levels`.

    One slot of each direction stays unused: it is where a voxel without a neighbour looks.
    """
    sizes = []
    for voxels, *pairs in np.asarray(counts).tolist():
        block = next((size for size in BLOCKS if 200 * size <= sum(pairs)), BLOCKS[-1])  # at most 3 % unused
        sizes.append(Sizes(voxels, tuple((number // block + 1) * block for number in pairs)))
    return tuple(sizes)


def down_block(voxels: int) -> int:
    """Pairs of one product of a 2x2x2 convolution of so many voxels: the eight elements leave half a block unused."""
    return next((size for size in BLOCKS if 32 * size <= voxels), BLOCKS[-1])


def room_for(counts: np.ndarray) -> tuple[tuple[np.ndarray, ...], ...]:
    """`sizes_for(counts)` as shapes, which a compiled step takes them from: of each level empty arrays [0, ...].

    The 0 is in front, because XLA's loops on a CPU run over what stands before it. `sizes_of` reads them.
    """
    room = []
    for voxels, pairs in sizes_for(counts):
        blocks = [size // BLOCKS[-1] for size in pairs]
        # Four sizes an array: the product of a shape must not pass 2^63, even where one is 0.
        shapes = [(0, voxels, *blocks[:1]), *((0, *blocks[k : k + 4]) for k in range(1, 13, 4))]
        room.append(tuple(np.zeros(shape, np.int32) for shape in shapes))
    return tuple(room)


def sizes_of(room: Any) -> tuple[Sizes, ...]:
    """The sizes in the shapes of `room_for`, with an axis D in front."""
    sizes = []
    for level in room:
        voxels, *blocks = (size for part in level for size in part.shape[2:])
        sizes.append(Sizes(voxels, tuple(number * BLOCKS[-1] for number in blocks)))
    return tuple(sizes)
