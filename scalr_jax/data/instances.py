"""A bank of instances for cut-mix: the objects of some classes, cut out of every training scan once.

An instance is what the dataset numbers as one; where it numbers none, a connected set of points of one class, whose
parts lie in neighbouring voxels of half a metre. x and y are centred on its points' mean, z starts at its lowest point,
and intensity is normalised by its sensor's statistics. The folder has `points.npy` [T, 4] float32, `start.npy` [n + 1]
int64 and `labels.npy` [n] uint8; `bank.json`, which says whose they are, comes last.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import logging

from scalr_jax.data.readers import files
from scalr_jax.data.scenes import Dataset, Frame
from scalr_jax.data.transforms import labels_of, to_ego
from scalr_jax.runtime.errors import BadFrameError, InputError, too_many_bad
from scalr_jax.runtime.logging import PROGRESS_SECONDS
from scalr_jax.runtime.storage import read_json, reason, write_json

GAP = 0.5  # metres, the voxels of `connected`
MIN_POINTS = 6  # of an instance
THREADS = 8  # that read scans


@dataclasses.dataclass(frozen=True)
class InstanceBank:
    """The instances in a folder; `classes` are those that have some. Files are mapped into memory on first use."""

    folder: Path
    classes: tuple[int, ...]

    def count(self, label: int) -> int:
        return len(_open(self.folder).of_class[label])

    def instance(self, label: int, number: int, statistics: tuple[float, float]) -> np.ndarray:
        """Instance `number` of a class: [n, 4] float32, with the raw intensities of a sensor of these statistics."""
        bank = _open(self.folder)
        k = bank.of_class[label][number]
        points = np.array(bank.points[bank.start[k] : bank.start[k + 1]])
        points[:, 3] = points[:, 3] * statistics[1] + statistics[0]
        return points


class _Files(NamedTuple):
    points: np.ndarray
    start: np.ndarray
    of_class: dict[int, np.ndarray]  # class -> its instances


@functools.lru_cache(maxsize=4)
def _open(folder: Path) -> _Files:
    try:
        with files.NUMPY_LOAD:
            labels, start = (np.load(folder / name) for name in ("labels.npy", "start.npy"))
            points = np.load(folder / "points.npy", mmap_mode="r")
        if points.shape != (start[-1], 4) or len(start) != len(labels) + 1:
            raise ValueError(f"{len(points)} points, {len(labels)} labels and {len(start)} places do not fit")
    except (IndexError, *files.UNREADABLE_ARRAYS) as error:
        raise InputError(f"{folder}: damaged ({reason(error)}); remove it to cut the instances again") from error
    of_class = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}
    return _Files(points, start, of_class)


def open_bank(folder: Path, dataset: Dataset, classes: Sequence[int]) -> InstanceBank:
    """Opens what `write_bank` wrote. Raises `InputError` when it is of other scans or classes, or holds nothing."""
    path = folder / "bank.json"
    if read_json(path, "remove the folder to cut the instances again") != bank_key(dataset, classes):
        raise InputError(f"{folder} holds instances of other scans or classes; remove it, or use another --workdir")
    found = tuple(sorted(_open(folder).of_class))
    if not found:
        raise InputError(f"no training scan has an instance of the classes of data.cutmix; {folder} is empty")
    return InstanceBank(folder, found)


def bank_key(dataset: Dataset, classes: Sequence[int]) -> dict:
    """The settings and files that an instance bank depends on."""
    names = [dataset.name(k) for k in (0, len(dataset) - 1)]
    return {"classes": [dataset.class_names[k] for k in classes], "scans": len(dataset), "names": names}


def write_bank(folder: Path, dataset: Dataset, classes: Sequence[int]) -> None:
    """Cuts the instances out of all scans; nothing is done when the bank is there. Raises InputError when more than 1 %
    of the scans (and more than one) cannot be read."""
    if (folder / "bank.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    points, labels, bad, said = [], [], 0, time.monotonic()
    scans = grain.MapDataset.range(len(dataset)).map(functools.partial(_cut_scan, dataset, classes))
    stream = iter(scans.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * THREADS)))
    for number, found in enumerate(stream, 1):
        if isinstance(found, str):
            bad += 1
            logging.warning("no instances of a bad frame: %s", found)
            if too_many_bad(bad, len(dataset)):
                raise InputError(f"{bad} of {len(dataset)} frames are bad, more than 1 %; the last one: {found}")
            continue
        points += [instance for _, instance in found]
        labels += [label for label, _ in found]
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            print(f"cut-mix: {len(labels)} instances of {number} of {len(dataset)} scans", flush=True)
    stream.close()
    np.save(folder / "points.npy", np.concatenate([np.zeros((0, 4), np.float32), *points]))
    np.save(folder / "start.npy", np.cumsum([0, *map(len, points)]))
    np.save(folder / "labels.npy", np.array(labels, np.uint8))
    counts = [f"{labels.count(k)} of {dataset.class_names[k]}" for k in classes]
    print(f"cut-mix: {len(labels)} instances: {', '.join(counts)}", flush=True)
    write_json(folder / "bank.json", bank_key(dataset, classes))


def _cut_scan(dataset: Dataset, classes: Sequence[int], index: int) -> list[tuple[int, np.ndarray]] | str:
    """A scan's instances, or what is wrong with it."""
    try:
        frame = dataset.frame(index, np.random.default_rng(index))
    except BadFrameError as error:
        return str(error)
    return list(cut(frame, classes, dataset.intensity(index)))


def cut(frame: Frame, classes: Sequence[int], statistics: tuple[float, float]) -> Iterator[tuple[int, np.ndarray]]:
    """(class, points [n, 4] float32) of each instance of at least six points."""
    labels = labels_of(frame)
    for label in classes:
        mine = np.flatnonzero(labels == label)
        if len(mine) < MIN_POINTS:
            continue
        points = np.concatenate([to_ego(frame.points[mine], frame.to_ego), frame.points[mine, 3:4]], axis=1)
        numbers = connected(points[:, :3]) if frame.instances is None else frame.instances[mine]
        for number in np.unique(numbers):
            instance = points[numbers == number].astype(np.float32)
            if len(instance) >= MIN_POINTS:
                instance[:, :2] -= instance[:, :2].mean(axis=0)
                instance[:, 2] -= instance[:, 2].min()
                instance[:, 3] = (instance[:, 3] - statistics[0]) / statistics[1]
                yield label, instance


def connected(xyz: np.ndarray) -> np.ndarray:
    """The connected set [n] of each point [n, 3] (metres): voxels of `GAP` that touch, corners included, are one."""
    from scipy.sparse import coo_matrix  # these take a third of a second, and most runs mix no instances
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    voxels, inverse = np.unique(np.floor(xyz / GAP).astype(np.int64), axis=0, return_inverse=True)
    pairs = KDTree(voxels).query_pairs(1.5, p=np.inf, output_type="ndarray")
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(voxels), len(voxels)))
    return connected_components(graph, directed=False)[1][inverse.ravel()]
