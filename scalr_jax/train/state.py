"""What a step reads and writes, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """A pytree. Randomness is `fold_in(key(seed), step)`, so no key is stored.

    `opt_state` covers `params[k]` for the trainable top-level keys k only.
    """

    step: jax.Array  # [] int32
    scenes_seen: jax.Array  # [] int32: schedules advance by it
    params: Any
    batch_stats: Any
    opt_state: Any


@flax.struct.dataclass
class AveragedState(TrainState):
    """With `optimizer.ema`: beside the weights their moving average, which is what is evaluated and exported.

    `average` is {"params", "batch_stats"}: the trainable top-level parameters and all statistics.
    """

    average: Any = None


def start_average(state: TrainState, trainable: tuple[str, ...]) -> AveragedState:
    """`state` with an average that begins at its weights, in buffers of its own (both are donated)."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(TrainState)}
    average = {"params": split(state.params, trainable)[0], "batch_stats": state.batch_stats}
    return AveragedState(**fields, average=jax.tree.map(jnp.copy, average))


def variables_of(state: TrainState) -> dict:
    """params and batch_stats to evaluate: the averages, where there are any."""
    if isinstance(state, AveragedState):
        return {"params": {**state.params, **state.average["params"]}, "batch_stats": state.average["batch_stats"]}
    return {"params": state.params, "batch_stats": state.batch_stats}


def split(params: Any, trainable: tuple[str, ...]) -> tuple[dict, dict]:
    """Top-level parameters as (trainable, frozen)."""
    chosen = {k: v for k, v in params.items() if k in trainable}
    return chosen, {k: v for k, v in params.items() if k not in trainable}


def init_state(student: Any, batch: Any, optimizer: optax.GradientTransformation, trainable, key) -> TrainState:
    """A fresh state; `trainable` None: all. Call under `jit` with `out_shardings`, so that it is born sharded."""
    variables = student.init({"params": key, "dropout": key}, batch, train=False)
    params = variables["params"]
    chosen, _ = split(params, tuple(params) if trainable is None else trainable)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, params, variables.get("batch_stats", {}), optimizer.init(chosen))
