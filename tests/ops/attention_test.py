"""Attention in tiles equals attention with all logits, and so do its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.ops import attention

pytestmark = pytest.mark.usefixtures("highest_precision")


def random(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def naive(q, k, v, counts):
    """One scene after another, in NumPy and float64."""
    out, first = np.zeros(q.shape), 0
    for count in filter(None, map(int, counts)):
        rows = slice(first, first + count)
        a, b, c = (np.asarray(x[rows], np.float64).swapaxes(0, 1) for x in (q, k, v))  # [heads, n, d]
        logits = a @ b.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[rows] = (weights / weights.sum(-1, keepdims=True) @ c).swapaxes(0, 1)
        first += count
    return out


@pytest.mark.parametrize(
    ("most", "num_rows", "counts"),
    [
        (128, 384, [[100, 0, 150, 30], [0, 0, 384, 0]]),  # blocks of several scenes, an empty one, padding; no padding
        (128, 70, [[40, 20], [0, 0]]),  # a table that is no whole number of tiles; a shard without a scene
        (256, 512, [[300, 150, 20, 0], [512, 0, 0, 0]]),  # an accelerator's tiles are larger
    ],
)
def test_tiles_are_the_reference_and_the_reference_is_the_formula(monkeypatch, most, num_rows, counts):
    monkeypatch.setattr(attention, "CPU_TILE", most)
    shape, counts = (len(counts), num_rows, 2, 4), jnp.asarray(counts, jnp.int32)
    q, k, v, direction = random(*[shape] * 4)
    scene = attention.scene_of(counts, num_rows)
    valid = (scene < counts.shape[1])[..., None, None]

    def reference(q, k, v):
        return jnp.where(valid, attention.reference(q, k, v, scene), 0.0)

    def along(function):
        return jax.jit(jax.value_and_grad(lambda q, k, v: (function(q, k, v) * direction).sum(), (0, 1, 2)))

    def tiles(q, k, v):
        return attention.packed(q, k, v, counts)

    packed = jax.jit(tiles)(q, k, v)
    for d in range(len(counts)):
        np.testing.assert_allclose(packed[d], naive(q[d], k[d], v[d], counts[d]), atol=2e-6)
    ours, theirs = along(tiles)(q, k, v), along(reference)(q, k, v)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_key_counts_as_often_as_it_is_copied():
    """`copies` equals so many rows of the same token, and 0 leaves it out."""
    q, k, v = random(*[(1, 6, 1, 4)] * 3)
    repeats = np.array([1, 3, 1, 2, 1, 0])
    q, k, v, scene = *map(np.asarray, (q, k, v)), np.array([[0, 0, 0, 1, 1, 1]])
    wide = [np.repeat(x, repeats, axis=1) for x in (k, v)]
    seen = np.repeat(scene[0], repeats)
    found = jax.jit(attention.reference)(q, k, v, scene, repeats[None].astype(np.float32))
    for row in range(6):
        mine = seen == scene[0, row]
        same = np.repeat(q[0, row : row + 1], mine.sum(), axis=0)
        wanted = naive(same, wide[0][0][mine], wide[1][0][mine], [mine.sum()])
        np.testing.assert_allclose(found[0, row], wanted[0], atol=1e-6)
