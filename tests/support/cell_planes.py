"""Planes of two tiny scenes, and the mixing of their dense grid, to which the forms on occupied cells are compared."""

import jax
import jax.numpy as jnp
import numpy as np

from scalr_jax.data.grids import plane_tables
from scalr_jax.data.packing import Capacities, pack_shard
from scalr_jax.data.scenes import SceneView
from scalr_jax.ops import cell_conv, cells

GRID = (6, 5)
CHANNELS = 3
POINTS, CELLS, HALO = 24, 40, 64  # capacities: one compilation serves every example
SCENES = 2


def packed_plane(positions):
    """Two scenes' positions i * W + j -> one plane of a shard, padded to the capacities."""
    scenes = []
    for position in positions:
        plane = plane_tables(np.array(position, np.int64), GRID)
        feats = np.zeros((len(position), 1), np.float32)
        scenes.append(SceneView("", 0, feats, np.zeros((len(position), 1), np.int32), (plane,), None, None, None))
    shard = pack_shard(scenes, Capacities(POINTS, SCENES, (CELLS,), (HALO,)), scenes[0], (GRID,))
    return jax.device_put(shard.planes[0])


@jax.jit
def mixed_dense(points, plane, kernel1, bias, kernel2):
    grid = cells.flatten_dense(points, plane, grid=GRID, num_scenes=SCENES)
    grid = jax.nn.relu(cell_conv.conv_dense(grid, kernel1) + bias)
    return cells.inflate_dense(cell_conv.conv_dense(grid, kernel2), plane)


def gradients(function, weights):
    return jax.jit(
        jax.grad(lambda points, plane, *rest: jnp.sum(weights * function(points, plane, *rest)), argnums=(0, 2, 3, 4))
    )


WEIGHTS = np.random.default_rng(0).normal(size=(POINTS, CHANNELS)).astype(np.float32)
dense_gradient = gradients(mixed_dense, WEIGHTS)
AREA = GRID[0] * GRID[1]
ADVERSARIAL = {
    "one cell": ([7] * 5, [0]),
    "corners": ([0, GRID[1] - 1, AREA - GRID[1], AREA - 1], [0, 0, AREA - 1]),
    "borders": ([*range(GRID[1])], [*range(0, AREA, GRID[1])]),
    "all cells of half a grid": ([*range(AREA // 2)], [3]),
    "empty scene": ([], [5, 6, 11]),
    "both empty": ([], []),
}
