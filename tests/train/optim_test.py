"""Schedules against the published numbers, and the optimiser against its formula."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scalr_jax import recipes
from scalr_jax.config import OptimizerSettings
from scalr_jax.data.scenes import SceneNeeds
from scalr_jax.interop.model import student_of
from scalr_jax.interop.waffleiron import weight_table
from scalr_jax.models.build import make_backbone
from scalr_jax.models.waffleiron import WaffleIronBackbone
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import flatten
from scalr_jax.train import optim
from tests.support.checks import mentions
from tests.support.random_scenes import FIELD_OF_VIEW
from tests.support.tiny_student import tiny_model

NEEDS = SceneNeeds(FIELD_OF_VIEW)
BACKBONE = WaffleIronBackbone(NEEDS, channels=2, depth=2)


def update(optimizer, gradients, params) -> Any:
    """The first update."""
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(gradients, params)


def test_published_schedules(golden):
    arrays = golden("schedules")
    t = jnp.asarray(arrays["step"], jnp.float32)
    warmup, total, final = arrays["args_cosine"]
    ours = optim.warmup_cosine(t, warmup=warmup, total=total, final=final)
    np.testing.assert_allclose(ours, arrays["warmup_cosine"], rtol=1e-6, atol=1e-6)
    warmup, cooldown, timescale, total = arrays["args_rsqrt"].tolist()
    ours = optim.warmup_rsqrt_cooldown(t, warmup=warmup, cooldown=cooldown, timescale=timescale, total=total)
    np.testing.assert_allclose(ours, arrays["warmup_rsqrt_cooldown"], rtol=1e-6, atol=1e-6)


def test_the_cool_down_begins_after_its_step():
    """As released; also where the step comes from a share of the schedule and is rounded."""
    settings = OptimizerSettings(schedule="rsqrt", learning_rate=1.0, warmup_share=1 / 65)
    for steps in (1, 7, 6_887):
        rate = optim.make_schedule(settings, 65.0 * steps)
        before, after = (float(rate(jnp.float32(63 * steps + late))) for late in (0, 1e-3 * steps))
        assert before == pytest.approx((1 + 62 / 0.45) ** -0.5, rel=1e-6)
        assert after < (1 + 63 / 0.45) ** -0.5


def test_schedules_stay_at_their_end():
    assert optim.warmup_cosine(jnp.float32(999), warmup=1, total=10, final=0.1) == pytest.approx(0.1)
    assert optim.warmup_rsqrt_cooldown(jnp.float32(999), warmup=1, cooldown=8, timescale=2, total=10) == 0


def test_the_settings_choose_the_schedule():
    cosine = optim.make_schedule(OptimizerSettings(), 100.0)
    assert cosine(jnp.float32(2)) == pytest.approx(2e-3)  # the warm-up is 2 % long
    assert cosine(jnp.float32(100)) == pytest.approx(1e-5)
    nothing = optim.make_schedule(OptimizerSettings(learning_rate=0.0, schedule="constant"), 100.0)
    assert nothing(jnp.float32(5)) == 0


def test_adamw_decays_every_parameter():
    """One step equals AdamW's formula (decoupled weight decay), biases included."""
    optimizer = optim.make_optimizer(OptimizerSettings(), BACKBONE)
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}
    gradients = {"kernel": jnp.array([0.5, 0.1]), "bias": jnp.array([-1.0])}
    updates = update(optimizer, gradients, params)
    theirs = update(optax.adamw(1.0, weight_decay=0.03), gradients, params)
    for name in params:
        np.testing.assert_allclose(-updates[name], theirs[name], rtol=1e-6)


def test_lamb_by_its_formula():
    """A matrix as Optax's LAMB has it, each layer of a stack by itself, and vectors as AdamW."""
    rng = np.random.default_rng(0)
    stack, kernel, bias, zero = (
        rng.normal(size=(2, 4, 3)),
        rng.normal(size=(4, 3)),
        rng.normal(size=3),
        np.zeros((2, 2)),
    )
    params: Any = {"groups": {"kernel": stack}, "head": {"kernel": kernel, "bias": bias, "zero": zero}}
    params = {k: {name: x.astype(np.float32) for name, x in v.items()} for k, v in params.items()}
    gradients = {
        k: {name: rng.normal(size=x.shape).astype(np.float32) for name, x in v.items()} for k, v in params.items()
    }
    ours = update(optim.make_optimizer(OptimizerSettings(name="lamb"), BACKBONE), gradients, params)
    apart = {"a": params["groups"]["kernel"][0], "b": params["groups"]["kernel"][1], "c": params["head"]["kernel"]}
    apart_gradients = {
        "a": gradients["groups"]["kernel"][0],
        "b": gradients["groups"]["kernel"][1],
        "c": gradients["head"]["kernel"],
    }
    lamb = update(optax.lamb(1.0, eps=1e-8, weight_decay=0.03), apart_gradients, apart)
    for mine, theirs in zip((*ours["groups"]["kernel"], ours["head"]["kernel"]), lamb.values(), strict=True):
        np.testing.assert_allclose(-mine, theirs, rtol=1e-5, atol=1e-6)
    adamw = update(optax.adamw(1.0, weight_decay=0.03), gradients, params)
    for name in ("bias", "zero"):
        np.testing.assert_allclose(-ours["head"][name], adamw["head"][name], rtol=1e-5, atol=1e-6)


def test_a_large_batch_sees_the_same_scenes_on_the_same_schedule():
    base = recipes.pretraining("scalr")
    large = recipes.large_batch(recipes.packed(recipes.pretraining("scalr"), 64), 60)
    assert large.num_steps * 64 * recipes.PACK_MEAN == pytest.approx(base.num_steps * 8, rel=1e-3)
    assert large.optimizer.total_updates == base.num_steps  # the schedule counts scenes in units of 8
    assert large.optimizer.learning_rate == pytest.approx(60**0.5 * base.optimizer.learning_rate)
    assert large.optimizer.warmup_share == pytest.approx(min(0.1, 60**0.5 * base.optimizer.warmup_share))
    with pytest.raises(InputError, match=mentions(0)):
        recipes.large_batch(base, 0)


@pytest.mark.parametrize("depth", [1, 5, 6])
def test_layer_decay_by_its_formula(depth):
    """Learning rate x decay^(depth + 1 - layer); layer d of the backbone is d + 1, whatever stack it lies in."""
    decay = 0.9
    groups, rest = divmod(depth, 3)
    layers = {"groups": {f"plane_{k}": {"bias": jnp.ones((groups, 2))} for k in range(3 if groups else 0)}}
    layers["rest"] = {f"plane_{k}": {"bias": jnp.ones(2)} for k in range(rest)}
    params = {"embedding": {"kernel": jnp.ones((2, 2))}, "backbone": layers, "head": {"bias": jnp.ones(3)}}
    scaled: Any = optim.scale_by_layer(WaffleIronBackbone(NEEDS, 2, depth), decay).update(params, optax.EmptyState())[0]
    np.testing.assert_allclose(scaled["embedding"]["kernel"], decay ** (depth + 1), rtol=1e-6)
    np.testing.assert_allclose(scaled["head"]["bias"], 1.0, rtol=1e-6)
    for d in range(depth):
        stack = scaled["backbone"]["groups" if d < 3 * groups else "rest"][f"plane_{d % 3}"]["bias"]
        row = stack[d // 3] if d < 3 * groups else stack
        np.testing.assert_allclose(row, decay ** (depth + 1 - (d + 1)), rtol=1e-6)


@pytest.mark.parametrize("depth", [3, 5])
def test_layer_decay_of_every_published_weight(depth):
    """Layers by the published names: embed.* is layer 0, *_mix.d.* layer d + 1, classif.* depth + 1."""
    model, variables = tiny_model("segment", 4, depth=depth, norm="batch")
    ones = jax.tree.map(np.ones_like, variables["params"])
    scaled: Any = optim.scale_by_layer(make_backbone(model), 0.9).update(ones, optax.EmptyState())[0]
    factors = flatten(scaled)
    for entry in weight_table(student_of(model)):
        if entry.kind != "params":
            continue
        published = entry.theirs.split(".")
        layer = {"embed": 0, "classif": depth + 1}.get(published[0])
        layer = int(published[2]) + 1 if layer is None else layer
        name, wanted = entry.ours.replace("/", "."), 0.9 ** (depth + 1 - layer)
        if entry.row is None:
            np.testing.assert_allclose(factors.pop(name), wanted, rtol=1e-6)
        else:
            np.testing.assert_allclose(factors[name][entry.row], wanted, rtol=1e-6)
    assert all(name.startswith("backbone.groups.") for name in factors)  # the stacks, whose rows were all looked at


def test_layer_decay_in_the_optimizer():
    """It scales whole updates, weight decay included."""
    params = {"embedding": jnp.ones(2), "head": jnp.ones(2)}
    plain = update(optim.make_optimizer(OptimizerSettings(), BACKBONE), params, params)
    decayed = update(optim.make_optimizer(OptimizerSettings(layer_decay=0.5), BACKBONE), params, params)
    np.testing.assert_allclose(decayed["head"], plain["head"])
    np.testing.assert_allclose(decayed["embedding"], plain["embedding"] / 8)
