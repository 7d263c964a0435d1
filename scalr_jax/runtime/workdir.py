"""A run's folder: whose it is, and that one run at a time writes it."""

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
from scalr_jax.runtime.storage import differences, flatten, locked, read_json, write_json


@contextlib.contextmanager
def claim(workdir: Path, record: Mapping[str, Any], keys: Sequence[Row]) -> Iterator[None]:
    """Holds `workdir` for a run: its config.json is written, or compared with the one there.

    Keys that may change on resume change neither the data's order nor the parameters. Sizes of tables are among them,
    because a run stops at the first scene that these do not hold, and goes on when they are raised.

    `record` is the config, nested, in JSON's types; `keys` says which may change, and the defaults of younger ones.

    Raises:
        InputError: the folder holds a run of another config (every difference is listed), is in use by a live run, or
          the processes of this run disagree on the config or do not share the folder.
    """
    local = tuple(row.name for row in keys if row.local)
    distributed.check_agreement({**record, "workdir": str(workdir.absolute())}, free=local)
    path = workdir / "config.json"
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            _compare(path, record, keys)
            fresh = not path.exists()
            if workdir.exists() and not workdir.is_dir():
                raise InputError(f"{workdir} is a file; give a folder as --workdir")
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(workdir / "lock", "wait for it, stop it, or use another --workdir"))
            write_json(path, record)
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


def _compare(path: Path, record: Mapping[str, Any], keys: Sequence[Row]) -> None:
    """Raises `InputError` with every difference. Keys missing from an older config.json count as their defaults."""
    if not path.exists():
        return
    saved = flatten(read_json(path, "use another --workdir, or remove it"))
    saved = json.loads(json.dumps({row.name: row.default for row in keys})) | saved
    if found := differences(saved, record, free=[row.name for row in keys if row.resume]):
        raise InputError(f"{path.parent} holds a run with another config ({found}); use another --workdir")
