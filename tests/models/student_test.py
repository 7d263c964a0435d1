"""The student: published numbers, and the laws of packing and padding."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.data.packing import Capacities, pack_shard
from scalr_jax.interop import waffleiron as interop
from scalr_jax.interop.layout import apply_published_layout, published_batch
from scalr_jax.interop.model import student_of
from scalr_jax.interop.published import published_state_dict
from scalr_jax.models.waffleiron import WaffleIronBackbone
from tests.support.random_scenes import GRIDS, pack, random_scene, stack
from tests.support.small_student import init, small_student

KINDS = ("scalr", "batchnorm", "scalr_plus")
FORMS = [*((kind, "cells") for kind in KINDS), ("scalr", "dense")]  # norms and activations are the same code in both


def apply(student, variables, batch, *, train=False):
    """Jitted: run operation by operation, the scan would be compiled again and again."""
    mutable = ["batch_stats"] if train else False
    return jax.device_get(jax.jit(lambda v, b: student.apply(v, b, train=train, mutable=mutable))(variables, batch))


def load_golden(arrays, kind):
    weights = {name.removeprefix("param/"): value for name, value in arrays.items() if name.startswith("param/")}
    model = interop.infer_model(weights, kind)
    layout = [arrays[name] for name in ("feat", "cell_ind", "occupied_cells", "neighbors_emb", "grids")]
    return model, interop.convert_weights(weights, student_of(model), kind), layout


def scale_error(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.usefixtures("highest_precision")
@pytest.mark.parametrize(("kind", "implementation"), FORMS)
def test_published_outputs(golden, kind, implementation):
    arrays = golden(f"student_{kind}_full")
    model, variables, layout = load_golden(arrays, kind)
    out = apply_published_layout(model, variables, *layout, implementation=implementation)
    assert scale_error(out[:, :, ::5], arrays["out_eval"]) < 1e-5


@pytest.mark.usefixtures("highest_precision")
@pytest.mark.parametrize("kind", ["scalr", "batchnorm"])
def test_published_outputs_of_padded_scenes(golden, kind):
    arrays = golden(f"student_{kind}_padded")
    model, variables, layout = load_golden(arrays, kind)
    out = apply_published_layout(model, variables, *layout)[:, :, ::5]
    valid = arrays["occupied_cells"][:, None, ::5] > 0
    assert scale_error(out * valid, arrays["out_eval"] * valid) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("highest_precision")
@pytest.mark.parametrize(("kind", "implementation"), FORMS)
def test_published_training_step(golden, kind, implementation):
    """Outputs in training, loss, every gradient and every running statistic."""
    arrays = golden(f"student_{kind}_full")
    model, variables, layout = load_golden(arrays, kind)
    batch = published_batch(*layout)
    student = student_of(model, drop_path=0.0, grids=arrays["grids"].tolist(), implementation=implementation)
    num_scenes, channels, num_points = arrays["target"].shape
    target = arrays["target"].transpose(0, 2, 1).reshape(1, -1, channels)

    @jax.jit
    def run(params):
        def loss_of(params):
            out, updated = student.apply({**variables, "params": params}, batch, train=True, mutable=["batch_stats"])
            return jnp.mean(jnp.square(out - target)), (out, updated["batch_stats"])

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    (loss, (out, statistics)), gradients = run(variables["params"])
    out = np.asarray(out).reshape(num_scenes, num_points, channels).transpose(0, 2, 1)
    assert scale_error(out[:, :, ::5], arrays["out_train"]) < 1e-5
    assert abs(loss / arrays["loss_train"] - 1) < 1e-5
    ours = published_state_dict(student, {"params": gradients, "batch_stats": statistics})
    for name, theirs in arrays.items():
        if name.startswith("grad/") and name != "grad/embed.conv2.0.bias":
            assert scale_error(ours[name.removeprefix("grad/")], theirs) < 1e-4, name
        if name.startswith("buf_after/") and "tracked" not in name:
            np.testing.assert_allclose(ours[name.removeprefix("buf_after/")], theirs, rtol=1e-6, atol=1e-6)
    # This bias goes into a batch norm, so its gradient is zero but for rounding: theirs is at most 5e-8.
    assert np.abs(ours["embed.conv2.0.bias"]).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cells", "dense"])
def test_padding_changes_nothing(implementation):
    """Output, gradients and running statistics in training, with and without padded rows; none is NaN."""
    scenes = [random_scene(0), random_scene(1, 23)]
    student = small_student(implementation=implementation)
    tight, loose = pack(scenes), pack(scenes, extra=17, extra_scenes=2)
    variables = init(student, tight)

    def run(batch):
        valid = batch.scene[0] < batch.scene_points.shape[1]

        def loss_of(params):
            out, updated = student.apply({**variables, "params": params}, batch, train=True, mutable=["batch_stats"])
            out = jnp.where(valid[:, None], out[0], 0.0)
            return jnp.sum(jnp.sin(out)), (out, updated)

        return jax.jit(jax.value_and_grad(loss_of, has_aux=True))(variables["params"])

    (_, (out, statistics)), gradients = run(tight)
    (_, (padded_out, padded_statistics)), padded_gradients = run(loose)
    num_points = tight.feats.shape[1]
    np.testing.assert_allclose(padded_out[:num_points], out, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(padded_statistics), jax.tree.leaves(statistics), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(padded_gradients), jax.tree.leaves(gradients), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["cells", "dense"])
def test_packed_equals_apart(implementation):
    scenes = [random_scene(seed, 20 + 7 * seed) for seed in range(3)]
    student = small_student(implementation=implementation)
    variables = init(student, pack(scenes[:1]))
    together = apply(student, variables, pack(scenes))[0]
    apart = [apply(student, variables, pack([scene]))[0] for scene in scenes]
    np.testing.assert_allclose(together, np.concatenate(apart), rtol=1e-5, atol=1e-5)


def test_shards_equal_one_shard():
    """Two shards give the outputs and running statistics of one shard that holds both scenes."""
    scenes = [random_scene(0), random_scene(1)]
    capacities = Capacities(64, 2, (64, 64, 64), (256, 64, 64))
    two = stack([pack_shard([scene], capacities, scene, GRIDS) for scene in scenes])
    student = small_student()
    variables = init(student, two)
    out_two, statistics_two = apply(student, variables, two, train=True)
    out_one, statistics_one = apply(student, variables, pack(scenes), train=True)
    np.testing.assert_allclose(out_two[:, :40].reshape(80, -1), out_one[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(statistics_two), jax.tree.leaves(statistics_one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 3, 5, 6])
def test_any_depth_has_its_layers(depth):
    def size(depth):
        init = lambda batch: small_student(depth=depth).init(jax.random.key(0), batch, train=False)  # noqa: E731
        shapes = jax.eval_shape(init, pack([random_scene(0)]))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]["backbone"]))

    assert size(depth) == depth * size(1)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["layer", "group"])
def test_remat_changes_nothing(remat):
    batch = pack([random_scene(0)])
    variables = init(small_student(), batch)

    def gradient(student):
        loss_of = lambda p: student.apply({**variables, "params": p}, batch, train=False).sum()  # noqa: E731
        return jax.jit(jax.grad(loss_of))(variables["params"])

    plain, again = gradient(small_student()), gradient(small_student(remat=remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_stochastic_depth_is_per_scene_and_keeps_the_mean():
    """Each scene's branch is dropped whole, and survivors are scaled by 1 / (1 - rate)."""
    from scalr_jax.models.layers import keep_scenes

    class Drop(nn.Module):
        @nn.compact
        def __call__(self, scene):
            return keep_scenes(self, scene, 64, 0.25, True)

    scene = jnp.repeat(jnp.arange(64), 5)[None]
    out = Drop().apply({}, scene, rngs={"dropout": jax.random.key(0)})
    per_scene = np.asarray(out).reshape(64, 5)
    np.testing.assert_array_equal(per_scene, np.repeat(per_scene[:, :1], 5, axis=1))
    values, counts = np.unique(per_scene[:, 0], return_counts=True)
    np.testing.assert_allclose(values, [0, 4 / 3], rtol=1e-6)
    assert 4 <= counts[0] <= 30  # 16 of 64 expected; these are five standard deviations


def test_initialised_as_published():
    """PyTorch's defaults: everything U(+-1/sqrt(fan_in)), layer scale and depthwise kernels by their own fan-in."""
    batch = pack([random_scene(0)])
    student = small_student(channels=64, depth=3)
    variables = jax.jit(lambda batch: student.init(jax.random.key(0), batch, train=False))(batch)
    layer = jax.tree.map(np.asarray, variables["params"]["backbone"]["groups"]["plane_0"])
    for array, bound in (
        (layer["spatial"]["scale"], 1.0),
        (layer["spatial"]["kernel_1"], 1 / 3),
        (layer["spatial"]["bias_2"], 1 / 3),
        (layer["channel"]["linear_1"]["kernel"], 1 / 8),
        (layer["channel"]["scale"], 1.0),
        (variables["params"]["embedding"]["neighbor_in"], 5**-0.5),
    ):
        assert np.abs(array).max() <= bound
        assert np.abs(array).std() == pytest.approx(bound / 12**0.5, rel=0.25)
        assert array.std() == pytest.approx(bound / 3**0.5, rel=0.25)


def test_a_residual_in_bfloat16_follows_the_one_in_float32(golden):
    """Its dtype is that of the sum alone: an output off by the rounding of its layers."""
    model, variables, layout = load_golden(golden("student_scalr_full"), "scalr")
    batch = published_batch(*layout)
    exact = student_of(model, grids=np.asarray(layout[-1]).tolist())
    assert isinstance(exact.backbone, WaffleIronBackbone)
    rounded = exact.clone(backbone=dataclasses.replace(exact.backbone, residual_dtype="bfloat16"))
    outputs = [apply(student, variables, batch) for student in (exact, rounded)]
    assert 1e-6 < scale_error(outputs[1], outputs[0]) < 0.02
    assert outputs[1].dtype == np.float32
