"""A compiled step in a file, so that an accelerator need not wait for XLA.

    python -m scalr_jax.compile --config=CONFIG --topology=h100:1 --save=FILE     on any machine
    python -m scalr_jax.main --config=CONFIG --workdir=WORKDIR --config.executable=FILE

The file is a line of JSON, `described`, and the bytes of `jax.experimental.serialize_executable`. It is loaded where
JAX, the devices and the step are the same; a step is its StableHLO, with shapes and hyperparameters. The bytes are a
pickle: load only files that you trust.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered, Wrapped

from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import json_text, reason, written_whole

FORMAT = "scalr_jax executable 1"
ARGUMENTS = ("state", "teachers", "batch")
Devices = Sequence  # of jax.Device, which JAX defines as a variable
AGAIN = "make it again with scalr_jax.compile --save, or leave config.executable out"


class Saved(NamedTuple):
    """A file's content."""

    path: Path
    header: dict[str, object]  # `described`, with the file's format and the payload's digest
    payload: bytes


def described(lowered: Lowered, devices: Devices) -> dict[str, object]:
    """The facts in which a compiled step and the step `lowered` on `devices` must agree."""
    arguments = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(lowered.args_info[0]):
        name = ARGUMENTS[path[0].idx] + jax.tree_util.keystr(path[1:])
        arguments[name] = f"{leaf.dtype}{list(leaf.shape)}"
    program = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    about: dict[str, object] = {"jax": jax.__version__, "device": devices[0].device_kind, "devices": len(devices)}
    return {**about, "arguments": arguments, "program": program}


def save(path: Path, lowered: Lowered, compiled: Compiled, devices: Devices) -> int:
    """Writes a step and returns the file's size in bytes. Raises `InputError` where JAX cannot serialise it."""
    try:
        payload, _, _ = serialize_executable.serialize(compiled)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise InputError(f"{path}: JAX does not serialise this step ({reason(error)}); leave --save out") from error
    digest = hashlib.sha256(payload).hexdigest()
    header = {"format": FORMAT, **described(lowered, devices), "payload": digest}
    with written_whole(path) as file:
        file.write(json_text(header).encode() + b"\n" + payload)
    return path.stat().st_size


def read(name: str | Path) -> Saved | None:
    """Reads what `save` wrote, running nothing. None without a name. Raises `InputError` for a file that is missing,
    damaged or another."""
    if not name:
        return None
    path = Path(name)
    try:
        first, _, payload = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise InputError(f"{path}: no compiled step can be read ({error.strerror}); {AGAIN}") from error
    try:
        header = json.loads(first)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f"{path} is no compiled step that this version saved; {AGAIN}")
    if hashlib.sha256(payload).hexdigest() != header.get("payload"):
        raise InputError(f"{path} is damaged: its bytes are not those that were saved; {AGAIN}")
    return Saved(path, header, payload)


def choose(saved: Saved | None, step: Wrapped, arguments: tuple, mesh: Mesh) -> Wrapped | Compiled:
    """The saved step where there is one, else the jitted `step`. arguments: arrays or shapes, with shardings."""
    return step if saved is None else load(saved, step.lower(*arguments), list(mesh.devices.flat))


def load(saved: Saved, lowered: Lowered, devices: Devices) -> Compiled:
    """The saved step, for the arguments of `lowered`. Raises `InputError` that says what differs."""
    if problem := _difference(saved.header, described(lowered, devices)):
        raise InputError(f"{saved.path} is another step: {problem}; {AGAIN}")
    in_tree, client = jax.tree.structure(lowered.args_info), devices[0].client
    try:
        return serialize_executable.deserialize_and_load(
            saved.payload, in_tree, lowered.out_tree, backend=client, execution_devices=devices
        )
    except Exception as error:  # whatever a pickle, PJRT or a driver raises
        raise InputError(f"{saved.path}: XLA does not load it here ({reason(error)}); {AGAIN}") from error


def _difference(saved: dict, here: dict) -> str:
    """The first thing that differs, "" when nothing does."""
    for key, what in (("jax", "JAX"), ("device", "the device"), ("devices", "the number of devices")):
        if saved.get(key) != here[key]:
            return f"{what} is {here[key]} here and was {saved.get(key)}"
    was, now = saved.get("arguments", {}), here["arguments"]
    for name in [*now, *was]:
        if was.get(name) != now.get(name):
            sizes = "; data.cells_per_shard and its like fix sizes" if name.startswith("batch") else ""
            return f"{name} is {now.get(name, 'not there')} here and was {was.get(name, 'not there')}{sizes}"
    if saved.get("program") != here["program"]:
        return "a constant or an operation differs (of the schedule: set optimizer.total_updates)"
    return ""
