"""Ahead-of-time compilation for TPUs, on any machine: interpret mode hides what Mosaic and the partitioner refuse."""

import re
from typing import Any

import bench_formulations
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scalr_jax.config import OptimizerSettings
from scalr_jax.data.scenes import Batch, Plane, SceneNeeds
from scalr_jax.models import vit
from scalr_jax.models.student import Student
from scalr_jax.models.waffleiron import WaffleIronBackbone
from scalr_jax.runtime import sharding
from scalr_jax.runtime.chips import devices_of
from scalr_jax.train import optim, steps
from scalr_jax.train.state import init_state
from scalr_jax.train.teachers import Source, Teacher
from tests.support.checks import present
from tests.support.random_scenes import FIELD_OF_VIEW

pytestmark = pytest.mark.tpu

GRIDS = ((256, 256), (256, 32), (256, 32))
POINTS, SCENES, CELLS, HALO, IMAGE = 4096, 2, 1024, 2048, (56, 84)


@pytest.fixture(scope="module")
def mesh():
    """Four devices of a v5e: two data shards, two parameter shards."""
    pytest.importorskip("libtpu", reason="needs the tpu extra: pip install 'scalr_jax[tpu]'")
    return sharding.make_mesh(2, 2, devices=devices_of("v5e:2x2"))


def abstract_batch(mesh):
    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        place = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        return jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=place)

    plane = Plane(
        cell=array(POINTS),
        grid_index=array(CELLS),
        order=array(POINTS),
        start=array(CELLS + 1),
        inverse_count=array(CELLS, dtype=jnp.float32),
        halo_index=array(HALO),
        halo_taps=array(HALO, 9),
        cell_taps=array(CELLS, 9),
    )
    return Batch(
        feats=array(POINTS, 5, dtype=jnp.float32),
        scene=array(POINTS),
        scene_points=array(SCENES),
        neighbors=array(POINTS, 16),
        planes=(plane,) * 3,
        images=array(SCENES, *IMAGE, 3, dtype=jnp.uint8),
        pixels=array(POINTS, 2),
        labels=array(POINTS),
    )


def compiled_text(mesh, head, make_step):
    """The compiled step of a student of two groups of layers, all state abstract."""
    backbone = WaffleIronBackbone(SceneNeeds(FIELD_OF_VIEW, grids=GRIDS), 256, 6, remat="group")
    student = Student(backbone, head=head, out_features=384, dtype=jnp.bfloat16)
    optimizer = optim.make_optimizer(OptimizerSettings(), backbone)
    batch = abstract_batch(mesh)
    state = jax.eval_shape(lambda b: init_state(student, b, optimizer, None, jax.random.key(0)), batch)
    teacher_config = vit.ViTConfig(depth=2)
    teacher = jax.eval_shape(lambda: vit.init(teacher_config, jax.random.key(0), IMAGE))

    def placed(tree):
        shardings = sharding.parameter_shardings(tree, mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    step, arguments = make_step(student, optimizer, teacher_config, placed(state), placed(teacher), batch)
    return jax.jit(step, donate_argnums=0).lower(*arguments).compile().as_text()


def sources(text, instruction):
    """Where the gathers, scatters or sorts of a compiled step come from, as paths of names."""
    found = re.findall(rf'^.* = [^=]*? {instruction}\(%.*?op_name="(.*?)"', text, re.MULTILINE)
    return sorted({re.sub(r"jit\(.*?\)/|transpose\(|jvp\(|\)", "", name) for name in found})


def test_the_distillation_step_has_kernels_and_no_scatter(mesh):
    def make_step(student, optimizer, teacher_config, state, teacher, batch):
        options = {"sources": (Source(384, IMAGE, teacher_config),), "seed": 0, "batch_size": 8}
        step = steps.make_distill_step(student, optimizer, lambda t: t, **options)
        return step, (state, (Teacher(teacher),), batch)

    text = compiled_text(mesh, "distill", make_step)
    counts = bench_formulations.count_instructions(present(text))
    assert counts["tpu_kernel"] >= 3 * 10  # a group's forward and backward pass
    assert "scatter" not in counts
    # Two lists in two orders a plane, once a step and not once a layer.
    assert counts["sort"] == 12
    assert sources(text, "sort") == ["Student/backbone/sort"]
    # What is left of gathers: the neighbours' features, once a step, and the teacher's four tokens a point.
    assert not [name for name in sources(text, "gather") if "backbone" in name]


def test_the_segmentation_step_adds_what_lovasz_sorts(mesh):
    def make_step(student, optimizer, teacher_config, state, teacher, batch):
        step = steps.make_segment_step(student, optimizer, lambda t: t, seed=0, batch_size=8, trainable=None)
        return step, (state, None, batch)

    text = compiled_text(mesh, "segment", make_step)
    counts = bench_formulations.count_instructions(present(text))
    assert counts["tpu_kernel"] >= 3 * 10
    assert counts.get("scatter", 0) <= 1  # the gradient of the sorted errors
    assert [name for name in sources(text, "sort") if "backbone" not in name] == ["vmap(sort"]


def test_kernels_compile_at_the_largest_sizes():
    """A batch of eight full turns on one device, 768 channels in bfloat16: the tables of the fine-tuning configs."""
    pytest.importorskip("libtpu", reason="needs the tpu extra: pip install 'scalr_jax[tpu]'")
    sizes = ["--points=160000", "--cells=41600", "--halo=116800", "--only=windows"]
    result = bench_formulations.main(["--topology=v5p:2x2x1", *sizes])
    assert result["windows_step"]["tpu_kernel"] == 10
    assert "scatter" not in result["windows_step"]
    assert "gather" not in result["windows_step"]
