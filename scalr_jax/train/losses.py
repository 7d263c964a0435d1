"""The losses. Rows are points; `mask` says which count; masked rows may hold anything and get zero gradient.

distillation: mean over pairs of || p/|p| - q/|q| ||_2   (ScaLR, equation 1: not squared)
segmentation: cross-entropy + Lovasz-softmax over the classes present (Berman et al., CVPR 2018)

With `groups` of scenes (train/groups.py) each is the mean over the groups of the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from scalr_jax.train.groups import Groups, lovasz_by_group, running_sums

Array = jax.Array
EPS = 1e-12  # as torch.nn.functional.normalize


def normalize(x: Array, mask: Array) -> Array:
    """Unit rows [..., C] in float32; masked rows are replaced before the norm, so that their gradient is zero."""
    x = _unmasked(x, mask)
    return x / jnp.maximum(safe_norm(x), EPS)[..., None]


def lengths(x: Array, mask: Array) -> Array:
    """Norms [...] of the rows that `normalize` divides by them, which XLA then computes once; not finite as these."""
    return safe_norm(_unmasked(x, mask))


def _unmasked(x: Array, mask: Array) -> Array:
    return jnp.where(mask[..., None], x.astype(jnp.float32), 1.0)


def safe_norm(x: Array) -> Array:
    """Euclidean norm of the last axis, with gradient zero (not NaN) at zero. NaN stays NaN."""
    square = jnp.sum(jnp.square(x), axis=-1)
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def masked_mean(values: Array, mask: Array, groups: Groups | None = None) -> Array:
    if groups is not None:
        return jnp.sum(jnp.where(mask, values, 0.0) * groups.share.reshape(mask.shape))
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)


def distillation(student: Array, teacher: Array, mask: Array, groups: Groups | None = None) -> Array:
    """student, teacher [..., C], mask [...] -> scalar: mean distance of the unit vectors over all valid rows."""
    difference = normalize(student, mask) - normalize(jax.lax.stop_gradient(teacher), mask)
    return masked_mean(safe_norm(difference), mask, groups)


def dropped(each: Array, rate: float, key: Array) -> Array:
    """The sum of several teachers' losses [n], each but the largest left out with probability `rate` (teacher dropping
    of UNIC, Sariyildiz et al., 2024, there for each image): a student cannot neglect the teacher that it knows
    least."""
    if rate == 0.0 or len(each) < 2:
        return each.sum()
    kept = jax.random.bernoulli(key, 1.0 - rate, each.shape) | (jnp.arange(len(each)) == jnp.argmax(each))
    return jnp.where(kept, each, 0.0).sum()


def best_constant(teacher: Array, mask: Array, groups: Groups | None = None, *, iterations: int = 4) -> Array:
    """The distillation loss of the best constant prediction for these pairs: what a collapsed student reaches.

    The unit vector c that minimises the mean distance to the teacher's unit vectors, by Weiszfeld's iteration from
    their mean direction. In a loop, for XLA on a GPU computes a branch without one whether it is taken or not.
    """
    q = normalize(teacher, mask)
    axes = tuple(range(q.ndim - 1))
    share = mask if groups is None else groups.share

    def closer(_: int, distance: Array) -> Array:
        direction = jnp.sum(q * (share / jnp.maximum(distance, 1e-3))[..., None], axis=axes)
        return safe_norm(q - direction / jnp.maximum(safe_norm(direction), EPS))

    distance = jax.lax.fori_loop(0, iterations, closer, jnp.ones(mask.shape))
    return masked_mean(distance, mask, groups)


def cross_entropy(logits: Array, labels: Array, mask: Array, groups: Groups | None = None) -> Array:
    """logits [..., classes] float32, labels [...] int32 -> scalar mean over `mask`."""
    log_probability = jax.nn.log_softmax(jnp.where(mask[..., None], logits, 0.0))
    chosen = labels[..., None] == jnp.arange(logits.shape[-1])  # no gather: its gradient would be a scatter
    return -masked_mean(jnp.where(chosen, log_probability, 0.0).sum(-1), mask, groups)


def lovasz_softmax(logits: Array, labels: Array, mask: Array) -> Array:
    """Lovasz-softmax over the classes present among the valid rows. logits [D, P, classes], labels [D, P] -> scalar."""
    num_shards = len(labels)
    logits, labels, mask = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), mask.reshape(-1)
    probabilities = jax.nn.softmax(jnp.where(mask[:, None], logits, 0.0))  # [N, classes]

    def one_class(k: Array, probability: Array) -> tuple[Array, Array]:
        truth = jnp.where(mask, labels == k, False).astype(jnp.float32)
        error = jnp.where(mask, jnp.abs(truth - probability), -1.0)  # padding sorts last
        order = jnp.argsort(-jax.lax.stop_gradient(error))
        sorted_truth, sorted_mask = truth[order], mask[order].astype(jnp.float32)
        intersection = truth.sum() - running_sums(sorted_truth, num_shards)
        union = truth.sum() + running_sums((1.0 - sorted_truth) * sorted_mask, num_shards)
        jaccard = 1.0 - intersection / jnp.maximum(union, 1.0)
        weights = jnp.diff(jaccard, prepend=0.0) * sorted_mask
        in_order = jnp.where(mask, error, 0.0).at[order].get(unique_indices=True)
        return jnp.sum(in_order * weights), truth.sum() > 0

    values, present = jax.vmap(one_class)(jnp.arange(logits.shape[-1]), probabilities.T)
    return masked_mean(values, present)


def segmentation(logits: Array, labels: Array, mask: Array, groups: Groups | None = None) -> tuple[Array, Array]:
    """Cross-entropy and Lovasz-softmax of [D, P, classes] logits, as two scalars; `mask` excludes label 255."""
    logits = logits.astype(jnp.float32)
    entropy = cross_entropy(logits, labels, mask, groups)
    if groups is None:
        return entropy, lovasz_softmax(logits, labels, mask)
    return entropy, lovasz_by_group(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), groups)
