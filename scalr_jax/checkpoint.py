"""Checkpoints with Orbax (the only file that knows it): train state and the data streams' positions.

The teacher is never in one. A checkpoint that cannot be read is named, and the one before it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from absl import logging
from orbax.checkpoint import v1 as _orbax

from scalr_jax.data.scenes import InputError

ocp: Any = _orbax  # its annotations are narrower than what it takes


class Checkpoints:
    """Asynchronous checkpoints under `directory`, every `every` steps; kept are the last `keep` and, unless it is 0,
    one every `keep_every` steps."""

    def __init__(self, directory: Path, *, every: int, keep: int, keep_every: int = 0):
        training = ocp.training
        kept = [training.preservation_policies.LatestN(keep)]
        if keep_every:
            kept.append(training.preservation_policies.EveryNSteps(keep_every))
        self._checkpointer = training.Checkpointer(
            directory.absolute(),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(every),
            preservation_policy=training.preservation_policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any, positions: jax.Array, *, force: bool = False) -> None:
        """Starts a save when the policy (or `force`) says so; returns before it is written."""
        if self._checkpointer.latest is not None and self._checkpointer.latest.step == step:
            return
        self._checkpointer.save_async(step, {"state": state, "positions": positions}, force=force)

    def restore(self, abstract_state: Any, abstract_positions: Any) -> tuple[Any, jax.Array] | None:
        """The newest readable (state, positions) with the shardings of the abstract ones; None when there is none."""
        wanted = {"state": abstract_state, "positions": abstract_positions}
        errors = []
        for found in sorted(self._checkpointer.checkpoints, key=lambda c: -c.step):
            try:
                loaded = self._checkpointer.load(found.step, wanted)
            except Exception as error:  # Orbax raises many kinds for missing and cut files
                errors.append(f"step {found.step} ({str(error).splitlines()[0][:200]})")
                logging.warning("checkpoint %s cannot be read, trying the one before", errors[-1])
                continue
            for newer in self._checkpointer.checkpoints:  # what could not be read would block its step's next save
                if newer.step > found.step:
                    self._checkpointer.delete(newer.step)
            return loaded["state"], loaded["positions"]
        if errors:
            raise InputError(
                f"no checkpoint in {self._checkpointer.directory} can be read: {'; '.join(errors)}; "
                "remove the folder to start again"
            )
        return None

    def wait(self) -> None:
        """Until what was started is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()


def load_variables(directory: Path) -> dict:
    """params and batch_stats of the newest checkpoint, as NumPy arrays, without a model.

    Read onto one device: where the run had them (perhaps on more devices than there are here) does not matter.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.training.Checkpointer(directory.absolute()) as checkpointer:
        if checkpointer.latest is None:
            raise InputError(f"{directory} holds no checkpoint; give the workdir of a finished run")
        step = checkpointer.latest.step
        there: Any = checkpointer.metadata(step).metadata["state"]
        wanted = {name: there[name] for name in ("params", "batch_stats")}
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), wanted)
        context = ocp.Context()
        context.pytree.loading.partial_load = True  # the optimiser's state stays on disk
        with context:
            loaded: Any = checkpointer.load(step, {"state": wanted})
    return jax.device_get(loaded["state"])


def save_weights(directory: Path, variables: Any) -> None:
    """Writes {"params", "batch_stats"} alone, as a checkpoint that `orbax.checkpoint.v1.load(directory)` reads."""
    ocp.save(directory.absolute(), variables)


def load_weights(directory: Path) -> dict:
    """What `save_weights` wrote, as NumPy arrays. Raises InputError when it cannot be read."""
    try:
        return jax.device_get(ocp.load(directory.absolute()))
    except Exception as error:  # Orbax raises many kinds for missing and cut files
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"{directory} cannot be read ({reason}); copy it again") from None
