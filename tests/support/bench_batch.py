"""Shared by tests of benches."""

from scalr_jax.bench import scenes
from tests.support.random_scenes import GRIDS, random_scene


def save_batch(path):
    """Two random scenes, of 41 and 42 points, with images of 28 x 42 pixels, as `--save_batch` writes them."""
    views = [random_scene(seed, num_points=40 + seed) for seed in (1, 2)]
    batch = scenes.resized(scenes.pack(views, GRIDS, points_a_scene=None), (28, 42))
    scenes.save(path, scenes.Scenes(batch, GRIDS, "generated", ("a", "b")))
    return path
