"""A WaffleIron for the grids of random scenes: three layers, 8 wide."""

import dataclasses

import jax
import numpy as np

from scalr_jax.data.scenes import SceneNeeds
from scalr_jax.models.student import Student
from scalr_jax.models.waffleiron import WaffleIronBackbone
from tests.support.random_scenes import FIELD_OF_VIEW, GRIDS


def small_student(**changes):
    settings = {"channels": 8, "depth": 3, "grids": GRIDS, "out_features": 6, **changes}
    fields = {field.name for field in dataclasses.fields(Student)}
    of_student = {name: settings.pop(name) for name in list(settings) if name in fields}
    grids = settings.pop("grids")
    return Student(WaffleIronBackbone(SceneNeeds(FIELD_OF_VIEW, 4, grids), **settings), **of_student)


def init(student, batch):
    """Random variables without compiling the initialisers."""
    shapes = jax.eval_shape(lambda batch: student.init(jax.random.key(0), batch, train=False), batch)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.uniform(-0.5, 0.5, x.shape).astype(np.float32), shapes)
    variables = {**variables, "batch_stats": jax.tree.map(lambda x: np.abs(x) + 0.5, variables["batch_stats"])}
    return jax.device_put(variables)
