"""What tests of benches share."""

import contextlib

import jax

from scalr_jax.bench import scenes
from tests.support.random_scenes import GRIDS, random_scene


def save_batch(path):
    """Two random scenes, of 41 and 42 points, with images of 28 x 42 pixels, as `--save_batch` writes them."""
    views = [random_scene(seed, num_points=40 + seed) for seed in (1, 2)]
    batch = scenes.resized(scenes.pack(views, GRIDS, points_a_scene=None), (28, 42))
    scenes.save(path, scenes.Scenes(batch, GRIDS, "generated", ("a", "b")))
    return path


@contextlib.contextmanager
def less_optimized():
    """Programs are compiled without care: that they are measured is what is tested."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
