"""Checkpoints with Orbax (the only file that knows it): train state and the data streams' positions.

The teacher is never in one. A checkpoint that cannot be read is named, and the one before it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from logging import LogRecord
from pathlib import Path
from typing import Any, TypeVar

import jax
from absl import logging
from orbax.checkpoint import v1 as _orbax

from scalr_jax.runtime.errors import InputError

State = TypeVar("State")  # a tree of arrays
ocp: Any = _orbax  # its annotations are narrower than what it takes


class Checkpoints:
    """Asynchronous checkpoints under `directory`, every `every` steps; kept are the last `keep` and, unless it is 0,
    one every `keep_every` steps."""

    def __init__(self, directory: Path, *, every: int, keep: int, keep_every: int = 0):
        logging.get_absl_logger().addFilter(_is_news)
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

    def save(self, step: int, state: object, positions: jax.Array, *, force: bool = False) -> None:
        """Starts a save when the policy (or `force`) says so; returns before it is written."""
        if self._checkpointer.latest is not None and self._checkpointer.latest.step == step:
            return
        with self._named_errors():
            self._checkpointer.save_async(step, {"state": state, "positions": positions}, force=force)

    def restore(
        self, abstract_state: State, abstract_positions: jax.ShapeDtypeStruct
    ) -> tuple[State, jax.Array] | None:
        """The newest readable (state, positions) with the shardings of the abstract ones; None when there is none.

        Raises:
            InputError: none of those that are there can be read, or they are of a run with more or fewer data shards.
        """
        wanted = {"state": abstract_state, "positions": abstract_positions}
        errors = []
        for found in sorted(self._checkpointer.checkpoints, key=lambda c: -c.step):
            try:
                there = _metadata(self._checkpointer, found.step)["positions"].shape[0]
                if there != (now := abstract_positions.shape[0]):
                    raise InputError(
                        f"{self._checkpointer.directory} is of a run with {there} data shards (devices), and here are "
                        f"{now}: the order of the scenes depends on their number; resume on as many, or give another "
                        "--workdir"
                    )
                loaded = self._checkpointer.load(found.step, wanted)
            except InputError:
                raise
            except Exception as error:  # Orbax raises many kinds for missing and cut files
                errors.append(f"step {found.step} ({_cause(error)})")
                where = self._checkpointer.directory
                logging.warning("in %s the checkpoint of %s cannot be read, trying the one before", where, errors[-1])
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
        with self._named_errors():
            self._checkpointer.wait()

    def close(self) -> None:
        with self._named_errors():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """What the system refuses to write; Orbax reports it when it is next called, and TensorStore as ValueError."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and "os_error_code" not in str(error):
                raise
            steps = [found.step for found in self._checkpointer.checkpoints]
            before = f"from step {max(steps)}" if steps else "from the beginning"
            reason = str(error).splitlines()[0].split("[os_error_code")[0].strip().rsplit(": ", 1)[-1]  # the system's
            raise InputError(
                f"a checkpoint could not be written in {self._checkpointer.directory} ({reason}); free space "
                f"or permit writing there, and the same command resumes {before}"
            ) from error


def _is_news(record: LogRecord) -> bool:
    """Drops Orbax's duplicate tracebacks and its misleading 'incompatible handler' warning."""
    return not ("orbax" in record.pathname and (record.exc_info or "incompatible handler" in record.getMessage()))


def _metadata(checkpointer: Any, step: int) -> Any:
    """Shapes of what a checkpoint holds. Raises `ValueError` when Orbax finds none that it can read."""
    found = checkpointer.metadata(step).metadata
    if not found or any(part is None for part in found.values()):
        raise ValueError(f"{step}/*/_METADATA is missing or cut")
    return found


def _cause(error: BaseException) -> str:
    """What TensorStore says of a file that cannot be read; Orbax speaks of its handlers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def load_variables(directory: Path) -> dict:
    """params and batch_stats of the newest checkpoint, as NumPy arrays, without a model: averages where it has them.

    Read onto one device: where the run had them (perhaps on more devices than there are here) does not matter.

    Raises:
      InputError: no checkpoint, or the newest one cannot be read.
    """
    logging.get_absl_logger().addFilter(_is_news)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.training.Checkpointer(directory.absolute()) as checkpointer:
        if checkpointer.latest is None:
            raise InputError(f"{directory} holds no checkpoint; give the workdir of a finished run")
        step = checkpointer.latest.step
        context = ocp.Context()
        context.pytree.loading.partial_load = True  # the optimiser's state stays on disk
        try:
            there: Any = _metadata(checkpointer, step)["state"]
            wanted = {name: there[name] for name in ("params", "batch_stats", "average") if name in there}
            wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), wanted)
            with context:
                loaded: Any = checkpointer.load(step, {"state": wanted})
        except Exception as error:  # Orbax raises many kinds for missing and cut files
            raise InputError(
                f"{directory / str(step)} is damaged ({_cause(error)}); copy it again, or move it away to take the "
                "checkpoint before it"
            ) from None
    state = jax.device_get(loaded["state"])
    for name, tree in state.pop("average", {}).items():
        state[name] = {**state[name], **tree}
    return state


def save_weights(directory: Path, variables: Mapping) -> None:
    """Writes {"params", "batch_stats"} alone, as a checkpoint that `orbax.checkpoint.v1.load(directory)` reads."""
    ocp.save(directory.absolute(), variables)


def load_weights(directory: Path) -> dict:
    """What `save_weights` wrote, as NumPy arrays. Raises InputError when it cannot be read."""
    try:
        return jax.device_get(ocp.load(directory.absolute()))
    except Exception as error:  # Orbax raises many kinds for missing and cut files
        raise InputError(f"{directory} cannot be read ({_cause(error)}); copy it again") from None
