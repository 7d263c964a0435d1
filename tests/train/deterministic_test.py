"""A training step for a GPU adds up in one order: traced on a machine without one."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from scalr_jax.compile import abstract
from scalr_jax.config import OptimizerSettings
from scalr_jax.models.build import make_student
from scalr_jax.settings import read_settings
from scalr_jax.train import optim, steps
from scalr_jax.train.state import init_state
from tests.support.runs import config_of, scene_settings
from tests.support.traced_flops import operations

MODELS = {
    "waffleiron": {"channels": 8, "depth": 3, "num_neighbors": 2},
    "vavit_tiny": {"vavit.depth": 1, "vavit.point_depth": 1, "num_neighbors": 2},
}


def unordered_sums(platform, name, scenes_per_group):
    """The sums of rows by an index in a step of segmentation on two devices, that have no order on a GPU."""
    config = config_of("smoke")
    config.task = "finetune"
    config.data.update(points_per_shard=512, scenes_per_shard=2)
    config.model.update_from_flattened_dict({**MODELS[name], "name": name})
    settings = read_settings(config)
    mesh: Any = AbstractMesh(
        (2, 1), ("data", "fsdp"), (AxisType.Auto,) * 2, abstract_device=AbstractDevice(platform, 2, platform)
    )
    student = make_student(settings.model, head="segment", out_features=4, platform=platform)
    scenes = scene_settings(config, task="segment", train=True)
    batch = abstract.make_batch(scenes, abstract.choose_capacities(settings.data, student.needs), mesh)
    optimizer = optim.make_optimizer(OptimizerSettings(), student.backbone)
    state = jax.eval_shape(lambda b: init_state(student, b, optimizer, None, jax.random.key(0)), batch)
    options = {"seed": 0, "batch_size": 8, "trainable": None, "scenes_per_group": scenes_per_group}
    step = steps.make_segment_step(student, optimizer, lambda t: t, **options)
    jaxpr = jax.make_jaxpr(step)(state, None, batch).jaxpr
    return [
        str(equation.source_info.traceback)
        for equation in operations(jaxpr)
        if equation.primitive.name == "scatter-add"
        and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
        and not equation.params["unique_indices"]
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_step_for_a_gpu_has_no_sum_without_order(name):
    """Whose loss is grouped in one of them. A CPU's has some, in the order of the rows."""
    assert not unordered_sums("cuda", name, scenes_per_group=int(name == "vavit_tiny"))


def test_the_step_asks_xla_for_the_rest_where_the_key_says_so():
    asked, plain = steps.compiler_options("gpu", deterministic=True), steps.compiler_options("gpu")
    assert asked == {**plain, "xla_gpu_deterministic_ops": True} != plain
    assert "xla_gpu_deterministic_ops" not in steps.compiler_options("tpu", deterministic=True)
