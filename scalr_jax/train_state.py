"""What a step reads and writes, and nothing else."""

from __future__ import annotations

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
