"""Arrays that cross devices in a compiled program."""

import re

import jax
import numpy as np

from scalr_jax.compile import abstract, hlo
from scalr_jax.runtime import sharding


def check_only_sums(student, scenes, capacities, mesh):
    """In the compiled gradient of a student in training, gradients and batch norms are added up over the devices of
    `mesh`, and neither tables nor rows cross one. scenes: `SceneSettings`."""
    batch = abstract.make_batch(scenes, capacities, mesh)
    shapes = jax.eval_shape(lambda batch: student.init(jax.random.key(0), batch, train=False), batch)

    def loss(params, statistics, batch):
        variables = {"params": params, "batch_stats": statistics}
        rngs = {"dropout": jax.random.key(0)}
        return student.apply(variables, batch, train=True, rngs=rngs, mutable=["batch_stats"])[0].sum()

    variables = abstract.placed(shapes, sharding.parameter_shardings(shapes, mesh))
    arguments = variables["params"], variables["batch_stats"], batch
    text = jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text() or ""
    found = {kind for kind in hlo.COLLECTIVES if re.search(rf" {kind}(-start)?\(", text)}
    assert found == {"all-reduce"}
    largest = max(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    for shape in re.findall(r"= f32\[([\d,]*)\][^=]*? all-reduce\(", text):
        assert np.prod([int(n) for n in shape.split(",") if n]) <= largest
