"""Means over groups of scenes equal the mean of each group's own loss, in NumPy and in its gradient."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from scalr_jax import tasks
from scalr_jax.config import get_config
from scalr_jax.models import vit
from scalr_jax.settings import read_settings
from scalr_jax.train import losses
from scalr_jax.train.groups import make_groups

SLOTS, CLASSES = 3, 5
SIZES = ((9, 4, 7), (12, 0, 0), (3, 8, 0))  # points of each scene of three shards; 0: an empty slot
POINTS = 24

grouped = jax.jit(make_groups, static_argnums=3)


def batch(seed=0):
    """scene [D, P], scene_points [D, S], labels [D, P] with ignored ones, and a number for each real scene."""
    rng = np.random.default_rng(seed)
    scene, order = np.full((len(SIZES), POINTS), SLOTS), np.full((len(SIZES), POINTS), -1)
    count = 0
    for d, sizes in enumerate(SIZES):
        ends = np.cumsum(sizes)
        for s, (end, size) in enumerate(zip(ends, sizes, strict=True)):
            scene[d, end - size : end] = s
            if size:
                order[d, end - size : end] = count
                count += 1
    labels = rng.integers(0, CLASSES - 1, scene.shape)
    labels[rng.random(scene.shape) < 0.2] = 255
    return scene, np.array(SIZES), labels, order


def mean_of_groups(loss_of, order, mask, k):
    """The mean of `loss_of(rows)` over groups of `k` scenes that have rows in `mask`; rows are [D, P] bool."""
    groups = [(order // k == g) & (order >= 0) & mask for g in range(-(-(order.max() + 1) // k))]
    found = [loss_of(rows) for rows in groups if rows.any()]
    return sum(found) / len(found)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def lovasz_reference(logits, labels):
    values = []
    for k in np.unique(labels):
        truth = (labels == k).astype(float)
        error = np.abs(truth - softmax(logits)[:, k])
        order = np.argsort(-error, kind="stable")
        hits = np.cumsum(truth[order])
        jaccard = 1 - (truth.sum() - hits) / (truth.sum() + np.arange(1, len(hits) + 1) - hits)
        values.append(np.sum(error[order] * np.diff([0.0, *jaccard])))
    return np.mean(values)


@pytest.fixture(scope="module")
def segmentation():
    """(logits, labels, mask, groups) -> the two losses, and the gradient of their sum."""

    def both(logits, labels, mask, groups=None):
        entropy, lovasz = losses.segmentation(logits, labels, mask, groups)
        return entropy + lovasz, (entropy, lovasz)

    return jax.jit(jax.value_and_grad(both, has_aux=True))


@pytest.mark.parametrize("k", [1, 3, 100])
def test_segmentation_is_the_mean_over_groups(k, segmentation):
    scene, scene_points, labels, order = batch()
    labels[0, :9] = 255  # a scene without a label takes no part
    logits = np.random.default_rng(1).normal(size=(*scene.shape, CLASSES)).astype(np.float32)
    logits[scene == SLOTS] = np.nan  # padding may hold anything
    mask = (scene < SLOTS) & (labels != 255)
    groups = grouped(scene, scene_points, mask, k)
    (_, (entropy, lovasz)), gradient = segmentation(logits, labels, mask, groups)

    def entropy_of(rows):
        return -np.mean(np.log(softmax(logits[rows].astype(np.float64))[np.arange(rows.sum()), labels[rows]]))

    def lovasz_of(rows):
        return lovasz_reference(logits[rows].astype(np.float64), labels[rows])

    np.testing.assert_allclose(entropy, mean_of_groups(entropy_of, order, mask, k), rtol=1e-5)
    np.testing.assert_allclose(lovasz, mean_of_groups(lovasz_of, order, mask, k), rtol=1e-5)
    found = np.asarray(gradient)
    expected: Any = mean_of_groups(lambda rows: np.asarray(segmentation(logits, labels, rows)[1]), order, mask, k)
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-6 * np.abs(expected[mask]).max() + 1e-8)
    assert np.all(found[~mask] == 0)


@pytest.mark.parametrize("k", [1, 2, 100])
def test_distillation_is_the_mean_over_groups(k):
    scene, scene_points, _, order = batch()
    rng = np.random.default_rng(2)
    student, teacher = rng.normal(size=(2, *scene.shape, 4)).astype(np.float32)
    mask = scene < SLOTS
    student[~mask], teacher[~mask] = 0, np.nan
    groups = grouped(scene, scene_points, mask, k)

    def loss_of(rows):
        p, q = (x[rows] / np.linalg.norm(x[rows], axis=-1, keepdims=True) for x in (student, teacher))
        return np.mean(np.linalg.norm(p - q, axis=-1))

    loss, gradient = jax.jit(jax.value_and_grad(losses.distillation))(student, teacher, mask, groups)
    np.testing.assert_allclose(loss, mean_of_groups(loss_of, order, mask, k), rtol=1e-6)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[~mask] == 0)
    best = jax.jit(partial(losses.best_constant, iterations=20))(teacher, mask, groups)
    distillation = jax.jit(losses.distillation)
    for constant in rng.normal(size=(20, 4)).astype(np.float32):
        assert distillation(np.broadcast_to(constant, teacher.shape), teacher, mask, groups) >= best - 1e-6


def test_without_groups_and_without_points(segmentation):
    scene, scene_points, _, _ = batch()
    assert grouped(scene, scene_points, scene < SLOTS, 0) is None
    nothing = np.zeros(scene.shape, bool)
    groups = grouped(scene, np.zeros_like(scene_points), nothing, 1)
    logits = np.ones((*scene.shape, CLASSES), np.float32)
    (loss, _), gradient = segmentation(logits, np.zeros(scene.shape, int), nothing, groups)
    assert loss == 0
    assert np.all(np.asarray(gradient) == 0)


def test_the_key_reaches_both_steps():
    config = get_config()
    config.loss.scenes_per_group = 2
    settings = read_settings(config)
    for task in (
        tasks.distillation(settings, [(vit.ViTConfig(), {})]),
        tasks.segmentation(settings, CLASSES, label="finetune", frozen=False, initial=None),
    ):
        step: Any = task.make_step
        assert step.keywords["scenes_per_group"] == 2
