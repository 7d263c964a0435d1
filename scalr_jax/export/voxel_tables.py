"""The tables of a MinkUNet for one scene, in NumPy and without padding: what an exported one takes as inputs.

`ops.sparse_conv` has the definitions and makes the same tables on the device, in room of static size; the convolutions
read them alike. Index -1 is no row.
"""

from __future__ import annotations

import numpy as np

from scalr_jax.ops.voxels import CENTRE, LEVELS, NEIGHBORS

BLOCK = 128  # pairs of one product, all of the same kernel element
NEAR = tuple(step for n, step in enumerate(NEIGHBORS) if n != CENTRE)


def voxel_tables(coordinates: np.ndarray, extent: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """The tables by name, with V_l voxels on level l (0 the finest, each twice as wide as the one before).

    Args:
      coordinates: [N, 3], in voxels of the finest level; those outside of `extent` count as its border's.
      extent: voxels along x, y, z.

    Returns:
      cell [N] int32            the voxel of each point
      order [N] int32           points sorted by voxel
      inverse_count [V_0]       float32, 1 / points of a voxel
      number [5] int32          V_l
      neighbors [V_0, 27] int32 rows of the 3x3x3 around each voxel, z fastest
      and the pairs of each level's convolutions, in slots of B blocks of 128, one kernel element a block:
      near_source_l [128 B] int32, near_element_l [B] int32   3x3x3 without its centre: input row, element of 26
      near_slots_l [V_l, 26] int32                            the slots to add up for each voxel
      down_source_l, down_element_l, down_slots_l [V_l+1, 8]  2x2x2 to the next level, elements of 8 (l = 0 to 3)
      up_source_l, up_slots_l [V_l, 1]                        and back, with the same elements
    """
    ijk = np.clip(np.floor(coordinates).astype(np.int64), 0, np.asarray(extent) - 1)
    voxels, cell, count = np.unique(ijk, axis=0, return_inverse=True, return_counts=True)
    cell = cell.reshape(-1)
    tables = {
        "cell": cell.astype(np.int32),
        "order": np.argsort(cell, kind="stable").astype(np.int32),
        "inverse_count": (1.0 / count).astype(np.float32),
    }
    numbers = []
    for level in range(LEVELS):
        near = _rows_of(voxels, extent)
        numbers.append(len(voxels))
        if level == 0:
            tables["neighbors"] = np.insert(near, CENTRE, np.arange(len(voxels)), axis=1).astype(np.int32)
        slots, source, _, element = _pairs(near)
        tables |= {f"near_source_{level}": source, f"near_element_{level}": element, f"near_slots_{level}": slots}
        if level + 1 < LEVELS:
            parents, parent = np.unique(voxels >> 1, axis=0, return_inverse=True)
            children = np.full((len(parents), 8), -1)
            children[parent.reshape(-1), (voxels & 1) @ (4, 2, 1)] = np.arange(len(voxels))
            slots, source, target, element = _pairs(children)
            tables |= {f"down_source_{level}": source, f"down_element_{level}": element, f"down_slots_{level}": slots}
            up = np.empty((len(voxels), 1), np.int32)
            up[children[children >= 0], 0] = slots[children >= 0]
            tables |= {f"up_source_{level}": target, f"up_slots_{level}": up}
            voxels = parents
    return tables | {"number": np.array(numbers, np.int32)}


def _rows_of(voxels: np.ndarray, extent: tuple[int, int, int]) -> np.ndarray:
    """[V, 26]: the rows of the neighbours of sorted voxels [V, 3], -1 where there is none."""
    strides = np.array([(extent[1] + 2) * (extent[2] + 2), extent[2] + 2, 1])
    keys = (voxels + 1) @ strides
    near = keys[:, None] + np.array(NEAR) @ strides
    at = np.minimum(np.searchsorted(keys, near), len(keys) - 1)
    return np.where(keys[at] == near, at, -1)


def _pairs(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """inputs [V, T]: the row that each kernel element reads for each output, -1 for none. Every element gets whole
    blocks. Returns slots [V, T], source [Q], target [Q] (its output), element [Q / 128]."""
    valid = inputs >= 0
    blocks = -(-valid.sum(axis=0) // BLOCK)  # [T]
    first = (np.cumsum(blocks) - blocks) * BLOCK
    slots = np.where(valid, first + np.cumsum(valid, axis=0) - 1, -1)
    source, target = np.full((2, blocks.sum() * BLOCK), -1, np.int32)
    source[slots[valid]] = inputs[valid]
    target[slots[valid]] = np.nonzero(valid)[0]
    return slots.astype(np.int32), source, target, np.repeat(np.arange(len(blocks), dtype=np.int32), blocks)
