"""The step compiled ahead of time: the run's own shapes, and what its devices send each other on a pod.

The tests marked `tpu` compile for topologies that are not there: python -m pytest -m tpu tests/compile_test.py
"""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax import recipes
from scalr_jax.compile import abstract, hlo, hlo_cost, predict, roofline
from scalr_jax.compile import run as compile
from scalr_jax.config import OptimizerSettings
from scalr_jax.data.packing import Capacities, pack_shard, stack_shards
from scalr_jax.data.pipeline import Pipeline
from scalr_jax.models import vit
from scalr_jax.models.build import make_backbone
from scalr_jax.models.layers import linear
from scalr_jax.models.vit import TEACHERS
from scalr_jax.runtime import chips, sharding
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings
from scalr_jax.train import optim, steps
from scalr_jax.train.state import init_state
from scalr_jax.train.teachers import Source, Teacher
from tests.support.fast import usual_jit
from tests.support.paths import ROOT
from tests.support.random_scenes import GRIDS, IMAGE_SIZE, random_scene
from tests.support.runs import config_of, open_split, scene_settings
from tests.support.small_student import small_student

CONFIG_FILES = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how ml_collections loads them


@pytest.mark.slow
def test_shapes_are_those_of_a_run(tmp_path):
    """The batch made of nothing is the one that a run's pipeline makes, leaf by leaf."""
    config = config_of("smoke")
    config.data.update(num_scenes=1, cells_per_shard=(4096, 2048, 2048), halo_per_shard=(8192, 4096, 4096))
    mesh = sharding.make_mesh(8, 1)
    dataset = open_split(config, "train", cache=tmp_path)
    for task in ("distill", "segment"):
        settings = scene_settings(config, task=task, train=True)
        pipeline = Pipeline(dataset, settings, num_shards=8, shards=sharding.local_shards(mesh))
        capacities = abstract.choose_capacities(read_settings(config).data, settings.needs)
        real = sharding.put_batch(pipeline.empty_batch(capacities, pipeline.sample(1)[0]), mesh)
        made = abstract.make_batch(settings, capacities, mesh)
        assert jax.tree.structure(real) == jax.tree.structure(made)
        for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(made), strict=True):
            assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)


def test_open_capacities_are_those_of_the_published_mixture():
    config = recipes.packed(recipes.pretraining("scalr"), 1)
    settings = read_settings(config)
    needs = make_backbone(settings.model).needs
    given = abstract.choose_capacities(settings.data, needs)
    data = dataclasses.replace(settings.data, cells_per_shard=(), halo_per_shard=())
    assert abstract.choose_capacities(data, needs) == given
    data = dataclasses.replace(data, points_per_shard=data.points_per_shard // 2)
    assert abstract.choose_capacities(data, needs).cells == tuple(n // 2 for n in given.cells)
    # Pillars are those of a pack, or of so many whole turns.
    config = recipes.packed(recipes.pretraining("vavit_b"), 1)
    needs = make_backbone(read_settings(config).model).needs
    config.data.pillars_per_shard = ()
    capacities = abstract.choose_capacities(read_settings(config).data, needs)
    assert (capacities.pillars, capacities.cells) == ((recipes.PACK_PILLARS,), ())
    data = read_settings(recipes.waffleiron("nuscenes", 256)).data
    turns = data.points_per_shard / recipes.MAX_POINTS
    assert abstract.choose_capacities(data, needs).pillars[0] == pytest.approx(turns * recipes.TURN_PILLARS, abs=128)
    data = dataclasses.replace(data, pillars_per_shard=(640,))
    assert abstract.choose_capacities(data, needs).pillars == (640,)


def test_teachers_are_known_by_name_width_and_file():
    width = lambda name: abstract.choose_teacher(name, given=False).width  # noqa: E731
    names = ("", "vitg14", "384", "/data/dinov2_vitb14_reg4_pretrain.pth", "vit_small_patch14_dinov2.safetensors")
    assert [width(name) for name in names] == [1024, 1536, 384, 768, 384]
    assert width("dinov3_vit7b16_pretrain_lvd1689m.pth") == 4096
    assert width("demo") == abstract.choose_teacher("demo", given=True).width
    shapes = abstract.teacher_shapes((224, 448), TEACHERS["vit7b16"])
    assert sum(x.size for x in jax.tree.leaves(shapes)) == pytest.approx(6.716e9, rel=0.001)  # DINOv3, table 2
    with pytest.raises(InputError, match=r"--teacher=resnet50 names no known teacher.*vit7b16 \(4096 wide\)"):
        abstract.choose_teacher("resnet50", given=True)
    with pytest.raises(InputError, match=r"data\.image_size"):
        abstract.teacher_shapes((224, 450), TEACHERS["vitl14"])


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x2", "tpu"), ("h100:1", "cuda")])
def test_without_a_compiler_its_extra_is_named(monkeypatch, topology, extra):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"pip install 'scalr_jax\[{extra}\]'"):
        chips.devices_of(topology)


@pytest.mark.parametrize(("topology", "slices", "said"), [("h100:8", 2, "h100:16"), ("h100:2x2", 1, "h100:2x2")])
def test_topologies_of_gpus_have_one_axis_and_no_slices(topology, slices, said):
    with pytest.raises(InputError, match=said):
        chips.devices_of(topology, slices)


def test_configs_that_train_nothing_or_do_not_divide_are_named():
    mesh = sharding.make_mesh(8, 1)
    with pytest.raises(InputError, match="does not divide among 8 devices"):
        abstract.make_run(read_settings(recipes.waffleiron("nuscenes", 256)), mesh)
    with pytest.raises(InputError, match="'demo' trains no student"):
        abstract.make_run(read_settings(config_of("demo")), mesh)
    config = config_of("smoke")
    config.task = "finetune"
    with pytest.raises(InputError, match=r"model\.num_classes"):
        abstract.make_run(read_settings(config), mesh)


def test_a_cached_teacher_is_tokens_in_the_batch_and_nothing_in_the_step():
    mesh = sharding.make_mesh(8, 1)
    config = config_of("smoke")
    run = abstract.make_run(read_settings(config), mesh, "vits14", cached=True)
    assert not jax.tree.leaves(run.teacher)
    assert run.batch.images is None
    rows, columns = (size // 14 for size in config.data.image_size)
    ((tokens, _),) = run.batch.tokens
    assert tokens.shape == (8, config.data.scenes_per_shard, rows, columns, 384)
    assert tokens.dtype == np.uint16
    config.task = "finetune"
    with pytest.raises(InputError, match="--cached_teacher"):
        abstract.make_run(read_settings(config), mesh, cached=True)


@CONFIG_FILES
def test_what_does_not_fit_ends_with_code_2_and_the_shortfall(monkeypatch, capsys):
    """The compiler's message as it was for a 7B teacher on a v5e; the chip's memory is the one it names."""
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (21.66G) exceeds "
        "available HBM (15.75G)."
    )
    peak = compile.needed_bytes(message)
    assert peak == int(21.66 * 2**30)
    assert compile.needed_bytes("RESOURCE_EXHAUSTED: Used 512.5M of 256M hbm.") == int(512.5 * 2**20)
    with pytest.raises(RuntimeError, match="the compiler failed: Mosaic"):
        compile.needed_bytes("Mosaic failed")
    result = {"topology": "v5e:4x4", "devices": 16, "peak_bytes_per_device": peak, "parameter_bytes": 1, "fits": False}
    result |= {"hbm_bytes": chips.CHIPS["v5e"].hbm_bytes, "compile_s": 1.0, "collectives": None}
    monkeypatch.setattr(compile, "compile_step", lambda *_, **__: (result, ""))
    monkeypatch.setattr(compile.os, "environ", dict(compile.os.environ))
    with pytest.raises(SystemExit) as end:
        compile.main(["compile", f"--config={ROOT}/configs/smoke.py", "--topology=v5e:4x4"])
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert "lacks 5.91 GiB" in err
    assert err.count("\n") == 1
    assert json.loads(out.splitlines()[-1]) == result


def test_help_and_a_missing_config_end_as_they_should():
    def command(*arguments):
        arguments = [sys.executable, "-m", "scalr_jax.compile", *arguments]
        return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    shown = command("--help")
    assert shown.returncode == 0
    assert "--topology=v5p:8x8x16" in shown.stdout
    missing = command("--config=configs/nope.py", "--topology=v5e:2x2")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "configs/nope.py" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_weights_have_float32_gradients_of_bfloat16_products():
    x = jax.random.normal(jax.random.key(0), (512, 24)).astype(jnp.bfloat16)
    kernel, bias = jax.random.normal(jax.random.key(1), (24, 16)), jnp.arange(16.0)
    loss = lambda f, *args: (f(*args).astype(jnp.float32) ** 2).sum()  # noqa: E731
    plain = lambda x, kernel, bias: x @ kernel.astype(x.dtype) + bias.astype(x.dtype)  # noqa: E731
    np.testing.assert_array_equal(linear(x, kernel, bias), plain(x, kernel, bias))
    gradients = usual_jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
    ours = gradients(linear, x, kernel, bias)
    exact = gradients(plain, x.astype(jnp.float32), kernel, bias)
    assert [g.dtype for g in ours] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.02, atol=0.02 * float(jnp.abs(b).max()))
    # In float32 it is JAX's own gradient.
    x = x.astype(jnp.float32)
    for a, b in zip(gradients(linear, x, kernel, bias), exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def split_steps():
    """fsdp -> (the compiled text, parameters and loss after a step) of a distillation step on eight CPU devices."""
    capacities = Capacities(96, 2, (72, 72, 72), (512, 128, 128))
    shards = [[random_scene(2 * d), random_scene(2 * d + 1, 30)] for d in range(8)]
    batch = stack_shards([pack_shard(scenes, capacities, scenes[0], GRIDS) for scenes in shards])
    vit_config = vit.ViTConfig(patch_size=8, width=48, depth=3, num_heads=2, hidden=80, position_grid=(2, 3))
    weights = vit.init(vit_config, jax.random.key(1), IMAGE_SIZE)
    student = small_student(channels=40, depth=15, out_features=48)  # five groups, so that CPUs loop too
    optimizer = optim.make_optimizer(OptimizerSettings(), student.backbone)
    options = {"sources": (Source(48, IMAGE_SIZE, vit_config, "x"),), "seed": 0, "batch_size": 8}
    step = steps.make_distill_step(student, optimizer, lambda t: jnp.full((), 1e-3), **options)

    one = jax.tree.map(lambda x: x[:1], batch)
    fresh = jax.jit(lambda b: init_state(student, b, optimizer, None, jax.random.key(0)))(one)

    def run(fsdp):
        mesh = sharding.make_mesh(-1, fsdp)
        put = sharding.put_batch(batch, mesh)
        places = sharding.parameter_shardings(fresh, mesh)
        state = jax.device_put(fresh, places)
        teacher = (Teacher(jax.device_put(weights, sharding.parameter_shardings(weights, mesh))),)
        lowered = jax.jit(step, out_shardings=(places, sharding.replicated(mesh))).lower(state, teacher, put)
        program = lowered.compile()
        state, metrics = program(state, teacher, put)
        return program.as_text(), jax.device_get(state.params), float(metrics["loss"])

    return {fsdp: run(fsdp) for fsdp in (1, 4)}


@pytest.mark.slow
def test_parameters_split_over_fsdp_make_the_same_step(split_steps):
    (_, params, loss), (_, split_params, split_loss) = split_steps[1], split_steps[4]
    assert split_loss == pytest.approx(loss, rel=1e-5)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(split_params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_devices_send_no_activations(split_steps, fsdp):
    """No collective has an axis of points, cells, halo cells or tokens, of one shard or of all; what is reduced is the
    gradients, loops times their trips: over fsdp, and an fsdp-th of them over data."""
    text, params, _ = split_steps[fsdp]
    found = hlo.collectives(hlo.parse(text))
    check_no_activations(found, (96, 72, 512, 128, 7), 8)
    total = 4 * sum(x.size for x in jax.tree.leaves(params))
    assert reduced_bytes(found) == pytest.approx(total * (1 if fsdp == 1 else 1 + 1 / fsdp), rel=0.1)
    kinds = set(hlo.summary(found))
    assert kinds == {"all-reduce"} if fsdp == 1 else kinds <= {"all-reduce", "all-gather", "reduce-scatter"}


def check_no_activations(found, sizes, num_shards):
    """`sizes`: points, cells and tokens of a shard, none of which is a width of the models."""
    forbidden = {size * times for size in sizes for times in (1, num_shards)}
    for collective in found:
        for part in collective.arrays:
            assert not forbidden & set(part.dims), (collective.kind, part.dims, collective.source)


def reduced_bytes(found):
    summary = hlo.summary(found)
    return sum(summary.get(kind, {"bytes": 0})["bytes"] for kind in ("all-reduce", "reduce-scatter"))


POINTS, CELLS, HALO, PILLARS, IMAGE = 4096, 1024, 2048, 640, (56, 84)


def pod_run(topology, *, slices=1, fsdp=1, **model):
    """The abstract run of a small published student on a topology. Three groups of layers, so loops stay loops."""
    config = recipes.pretraining("scalr", 128)
    config.model.depth = 9
    config.model.update(model)
    config.data.update(points_per_shard=POINTS, scenes_per_shard=2, scenes_per_step=0, image_size=IMAGE)
    config.data.update(cells_per_shard=(CELLS,) * 3, halo_per_shard=(HALO,) * 3, pillars_per_shard=(PILLARS,))
    mesh = sharding.make_mesh(-1, fsdp, devices=chips.devices_of(topology, slices))
    return abstract.make_run(read_settings(config), mesh, "vits14"), mesh.size


def pod_collectives(*arguments, **settings):
    pytest.importorskip("libtpu", reason="needs the tpu extra: pip install 'scalr_jax[tpu]'")
    run, num_devices = pod_run(*arguments, **settings)
    found = hlo.collectives(hlo.parse(run.lower().compile().as_text()))
    tokens = math.prod(size // 14 for size in IMAGE) + 1
    check_no_activations(found, (POINTS, CELLS, HALO, PILLARS, tokens), num_devices)
    return run, found


@pytest.mark.tpu
def test_a_pod_reduces_the_gradients_and_nothing_grows_with_it():
    run, few = pod_collectives("v5e:2x2")
    _, many = pod_collectives("v5e:4x4")
    assert set(hlo.summary(few)) == {"all-reduce"}
    assert reduced_bytes(few) == pytest.approx(run.parameter_bytes, rel=0.1)
    assert hlo.summary(many) == hlo.summary(few)
    # The layers' share of them stands in the loop over groups.
    assert sum(c.bytes for c in few if c.times == 3) > 0.5 * run.parameter_bytes


@pytest.mark.tpu
def test_split_parameters_are_gathered_and_their_gradients_scattered():
    run, found = pod_collectives("v5p:2x2x1", fsdp=4)
    summary = hlo.summary(found)
    passed = summary.pop("collective-permute", {"bytes": 0})  # XLA's own ring, for the kernel of five input features
    assert passed["bytes"] < 0.01 * run.parameter_bytes
    assert set(summary) == {"all-reduce", "all-gather", "reduce-scatter"}
    assert reduced_bytes(found) == pytest.approx(run.parameter_bytes, rel=0.1)
    assert summary["reduce-scatter"]["bytes"] > 0.8 * run.parameter_bytes
    # Each kernel of the teacher once in bfloat16, of the student up to three times: forward, again, backward.
    teacher_bytes = sum(2 * x.size for x in jax.tree.leaves(run.teacher))
    gathered = summary["all-gather"]["bytes"]
    assert 0.9 * teacher_bytes < gathered < teacher_bytes + 3 * run.parameter_bytes


@pytest.mark.tpu
def test_a_vavit_reduces_its_gradients_alone():
    run, found = pod_collectives("v5e:2x2", name="vavit_tiny")
    assert set(hlo.summary(found)) == {"all-reduce"}
    assert reduced_bytes(found) == pytest.approx(run.parameter_bytes, rel=0.1)


@pytest.mark.tpu
def test_slices_exchange_their_share_of_the_gradients():
    """Plain spatial mixing, which compiles in a third of the time: what crosses between slices is the same."""
    run, found = pod_collectives("v5e:2x2", slices=2, implementation="cells")
    summary = hlo.summary(found)
    assert reduced_bytes(found) == pytest.approx(run.parameter_bytes, rel=0.1)
    assert summary[hlo.BETWEEN_SLICES]["bytes"] == pytest.approx(run.parameter_bytes / 4, rel=0.25)


# Bytes and FLOPs of a step on one H100 (jax 0.10.2, 2026-11-29).
TRAFFIC_VAVIT, FLOPS_VAVIT = 628_616_761, 5_768_094_720
TRAFFIC, FLOPS = 841_247_186, 14_250_964_480


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("model", "traffic", "work"),
    [({"name": "vavit_tiny", "dtype": "bfloat16"}, TRAFFIC_VAVIT, FLOPS_VAVIT), ({"depth": 3}, TRAFFIC, FLOPS)],
)
def test_a_gpu_steps_bytes_and_flops_are_those_committed(model, traffic, work):
    """Within 3 %: what costs a GPU time is not added unseen."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the cuda extra: pip install 'scalr_jax[cuda]'")
    chip = chips.CHIPS["h100"]
    with abstract.compiling_for(chip) as options:
        run, _ = pod_run("h100:1", **model)
        program = hlo.parse(run.lower().compile(options).as_text())
    assert hlo_cost.hbm_bytes(program) == pytest.approx(traffic, rel=0.03)
    assert hlo_cost.flops(program) == pytest.approx(work, rel=0.03)
    work = predict.useful(run.student, run.teacher_config, IMAGE, run.capacities)
    found = predict.predict(program, chip, 1, work)
    assert {"teacher", "products", "optimiser", "embedding"} <= found["categories"].keys()
    assert 0 < found["predicted_mfu"] < roofline.CONSTANTS["peak_share"]
    assert sum(kind["bytes"] for kind in found["categories"].values()) == hlo_cost.hbm_bytes(program)


@pytest.mark.cuda
def test_several_gpus_reduce_the_gradients_alone():
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs the cuda extra: pip install 'scalr_jax[cuda]'")
    with abstract.compiling_for(chips.CHIPS["h100"]) as options:
        run, num_devices = pod_run("h100:8", name="vavit_tiny")
        found = hlo.collectives(hlo.parse(run.lower().compile(options).as_text()))
    check_no_activations(found, (POINTS, PILLARS), num_devices)
    assert set(hlo.summary(found)) == {"all-reduce"}
    assert reduced_bytes(found) == pytest.approx(run.parameter_bytes, rel=0.1)
