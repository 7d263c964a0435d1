"""The commands that show what a run survives, of one without a model; `kills` is what tests/processes_test.py does."""

import gc
import json
import time

import jax
import jax.numpy as jnp
import pytest
import reliability

from scalr_jax.runtime.checkpoint import Checkpoints


def counting(keys, workdir):
    """In place of a training: counts its steps, and resumes."""
    state, positions = {"params": {"step": jnp.zeros(4)}, "batch_stats": {}}, jnp.zeros(1)
    shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)  # noqa: E731
    checkpoints = Checkpoints(workdir / "checkpoints", every=keys["checkpoint_every_steps"], keep=2)
    found = checkpoints.restore(*jax.tree.map(shape, (state, positions)))
    state = found[0] if found else state
    for step in range(int(state["params"]["step"][0]) + 1, keys["num_steps"] + 1):
        state = jax.tree.map(lambda leaf: leaf + 1, state)
        checkpoints.save(step, state, positions)
        if step % 3 == 0:
            checkpoints.wait()
            time.sleep(
                0.5
            )  # so that a soak, which looks five times a second, sees times without a save in each quarter
    checkpoints.close()


@pytest.fixture
def results(tmp_path, monkeypatch):
    """(command, *flags) -> its exit code and the file it writes."""
    monkeypatch.setattr(reliability, "use_cache", lambda _: None)
    monkeypatch.setattr(reliability, "run_here", counting)

    def run(command, *flags):
        with pytest.raises(SystemExit) as stopped:
            reliability.main([command, f"--output={tmp_path}", *flags])
        return stopped.value.code, json.loads((tmp_path / f"{command}.json").read_text())

    return run


@pytest.mark.slow
def test_damages(results):
    code, found = results("damages", "--cases=10")
    assert (code, found["wrong"]) == (0, 0)
    assert found["counts"] == {"flipped": 3, "cut": 3, "zeroed": 2, "deleted": 2}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_values_that_were_damaged_unnoticed_are_told(results, monkeypatch):
    """Orbax then reads damaged files itself, and at times leaves an event loop behind that complains when collected."""
    monkeypatch.setattr("scalr_jax.runtime.digests.changes", lambda *_: "")
    code, found = results("damages", "--cases=5")
    gc.collect()
    assert code == 1
    assert found["wrong"] > 0


@pytest.mark.slow
def test_a_soak(results):
    code, found = results("soak", "--steps=60", "--saves=20")
    assert (code, found["wrong"]) == (0, 0)
    assert found["results"][-1]["step"] > found["results"][0]["step"] >= 6
