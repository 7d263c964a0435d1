"""Every test process sees eight CPU devices. Golden arrays are read from tests/golden."""

import fcntl
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

from tests.support.fast import FAST, RUNNING
from tests.support.paths import GOLDEN

flags = ["--xla_force_host_platform_device_count=8", *(FAST if os.environ["JAX_PLATFORMS"] == "cpu" else [])]
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])  # read when the first device is used


LONGEST = ("notebooks_test.py", "processes_test.py", "demo_test.py")


def pytest_collection_modifyitems(items):
    """The longest files first: of two processes none is left with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


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


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder of the session that the test processes of `pytest -n` have in common."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(shared_folder):
    """A program that several tests run is compiled once a session."""
    folder = str(shared_folder / "compiled")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # of the commands that tests start, which else keep the user's
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session", autouse=True)
def _rendering_that_runs():
    """Streets are rendered by a program that takes longer to compile, and is run often enough to be worth it."""
    from scalr_jax.data.streets import render

    for name in ("trace_lidar", "trace_camera"):
        setattr(render, name, jax.jit(getattr(render, name).__wrapped__, compiler_options=RUNNING))


@pytest.fixture(scope="module")
def few_blocks():
    """A minkunet14 is the same net with two residual blocks, one down and one up, which compiles in a third of the
    time."""
    from scalr_jax.interop.model import kept_variables
    from scalr_jax.models import minkunet

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(minkunet.BLOCKS, "minkunet14", (1, 0, 0, 0, 0, 0, 0, 1))
        kept_variables.clear()
        yield
    kept_variables.clear()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Programs of a file's tests are of no use to the next file's, and would fill the memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def street_cache(shared_folder):
    """Eight training and two validation streets, rendered once a session."""
    from scalr_jax.data.streets.streets import Streets

    root = shared_folder / "streets"
    with open(shared_folder / "streets.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process waits here, and finds them
        for split, number in (("train", 8), ("validation", 2)):
            Streets(root, split=split, num_scenes=number, image_size=(112, 224)).render_missing(progress=None)
    return root
