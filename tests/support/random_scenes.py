"""Random scenes for tests: small, seeded, of any number of points."""

import numpy as np

from scalr_jax.data.grids import make_plane
from scalr_jax.data.packing import Capacities, add, pack_shard, sizes
from scalr_jax.data.scenes import PLANE_AXES, SceneView
from scalr_jax.data.transforms import find_neighbors, make_features

FIELD_OF_VIEW = ((-8.0, -8.0, -2.0), (8.0, 8.0, 2.0))
GRIDS = ((16, 16), (16, 4), (16, 4))
IMAGE_SIZE = (16, 24)


def random_scene(seed, num_points=40, *, num_neighbors=4, index=0, spread=1.0):
    """A SceneView with image, pixels and labels; `spread` < 1 crowds the points into few cells."""
    rng = np.random.default_rng(seed)
    low, high = np.array(FIELD_OF_VIEW)
    xyz = (rng.uniform(low, high, (num_points, 3)) * 0.99 * spread).astype(np.float32)
    planes = tuple(make_plane(xyz, axes, grid, FIELD_OF_VIEW) for axes, grid in zip(PLANE_AXES, GRIDS, strict=True))
    return SceneView(
        name=f"scene {seed}",
        stream_index=index,
        feats=make_features(xyz, rng.uniform(0, 255, num_points), (100.0, 50.0)),
        neighbors=find_neighbors(xyz, num_neighbors),
        planes=planes,
        image=rng.integers(0, 256, (*IMAGE_SIZE, 3), dtype=np.uint8),
        pixels=(rng.random((num_points, 2)) * IMAGE_SIZE).astype(np.int32),
        labels=rng.integers(0, 5, num_points).astype(np.uint8),
    )


def pack(scenes, *, extra=0, extra_scenes=0):
    """One shard [1, ...] that holds exactly `scenes`, with `extra` more rows in every table."""
    need = Capacities(0, 0, (0, 0, 0), (0, 0, 0))
    for scene in scenes:
        need = add(need, sizes(scene))
    capacities = Capacities(
        need.points + extra,
        need.scenes + extra_scenes,
        tuple(n + extra for n in need.cells),
        tuple(n + extra for n in need.halo),
    )
    return stack([pack_shard(scenes, capacities, scenes[0], GRIDS)])


def stack(shards):
    """Batches without a D axis -> one batch [D, ...] of JAX arrays."""
    import jax

    return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *shards))
