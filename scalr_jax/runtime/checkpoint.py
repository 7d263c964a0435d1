"""Checkpoints with Orbax (the only file that knows it): train state and the data streams' positions.

The teacher is never in one. Orbax's arrays have no checksums, so every file gets a digest: those of the state before
Orbax commits the checkpoint by renaming its folder, those of its own two files after. A checkpoint that is not as it
was written, or cannot be read, is named, and the one before it is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from logging import LogRecord
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as _orbax

from scalr_jax.runtime import digests, distributed
from scalr_jax.runtime.errors import InputError

State = TypeVar("State")  # a tree of arrays
ocp: Any = _orbax  # its annotations are narrower than what it takes
WRITTEN_AT_COMMIT = ("_CHECKPOINT_METADATA", "commit_success.txt")  # by Orbax, around the renaming


class Checkpoints:
    """Asynchronous checkpoints under `directory`, every `every` steps; kept are the last `keep` and, unless it is 0,
    one every `keep_every` steps."""

    def __init__(self, directory: Path, *, every: int, keep: int, keep_every: int = 0):
        logging.get_absl_logger().addFilter(_is_news)
        self._directory, self._every = directory.absolute(), every
        self._step, self._response = 0, None  # of the save that was begun last
        policies, context = ocp.training.preservation_policies, ocp.Context()
        # A function: of a bound method Orbax would copy the object too.
        context.async_options.post_finalization_callback = lambda: self._seal_before_commit()
        kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            context=context,
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: object, positions: jax.Array, *, force: bool = False) -> None:
        """Starts a save every so many steps, or when `force` says so; returns before it is written."""
        latest = self._checkpointer.latest
        if (step % self._every and not force) or (latest is not None and latest.step == step):
            return
        self._finish()
        self._step = step
        with self._named_errors():
            tree = {"state": state, "positions": positions}
            self._response = self._checkpointer.save_async(step, tree, force=True)

    def _seal_before_commit(self) -> None:
        """Called by Orbax, on process 0, when all files of all processes are written."""
        for folder in self._directory.glob(f"{self._step}.orbax-checkpoint-tmp*"):
            digests.seal(folder, but=WRITTEN_AT_COMMIT)

    def _finish(self) -> None:
        """Waits for the save that was begun last, and seals it. To ask for the result frees Orbax's thread and event
        loop: one thread and three descriptors a save (0.12.8)."""
        response, self._response = self._response, None
        if response is not None:
            with self._named_errors():
                response.result()
                if jax.process_index() == 0:
                    digests.seal(self._directory / str(self._step))

    def restore(
        self, abstract_state: State, abstract_positions: jax.ShapeDtypeStruct
    ) -> tuple[State, jax.Array] | None:
        """The newest readable (state, positions) with the shardings of the abstract ones; None when there is none.
        Newer ones are moved to a folder beside `directory`: they would block their steps' next saves.

        Raises:
            InputError: none of the existing ones can be read, or they are of a run with more or fewer data shards.
        """
        expected, now = {"state": abstract_state, "positions": abstract_positions}, abstract_positions.shape[0]

        def read(step: int) -> dict:
            saved = _metadata(self._checkpointer, step)["positions"].shape[0]
            if saved != now:
                raise InputError(
                    f"{self._directory} is of a run with {saved} data shards (devices), and here are "
                    f"{now}: the order of the scenes depends on their number; resume on as many, or give another "
                    "--workdir"
                )
            return self._checkpointer.load(step, expected)

        def agreed(problem: str) -> str:
            others = distributed.sum_over_processes(np.array(bool(problem), np.int32))
            return problem or ("another process found it damaged" if others else "")

        found = _newest(self._checkpointer, read, "remove the folder to start again", agreed)
        if found is None:
            return None
        self._set_aside(found.damaged)
        if jax.process_index() == 0:
            digests.seal(self._directory / str(found.step))
        return found.content["state"], found.content["positions"]

    def _set_aside(self, steps: Iterable[int]) -> None:
        """Moves checkpoints to `directory`.damaged, where Orbax does not look."""
        aside = self._directory.with_name(f"{self._directory.name}.damaged")
        distributed.barrier("before damaged checkpoints are moved")
        for step in steps if jax.process_index() == 0 else ():
            aside.mkdir(exist_ok=True)
            names = (str(step), *(f"{step}.{number}" for number in range(1, 1000)))
            target = next(aside / name for name in names if not (aside / name).exists())
            (self._directory / str(step)).rename(target)
            logging.warning("moved the checkpoint of step %d to %s", step, target)
        distributed.barrier("after damaged checkpoints are moved")
        self._checkpointer.reload()

    def wait(self) -> None:
        """Waits until every started save is on disk."""
        self._finish()
        with self._named_errors():
            self._checkpointer.wait()

    def close(self) -> None:
        with self._named_errors(), contextlib.closing(self._checkpointer):
            self._finish()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Names errors of writing, which Orbax reports when it is next called, and TensorStore as ValueError."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and "os_error_code" not in str(error):
                raise
            # From the disk: Orbax counts the one that could not be written.
            steps = [int(path.name) for path in self._directory.iterdir() if path.name.isdigit()]
            before = f"from step {max(steps)}" if steps else "from the beginning"
            reason = isinstance(error, OSError) and error.strerror  # else TensorStore's, which ends with the system's
            reason = reason or str(error).splitlines()[0].split("[os_error_code")[0].strip().rsplit(": ", 1)[-1]
            raise InputError(
                f"a checkpoint could not be written in {self._directory} ({reason}); free space "
                f"or permit writing there, and the same command resumes {before}"
            ) from error


def _is_news(record: LogRecord) -> bool:
    """Drops Orbax's duplicate tracebacks, its misleading 'incompatible handler' warning, and what it says of a damaged
    _CHECKPOINT_METADATA, which the digests tell."""
    known = ("incompatible handler", "Metadata file", "Provided metadata contains unknown key")
    dropped = record.exc_info or any(words in record.getMessage() for words in known)
    return not ("orbax" in record.pathname and dropped)


def _metadata(checkpointer: Any, step: int) -> Any:
    """Shapes of what a checkpoint holds. Raises `ValueError` when Orbax finds none that it can read."""
    found = checkpointer.metadata(step).metadata
    if not found or any(part is None for part in found.values()):
        raise ValueError(f"{step}/*/_METADATA is missing or cut")
    return found


def _cause(error: BaseException) -> str:
    """TensorStore's words on a file that cannot be read; Orbax speaks of its handlers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0][:300]


class _Found(NamedTuple):
    """A checkpoint that was read, and the newer ones that could not be: step -> what is wrong."""

    step: int
    content: Any
    damaged: dict[int, str]


def _newest(
    checkpointer: Any, read: Callable[[int], Any], remedy: str, agreed: Callable[[str], str] = str
) -> _Found | None:
    """The newest checkpoint that is as it was written and that `read` can read; None when there is none at all.

    One without digests is read when an older version wrote it, which left none in those before it. `agreed`: the
    problem of a checkpoint on this process -> the problem to act on.

    Raises:
        InputError: none of the existing ones can be read; ends with the `remedy`.
    """
    where, damaged = Path(checkpointer.directory), {}
    steps = sorted((found.step for found in checkpointer.checkpoints), reverse=True)
    sealed = [step for step in steps if digests.is_sealed(where / str(step))]
    for step in steps:
        older = not sealed or step < sealed[-1]
        try:
            if problem := agreed("" if older else digests.damage(where / str(step))):
                raise ValueError(problem)
            content = read(step)
        except InputError:
            raise
        except Exception as error:  # Orbax raises many kinds for missing and cut files
            damaged[step] = _cause(error)
            logging.warning("in %s the checkpoint of step %d (%s) cannot be read", where, step, damaged[step])
            continue
        if damaged:
            logging.warning("in %s the checkpoint of step %d is used, the one before", where, step)
        if older:
            logging.warning("in %s the checkpoint of step %d has no digests: its files are not verified", where, step)
        return _Found(step, content, damaged)
    if damaged:
        listed = "; ".join(f"step {step} ({problem})" for step, problem in damaged.items())
        raise InputError(f"no checkpoint in {where} can be read: {listed}; {remedy}")
    return None


def load_variables(directory: Path) -> dict:
    """params and batch_stats of the newest readable checkpoint, as NumPy arrays, without a model: averages where it
    has them. Nothing is moved or written.

    Read onto one device: where the run had them (perhaps on more devices than there are here) does not matter.

    Raises:
      InputError: no checkpoint, or none that can be read.
    """
    logging.get_absl_logger().addFilter(_is_news)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # the optimiser's state stays on disk
    with ocp.training.Checkpointer(directory.absolute()) as checkpointer:

        def read(step: int) -> Any:
            saved = _metadata(checkpointer, step)["state"]
            expected = {name: saved[name] for name in ("params", "batch_stats", "average") if name in saved}
            expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), expected)
            with context:
                return checkpointer.load(step, {"state": expected})

        found = _newest(checkpointer, read, "copy the workdir again")
    if found is None:
        raise InputError(f"{directory} holds no checkpoint; give the workdir of a finished run")
    state = jax.device_get(found.content["state"])
    for name, tree in state.pop("average", {}).items():
        state[name] = {**state[name], **tree}
    return state


def save_weights(directory: Path, variables: Mapping) -> None:
    """Writes {"params", "batch_stats"} alone, as a checkpoint that `orbax.checkpoint.v1.load(directory)` reads."""
    ocp.save(directory.absolute(), variables)


def load_weights(directory: Path) -> dict:
    """Loads the weights that `save_weights` wrote, as NumPy arrays. Raises InputError when it cannot be read."""
    try:
        return jax.device_get(ocp.load(directory.absolute()))
    except Exception as error:  # Orbax raises many kinds for missing and cut files
        raise InputError(f"{directory} cannot be read ({_cause(error)}); copy it again") from None
