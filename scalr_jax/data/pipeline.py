"""From datasets to batches: Grain streams, worker processes, packing, exact resume.

Scene i of the shuffled global order belongs to data shard i mod D, and every shard packs its own stream, so the
order depends on the seed and on D, not on processes or workers. Every scene's randomness comes from (seed, epoch,
record). Nothing is filtered in the workers: a bad frame travels as a record with an error, which is dropped, named
and counted here. What a checkpoint needs of a stream is the scenes that wait to be packed, the last of which is where
reading goes on: with `lookahead` 1 one number, the first scene not yet in a finished step.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np
from absl import flags, logging
from numpy.typing import ArrayLike

from scalr_jax.data import packing
from scalr_jax.data.frame_checks import read_frame, read_views
from scalr_jax.data.joined import Joined
from scalr_jax.data.scenes import Batch, Dataset, FinishedScenes, Frame, SceneView
from scalr_jax.data.transforms import SceneSettings, check_classes, make_scene
from scalr_jax.runtime.errors import BadFrameError, InputError, too_many_bad

T = TypeVar("T")
SAMPLE_SIZE = 32  # scenes looked at to derive capacities
QUIET = "ignore:resource_tracker"  # its warning that it freed what a killed worker left


class Step(NamedTuple):
    """One step's input on this process."""

    batch: Batch  # leading axis: this process's shards
    positions: np.ndarray  # [D_local(, lookahead)] int64: where each stream goes on after this step
    num_scenes: int
    bad_frames: int  # distinct bad frames met so far on this process
    scenes: tuple[tuple[SceneView, ...], ...]  # per shard, for evaluation
    bucket: int = 0  # which of `packing.in_buckets` the batch has


@dataclasses.dataclass(frozen=True)
class BuildScene:
    """Position in the endless shuffled order -> SceneView; runs in a worker."""

    dataset: Dataset | FinishedScenes
    settings: SceneSettings
    seed: int

    def __call__(self, position: int, drawn: tuple[int, int]) -> SceneView:
        epoch, record = drawn
        rng = np.random.default_rng((self.seed, 0 if self.settings.fixed else epoch, record))
        try:
            if isinstance(self.dataset, FinishedScenes):
                return self.dataset.scene(record, position)
            if self.settings.views > 1:
                frame, *views = read_views(self.dataset, record, self.settings.views, rng)
                return make_scene(frame, position, self.dataset.intensity(record), self.settings, rng, views=views)
            frame, mixing = self._frame(self.dataset, record, rng), self.settings.mixing
            records = [] if mixing is None else mixing.others(record, len(self.dataset), rng)
            others = [(self._frame(self.dataset, k, rng), self.dataset.intensity(k)) for k in records]
            return make_scene(frame, position, self.dataset.intensity(record), self.settings, rng, others)
        except BadFrameError as error:
            nothing = np.zeros((0, 0), np.float32)
            return SceneView(str(record), position, nothing, nothing, (), None, None, None, str(error))

    def _frame(self, dataset: Dataset, record: int, rng: np.random.Generator) -> Frame:
        """A frame with what is mixed into its raw scan. Raises `BadFrameError`."""
        frame = read_frame(dataset, record, rng)
        if self.settings.mixing is not None:
            frame = self.settings.mixing(frame, record, dataset, rng)
        if self.settings.task == "segment":
            check_classes(frame, len(dataset.class_names))
        return frame


@dataclasses.dataclass(frozen=True)
class Vote:
    """Position in one shard's stream -> SceneView, each of the shard's frames `votes` times in a row."""

    build: BuildScene
    shard: int
    num_shards: int
    votes: int

    def __call__(self, position: int) -> SceneView:
        number, vote = divmod(position, self.votes)
        record = number * self.num_shards + self.shard
        return self.build(record, (vote, record))


@dataclasses.dataclass(frozen=True)
class Draw:
    """Position in the endless order, slot of its epoch -> (epoch, record). Without `sources` the slot is the record.

    With them, slots belong to the datasets in turn, `counts[k]` to dataset k, and the n-th slot that a dataset ever
    gets draws the n-th of its own endless shuffled order. So the shuffle of the slots mixes the datasets at random, and
    no period of a mixture meets the number of shards.
    """

    counts: tuple[int, ...]
    sources: tuple[_Source, ...] = ()

    def __call__(self, position: int, slot: int) -> tuple[int, int]:
        epoch = position // sum(self.counts)
        if not self.sources:
            return epoch, int(slot)
        k = int(np.searchsorted(np.cumsum(self.counts), slot, side="right"))
        number = epoch * self.counts[k] + int(slot) - sum(self.counts[:k])
        source = self.sources[k]
        record = source.order[number]
        assert record is not None, "no record is filtered out"
        return number // source.frames, int(record)


class _Source(NamedTuple):
    """One dataset of a weighted mixture."""

    frames: int
    order: grain.MapDataset[int]  # its records, shuffled, endless


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """One dataset's batches for this process's shards.

    Args:
        dataset: of frames, or of scenes that need no work.
        settings: how a frame becomes a scene.
        seed: of the order and of every random choice.
        num_shards: D, over all processes.
        shards: this process's shards.
        epochs: None for an endless shuffled stream (training); evaluation takes 1, in order.
        num_workers: worker processes of this process (0: none).
        scenes_per_step: None, or exactly so many scenes a step over all shards.
        votes: of an evaluation: how often each frame comes, one after the other on its shard, with other random
            numbers each time. A scene's `index` is its frame's.
        lookahead: of training: scenes that may wait for room before a pack is closed.
    """

    dataset: Dataset | FinishedScenes
    settings: SceneSettings
    seed: int = 0
    num_shards: int = 1
    shards: Sequence[int] = (0,)
    epochs: int | None = None
    num_workers: int = 0
    scenes_per_step: int | None = None
    votes: int = 1
    lookahead: int = 1

    def __post_init__(self):
        if len(self.dataset) == 0:
            raise InputError("the dataset has no frame")
        if self.scenes_per_step and self.scenes_per_step % self.num_shards:
            raise InputError(
                f"data.scenes_per_step = {self.scenes_per_step} does not divide among {self.num_shards} data shards"
            )

    @property
    def exactly(self) -> int | None:
        """Scenes of every pack; None: as many as fit."""
        return self.scenes_per_step // self.num_shards if self.scenes_per_step else None

    def order(self) -> Any:
        """The global order, a grain.MapDataset: element i is the scene at position i."""
        draw = self._draw()
        slots = grain.MapDataset.range(sum(draw.counts))
        if self.epochs is None:
            slots = _endless(slots, self.seed)
        return slots.map_with_index(draw).map_with_index(BuildScene(self.dataset, self.settings, self.seed))

    def _draw(self) -> Draw:
        if not isinstance(self.dataset, Joined) or self.dataset.weights is None or self.epochs is not None:
            return Draw((len(self.dataset),))
        weights = self.dataset.weights
        ends = np.rint(np.cumsum(weights) / sum(weights) * len(self.dataset)).astype(int)
        if (np.diff(ends, prepend=0) < 1).any():
            raise InputError(
                f"the weights {weights} give a dataset no scene in an epoch of {len(self.dataset)}; raise it"
            )
        sources, first = [], 0
        for k, part in enumerate(self.dataset.datasets):
            records = grain.MapDataset.range(first, first + len(part))
            sources.append(_Source(len(part), _endless(records, self.seed + 1 + k)))
            first += len(part)
        return Draw(tuple(int(count) for count in np.diff(ends, prepend=0)), tuple(sources))

    def stream(self, shard: int, first: int) -> Iterator[SceneView]:
        """Scenes of one shard from position `first` on, bad ones included."""
        scenes = self.order().slice(slice(first, None, self.num_shards))
        if self.votes > 1:
            build = BuildScene(self.dataset, self.settings, self.seed)
            number = len(range(shard, len(self.dataset), self.num_shards)) * self.votes
            scenes = grain.MapDataset.range(number).map(Vote(build, shard, self.num_shards, self.votes))
        workers = -(-self.num_workers // len(self.shards))
        threads = grain.ReadOptions(num_threads=0 if workers else 2, prefetch_buffer_size=0 if workers else 4)
        stream = scenes.to_iter_dataset(threads)
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, also outside an absl program
            if QUIET not in sys.warnoptions:  # of processes that are started from here on
                sys.warnoptions.append(QUIET)
            options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            stream = stream.mp_prefetch(options, worker_init_fn=_tie_to_parent)
        iterator = iter(stream)
        try:
            yield from iterator
        except InputError as error:
            raise InputError(str(error)) from None  # without Grain's traceback and notes, which hide the sentence
        except RuntimeError as error:
            code = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
            if code is None:
                raise
            raise InputError(
                f"a data worker was killed (exit code {code[1]}; -9 usually means that memory ran out); "
                f"the same command resumes; fewer data.num_workers (now {self.num_workers}) need less memory"
            ) from None
        finally:  # a stream that is left early must stop its workers and free their shared memory
            iterator.close()

    def sample(self, number: int = SAMPLE_SIZE) -> list[SceneView]:
        """Good scenes, the same on every process: the first of the shuffled order, of few frames several augmentations;
        in an evaluation, which is not shuffled, from all over the dataset."""
        order, scenes, error, length = self.order(), [], "it is empty", len(self.dataset)
        repeats = self.epochs is None and self.settings.augmentation != "none"
        places = range(2 * number if repeats else min(2 * number, length))
        if self.epochs is not None:
            places = dict.fromkeys([*np.linspace(0, length - 1, min(number, length)).astype(int).tolist(), *places])
        for place in places:
            scene = order[place]
            if scene.error is None:
                scenes.append(scene)
            else:
                error = scene.error
            if len(scenes) == number:
                break
        if not scenes:
            raise InputError(f"no usable frame at the beginning of the dataset: {error}")
        return scenes

    def empty_batch(self, capacities: packing.Capacities, template: SceneView) -> Batch:
        """Arrays of the right shapes and dtypes, all padding."""
        return self.batch([()] * len(self.shards), capacities, template)

    def batch(
        self, scenes: Sequence[Sequence[SceneView]], capacities: packing.Capacities, template: SceneView
    ) -> Batch:
        """The scenes of each local shard as arrays of these capacities."""
        grids = self.settings.needs.grids
        return packing.stack_shards([packing.pack_shard(part, capacities, template, grids) for part in scenes])

    def steps(
        self,
        capacities: packing.Capacities,
        template: SceneView,
        positions: ArrayLike | None = None,
        shares: Sequence[float] = (),
    ) -> Iterator[Step]:
        """Batches from `positions` (of a `Step`; default: the beginning) on.

        With `shares` a batch has the smallest of `packing.in_buckets` that holds the scenes of this process. Ends after
        the longest stream of an evaluation; other shards, and other processes, then see empty packs.
        """
        rooms, ended = packing.in_buckets(capacities, shares), packing.Pack((), (), packing.nothing_of(capacities))
        positions = self.beginning() if positions is None else np.asarray(positions)
        bad: dict[str, str] = {}
        packed = functools.partial(
            packing.pack_stream, capacities=capacities, exactly=self.exactly, lookahead=self.lookahead
        )
        streams = [
            packed(self._good(self._resumed(shard, position), bad))
            for shard, position in zip(self.shards, positions, strict=True)
        ]
        while True:
            packs = [next(stream, ended) for stream in streams]
            positions = np.stack(list(map(self._after, self.shards, packs, positions)))
            scenes, bucket = tuple(pack.scenes for pack in packs), packing.bucket_of(packs, rooms)
            arrays = self.batch(scenes, rooms[bucket], template)
            yield Step(arrays, positions, sum(map(len, scenes)), len(bad), scenes, bucket)

    def beginning(self) -> np.ndarray:
        """`Step.positions` before the first step: nothing waits (-1), each stream goes on at its first scene."""
        first = np.array(self.shards, np.int64)
        return first if self.lookahead == 1 else np.stack([*[np.full_like(first, -1)] * (self.lookahead - 1), first], 1)

    def _resumed(self, shard: int, position: np.ndarray) -> Iterator[SceneView]:
        """The scenes of a shard that wait, then its stream."""
        *waiting, first = np.atleast_1d(position).tolist()
        order = self.order()
        yield from (order[number] for number in waiting if number >= 0)
        yield from self.stream(shard, first)

    def _after(self, shard: int, pack: packing.Pack, position: np.ndarray) -> np.ndarray:
        """A shard's row of `Step.positions` after a pack, from that before it."""
        if not pack.scenes:
            return position
        *waiting, last = pack.waiting
        last += (shard - last) % self.num_shards  # the first of this shard that is not before the pack's end
        after = np.full(self.lookahead, -1)
        after[self.lookahead - len(pack.waiting) :] = [*waiting, last]
        return after.reshape(position.shape)

    def _good(self, scenes: Iterator[SceneView], bad: dict[str, str]) -> Iterator[SceneView]:
        """Drops, names and counts bad frames; stops when more than 1 % (and more than one) are bad."""
        for scene in scenes:
            if scene.error is None:
                yield scene
            elif scene.name not in bad:
                bad[scene.name] = scene.error
                logging.warning("skipped a bad frame: %s", scene.error)
                if too_many_bad(len(bad), len(self.dataset)):
                    found = f"{len(bad)} of {len(self.dataset)} frames are bad, more than 1 %"
                    raise InputError(f"{found}; the last one: {scene.error}")


def _tie_to_parent(worker: int, num_workers: int) -> None:
    """In a worker: leave the answer to signals to the parent (a cluster sends SIGTERM to all, and the parent still
    wants scenes until it has saved), and end when it is gone: Grain's workers outlive a parent that was killed."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _endless(records: grain.MapDataset, seed: int) -> grain.MapDataset:
    """Epoch after epoch, each in another order."""
    return records.shuffle(seed=seed % 2**32).repeat((2**31 - 1) // len(records))


def prefetch(items: Iterator[T], size: int = 2) -> Generator[T, None, None]:
    """The same items, computed ahead in one thread, in order."""
    if size == 0:
        yield from items
        return
    end: Any = object()  # a StopIteration must not leave a generator
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        pending = deque(pool.submit(next, items, end) for _ in range(size))
        while (taken := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield taken
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(items, Generator):
            items.close()
