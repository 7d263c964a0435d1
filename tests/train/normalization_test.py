"""A teacher's features, normalised: what each kind makes of them, and of their statistics in batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.runtime.errors import InputError
from scalr_jax.train.normalization import (
    Moments,
    batch_moments,
    hadamard,
    read_normalizations,
    shapes,
    write_normalizations,
)
from tests.support.checks import mentions

CHANNELS = 12


@pytest.fixture(scope="module")
def features():
    """Features [N, C] of different means and deviations, correlated, one channel constant; and which count."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(400, CHANNELS)) @ rng.normal(size=(CHANNELS, CHANNELS))
    mixed = mixed * np.geomspace(0.01, 3.0, CHANNELS) + rng.normal(size=CHANNELS)
    mixed[:, 5] = 2.0
    return mixed.astype(np.float32), rng.random(400) < 0.8


def measured(features, kind, sizes=(3, 150, 247)):
    x, mask = features
    moments, full = Moments(kind == "phi_s"), kind == "phi_s"
    for part, kept in zip(*(np.split(each, np.cumsum(sizes)[:-1]) for each in (x, mask)), strict=True):
        part = np.where(kept[:, None], part, np.nan)  # of what does not count nothing is read
        moments.add(*jax.device_get(batch_moments(jnp.asarray(part), jnp.asarray(kept), full=full)))
    return moments.normalization(kind)


def test_each_kind_does_to_the_features_what_it_is_called(features):
    x, mask = features
    kept = x[mask].astype(np.float64)
    constant = np.arange(CHANNELS) == 5
    q = {kind: np.asarray(measured(features, kind)(x))[mask] for kind in ("center", "standardize", "phi_s")}
    standard = (kept - kept.mean(0)) / np.where(constant, 1, kept.std(0))
    np.testing.assert_allclose(q["center"], kept - kept.mean(0), atol=1e-5)
    np.testing.assert_allclose(q["standardize"], standard, atol=1e-3)
    np.testing.assert_allclose(q["phi_s"].std(0), 1, atol=1e-4)
    scale = np.sqrt(kept.var(0).mean())  # a rotation besides: lengths stay
    lengths = [np.linalg.norm(each, axis=1) for each in (q["phi_s"] * scale, q["center"])]
    np.testing.assert_allclose(*lengths, rtol=1e-4)


@pytest.mark.parametrize("kind", ["standardize", "phi_s"])
def test_statistics_do_not_depend_on_the_batches(features, kind):
    one, three = (measured(features, kind, sizes) for sizes in ((400,), (3, 150, 247)))
    np.testing.assert_allclose(one.mean, three.mean, rtol=1e-5, atol=1e-6)
    x = features[0]
    np.testing.assert_allclose(one(x), three(x), atol=2e-3 if kind == "phi_s" else 1e-4)


@pytest.mark.parametrize("size", [1, 2, 12, 32, 384, 768, 1024, 1152, 1280, 1408])
def test_hadamard_of_the_widths_of_published_models(size):
    found = hadamard(size)
    assert set(np.unique(found)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(found @ found.T, size * np.eye(size))


def test_widths_without_a_rotation_are_refused():
    with pytest.raises(InputError, match=mentions("teacher.normalize", "phi_s", 10, "standardize")):
        shapes("phi_s", 10)
    assert shapes("none", 10) is None


def test_statistics_are_kept_exactly_and_others_are_refused(tmp_path, features):
    path = tmp_path / "statistics.safetensors"
    kinds = ("standardize", "none", "phi_s")
    like = [shapes(kind, CHANNELS) for kind in kinds]
    with pytest.raises(InputError, match=mentions("statistics.safetensors is missing", "workdir")):
        read_normalizations(path, like)
    found = [None if kind == "none" else measured(features, kind) for kind in kinds]
    write_normalizations(path, found)
    again = read_normalizations(path, like)
    assert again[1] is None
    jax.tree.map(np.testing.assert_array_equal, again, found)
    with pytest.raises(InputError, match=mentions("statistics.safetensors", "other features", "teacher.normalize")):
        read_normalizations(path, like[:2])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=mentions("statistics.safetensors", "damaged")):
        read_normalizations(path, like)
