"""Run the student on the arrays of the published code, [B, channels, N] with padding at the end.

The published versions differ in what padding does. WaffleIron and ScaLR mask padded points out of the cell means;
ScaLR+ does not: there they are points of cell 0 of every plane, with features 0. `padding` names the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from scalr_jax.data.grids import plane_tables
from scalr_jax.data.packing import Capacities, pack_shard
from scalr_jax.data.scenes import Batch, SceneView
from scalr_jax.interop.model import student_of
from scalr_jax.models.student import Variables
from scalr_jax.runtime.errors import InputError

PADDINGS = ("masked", "published")


def published_batch(
    feat: np.ndarray,
    cell_ind: np.ndarray,
    occupied_cells: np.ndarray,
    neighbors_emb: np.ndarray,
    grids: ArrayLike,
    *,
    padding: str = "masked",
) -> Batch:
    """Published arrays (see `apply_published_layout`) as one packed shard of exactly the points that count."""
    grids = [(int(h), int(w)) for h, w in np.asarray(grids)]
    scenes = []
    for b, count in enumerate(_counts(occupied_cells, padding)):
        planes = tuple(plane_tables(np.asarray(cell_ind[b, k, :count], np.int64), grids[k]) for k in range(len(grids)))
        feats = np.asarray(feat[b, :, :count].T, np.float32)
        neighbors = np.asarray(neighbors_emb[b, 1:, :count].T, np.int32)
        scenes.append(SceneView(str(b), b, feats, neighbors, planes, None, None, None))
    totals = [
        tuple(sum(len(getattr(scene.planes[k], name)) for scene in scenes) for k in range(len(grids)))
        for name in ("position", "halo_taps")
    ]
    points = sum(len(scene.feats) for scene in scenes)
    shard = pack_shard(scenes, Capacities(points, len(scenes), *totals), scenes[0], grids)
    return jax.device_put(jax.tree.map(lambda x: np.asarray(x)[None], shard))


def apply_published_layout(
    model_config: Mapping,
    variables: Variables,
    feat: np.ndarray,
    cell_ind: np.ndarray,
    occupied_cells: np.ndarray,
    neighbors_emb: np.ndarray,
    grids: ArrayLike,
    *,
    train: bool = False,
    implementation: str = "auto",
    padding: str = "masked",
) -> Any:
    """Run the student on the published code's arrays.

    feat [B, F, N], cell_ind [B, 3, N], occupied_cells [B, N] (1 valid, 0 padding, padding last),
    neighbors_emb [B, K + 1, N] (row 0 the point itself), grids [3, 2]. Returns out [B, C_out, N] (zero where padded),
    or, in training, (out, new variables). Stochastic depth is off.

    `padding`: "masked", padded points touch nothing (WaffleIron and ScaLR, but for their batch-norm statistics, which
    in training include padded points); "published", they are points like the others, as in the released ScaLR+.
    """
    batch = published_batch(feat, cell_ind, occupied_cells, neighbors_emb, grids, padding=padding)
    student = student_of(model_config, drop_path=0.0, grids=np.asarray(grids).tolist(), implementation=implementation)
    mutable = ["batch_stats"] if train else False
    result = jax.jit(lambda v, b: student.apply(v, b, train=train, mutable=mutable))(variables, batch)
    rows, updated = result if train else (result, None)
    out = np.zeros((feat.shape[0], rows.shape[-1], feat.shape[2]), np.float32)
    start = 0
    for b, count in enumerate(_counts(occupied_cells, padding)):
        out[b, :, :count] = np.asarray(rows[0, start : start + count]).T
        start += count
    return (out, {**variables, **updated}) if train else out  # type: ignore[dict-item]


def _counts(occupied_cells: np.ndarray, padding: str) -> list[int]:
    """How many points of each scene count, from the mask [B, N] whose padding stands last."""
    if padding not in PADDINGS:
        raise InputError(f"padding = {padding!r} is none of {', '.join(PADDINGS)}")
    if padding == "published":
        return [occupied_cells.shape[1]] * len(occupied_cells)
    return [int(valid.sum()) for valid in occupied_cells]
