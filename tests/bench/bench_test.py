"""The benches on tiny sizes: every key is there and makes sense; FLOPs counted by hand are what JAX and XLA see."""

import itertools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.bench import products, programs, published, scenes, timing
from scalr_jax.bench import student as bench_student
from scalr_jax.bench.run import main
from scalr_jax.interop.layout import published_batch
from scalr_jax.models import flops, vit
from scalr_jax.models.waffleiron import WaffleIron, WaffleIronBackbone
from scalr_jax.runtime.chips import peak, utilisation
from scalr_jax.train import optim, steps
from tests.support.bench_batch import save_batch
from tests.support.checks import present
from tests.support.small_student import small_student
from tests.support.traced_flops import traced_flops

HEADER = ("device", "jax", "runs")
STUDENT = ["points", "points_per_s", "flops", "peak_bytes", "spatial_peak_bytes", "spatial_dense_peak_bytes"]
STUDENT += ["forward_s", "step_s", "layer_forward_s", "layer_step_direct_s", "layer_matmul_s", "layer_matmul_step_s"]
STUDENT += ["matmul_step_s", "spatial_s", "spatial_dense_s", "spatial_layer_s", "spatial_share"]
STEP = ["points", "step_s", "teacher_s", "student_step_s", "scenes_per_s", "points_per_s", "flops", "peak_bytes"]
TEACHER = ["images", "tokens", "forward_s", "images_per_s", "flops", "peak_bytes"]


@pytest.fixture(scope="module")
def batch_file(tmp_path_factory):
    """Two random scenes with images of 28 x 42 pixels, as `--save_batch` writes them."""
    return save_batch(tmp_path_factory.mktemp("bench") / "batch.npz")


def run(capsys, *argv):
    """The object of the last line."""
    main(list(argv))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def check(result, keys):
    for key in HEADER:
        assert result[key], key
    for key in keys:
        assert math.isfinite(result[key]), key
        assert result[key] > 0, key
    assert result["mfu"] is None  # a CPU has no peak
    assert result["device"] == "cpu"


SMALL = ("--channels=8", "--runs=1")


@pytest.mark.slow
def test_student(capsys, batch_file, monkeypatch):
    monkeypatch.setattr(bench_student, "LOOPED", 0)  # few layers compile faster, and are as good for what is asserted
    result = run(capsys, "student", f"--batch={batch_file}", *SMALL, "--depth=1", "--out_features=8")
    check(result, STUDENT)
    assert math.isfinite(result["layer_step_s"])  # a difference of two times: on so small a batch it is noise
    assert result["points"] == 83
    assert result["spatial_peak_bytes"] < result["spatial_dense_peak_bytes"]


DEMO = ("--teacher=demo", "--image_size=32,64")


@pytest.mark.slow
def test_step(capsys, batch_file):
    result = run(capsys, "step", f"--batch={batch_file}", *SMALL, "--depth=1", *DEMO, "--cache=int8")
    check(result, {*STEP, "cached_step_s", "cached_ratio"})
    assert result["cached_ratio"] == pytest.approx(result["step_s"] / result["cached_step_s"], rel=1e-3)
    assert result["image_size"] == [32, 64]


def test_teacher(capsys):
    result = run(capsys, "teacher", "--teacher=demo", "--images=1", "--image_size=32,32", "--runs=1")
    check(result, TEACHER)


@pytest.mark.slow
def test_compile_times(capsys, batch_file):
    """docs/measurements/cpu.md has the figure of 12 and 48 layers; here it is that both are measured."""
    result = run(capsys, "student", f"--batch={batch_file}", "--channels=8", "--compile=1,2", "--runs=1")
    assert set(result["compile_s"]) == {"1", "2"}
    assert min(result["compile_s"].values()) > 0
    assert math.isfinite(result["compile_ratio"])


def test_a_batch_comes_back_as_it_was(batch_file, tmp_path):
    loaded = scenes.load(batch_file)
    scenes.save(tmp_path / "again.npz", loaded)
    again = scenes.load(tmp_path / "again.npz")
    assert again[1:] == loaded[1:]
    assert again.num_points == 83
    jax.tree.map(np.testing.assert_array_equal, loaded.batch, again.batch)


def test_what_the_published_student_is_given_are_the_same_scenes(batch_file):
    """Padded for it and packed again they are what they were; the outputs of both are compared by the bench itself."""
    loaded = scenes.load(batch_file)
    arrays = published.padded(loaded.batch, loaded.grids)
    assert arrays.feat.shape == (2, 5, 42)
    again = published_batch(*arrays, loaded.grids)
    for name in ("feats", "scene", "neighbors"):
        wanted = getattr(loaded.batch, name)[:, :83]  # without the shard's padding
        np.testing.assert_array_equal(np.asarray(getattr(again, name)), wanted, err_msg=name)
    for mine, theirs in zip(loaded.batch.planes, again.planes, strict=True):
        cells = [plane.grid_index[0][plane.cell[0, :83]] for plane in (mine, theirs)]
        np.testing.assert_array_equal(*cells)


@pytest.mark.parametrize("name", [[], ["student"], ["step"], ["teacher"]])
def test_help_has_an_example(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main([*name, "--help"])
    assert stopped.value.code == 0
    assert "    python -m scalr_jax.bench" in capsys.readouterr().out


def test_a_saved_batch_needs_no_data_libraries(batch_file):
    """Libraries that a bare machine lacks are blocked; the modules must load, and read the batch."""
    blocked = ["grain", "ml_collections", "tensorflow_datasets", "array_record", "pykdtree", "PIL", "matplotlib"]
    program = (
        "import sys, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked}: raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from scalr_jax.bench import run, scenes, step, student, teacher\n"
        "from pathlib import Path\n"
        f"print(scenes.load(Path({str(batch_file)!r})).num_points)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["83"], done.stderr


SIZES = flops.Sizes(channels=64, depth=6, out_features=48, head_hidden=96, num_neighbors=4, num_features=5)


def test_flops_of_a_step_are_those_that_are_traced(batch_file):
    """The embedding's statistics (5 features wide) are the only products that are not counted; what is counted and no
    product are its neighbours' hidden layers, made twice of 5 multiply-adds."""
    loaded = scenes.load(batch_file)
    batch = jax.device_put(loaded.batch)
    student = small_student(channels=64, depth=6, out_features=48, head_hidden=96)
    optimizer = optim.make_optimizer(programs.OPTIMIZER, student.backbone)
    schedule = optim.make_schedule(programs.OPTIMIZER, 1.0)
    step = steps.make_student_step(student, optimizer, schedule, seed=0, batch_size=8)
    state = jax.eval_shape(programs.student_step(student)[0], batch)
    target = jax.ShapeDtypeStruct((*batch.scene.shape, 48), jnp.float32)
    traced = traced_flops(step, state, target, batch)
    counted = flops.flops(flops.student_products(SIZES), batch.scene.size, backward=True, again=True)
    counted -= 2 * batch.scene.size * SIZES.num_neighbors * 2 * SIZES.num_features * SIZES.channels
    assert counted <= traced <= 1.01 * counted


@pytest.mark.slow
def test_products_of_a_step_are_all_there():
    """As traced, and as XLA counts them, which counts a loop once."""
    num_points = 256
    operands = products.step_operands(SIZES, num_points, jnp.float32)
    traced = traced_flops(products.step_products, operands)
    assert traced == flops.flops(flops.student_products(SIZES), num_points, backward=True, again=True)
    compiled = jax.jit(products.step_products).lower(operands).compile()
    once = flops.student_products(SIZES._replace(num_neighbors=1, depth=1))
    least = flops.flops(once, num_points, backward=True, again=True)
    assert least <= present(compiled.cost_analysis())["flops"] <= 1.1 * least
    for leaf in jax.tree.leaves(compiled(operands)):
        assert 1e-3 < float(jnp.abs(leaf).mean()) < 1e6  # neither vanished nor overflowed


def test_flops_of_layers_are_nearly_all_that_xla_counts(batch_file):
    """At 256 channels, norms, activations and spatial mixing are a few percent of a layer's operations."""
    loaded = scenes.load(batch_file)
    batch = jax.device_put(loaded.batch)
    backbone, rows = small_student(channels=256).backbone, batch.scene.size
    assert isinstance(backbone, WaffleIronBackbone)
    model = WaffleIron(backbone)
    x = jnp.zeros((rows, 256))

    def apply(variables, x, batch):
        return model.apply(variables, x, batch.planes, batch.scene, 2, train=False)

    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, batch.planes, batch.scene, 2, train=False))
    compiled = jax.jit(apply).lower(variables, x, batch).compile()
    layers = flops.layer_products(SIZES._replace(channels=256)) * 3
    counted = flops.flops(layers, rows, backward=False)
    assert counted <= present(compiled.cost_analysis())["flops"] <= 1.15 * counted


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_flops_of_a_teacher_are_those_that_are_traced(ffn):
    config = vit.ViTConfig(width=64, depth=3, num_heads=2, hidden=96, ffn=ffn, num_registers=2, position_grid=(2, 3))
    shapes = jax.eval_shape(lambda: vit.init(config, jax.random.key(0), (28, 42)))
    images = jax.ShapeDtypeStruct((2, 28, 42, 3), jnp.float32)
    traced = traced_flops(lambda params, images: vit.features(config, params, images), shapes, images)
    assert traced == flops.teacher_flops(config, 2, (28, 42))


def test_known_chips():
    kinds = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "cpu": None}
    kinds |= {"NVIDIA A100-SXM4-80GB": 312e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12}
    kinds |= {"TPU v5e": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12}
    assert {kind: peak(kind) for kind in kinds} == kinds
    assert utilisation(1e12, 1.0, "TPU v6e") == pytest.approx(1 / 918)


def test_turns_are_interleaved():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleave(functions, runs=3)
    assert len(times["a"].seconds) == 3
    assert order[:4] == ["a", "a", "b", "b"]  # warm-up, and the number of calls
    assert len(list(itertools.groupby(order[4:]))) == 6  # a b a b a b
