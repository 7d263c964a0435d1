"""A run's folder: which config it belongs to, and one run at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from scalr_jax.runtime import distributed
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.keys import Row
from scalr_jax.runtime.logging import read_metrics
from scalr_jax.runtime.storage import PARTIAL, differences, flatten, locked, read_json, write_json

SETTINGS = ("config.json", "settings.json")
# What may lie there before the first step.
BEFORE_A_STEP = ("lock", "streets", "instances", "features", "tensorboard", "teacher_statistics.safetensors")


@contextlib.contextmanager
def claim(workdir: Path, record: Mapping[str, Any], keys: Sequence[Row]) -> Iterator[None]:
    """Holds `workdir` for a run: its config.json is written, or compared with the one there.

    Keys that may change on resume change neither the data's order nor the parameters. Sizes of tables are among them,
    because a run stops at the first scene that these do not hold, and goes on when they are raised.

    `record` is the config, nested, in JSON's types; `keys` says which may change, and the defaults of newer ones.

    Raises:
        InputError: the folder holds a run of another config (every difference is listed), is in use by a live run, or
          the processes of this run disagree on the config or do not share the folder.
    """
    local = tuple(row.name for row in keys if row.local)
    distributed.check_agreement({**record, "workdir": str(workdir.absolute())}, free=local)
    path = workdir / "config.json"
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            for place in (workdir, workdir / "checkpoints"):
                if place.exists() and not place.is_dir():
                    raise InputError(f"{place} is a file, expected a folder; give another --workdir")
            if _begun(workdir):
                _compare(path, record, keys)
                if (metrics := workdir / "metrics.jsonl").exists():
                    read_metrics(metrics)
            made = not workdir.exists()
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_removed_if_empty(workdir, made))
            stack.enter_context(locked(workdir / "lock", "wait for it, stop it, or use another --workdir"))
            write_json(path, record)
            stack.enter_context(_forget_if_nothing_was_done(workdir))
        distributed.barrier(f"claim {workdir}")
        if not path.exists():
            raise InputError(
                f"{workdir} on process {jax.process_index()} is not the folder that process 0 writes; give a --workdir "
                "on storage that all processes share"
            )
        yield


@contextlib.contextmanager
def _forget_if_nothing_was_done(workdir: Path) -> Iterator[None]:
    """A run that ended before its first step leaves no config that a corrected one would have to equal."""
    try:
        yield
    except BaseException:
        if not _begun(workdir):
            for name in SETTINGS:
                (workdir / name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _removed_if_empty(workdir: Path, made: bool) -> Iterator[None]:
    """A folder that this run `made`, and in which it has left nothing but its lock, is removed when the run fails."""
    try:
        yield
    except BaseException:
        if made and [path.name for path in workdir.iterdir()] in ([], ["lock"]):
            (workdir / "lock").unlink(missing_ok=True)
            workdir.rmdir()
        raise


def _begun(workdir: Path) -> bool:
    """Whether a run did anything in `workdir` that depends on its whole config: a step, a result, another's files.

    A killed run that did not come so far may leave its settings.
    """

    def counts(path: Path) -> bool:
        if path.name == "checkpoints":
            return any(child.name.isdecimal() for child in path.iterdir())
        return path.name not in (*SETTINGS, *BEFORE_A_STEP) and not path.name.endswith(PARTIAL)

    if not workdir.is_dir():
        return False
    config = workdir / "config.json"
    return any(counts(path) for path in workdir.iterdir()) or (config.exists() and not _is_ours(config))


def _is_ours(path: Path) -> bool:
    """Whether a config.json is that of a run, not another program's file."""
    try:
        return {"task", "data"} <= json.loads(path.read_text()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _compare(path: Path, record: Mapping[str, Any], keys: Sequence[Row]) -> None:
    """Raises `InputError` with every difference. Keys missing from an older config.json count as their defaults."""
    if not path.exists():
        if found := [name for name in ("metrics.jsonl", "checkpoints") if (path.parent / name).exists()]:
            raise InputError(
                f"{path} is missing, and {' and '.join(found)} beside it are of a run; copy the workdir again, or use "
                "another --workdir"
            )
        return
    saved = flatten(read_json(path, "use another --workdir, or remove it"))
    saved = json.loads(json.dumps({row.name: row.default for row in keys})) | saved
    if found := differences(saved, record, free=[row.name for row in keys if row.resume]):
        raise InputError(f"{path.parent} holds a run with another config ({found}); use another --workdir")
