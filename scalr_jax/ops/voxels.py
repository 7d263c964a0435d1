"""What a sparse student needs of its voxels before a step runs, in NumPy: coordinates, counts and sizes of tables.

Voxels are those of `model.voxel_size` metres, counted from the lower corner of the field of view, and on each further
level twice as wide. The tables themselves are made on the device (`ops.sparse_conv`), in room of static size. How much
they need is counted here, scene by scene: counts of scenes add up to those of their pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

LEVELS = 5  # of a MinkUNet
# Pairs of one product: more are faster (on CPU XLA makes one of 1,024 by 64 channels, or 512 by 128, on one core, and
# those of 2,048 or 1,024 on all), and leave more slots unused.
BLOCKS = (2048, 1024, 512, 256, 128)
NEIGHBORS = tuple((i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1))
CENTRE = NEIGHBORS.index((0, 0, 0))  # of 27: its pairs are the voxels themselves, and need no table
# Of two neighbours one is the other's in one of these; in the opposite direction they are the same pair, turned round.
DIRECTIONS = NEIGHBORS[CENTRE + 1 :]
# Those that are the same but for a turn about the vertical.
KINDS = tuple((abs(i) + abs(j), abs(k)) for i, j, k in DIRECTIONS)
# Room by direction pays where it takes at most so many times the slots, and is so large on average.
MORE, LARGE = 1.3, 512


class Sizes(NamedTuple):
    """Static sizes of a level: rows of its table, slots of its 3x3x3 pairs (whole blocks), pairs of a block.

    With `directions` the pairs of each of the 13 `DIRECTIONS` have so many slots of their own, and `pairs` is not used.
    """

    voxels: int
    pairs: int
    block: int
    directions: tuple[int, ...] = ()


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
    """What one scene needs: [levels, 2 + 13] int64. coordinates [N, 3] integers.

    Voxels; pairs of neighbours, each counted both ways (3x3x3, without centres); pairs in each of `DIRECTIONS`. Of
    several scenes in a pack these add up, and each of the 26 elements may leave a part of a block unused: `sizes_for`
    adds that.
    """
    counts = []
    coordinates = np.asarray(coordinates, np.int64)
    for _ in range(num_levels):
        low = coordinates.min(axis=0) - 1
        extent = coordinates.max(axis=0) - low + 2
        strides = np.array([extent[1] * extent[2], extent[2], 1])
        keys = np.unique((coordinates - low) @ strides)
        steps = np.array(DIRECTIONS) @ strides
        found = [int(np.isin(keys + step, keys, assume_unique=True).sum()) for step in steps]
        counts.append([len(keys), 2 * sum(found), *found])
        columns, z = np.divmod(keys, extent[2])
        x, y = np.divmod(columns, extent[1])
        coordinates = (np.stack([x, y, z], axis=1) + low) // 2
    return np.array(counts, np.int64)


def turned(counts: np.ndarray) -> np.ndarray:
    """[..., 2 + 13] -> the most that a scene of these counts has in each direction, were it turned by right angles."""
    counts = np.array(counts)
    for kind in set(KINDS):
        same = [2 + k for k, other in enumerate(KINDS) if other == kind]
        counts[..., same] = counts[..., same].max(axis=-1, keepdims=True)
    return counts


def pooled(pairs: Sequence[int]) -> tuple[int, ...]:
    """Pairs of each level -> 13 numbers a level that say: any direction may have them all."""
    return tuple(number // 2 for number in pairs for _ in DIRECTIONS)


def by_direction(pairs: int, directions: Sequence[int]) -> bool:
    """Whether a level's pairs get room by direction, rather than room for `pairs` of any."""
    return LARGE * len(DIRECTIONS) <= sum(directions) <= MORE * pairs / 2


def sizes_for(counts: np.ndarray) -> tuple[Sizes, ...]:
    """The smallest sizes with room for `counts` [levels, 2 + 13] of `count_levels`, or where the directions are
    `pooled`, for as many pairs of any."""
    sizes = []
    for voxels, pairs, *directions in np.asarray(counts).tolist():
        block = next((size for size in BLOCKS if 80 * size <= pairs), BLOCKS[-1])  # a sixth unused, on average
        if by_direction(pairs, directions):
            # Whole cache lines. One slot stays unused: it is where a voxel without a neighbour looks.
            sizes.append(Sizes(voxels, 0, block, tuple((number // 16 + 1) * 16 for number in directions)))
        else:
            sizes.append(Sizes(voxels, (pairs // block + 27) * block, block))
    return tuple(sizes)


def room_for(counts: np.ndarray) -> tuple[tuple[np.ndarray, ...], ...]:
    """`sizes_for(counts)` as shapes, which a compiled step takes them from: of each level empty arrays [0, ...].

    The 0 is in front, because XLA's loops on a CPU run over what stands before it. `sizes_of` reads them.
    """
    room = []
    for voxels, pairs, block, directions in sizes_for(counts):
        # Few sizes an array: the product of a shape must not pass 2^63, even where one is 0.
        shapes = [(voxels, pairs // block, block), *(directions[k : k + 2] for k in range(0, len(directions), 2))]
        room.append(tuple(np.zeros((0, *shape), np.int32) for shape in shapes))
    return tuple(room)


def sizes_of(room: Any) -> tuple[Sizes, ...]:
    """The sizes in the shapes of `room_for`, with an axis D in front."""
    sizes = []
    for first, *rest in room:
        voxels, blocks, block = first.shape[2:]
        sizes.append(Sizes(voxels, blocks * block, block, tuple(size for part in rest for size in part.shape[2:])))
    return tuple(sizes)
