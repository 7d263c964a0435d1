"""Every test process sees eight CPU devices. Golden arrays are read from tests/golden."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

import jax
import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden():
    """name -> the arrays of tests/golden/<name>.npz."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


@pytest.fixture
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield
