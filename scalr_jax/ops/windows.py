"""Spatial mixing for a TPU: the occupied-cells form of `cells.py` and `cell_conv.py` without gathers and scatters.

    flatten:  cells[m] = inverse_count[m] * sum of the points whose cell is m
    conv up, conv down: depthwise 3x3 convolutions between the occupied cells and their halo
    inflate:  points[p] = cells[cell[p]]

Rows are selected and added up by products with blocks of zeros and ones (`pallas/rows.py`, `pallas/cell_conv.py`), with
two lists of links a plane. Equal to the plain forms of `cells.py` and `cell_conv.py` to rounding, gradients included.
Everything has its D axis: the kernels are mapped over the devices, the rest is partitioned by XLA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from scalr_jax.ops.cells import Tables
from scalr_jax.ops.pallas.cell_conv import TapLinks, make_tap_links, to_cells, to_halo
from scalr_jax.ops.pallas.rows import Links, make_links, select_rows, sum_rows

Array = jax.Array


class PlaneWindows(NamedTuple):
    """Tables that a layer reads of a plane, in place of `scenes.Plane`."""

    cell: Array  # [D, P]
    inverse_count: Array  # [D, M]
    halo_index: Array  # [D, H]
    points: Links  # each point's cell
    taps: TapLinks  # each halo cell's neighbours


def make_windows(plane: Tables, grid: tuple[int, int]) -> PlaneWindows:
    """Once a step, from `scenes.Plane` and its grid's rows and columns."""
    num_cells = plane.inverse_count.shape[1]
    points = make_links(plane.cell[:, None], num_cells)
    taps = make_tap_links(plane.halo_taps, plane.halo_index, num_cells, grid[1])
    return PlaneWindows(plane.cell, plane.inverse_count, plane.halo_index, points, taps)


def flatten(points: Array, plane: PlaneWindows) -> Array:
    """Mean of the points of each occupied cell. [D, P, C] -> [D, M, C], same dtype; unused rows are zero."""
    sums: Any = sum_rows(points, plane.points, plane.inverse_count.shape[1])
    return (sums * plane.inverse_count[..., None]).astype(points.dtype)


def conv_up(cells: Array, plane: PlaneWindows, kernel: Array) -> Array:
    """Depthwise 3x3 convolution from the occupied cells to the halo. [D, M, C], [9, C] -> [D, H, C], same dtype."""
    return to_halo(cells, kernel, plane.taps, plane.halo_index.shape[1])


def conv_down(halo: Array, plane: PlaneWindows, kernel: Array) -> Array:
    """Depthwise 3x3 convolution from the halo to the occupied cells. [D, H, C], [9, C] -> [D, M, C], same dtype."""
    return to_cells(halo, kernel[::-1], plane.taps, plane.inverse_count.shape[1])


def inflate(cells: Array, plane: PlaneWindows) -> Array:
    """Each point reads its cell; padded points read zero. [D, M, C] -> [D, P, C]."""
    return select_rows(cells, plane.points, plane.cell.shape[1])
