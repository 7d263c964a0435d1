"""Several processes as one run: starting together, agreeing on the config, stopping together.

JAX's own ways to end (a C++ abort when a peer is lost, waiting minutes for one that never comes) become one sentence
and an exit code here; SIGTERM becomes a step after which all processes stop.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import ipaddress
import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from scalr_jax.runtime import stopping
from scalr_jax.runtime.command_line import end
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import differences, flatten

A_DAY = 24 * 3600 * 1000  # milliseconds: a process that is lost ends all others before
HEARTBEAT_SECONDS = 40  # a process that was not heard of for so long counts as dead


class Coordinator(Protocol):
    """The part of JAX's client that `agreement` needs."""

    def key_value_set(self, key: str, value: str) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...

    def key_value_delete(self, key: str) -> None: ...


_agreements = itertools.count()

LOST = (
    "stopped by JAX's distributed service, most likely because another process of this run died or can no longer be "
    "reached (its own output says why); the same command resumes from the last checkpoint"
)


def start(
    address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    connect_seconds: int = 120,
) -> None:
    """`jax.distributed.initialize` with the three arguments, or for the cluster that JAX detects (TPU pods, Slurm,
    Open MPI, JAX_COORDINATOR_ADDRESS), or not at all: one process alone. Before the first use of a device.

    Raises:
        InputError: arguments are missing or wrong, or the coordinator was not reached within `connect_seconds`.
    """
    given = {"--coordinator_address": address, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    limits: dict = {"initialization_timeout": connect_seconds, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    where = "" if address is None else f" at {address}"
    _at_abort(
        2,
        f"not all processes of this run came together{where} within {connect_seconds} s; start every one, with the "
        "same --coordinator_address and --num_processes and its own --process_id where the cluster does not say them",
    )
    if len(missing) == len(given):
        try:
            jax.distributed.initialize(
                coordinator_bind_address=_listening(os.environ.get("JAX_COORDINATOR_ADDRESS", "")), **limits
            )
        except ValueError as error:
            if "should be defined" in str(error) or "must be defined" in str(error):
                return  # no cluster: alone
            raise InputError(f"the cluster's settings are not understood: {error}") from error
    elif missing or address is None or num_processes is None or process_id is None:
        raise InputError(f"{' and '.join(missing)} must be given too, on every process")
    else:
        if not 0 <= process_id < num_processes:
            raise InputError(f"--process_id={process_id} is not between 0 and --num_processes={num_processes} - 1")
        _await_coordinator(address, process_id, connect_seconds)
        limits["coordinator_bind_address"] = _listening(address)
        jax.distributed.initialize(address, num_processes, process_id, **limits)
    _share_sigterm()
    _at_abort(1, LOST)


def _share_sigterm() -> None:
    """Puts this program's handler of SIGTERM, which calls JAX's, in place of JAX's."""
    if (requests := stopping.requests()) is not None:
        if theirs := _libc_signal(signal.SIGTERM, None):
            requests.tell = functools.partial(ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs), signal.SIGTERM)
        signal.signal(signal.SIGTERM, requests.hear)


def _libc_signal(number: int, handler: int | None) -> int | None:
    """The C library's `signal`: installs a handler by its address, None for the system's; returns the one before."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return libc.signal(number, handler)


def _await_coordinator(address: str, process_id: int, seconds: int) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator_address={address} is not host:port, with a port from 1 to 65535")
    limit = time.monotonic() + seconds
    while process_id > 0:  # process 0 is the coordinator
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except (OSError, UnicodeError) as error:  # the latter of a host whose name cannot be one
            if time.monotonic() > limit:
                raise InputError(
                    f"the coordinator {address} was not reached within {seconds} s ({error}); is process 0 running "
                    "there, and is the port open?"
                ) from error
            time.sleep(0.5)


def _listening(address: str) -> str | None:
    """Where process 0 listens: on the `address` (host:port) that was given, where JAX would listen on all interfaces.

    None, which leaves it to JAX, where it is not known which interface leads there: no address, one that is not this
    machine's (behind NAT), or a name that this machine alone takes for itself (127.0.1.1 in Debian's /etc/hosts).
    """
    host, _, port = address.rpartition(":")
    try:
        (family, _, _, _, place), *_ = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        found = str(place[0])
        with socket.socket(family) as probe:
            probe.bind((found, 0))
    except (OSError, ValueError):
        return None
    elsewhere = ipaddress.ip_address(found).is_loopback and host.strip("[]") not in ("localhost", found)
    if elsewhere or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return None
    return f"[{found}]:{port}" if ":" in found else f"{found}:{port}"


def _at_abort(code: int, message: str) -> None:
    """When JAX cannot reach the coordinator, or loses a peer, it calls abort(), from a thread of its own. Answer that
    signal with a sentence and an exit code. Python's signal handlers would never run: abort() does not return."""

    def on_abort(_: int) -> None:
        if (requests := stopping.requests()) is not None and requests.asked:
            stopping.leave(0, f"stopped as asked; {stopping.AGAIN}")  # and so is the peer that is gone
        end(code, message)

    global _handler  # the C library keeps only a pointer to it
    handler = _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    _libc_signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p).value)


_handler: object = None


def end_if_not_alone(code: int, message: str) -> None:
    """Beside other processes: one sentence, and out. The others notice within `HEARTBEAT_SECONDS`."""
    if jax.distributed.is_initialized():
        end(code, message)


def barrier(name: str) -> None:
    """Returns once every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def stack_over_processes(array: np.ndarray) -> np.ndarray:
    """Every process's array, on every process: [processes, ...]."""
    if jax.process_count() == 1:
        return array[None]
    # As bytes: JAX without 64 bits would make int64 int32.
    parts = np.asarray(multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8)))
    return np.stack([np.frombuffer(part.tobytes(), array.dtype).reshape(array.shape) for part in parts])


def sum_over_processes(array: np.ndarray) -> np.ndarray:
    """The sum of every process's array, on every process."""
    return stack_over_processes(array).sum(axis=0)


def check_agreement(settings: Mapping[str, object], free: tuple[str, ...] = ()) -> None:
    """Raises `InputError` on every process when one has other `settings` (nested, JSON types) than process 0, apart
    from dotted names that are `free`; lists the differences here."""
    if jax.process_count() == 1:
        return
    mine = {key: value for key, value in flatten(settings).items() if key not in free}
    text = json.dumps(mine)
    first, here = json.loads(_broadcast(text)), f"on process {jax.process_index()}"
    wrong = differences(first, json.loads(text), where="on process 0", here=here)
    agreeing = np.asarray(multihost_utils.process_allgather(np.array([not wrong])))
    if wrong:
        raise InputError(f"processes of one run have different configs: {wrong}")
    if not agreeing.all():
        others = ", ".join(str(process) for process in np.flatnonzero(~agreeing.ravel()))
        raise InputError(f"processes of one run have different configs: see what process {others} says")


def _broadcast(text: str) -> str:
    """Process 0's text, on every process."""
    data = text.encode()
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(data), np.int32)))
    padded = np.frombuffer(data[:size].ljust(size, b" "), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().decode()


def agreement() -> Callable[[int], int]:
    """A function that all processes call equally often, and that returns the largest of their numbers each time.

    Through the coordinator that brought them together, so that no device waits, and none is waited for.
    """
    if jax.process_count() == 1:
        return lambda number: number
    from jax._src.distributed import global_state  # JAX has no public way to the coordinator

    client, folder = global_state.client, f"scalr_jax/{next(_agreements)}"
    assert client is not None, "several processes have a coordinator"
    return largest_by(client, jax.process_index(), jax.process_count(), folder)


def largest_by(client: Coordinator, me: int, num_processes: int, folder: str) -> Callable[[int], int]:
    """`agreement` of process `me`, whose `client` of the coordinator it uses below the key `folder`."""
    turns = itertools.count()

    def largest(number: int) -> int:
        turn = next(turns)
        if me > 0:
            client.key_value_set(f"{folder}/{turn}/{me}", str(number))
            return int(client.blocking_key_value_get(f"{folder}/{turn}/all", A_DAY))
        others = range(1, num_processes)
        found = [int(client.blocking_key_value_get(f"{folder}/{turn}/{process}", A_DAY)) for process in others]
        client.key_value_set(f"{folder}/{turn}/all", str(max(number, *found)))
        client.key_value_delete(f"{folder}/{turn - 1}")  # which all have read
        return max(number, *found)

    return largest


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Around a training loop: reached(step) is True after the step at which every process is to save and stop; called
    once a step.

    Several processes agree on the step through JAX's preemption service; one process alone listens itself.
    """
    alone = not jax.distributed.is_initialized()
    given = stopping.requests() or stopping.Requests()
    with stopping.heard() if alone else contextlib.nullcontext(given) as requests:

        def reached(step: int) -> bool:
            requests.saving = True  # from the first step on there is something to save
            return requests.asked if alone else multihost_utils.reached_preemption_sync_point(step)

        try:
            yield reached
        finally:
            requests.saving = False
