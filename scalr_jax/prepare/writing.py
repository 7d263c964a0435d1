"""Writes record shards: several processes, each whole shards; what is finished survives any kill.

A shard is written beside its place, read back, summed and renamed; then `parts/<shard>.json` says what is in it. So a
shard counts when its part is there, and a run that goes on writes the others. `records.json`, from all parts, is last.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NamedTuple

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from scalr_jax.data.manifest import Part
from scalr_jax.prepare.layout import shard_name
from scalr_jax.prepare.source import Source
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.runtime.storage import checksum, remove_partial, write_json, written_beside

WRITER_OPTIONS = "group_size:1,uncompressed"  # images do not compress, and Zstd triples the time of reading
PARTS = "parts"
AGAIN = "free space on the disk and run the same command again: finished files are kept"
Progress = Callable[[int], object]  # gets the number of frames (or bytes) done since it was last called


class Shard(NamedTuple):
    """Frames `first` to `last` - 1 of a split's source."""

    split: str
    number: int
    num_shards: int
    first: int
    last: int

    @property
    def file(self) -> str:
        return shard_name(self.split, self.number, self.num_shards)


def plan_shards(split: str, num_frames: int, frames_per_shard: int) -> list[Shard]:
    """Shards of nearly equal numbers of frames; small splits too have several, so that processes share them."""
    num_shards = max(-(-num_frames // frames_per_shard), min(num_frames // 4, 8), 1)
    ends = [num_frames * k // num_shards for k in range(num_shards + 1)]
    return [Shard(split, k, num_shards, ends[k], ends[k + 1]) for k in range(num_shards)]


def write_shard(folder: Path, source: Source, shard: Shard, said: Progress) -> Part:
    """Writes one shard and its part, and returns that.

    Raises InputError: the disk is full, or will not take the file for another reason.
    """
    final = folder / shard.file
    try:
        with written_beside(final) as partial:
            part = _write_records(partial, source, shard, said)
            part["bytes"], part["sha256"] = partial.stat().st_size, checksum(partial)
        write_json(folder / PARTS / f"{shard.file}.json", part, indent=None)
    except OSError as error:
        raise InputError(f"{error.strerror or error} ({final}); {AGAIN}") from error
    return part


def _write_records(path: Path, source: Source, shard: Shard, said: Progress) -> Part:
    from scalr_jax.prepare import builders  # needs the prepare extra

    serialize = builders.make_serializer()
    part: Part = {"file": shard.file, "bytes": 0, "sha256": "", "records": 0, "names": [], "scan_files": [],
                  "scans": [], "cameras": [], "bad": [], "problems": []}  # fmt: skip
    known = {camera: k for k, camera in enumerate(source.cameras)}
    try:
        writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
        with contextlib.closing(writer):
            for index in range(shard.first, shard.last):
                try:
                    frame = source.prepare(index)
                except BadFrameError as error:
                    part["bad"].append(str(error))
                else:
                    for example in frame.examples:
                        writer.write(serialize(example))
                    part["records"] += len(frame.examples)
                    part["names"].append(frame.name)
                    part["scan_files"].append(source.scan_file(index))
                    part["scans"].append(frame.has_scan)
                    part["cameras"].append([known[camera] for camera in frame.cameras])
                    part["problems"] += frame.problems
                said(1)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        reader = array_record_module.ArrayRecordReader(str(path), options="readahead_buffer_size:0")
        with contextlib.closing(reader):
            if reader.num_records() != part["records"]:
                raise InputError(f"{reader.num_records()} of {part['records']} records were written ({path}); {AGAIN}")
    except RuntimeError as error:  # array_record's only kind
        raise InputError(f"{' '.join(str(error).split())[:300]}; {AGAIN}") from error
    return part


def write_shards(
    folder: Path, sources: Mapping[str, Source], shards: Sequence[Shard], num_processes: int, said: Progress
) -> Generator[Part]:
    """Writes `shards` in this process, or in several; yields parts as they are finished.

    Raises InputError: as `write_shard`, or a process was killed.
    """
    if num_processes == 1 or len(shards) < 2:
        for shard in shards:
            yield write_shard(folder, sources[shard.split], shard, said)
        return
    spawn = multiprocessing.get_context("spawn")
    todo = list(reversed(shards))
    workers: dict[Connection, SpawnProcess] = {}
    try:
        with _holding_interrupts():  # until all are known here, to be stopped
            for _ in range(min(num_processes, len(shards))):
                ours, theirs = spawn.Pipe()
                worker = spawn.Process(target=_work, args=(theirs, folder, dict(sources)), daemon=True)
                worker.start()
                theirs.close()
                workers[ours] = worker
                _send(ours, worker, todo.pop())
        yield from _collect(workers, todo, said)
    finally:
        for connection, worker in workers.items():
            connection.close()
            worker.terminate()
            worker.join()
        remove_partial(folder)


@contextlib.contextmanager
def _holding_interrupts() -> Generator[None]:
    """Processes that are started here never see Ctrl-C, also while they import; this one sees it afterwards.

    Blocking the signal is what they inherit; the handler is there because another thread (tqdm's) may receive it.
    """
    held: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number)) if in_main else None
    resource_tracker.ensure_running()  # multiprocessing's; starting it later would unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, handler)
    if held:
        raise KeyboardInterrupt


def _collect(workers: dict[Connection, SpawnProcess], todo: list[Shard], said: Progress) -> Generator[Part]:
    """Hands out `todo` (last first) to workers, each of which has one shard already, until all are written."""
    busy = set(workers)
    while busy:
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            try:
                message = ready.recv()
            except (EOFError, ConnectionError):
                raise _ended(workers[ready]) from None
            if isinstance(message, Exception):
                raise message
            if isinstance(message, int):
                said(message)
                continue
            yield message
            if todo:
                _send(ready, workers[ready], todo.pop())
            else:
                busy.remove(ready)


def _send(connection: Connection, worker: SpawnProcess, shard: Shard) -> None:
    try:
        connection.send(shard)
    except ConnectionError:
        raise _ended(worker) from None


def _ended(worker: SpawnProcess) -> Exception:
    """The error for a worker that is gone."""
    worker.join()
    code = worker.exitcode or 0
    if code >= 0:
        return RuntimeError("a worker of prepare failed; what it said is above")
    return InputError(
        f"a process of prepare was ended by signal {-code} (9: killed, perhaps because memory ran out); the "
        "same command goes on, and needs less memory with fewer --num_processes"
    )


def _work(connection: Connection, folder: Path, sources: Mapping[str, Source]) -> None:
    """A worker: writes the shards that its parent requests, and ends with it."""
    parent = os.getppid()

    def said(frames: int) -> None:
        if os.getppid() != parent:  # the parent was killed, and another run may have begun
            raise EOFError
        connection.send(frames)

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            shard = connection.recv()
            try:
                done = write_shard(folder, sources[shard.split], shard, said)
            except InputError as error:
                done = error
            connection.send(done)
