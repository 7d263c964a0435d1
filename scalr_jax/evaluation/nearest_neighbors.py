"""A probe without training: each point takes the class that its nearest features in a bank vote for.

    vote(class) = sum over the k nearest of exp(cosine / temperature) [label = class]

(the weighted vote of Wu et al., CVPR 2018, as DINO evaluates with.) The bank holds the same number of training points
of every class, drawn uniformly over all points of the class, and depends on the seed alone: each labelled point gets a
random number from (seed, scene), and the points with the smallest are the bank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scalr_jax.config import ProbeSettings, TrainSettings
from scalr_jax.data.scenes import IGNORE, Batch, Dataset, SceneNeeds, SceneView
from scalr_jax.evaluation.features import each_scene
from scalr_jax.models.student import Classifier, Student, Variables, without_head
from scalr_jax.runtime import distributed
from scalr_jax.runtime.errors import InputError
from scalr_jax.train.losses import normalize

Array = jax.Array

SMALLEST = 1e-30  # vote of a class that none of the neighbours has
ROW_BYTES = 1 << 26  # of the similarities that are kept at once


class NearestNeighbors(NamedTuple):
    """`apply(variables, batch, train=False)` -> logarithms of votes [D, P, classes], whose softmax is each class's
    share of them. variables: {"backbone", "bank", "labels"}."""

    student: Classifier  # with head "none"
    num_classes: int
    num_neighbors: int
    temperature: float

    @property
    def needs(self) -> SceneNeeds:
        return self.student.needs

    def apply(self, variables: Variables, batch: Batch, *, train: bool) -> Array:
        features = self.student.apply(variables["backbone"], batch, train=train)
        options: dict = {"num_neighbors": self.num_neighbors, "temperature": self.temperature}
        found = votes(features, variables["bank"], variables["labels"], num_classes=self.num_classes, **options)
        return jnp.log(jnp.maximum(found, SMALLEST))


def votes(
    features: Array, bank: Array, labels: Array, *, num_classes: int, num_neighbors: int, temperature: float
) -> Array:
    """Votes [D, P, classes] float32 for features [D, P, C] from a bank of unit rows [B, C] with labels [B] int32."""
    D, P, C = features.shape
    rows = max(1, min(P, ROW_BYTES // (4 * len(bank))))
    number = -(-P // rows)
    padded = jnp.pad(features, ((0, 0), (0, number * rows - P), (0, 0)))
    blocks = padded.reshape(D, number, rows, C).swapaxes(0, 1)  # [number, D, rows, C]

    def one_block(block: Array) -> Array:
        unit = normalize(block, jnp.ones(block.shape[:-1], bool))
        similarity = jnp.einsum("dpc,bc->dpb", unit, bank, precision="highest")
        nearest, index = jax.lax.top_k(similarity, min(num_neighbors, len(bank)))
        weight = jnp.exp((nearest - 1.0) / temperature)  # the common factor exp(1 / temperature) would overflow
        return jnp.einsum("dpk,dpkl->dpl", weight, jax.nn.one_hot(jnp.asarray(labels)[index], num_classes))

    return jax.lax.map(one_block, blocks).swapaxes(0, 1).reshape(D, number * rows, -1)[:, :P]


def make_bank(
    scenes: Iterable[tuple[SceneView, np.ndarray]], num_classes: int, per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unit features [B, C] float32 and labels [B] int32: `per_class` points of each class, or all that there are.

    scenes: this process's, each with its features [N, C]. Every process gets the same bank of all.
    """
    keys = np.full((num_classes, per_class), np.inf)  # the smallest random numbers of each class, ascending
    bank = None  # [num_classes, per_class, C]: their points' features
    for scene, features in scenes:
        if bank is None:
            bank = np.zeros((num_classes, per_class, features.shape[1]), np.float32)
        drawn = np.random.default_rng((seed, 1, scene.stream_index)).random(len(features))
        for label in set(np.unique(np.asarray(scene.labels))) - {IGNORE}:
            mine = np.flatnonzero(scene.labels == label)
            _keep_smallest(keys[label], bank[label], drawn[mine], features[mine])
    assert bank is not None, "the pipeline has checked that there is a scene"
    all_keys, all_rows = distributed.stack_over_processes(keys), distributed.stack_over_processes(bank)
    keys, bank = np.full_like(keys, np.inf), np.zeros_like(bank)
    for label in range(num_classes):
        rows = all_rows[:, label].reshape(-1, bank.shape[2])
        _keep_smallest(keys[label], bank[label], all_keys[:, label].ravel(), rows)
    there = np.isfinite(keys)
    if not there.any():
        raise InputError("the training set has no labelled point; check the label files, data.root and data.split")
    bank = bank[there]
    return bank / np.maximum(np.linalg.norm(bank, axis=1, keepdims=True), 1e-12), np.nonzero(there)[0].astype(np.int32)


def _keep_smallest(keys: np.ndarray, rows: np.ndarray, more_keys: np.ndarray, more_rows: np.ndarray) -> None:
    """In place: of both together, the ones with the smallest keys. keys [n] ascending, rows [n, C]."""
    both = np.concatenate([keys, more_keys])
    order = np.argsort(both)[: len(keys)]
    keys[:], rows[:] = both[order], np.concatenate([rows, more_rows])[order]


def nearest_neighbors(
    probe: ProbeSettings,
    settings: TrainSettings,
    student: Student,
    dataset: Dataset,
    backbone: Variables,
    num_classes: int,
) -> tuple[NearestNeighbors, dict]:
    """The classifier of `config.probe` and its variables, from the training frames; heads are left out."""
    scenes = each_scene(settings, student, dataset, backbone)
    bank, labels = make_bank(scenes, num_classes, probe.bank_per_class, settings.run.seed)
    counts = np.bincount(labels, minlength=num_classes)
    if jax.process_index() == 0:
        print(f"knn: a bank of {len(bank):,} points, {counts.min()} to {counts.max()} of a class", flush=True)
        if missing := [name for name, count in zip(dataset.class_names, counts, strict=True) if not count]:
            print(f"knn: no labelled point of {', '.join(missing)} in training; never predicted", flush=True)
    classifier = NearestNeighbors(student.clone(head="none"), num_classes, probe.num_neighbors, probe.temperature)
    return classifier, {"backbone": without_head(backbone), "bank": bank, "labels": labels}
