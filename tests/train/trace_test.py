"""The trace of some steps."""

import jax.numpy as jnp
import pytest

from scalr_jax.train.trace import Trace


@pytest.mark.parametrize(("steps", "run"), [((1, 3), 5), ((1, 9), 3)])
def test_steps_are_traced_to_their_end_or_the_runs(tmp_path, steps, run):
    trace = Trace(steps, tmp_path / "profile")
    for step in range(run):
        trace.before(step, jnp.zeros(3))
    trace.close()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_no_steps_and_steps_that_never_come_write_nothing(tmp_path):
    for steps in ((), (7, 9)):
        trace = Trace(steps, tmp_path / "profile")
        for step in range(3):
            trace.before(step, jnp.zeros(3))
        trace.close()
    assert not list(tmp_path.iterdir())
