"""Losses and metrics against the published numbers, and what masks promise."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.evaluation import report
from scalr_jax.runtime import sharding
from scalr_jax.runtime.errors import InputError
from scalr_jax.train import losses
from tests.support.checks import mentions, present


def test_published_distillation_loss(golden):
    arrays = golden("distill_loss")
    points = [arrays[f"pairing_points_{b}"] for b in (0, 1)]
    q = jnp.asarray(np.concatenate([arrays["feat_pixels_0"], arrays["feat_pixels_1"]]))
    mask = jnp.ones(len(q), bool)

    def loss_of(features):
        p = jnp.concatenate([features[b].T[points[b]] for b in (0, 1)])
        return losses.distillation(p, q, mask)

    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(jnp.asarray(arrays["feat_point"]))
    np.testing.assert_allclose(loss, arrays["loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, arrays["grad_feat_point"], atol=1e-6 * np.abs(arrays["grad_feat_point"]).max())


def test_padding_does_not_touch_the_distillation_loss_or_its_gradient():
    """Also when a padded row is zero, or equal to the teacher's: there a naive norm has a NaN gradient."""
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 6, 4)).astype(np.float32)
    padded_p, padded_q = (np.concatenate([x, np.zeros((3, 4), np.float32)]) for x in (p, q))
    mask = np.arange(9) < 6
    along = jax.jit(jax.value_and_grad(losses.distillation))
    loss, gradient = along(p, q, np.ones(6, bool))
    padded_loss, padded_gradient = along(padded_p, padded_q, mask)
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(padded_gradient[:6], gradient, rtol=1e-5, atol=1e-7)
    assert np.all(padded_gradient[6:] == 0)
    assert np.all(np.isfinite(along(q, q, np.ones(6, bool))[1]))


def test_best_constant_is_the_best():
    rng = np.random.default_rng(0)
    q = (rng.normal(size=(300, 5)) + np.array([2, 0, 0, 1, 0])).astype(np.float32)
    q, mask = jax.device_put((q, np.arange(300) < 250))
    best = jax.jit(lambda *a: losses.best_constant(*a, iterations=20))(q, mask)
    np.testing.assert_allclose(jax.jit(losses.best_constant)(q, mask), best, rtol=1e-3)
    constants = (rng.normal(size=(200, 5)) * 0.3 + np.array([2, 0, 0, 1, 0])).astype(np.float32)
    loss_of = jax.vmap(lambda constant: losses.distillation(jnp.broadcast_to(constant, q.shape), q, mask))
    assert jax.jit(loss_of)(constants).min() >= best - 1e-6


def test_a_label_outside_the_classes_is_named():
    labels, classes = np.array([0, 2, 255, 3], np.uint8), np.zeros(4, np.uint8)
    with pytest.raises(InputError, match=mentions("label", "3 classes")):
        report.confusion_matrix(labels, classes, 3)


@jax.jit
def segmentation_gradient(logits, labels, mask):
    """The gradient of both losses' sum, and the losses."""

    def total(logits):
        parts = losses.segmentation(logits, labels, mask)
        return sum(parts), parts

    return jax.grad(total, has_aux=True)(logits)


def test_published_segmentation_losses_and_metrics(golden):
    arrays = golden("segmentation")
    logits, labels = arrays["logits"], arrays["labels"]
    mask = labels != 255
    gradient, (entropy, lovasz) = segmentation_gradient(logits, labels, mask)
    np.testing.assert_allclose(entropy, arrays["loss_ce"], rtol=1e-6)
    np.testing.assert_allclose(entropy + lovasz, arrays["loss_ce_plus_lovasz"], rtol=1e-6)
    name = next(name for name in arrays if name.startswith("grad"))
    np.testing.assert_allclose(gradient, arrays[name], atol=1e-6 * np.abs(arrays[name]).max() + 1e-8)
    confusion = report.confusion_matrix(labels, logits.argmax(1), logits.shape[1])
    np.testing.assert_array_equal(confusion, arrays["confusion"])
    np.testing.assert_allclose(report.intersection_over_union(confusion), arrays["iou"], rtol=1e-6)
    found = report.results_of(confusion, [str(k) for k in range(len(confusion))])
    np.testing.assert_allclose(found["class_accuracy"], np.nanmean(arrays["acc"]), rtol=1e-6)
    np.testing.assert_allclose(found["accuracy"], arrays["oacc"], rtol=1e-6)


def test_published_segmentation_losses_in_a_packed_batch(golden):
    """The same numbers, loss and gradient, with the points spread over three shards and garbage between them."""
    arrays = golden("segmentation")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 260, arrays["logits"].shape[1])).astype(np.float32) * 50
    labels = rng.integers(0, 7, (3, 260))
    places = np.sort(rng.choice(3 * 260, 500, replace=False))
    logits.reshape(-1, 7)[places], labels.reshape(-1)[places] = arrays["logits"], arrays["labels"]
    mask = np.zeros(3 * 260, bool)
    mask[places] = arrays["labels"] != 255
    mask = mask.reshape(3, 260)
    gradient, parts = segmentation_gradient(logits, labels, mask)
    np.testing.assert_allclose(sum(parts), arrays["loss_ce_plus_lovasz"], rtol=1e-6)
    wanted = arrays["grad_logits"]
    np.testing.assert_allclose(
        np.asarray(gradient).reshape(-1, 7)[places], wanted, atol=1e-6 * np.abs(wanted).max() + 1e-8
    )
    assert not np.any(np.asarray(gradient)[~mask])


def lovasz_reference(logits, labels):
    """Lovasz-softmax class by class in NumPy, as the paper writes it."""
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    values = []
    for k in np.unique(labels):
        truth = (labels == k).astype(float)
        error = np.abs(truth - probabilities[:, k])
        order = np.argsort(-error, kind="stable")
        jaccard = [
            1 - (truth.sum() - truth[order[: i + 1]].sum()) / (truth.sum() + (1 - truth[order[: i + 1]]).sum())
            for i in range(len(order))
        ]
        values.append(np.sum(error[order] * np.diff([0.0, *jaccard])))
    return np.mean(values)


def test_lovasz_equals_its_reference_and_ignores_padding():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 4, 40)
    expected, lovasz = lovasz_reference(logits.astype(np.float64), labels), jax.jit(losses.lovasz_softmax)
    np.testing.assert_allclose(lovasz(logits, labels, np.ones(40, bool)), expected, rtol=1e-5)
    more = np.concatenate([logits, 10 * rng.normal(size=(9, 5)).astype(np.float32)])
    padded = lovasz(more, np.append(labels, np.full(9, 255)), np.arange(49) < 40)
    np.testing.assert_allclose(padded, expected, rtol=1e-5)


def test_what_lovasz_adds_up_grows_with_the_points_on_any_number_of_devices():
    """No window of a cumulative sum is as long as a shard, which would make the sums quadratic in the points."""
    rng = np.random.default_rng(2)
    mesh = sharding.make_mesh(8, 1)
    logits, labels = rng.normal(size=(8, 256, 3)).astype(np.float32), rng.integers(0, 3, (8, 256))
    arguments = sharding.put_batch((logits, labels, np.ones((8, 256), bool)), mesh)
    program = jax.jit(losses.lovasz_softmax).lower(*arguments).compile()
    windows = [
        math.prod(map(int, size.split("x")))
        for size in re.findall(r"window=\{size=([0-9x]+)", present(program.as_text()))
    ]
    assert 1 < max(windows) < 256
    np.testing.assert_allclose(program(*arguments), lovasz_reference(logits.reshape(-1, 3), labels.ravel()), rtol=1e-5)


def test_iou_of_a_class_that_is_absent_is_not_a_number():
    confusion = report.confusion_matrix(np.array([0, 0, 1, 255]), np.array([0, 1, 1, 2]), 3)
    np.testing.assert_allclose(report.intersection_over_union(confusion), [0.5, 0.5, np.nan])
    assert report.results_of(confusion, "abc")["miou"] == 0.5
