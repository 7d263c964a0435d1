"""A WaffleIron for the grids of random scenes: three layers, 8 wide."""

import jax
import jax.numpy as jnp
import numpy as np

from scalr_jax.models.student import Student
from tests.support.random_scenes import GRIDS


def small_student(**changes):
    settings = {"channels": 8, "depth": 3, "grids": GRIDS, "out_features": 6, **changes}
    return Student(**settings)


def init(student, batch):
    """Random variables without compiling the initialisers."""
    shapes = jax.eval_shape(lambda batch: student.init(jax.random.key(0), batch, train=False), batch)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: jnp.asarray(rng.uniform(-0.5, 0.5, x.shape), jnp.float32), shapes)
    return {**variables, "batch_stats": jax.tree.map(lambda x: jnp.abs(x) + 0.5, variables["batch_stats"])}
