"""Voxels of a sparse student before a step runs, in NumPy: coordinates, counts and sizes of tables.

Voxels are those of `model.minkunet.voxel_size` metres, counted from the lower corner of the field of view, and on each
further level twice as wide. The tables themselves are made on the device (`ops.sparse_conv`), in room of static size.
How much they need is counted here, scene by scene: counts of scenes add up to those of their pack.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LEVELS = 5  # of a MinkUNet
# Pairs of one product: more are faster (on CPU XLA makes one of 1,024 by 64 channels, or 512 by 128, on one core, and
# those of 2,048 or 1,024 on all), and leave more slots unused.
BLOCKS = (2048, 1024, 512, 256, 128)
NEIGHBORS = tuple((i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1))
CENTRE = NEIGHBORS.index((0, 0, 0))  # of 27: its pairs are the voxels themselves, and need no table


class Sizes(NamedTuple):
    """Static sizes of a level: rows of its table, slots of its 3x3x3 pairs (whole blocks), pairs of a block."""

    voxels: int
    pairs: int
    block: int


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
    """Counts of one scene: [levels, 2] int64, voxels and pairs of neighbours. coordinates [N, 3] integers.

    Pairs are those of 3x3x3 without its centre, counted both ways. Counts of the scenes of a pack add up, and each of
    the 26 elements may leave a part of a block unused: `sizes_for` adds that.
    """
    counts = []
    coordinates = np.asarray(coordinates, np.int64)
    for _ in range(num_levels):
        low = coordinates.min(axis=0) - 1
        extent = coordinates.max(axis=0) - low + 2
        strides = np.array([extent[1] * extent[2], extent[2], 1])
        keys = np.unique((coordinates - low) @ strides)
        steps = np.array(NEIGHBORS[CENTRE + 1 :]) @ strides  # in the opposite directions are the same pairs
        pairs = 2 * sum(int(np.isin(keys + step, keys, assume_unique=True).sum()) for step in steps)
        counts.append([len(keys), pairs])
        columns, z = np.divmod(keys, extent[2])
        x, y = np.divmod(columns, extent[1])
        coordinates = (np.stack([x, y, z], axis=1) + low) // 2
    return np.array(counts, np.int64)


def sizes_for(counts: np.ndarray) -> tuple[Sizes, ...]:
    """The smallest sizes with room for `counts` [levels, 2] of `count_levels`."""
    sizes = []
    for voxels, pairs in counts.tolist():
        block = next((size for size in BLOCKS if 80 * size <= pairs), BLOCKS[-1])  # a sixth unused, on average
        sizes.append(Sizes(voxels, (pairs // block + 27) * block, block))
    return tuple(sizes)
