"""Values that are not finite: the step that meets them changes nothing, and twenty in a row stop the run."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.config import OptimizerSettings
from scalr_jax.data.packing import Capacities, pack_shard, stack_shards
from scalr_jax.data.pipeline import Step
from scalr_jax.data.scenes import Frame
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import json_text
from scalr_jax.train import losses, optim, steps
from scalr_jax.train.state import init_state, start_average
from scalr_jax.train.watch import BEHIND, IN_A_ROW, Made, Watch, first_not_finite
from tests.support.checks import mentions
from tests.support.datasets import Frames
from tests.support.plain_runs import finetune
from tests.support.random_scenes import GRIDS, random_scene
from tests.support.runs import lines, on_one_device
from tests.support.small_student import init, small_student


@pytest.fixture(scope="module")
def batch():
    scenes = [random_scene(0), random_scene(1, 30)]
    shard = pack_shard(scenes, Capacities(96, 2, (72, 72, 72), (512, 128, 128)), scenes[0], GRIDS)
    batch = jax.device_put(stack_shards([shard]))
    return batch._replace(planes=batch.planes[:1])  # one plane: each layer is a group


@pytest.fixture(scope="module")
def training(batch):
    """A state with an average, good targets, and the jitted step(state, (targets, learning rate), batch)."""
    student = small_student(norm="batch", grids=GRIDS[:1], depth=1)
    optimizer = optim.make_optimizer(OptimizerSettings(), student.backbone)

    def fresh(batch):
        state = init_state(student, batch, optimizer, None, jax.random.key(0))
        return start_average(state, tuple(state.params))

    state = jax.jit(fresh)(batch)

    def step(state, given, batch):
        target, rate = given
        made = steps.make_student_step(student, optimizer, lambda _: rate, seed=0, batch_size=2)
        return steps.averaged(made, 0.5)(state, target, batch)

    targets = np.random.default_rng(1).normal(size=(*batch.scene.shape, student.out_features)).astype(np.float32)
    return state, targets, jax.jit(step)


@pytest.mark.parametrize("wrong", ["input", "teacher", "rate"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(wrong, training, batch):
    state, targets, step = training
    given, feats = targets.copy(), np.array(batch.feats)
    if wrong == "teacher":
        given[0, 3, 0] = np.nan
    if wrong == "input":
        feats[0, 5, 0] = 3e38
    given, bad = (given, 1e35 if wrong == "rate" else 1e-3), batch._replace(feats=feats)
    good, metrics = step(state, (targets, 1e-3), batch)
    assert metrics["skipped_steps"] == 0
    after, metrics = step(good, given, bad)
    assert metrics["skipped_steps"] == 1
    assert (int(after.step), int(after.scenes_seen)) == (2, 4)
    for name in ("params", "batch_stats", "opt_state", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(good, name))
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), good.params, state.params)
    assert max(jax.tree.leaves(moved)) > 0
    assert step(after, (targets, 1e-3), batch)[1]["skipped_steps"] == 0  # and training goes on


def test_a_norm_of_nan_is_nan_and_of_zero_has_no_gradient():
    rows = jnp.array([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0]])
    np.testing.assert_array_equal(losses.safe_norm(rows), [5.0, 0.0, np.nan])
    np.testing.assert_array_equal(jax.grad(lambda x: losses.safe_norm(x).sum())(rows[1]), [0.0, 0.0])


@pytest.mark.parametrize(("pattern", "stops"), [((20,), 20), ((19, 1, 20), 40), ((19, 1, 19), None)])
def test_twenty_in_a_row_stop(pattern, stops):
    """`pattern`: skipped, made, skipped ... in a row. The newest steps are looked at when nothing follows."""
    skipped = [k % 2 == 0 for k, number in enumerate(pattern) for _ in range(number)]
    watch, found = Watch(), []
    for number, flag in enumerate(skipped, 1):
        made = Made(number, Step(*[None] * 5), {"skipped_steps": np.int32(flag)})  # type: ignore[arg-type]
        found.append(watch.add(made, last=number == len(skipped)))
    assert [made.number for made in found if made] == ([stops] if stops else [])
    assert all(made is None for made in found[: IN_A_ROW + BEHIND - 2 - (stops == IN_A_ROW) * (BEHIND - 1)])


def test_the_first_layer_that_is_not_finite_is_found(batch):
    """In the embedding, in one group of a loop, and in the head."""
    student = small_student(grids=GRIDS[:1], depth=2, remat="group")
    variables = init(student, batch)

    def spoiled(*names, group: Any = ...):
        params = jax.tree.map(lambda x: x, variables["params"])
        here = params
        for name in names[:-1]:
            here = here[name]
        here[names[-1]] = np.array(here[names[-1]])
        here[names[-1]][group] = np.nan
        return first_not_finite(student, {**variables, "params": params}, batch)

    assert first_not_finite(student, variables, batch) is None
    assert spoiled("embedding", "point", "kernel") == "embedding/point"
    assert spoiled("head", "out", "kernel") == "head/out"
    layer = ("backbone", "groups", "plane_0", "spatial")
    assert spoiled(*layer, "kernel_1", group=1) == f"{'/'.join(layer)} of group 2"


@dataclasses.dataclass(frozen=True)
class Wild(Frames):
    """Six small scans, whose intensity is huge, and finite, after the first few."""

    tame: int

    class_names = ("a", "b")

    def __len__(self):
        return 6

    def frame(self, index, rng=None, *, camera=None):
        own = np.random.default_rng(index)
        points = own.uniform(-6, 6, (60, 4)) * [1, 1, 0.2, 1]
        points[:, 3] = 1 if index < self.tame else 3e38
        return Frame(self.name(index), points, np.eye(4), labels=own.integers(0, 2, 60).astype(np.uint8))


@pytest.fixture
def one_device(monkeypatch):
    on_one_device(monkeypatch)


def test_a_run_on_wild_scans_stops_naming_them_and_the_layer(one_device, tmp_path):
    wild = Wild(tame=0)
    with pytest.raises(InputError, match=mentions("frames/", "20 steps", "step 20", "every layer", "3e+38")):
        finetune(wild, tmp_path)
    logged = lines(tmp_path)
    assert sum(line["train/skipped_steps"] for line in logged) == 20
    assert not any("train/loss" in line for line in logged)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_run_that_learned_nothing_is_refused_also_when_it_is_started_again(one_device, tmp_path):
    for _ in range(2):
        with pytest.raises(InputError, match=mentions(tmp_path, "each of the 5 steps", "optimizer.learning_rate")):
            finetune(Wild(tame=0), tmp_path, num_steps=5)


def test_some_wild_scans_are_skipped_and_counted(one_device, tmp_path):
    state = finetune(Wild(tame=5), tmp_path, metrics='{"step": 5, "train/loss": 1.0}\n', num_steps=12)
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == [5, 10, 12]
    assert 0 < sum(line["train/skipped_steps"] for line in logged) < 12
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert all(np.isfinite(line["train/loss"]) for line in logged)


def test_json_has_null_where_a_number_is_not_finite():
    text = json_text({"a": float("nan"), "b": [1.5, float("inf"), np.float64("nan")], "c": {"d": (1, "x")}})
    assert json.loads(text) == {"a": None, "b": [1.5, None, None], "c": {"d": [1, "x"]}}
