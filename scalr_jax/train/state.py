"""The state that a step reads and writes, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from scalr_jax.data.scenes import Batch
from scalr_jax.models.student import Student, Variables

Array = jax.Array


@flax.struct.dataclass
class TrainState:
    """A pytree. Randomness is `fold_in(key(seed), step)`, so no key is stored.

    `opt_state` covers `params[k]` for the trainable top-level keys k only.
    """

    step: Array  # [] int32
    scenes_seen: Array  # [] int32: schedules advance by it
    params: dict
    batch_stats: dict
    opt_state: optax.OptState


@flax.struct.dataclass
class AveragedState(TrainState):
    """With `optimizer.ema`: beside the weights their moving average, which is what is evaluated and exported.

    `average` is {"params", "batch_stats"}: the trainable top-level parameters and all statistics.
    """

    average: dict


def start_average(state: TrainState, trainable: tuple[str, ...]) -> AveragedState:
    """`state` with an average that begins at its weights, in buffers of its own (both are donated)."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(TrainState)}
    average = {"params": split(state.params, trainable)[0], "batch_stats": state.batch_stats}
    return AveragedState(**fields, average=jax.tree.map(jnp.copy, average))


def variables_of(state: TrainState) -> Variables:
    """params and batch_stats to evaluate: the averages, where there are any."""
    if isinstance(state, AveragedState):
        return {"params": {**state.params, **state.average["params"]}, "batch_stats": state.average["batch_stats"]}
    return {"params": state.params, "batch_stats": state.batch_stats}


def split(params: Mapping, trainable: tuple[str, ...]) -> tuple[dict, dict]:
    """Top-level parameters as (trainable, frozen)."""
    chosen = {k: v for k, v in params.items() if k in trainable}
    return chosen, {k: v for k, v in params.items() if k not in trainable}


def init_state(
    student: Student,
    batch: Batch[Array],
    optimizer: optax.GradientTransformation,
    trainable: tuple[str, ...] | None,
    key: Array,
) -> TrainState:
    """A fresh state; `trainable` None: all. Call under `jit` with `out_shardings`, so that it is born sharded."""
    variables: Any = student.init({"params": key, "dropout": key}, batch, train=False)
    params = variables["params"]
    chosen, _ = split(params, tuple(params) if trainable is None else trainable)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, params, variables.get("batch_stats", {}), optimizer.init(chosen))
