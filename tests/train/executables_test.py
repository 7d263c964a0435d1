"""Compiled steps in files: what comes back is the step itself, and no other is taken for it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.bench import programs, scenes
from scalr_jax.runtime.errors import InputError
from scalr_jax.train import executables
from tests.support.bench_batch import save_batch
from tests.support.checks import present
from tests.support.small_student import small_student


def lowered(rows=4, rate=0.5, teacher=None):
    def step(state, teacher, batch):
        return {"w": state["w"] - rate * jnp.tanh(batch).sum(0)}, batch.mean()

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return jax.jit(step, donate_argnums=0).lower({"w": shape((3,))}, teacher, shape((rows, 3)))


@pytest.fixture(scope="module")
def devices():
    return jax.devices()[:1]


@pytest.fixture(scope="module")
def file(tmp_path_factory, devices):
    path = tmp_path_factory.mktemp("saved") / "step"
    step = lowered()
    assert executables.save(path, step, step.compile(), devices) == path.stat().st_size
    return path


def test_a_step_comes_back_with_its_bits_and_takes_its_state(file, devices):
    batch = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    found = executables.load(present(executables.read(file)), lowered(), devices)
    state, wanted = ({"w": jnp.arange(3.0)} for _ in range(2))
    ours, theirs = found(state, None, batch), lowered().compile()(wanted, None, batch)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert state["w"].is_deleted() == wanted["w"].is_deleted() == True  # noqa: E712


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda: lowered(rows=5), r"batch is float32\[5, 3\] here and was float32\[4, 3\].*cells_per_shard"),
        (lambda: lowered(teacher=jnp.zeros(2)), r"teachers is float32\[2\] here and was not there"),
        (lambda: lowered(rate=0.25), "a constant.*total_updates"),
    ],
)
def test_another_step_is_refused(file, devices, step, words):
    with pytest.raises(InputError, match=rf"step is another step: {words}.*compile --save"):
        executables.load(present(executables.read(file)), step(), devices)


@pytest.mark.parametrize(("key", "words"), [("jax", "JAX is"), ("device", "the device is"), ("devices", "number of")])
def test_another_machine_is_refused(file, devices, tmp_path, key, words):
    header, _, payload = file.read_bytes().partition(b"\n")
    (tmp_path / "step").write_bytes(json.dumps({**json.loads(header), key: "0.1"}).encode() + b"\n" + payload)
    with pytest.raises(InputError, match=f"{words} .* here and was 0.1"):
        executables.load(present(executables.read(tmp_path / "step")), lowered(), devices)


def test_what_is_no_step_is_named_before_anything_of_it_runs(file, tmp_path):
    content = file.read_bytes()
    for name, text, words in (
        ("cut", content[:-1], "cut is damaged"),
        ("empty", b"", "empty is no compiled step"),
        ("list", b"[1]\n", "list is no compiled step"),
        ("pickle", b"\x80\x04.", "pickle is no compiled step"),
    ):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(InputError, match=words):
            executables.read(tmp_path / name)
    with pytest.raises(InputError, match=r"nowhere: .*config\.executable"):
        executables.read(tmp_path / "nowhere")
    assert executables.read("") is None


def test_a_training_step_comes_back_as_it_was(tmp_path, devices):
    """Lowered from shapes, as `compile --save` does it, and from arrays, as a run does."""
    batch = scenes.load(save_batch(tmp_path / "batch.npz")).batch._replace(images=None, pixels=None)
    student = small_student(channels=4, depth=1)
    init, step = programs.student_step(student)
    jitted = jax.jit(step, donate_argnums=0)
    made = jax.jit(init)
    target = jax.ShapeDtypeStruct((*batch.scene.shape, student.out_features), jnp.float32)
    shapes = jitted.lower(jax.eval_shape(init, batch), target, jax.eval_shape(lambda: batch))
    executables.save(tmp_path / "step", shapes, compiled := shapes.compile(), devices)
    arrays = (jnp.ones(target.shape), jax.device_put(batch))
    run = executables.load(present(executables.read(tmp_path / "step")), jitted.lower(made(batch), *arrays), devices)
    ours, theirs = (step(made(batch), *arrays) for step in (run, compiled))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
