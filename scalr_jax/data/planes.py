"""Which cells of a plane, or pillars of the top view, a scene's points occupy, and the tables that a 3x3 convolution of
those cells reads."""

from __future__ import annotations

import numpy as np

from scalr_jax.data.scenes import FieldOfView, ScenePillars, ScenePlane


def make_plane(xyz: np.ndarray, axes: tuple[int, int], grid: tuple[int, int], field_of_view: FieldOfView) -> ScenePlane:
    """Cell tables of one plane. xyz [N, 3] inside the view."""
    return plane_tables(cell_position(xyz, axes, grid, field_of_view), grid)


def cell_position(
    xyz: np.ndarray, axes: tuple[int, int], grid: tuple[int, int], field_of_view: FieldOfView
) -> np.ndarray:
    """i * W + j [N] int64 of each point's cell (i, j) = floor((p - min) / cell size). xyz [N, 3] inside the view."""
    low, high = np.asarray(field_of_view, np.float64)[:, list(axes)]
    cell_size = (high - low) / np.array(grid)
    i, j = (((xyz[:, axis] - low[k]) / cell_size[k]).astype(np.int64) for k, axis in enumerate(axes))
    return i * grid[1] + j


def plane_tables(point_position: np.ndarray, grid: tuple[int, int]) -> ScenePlane:
    """Cell tables from each point's position i * W + j [N].

    Rows are looked up in the grid with a border of one cell, so that no tap wraps around, and nothing is sorted.
    """
    padded = (grid[0] + 2, grid[1] + 2)
    offsets = np.array([i * padded[1] + j for i in (-1, 0, 1) for j in (-1, 0, 1)])
    point = point_position + 2 * (point_position // grid[1]) + padded[1] + 1  # the same cell in the padded grid
    marked = np.zeros(padded, bool)
    marked.ravel()[point] = True
    occupied = np.flatnonzero(marked)  # [m], ascending
    row = np.full(padded[0] * padded[1], -1, np.int32)
    row[occupied] = np.arange(len(occupied), dtype=np.int32)
    cell = row[point]
    reached = np.zeros(padded, bool)
    for offset in offsets:
        reached.ravel()[occupied + offset] = True
    reached[0] = reached[-1] = reached[:, 0] = reached[:, -1] = False
    halo = np.flatnonzero(reached)  # [u]
    halo_taps = row[halo[:, None] + offsets]
    row[occupied] = -1
    row[halo] = np.arange(len(halo), dtype=np.int32)
    position, halo_position = (  # in the grid itself
        ((at // padded[1] - 1) * grid[1] + at % padded[1] - 1).astype(np.int32) for at in (occupied, halo)
    )
    return ScenePlane(cell, sort_by(cell), position, halo_position, halo_taps, row[occupied[:, None] + offsets])


def sort_by(keys: np.ndarray) -> np.ndarray:
    """Stable argsort [N] int32 of integers in [0, 2^31): one sort of numbers, several times faster than an argsort."""
    in_order = np.sort((keys.astype(np.int64) << 32) | np.arange(len(keys)))
    return in_order.astype(np.uint32).view(np.int32)


def pillar_keys(xyz: np.ndarray, size: float) -> np.ndarray:
    """The pillar of each point as one number [N] int64 that sorts by floor(x / size), then by floor(y / size).

    Counted from the origin, as VaViT does, and not from the field of view. xyz [N, 2+] in metres.
    """
    x, y = (np.floor(xyz[:, axis].astype(np.float64) / size).astype(np.int64) for axis in (0, 1))
    return (x << 32) + y


def make_pillars(xyz: np.ndarray, size: float) -> ScenePillars:
    """The pillars of points [N, 2+] that stand in the order of `pillar_keys`."""
    keys = pillar_keys(xyz, size)
    new = np.diff(keys, prepend=keys[:1] - 1) != 0
    assert (np.diff(keys) >= 0).all(), "points do not stand in the order of their pillars"
    first = keys[new]
    y = (first & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    steps = np.column_stack([(first - y) >> 32, y])
    return ScenePillars(np.cumsum(new, dtype=np.int32) - 1, (steps * size + size / 2).astype(np.float32))
