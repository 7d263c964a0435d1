"""Evaluation of segmentation: every original point takes the class of its nearest kept point.

With votes, each scan goes through the network in several augmented copies, and a point's class is the one with the
largest mean of the copies' softmax (WaffleIron's evaluation, with stochastic depth off: so no result depends on which
scans share a pack).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from scalr_jax.config import DataSettings
from scalr_jax.data.build import scene_settings
from scalr_jax.data.packing import Capacities, derive_capacities, flat, given_tables, largest, sizes
from scalr_jax.data.pipeline import Pipeline, prefetch
from scalr_jax.data.scenes import Dataset, SceneView
from scalr_jax.evaluation.features import check_outputs, split_rows
from scalr_jax.evaluation.report import confusion_matrix
from scalr_jax.models.student import Classifier, Variables
from scalr_jax.runtime import distributed, sharding
from scalr_jax.runtime.logging import Progress
from scalr_jax.train import steps

HEADROOM = 1.5  # a pack is at least so much larger than the largest of the first scenes


class ScanClasses(NamedTuple):
    """One scan's classes beside its labels; N original points, in the scan's order."""

    frame_index: int  # in the dataset
    classes: np.ndarray  # [N] uint8
    labels: np.ndarray  # [N] uint8
    ranges: np.ndarray  # [N] float32: metres from the origin of the student's frame


class Evaluator:
    """A segmentation model that classifies the scans of any number of datasets, compiled once.

    Args:
        seed: of the copies that vote.
        votes: augmented copies of each scan, by `data.augmentation`; 1: the scan as it is.
        order: [num_classes] the datasets' class of each of the model's; None: the same.
    """

    def __init__(
        self,
        data: DataSettings,
        mesh: Mesh,
        student: Classifier,
        variables: Variables,
        num_classes: int,
        *,
        seed: int = 0,
        votes: int = 1,
        order: np.ndarray | None = None,
    ):
        self.num_classes, self.votes = num_classes, votes
        self._data, self._mesh, self._seed = data, mesh, seed
        self._order = np.arange(num_classes) if order is None else order
        settings = scene_settings(data, student.needs, task="segment", train=False)
        self._settings = dataclasses.replace(settings, votes=votes > 1)
        outputs = (sharding.batch_sharding(self._mesh), sharding.replicated(self._mesh))
        self._step = jax.jit(steps.make_classify_step(student, probabilities=votes > 1), out_shardings=outputs)
        self._variables = jax.device_put(variables, sharding.replicated(self._mesh))
        self._capacities: Capacities | None = None
        self.num_scans = 0  # of the last `confusion`, over all processes: those that could be read

    def confusion(
        self, dataset: Dataset, *, rings: Sequence[float] = (), keep: Callable[[ScanClasses], None] | None = None
    ) -> np.ndarray:
        """Confusion matrices [len(rings) + 1, classes, classes] int64, over all processes, of the labelled points by
        their distance: below rings[0], from there to rings[1], ..., beyond the last (metres, ascending). Scans that
        cannot be read are in none; `num_scans` is the number of the others.

        `keep` sees every scan of this process, in the order of the dataset's frames on each of its shards.
        """
        confusion = np.zeros((len(rings) + 1, self.num_classes, self.num_classes), np.int64)
        progress, share, number = Progress(active=jax.process_index() == 0), -(-len(dataset) // jax.process_count()), 0
        for number, found in enumerate(self.scans(dataset), 1):
            scan = found._replace(classes=self._order[found.classes].astype(np.uint8))
            ring = np.searchsorted(rings, scan.ranges, side="right")
            for k in range(len(confusion)):
                confusion[k] += confusion_matrix(scan.labels[ring == k], scan.classes[ring == k], self.num_classes)
            if keep is not None:
                keep(scan)
            progress.add(f"evaluated {number} of {share} scans", share - number)
        self.num_scans = int(distributed.sum_over_processes(np.array([number]))[0])
        if self.num_scans < len(dataset) and jax.process_index() == 0:
            bad = len(dataset) - self.num_scans
            print(f"{bad} of {len(dataset)} scans could not be read: excluded from the results", flush=True)
        return distributed.sum_over_processes(confusion)

    def reserve(self, datasets: Sequence[Any], number: int = 4) -> None:
        """Makes packs large enough for the first scans of each dataset, so that one program serves them all."""
        sample = [scene for dataset in datasets for scene in self._pipeline(dataset).sample(number)]
        self._capacities = self._choose_capacities(sample)

    def scans(self, dataset: Dataset) -> Iterator[ScanClasses]:
        """The good scans of this process's shards, packed several a shard."""
        pipeline = self._pipeline(dataset)
        sample = pipeline.sample()
        self._capacities = self._choose_capacities(sample)
        ballots = [_Ballot(self.votes) for _ in pipeline.shards]
        steps_ahead = prefetch(iter(pipeline.steps(self._capacities, sample[0])), self._data.prefetch)
        with contextlib.closing(steps_ahead) as items:
            for item in items:
                rows, counts = self._step(self._variables, sharding.put_batch(item.batch, self._mesh))
                num_scenes, without_class = np.asarray(counts)
                if num_scenes == 0:  # on no process is one left
                    break
                check_outputs(without_class, item.scenes)
                rows = sharding.local_rows(rows)  # [D_local, P] classes, or [D_local, P, classes] probabilities
                for ballot, scenes, packed in zip(ballots, item.scenes, rows, strict=True):
                    for scene, kept in split_rows(scenes, packed):
                        yield from ballot.add(scene, kept[scene.upsample])
        for ballot in ballots:
            yield from ballot.close()

    def _pipeline(self, dataset: Dataset) -> Pipeline:
        shards: dict = {"num_shards": self._mesh.size, "shards": sharding.local_shards(self._mesh)}
        options: dict = {"seed": self._seed, "num_workers": self._data.num_workers, "votes": self.votes}
        return Pipeline(dataset, self._settings, epochs=1, **shards, **options)

    def _choose_capacities(self, sample: Sequence[SceneView]) -> Capacities:
        """Those of the last dataset as long as the sample fits with room to spare, so that nothing is compiled again;
        else larger ones. Tables are at least as large as `data` gives them."""
        held, data = self._capacities, self._data
        points = max(data.points_per_shard, int(HEADROOM * max(len(scene.feats) for scene in sample)))
        derived = derive_capacities(sample, points=points, scenes=data.scenes_per_shard)
        derived = largest(derived, given_tables(derived, data))
        if held is None:
            return derived
        if (HEADROOM * np.max([flat(sizes(scene)) for scene in sample], axis=0) <= flat(held)).all():
            return held
        return largest(held, derived)


def _scan(scene: SceneView, classes: np.ndarray) -> ScanClasses:
    assert scene.raw_labels is not None, "a scene of training"
    assert scene.raw_ranges is not None, "a scene of training"
    return ScanClasses(scene.stream_index, classes.astype(np.uint8), scene.raw_labels, scene.raw_ranges)


class _Ballot:
    """The votes on one scan of a shard, until another scan comes; a single vote is final."""

    def __init__(self, votes: int):
        self._votes = votes
        self._scene: SceneView | None = None
        self._sum = np.zeros((0, 0), np.float32)  # [N, classes]

    def add(self, scene: SceneView, rows: np.ndarray) -> Iterator[ScanClasses]:
        """Classes [N], or one copy's probabilities [N, classes]; yields what is decided."""
        if self._votes == 1:
            yield _scan(scene, rows)
        elif self._scene is not None and self._scene.stream_index == scene.stream_index:
            self._sum += rows
        else:
            yield from self.close()
            self._scene, self._sum = scene, rows

    def close(self) -> Iterator[ScanClasses]:
        if self._scene is not None:
            yield _scan(self._scene, self._sum.argmax(axis=1))
