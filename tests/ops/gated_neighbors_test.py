"""The neighbourhood branch one neighbour at a time equals the published arrays [N, K, C], and so do its gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.ops.gated_neighbors import EPS, Form, Gate, Norm, gated_max
from scalr_jax.ops.pillars import pillar_max, to_points

pytestmark = pytest.mark.usefixtures("highest_precision")

D, P, K, C = 2, 30, 4, 6


def plain(train, u, norm, gate, neighbors, mask):
    """As published: all differences, their statistics over all pairs, gate, maximum."""
    d = jax.vmap(lambda u, n: u[n] - u[:, None])(u, neighbors)  # [D, P, K, C]
    valid = jnp.broadcast_to(mask[..., None, None], d.shape)
    if train:
        mean = jnp.where(valid, d, 0).sum((0, 1, 2)) / (mask.sum() * K)
        variance = jnp.where(valid, jnp.square(d - mean), 0).sum((0, 1, 2)) / (mask.sum() * K)
    else:
        mean, variance = norm.mean, norm.variance
    r = jax.nn.relu((d - mean) * jax.lax.rsqrt(variance + EPS) * norm.scale + norm.bias)
    return (r * jax.nn.sigmoid(r @ gate.kernel + gate.bias)).max(axis=2), mean, variance


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    norm = Norm(1 + 0.3 * normal(C), 0.3 * normal(C), 0.1 * normal(C), 0.5 + jnp.square(normal(C)))
    mask = jnp.asarray(np.arange(P) < np.array([[P], [P - 7]]))
    own = np.broadcast_to(np.arange(P)[None, :, None], (D, P, K))
    neighbors = np.where(mask[..., None], rng.integers(0, P - 7, (D, P, K)), own)
    return (
        normal(D, P, C),
        norm,
        Gate(normal(C, C), normal(C)),
        jnp.asarray(neighbors, jnp.int32),
        mask,
        normal(D, P, C),
    )


@pytest.mark.parametrize("at_a_time", [1, K])
@pytest.mark.parametrize("train", [True, False])
def test_it_is_the_published_branch(inputs, train, at_a_time):
    u, norm, gate, neighbors, mask, direction = inputs
    direction = jnp.where(mask[..., None], direction, 0)  # padded rows touch no loss
    form = Form(train, jnp.float32, at_a_time)

    def along(function):
        def value(u, norm, gate):
            y, *moments = function(u, norm, gate)
            return (y * direction).sum(), (y, moments)

        return jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(u, norm, gate)

    def ours(u, norm, gate):
        result: Any = gated_max(form, u, norm, gate, neighbors, mask)
        y, (mean, variance, _) = result
        return y, mean, variance

    def published(u, norm, gate):
        return plain(train, u, norm, gate, neighbors, mask)

    (_, (y, moments)), gradients = along(ours)
    (_, (wanted, of_plain)), theirs = along(published)
    np.testing.assert_allclose(y[mask], wanted[mask], atol=2e-6)
    np.testing.assert_allclose(moments, of_plain, atol=2e-6)
    if not train:  # the running statistics have no gradient here
        theirs = (theirs[0], theirs[1]._replace(mean=jnp.zeros(C), variance=jnp.zeros(C)), theirs[2])
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_pillars_take_the_maximum_and_points_read_them():
    """Ties share the gradient as in PyTorch's scatter_reduce; unused rows are zero; padding gets nothing."""
    points = jnp.asarray([[1.0], [3.0], [3.0], [-2.0], [9.0]])
    cell = jnp.asarray([0, 0, 0, 2, 4])  # row 1 is empty, row 3 unused, 4 is padding
    most, pull = jax.vjp(lambda x: pillar_max(x, cell, 4), points)
    np.testing.assert_array_equal(most, [[3.0], [0.0], [-2.0], [0.0]])
    np.testing.assert_array_equal(pull(jnp.asarray([[4.0], [5.0], [6.0], [7.0]]))[0], [[0], [2], [2], [6], [0]])
    read, pull = jax.vjp(lambda x: to_points(x, cell), most)
    np.testing.assert_array_equal(read, [[3.0], [3.0], [3.0], [-2.0], [0.0]])
    np.testing.assert_array_equal(pull(jnp.ones((5, 1)))[0], [[3], [0], [1], [0]])
