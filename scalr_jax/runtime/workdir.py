"""A run's folder: whose it is, and that one run at a time writes it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

from scalr_jax.config import get_config
from scalr_jax.runtime import distributed
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import flatten, write_json

# Keys that may differ between a run and its resumption: they change neither the data order nor the parameters. Sizes of
# tables are among them because a run stops at the first scene that these do not hold, and goes on when they are raised.
FREE_KEYS = (
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "keep_every_steps",
    "data.num_workers",
    "data.prefetch",
    "data.cells_per_shard",
    "data.halo_per_shard",
    "data.voxels_per_shard",
    "data.pairs_per_shard",
)

LOCAL_KEYS = ("data.num_workers", "data.prefetch", "data.root")  # may differ between the processes of one run


@contextlib.contextmanager
def claim(config: Any, workdir: Path) -> Iterator[None]:
    """Holds `workdir` for a run of `config`: its config.json is written, or compared with the one there.

    Raises:
        InputError: the folder holds a run of another config (every difference is listed), is in use by a live run, or
          the processes of this run disagree on the config or do not share the folder.
    """
    new = json.loads(config.to_json_best_effort())
    distributed.check_agreement({**new, "workdir": str(workdir.absolute())}, free=LOCAL_KEYS)
    path = workdir / "config.json"
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            _compare(path, new)
            fresh = not path.exists()
            _make(workdir)
            stack.enter_context(_lock(workdir / "lock"))
            write_json(path, new)
            stack.enter_context(_forget_if_nothing_was_done(path, fresh))
        distributed.barrier(f"claim {workdir}")
        if not path.exists():
            raise InputError(
                f"{workdir} on process {jax.process_index()} is not the folder that process 0 writes; give a --workdir "
                "on storage that all processes share"
            )
        yield


@contextlib.contextmanager
def _forget_if_nothing_was_done(path: Path, fresh: bool) -> Iterator[None]:
    """A first run that was refused before its first step leaves no config that a corrected one would have to equal."""
    try:
        yield
    except InputError:
        if fresh and not (path.parent / "metrics.jsonl").exists():
            path.unlink(missing_ok=True)
        raise


def _make(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{workdir} is a file; give a folder as --workdir") from None


def _compare(path: Path, new: dict) -> None:
    """A key that the run's config.json does not have is younger than the run, which then had its default."""
    if not path.exists():
        return
    try:
        there = flatten(json.loads(path.read_text()))
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a run's config ({error}); use another --workdir, or remove it") from None
    now = flatten(new)
    old = {**flatten(json.loads(get_config().to_json_best_effort())), **there}
    differences = [
        f"{key}: {old.get(key)} there, {now.get(key)} now"
        for key in sorted(old | now)
        if old.get(key) != now.get(key) and key not in FREE_KEYS
    ]
    if differences:
        raise InputError(
            f"{path.parent} holds a run with another config ({'; '.join(differences)}); use another --workdir"
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """The system frees the lock when its process ends, however it ends."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"{path.parent} is in use by a live run ({holder}); wait for it, stop it, or use another --workdir"
            ) from None
        except OSError as error:  # a file system without locks
            logging.warning("%s cannot be locked (%s): make sure that no other run uses the folder", path, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
