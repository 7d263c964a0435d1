"""Laws of checkpoints: no damaged value is ever loaded, what is damaged is kept aside, nothing grows with the saves."""

import os
import random
import shutil
import threading
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.runtime import digests
from scalr_jax.runtime.checkpoint import Checkpoints, load_variables
from scalr_jax.runtime.errors import InputError
from tests.support.checks import mentions, present


def state_of(step):
    return {"params": {"kernel": jnp.arange(12.0).reshape(3, 4) + step}, "batch_stats": {"mean": jnp.full(5, step)}}


ABSTRACT = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), (state_of(0), jnp.zeros(1))
)


def write(folder, steps):
    checkpoints = Checkpoints(folder, every=1, keep=3)
    for step in steps:
        checkpoints.save(step, state_of(step), jnp.zeros(1))
    checkpoints.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    write(folder, (1, 2, 3))
    return folder


@pytest.fixture
def copy(three, tmp_path):
    return shutil.copytree(three, tmp_path / "checkpoints")


def restored(folder):
    """The step whose values are restored, or None."""
    checkpoints = Checkpoints(folder, every=1, keep=3)
    found = checkpoints.restore(*ABSTRACT)
    checkpoints.close()
    return found and same_as_a_step(found[0])


def same_as_a_step(state):
    step = int(state["batch_stats"]["mean"][0])
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
    return step


def flip_a_bit(path):
    content, seeded = bytearray(path.read_bytes()), random.Random(path.name)
    content[seeded.randrange(len(content))] ^= 1 << seeded.randrange(8)
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip_a_bit,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": lambda path: path.unlink(),
}


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", DAMAGES)
def test_whatever_file_is_damaged_the_one_before_is_used(three, copy, kind, caplog):
    """Each file of the newest checkpoint, also the digests and Orbax's own."""
    assert len(files(three / "3")) >= 10
    for number, file in enumerate(files(three / "3")):
        shutil.rmtree(copy)
        shutil.copytree(three, copy)
        damaged = copy / file.relative_to(three)
        DAMAGES[kind](damaged)
        caplog.clear()
        with caplog.at_level("WARNING", logger="absl"):
            assert same_as_a_step(load_variables(copy)) == 2, damaged
        name = damaged.relative_to(copy / "3").as_posix()
        assert name in caplog.text or (name == digests.FILE and "step 3" in caplog.text)
        assert len(files(copy / "3")) == len(files(three / "3")) - (kind == "deleted"), "reading moves nothing"
        if number % 4 == 0:
            assert restored(copy) == 2
            aside = sorted((copy.parent / "checkpoints.damaged").iterdir())
            assert len(aside) == number // 4 + 1, "moved aside, beside those of the same step before"
            write(copy, [3])
            assert restored(copy) == 3


def test_when_none_can_be_read_all_are_named_and_none_is_moved(copy):
    for step in (1, 2, 3):
        flip_a_bit(next(copy.glob(f"{step}/state/ocdbt.process_0/d/*")))
    for read in (restored, load_variables):
        with pytest.raises(InputError, match=mentions(copy, "step 1", "step 2", "step 3", "ocdbt.process_0/d")):
            read(copy)
    assert len(list(copy.iterdir())) == 3


def test_checkpoints_of_an_older_version_are_read_with_a_warning_and_sealed(copy, caplog):
    for path in copy.glob(f"*/{digests.FILE}"):
        path.unlink()
    with caplog.at_level("WARNING", logger="absl"):
        assert same_as_a_step(load_variables(copy)) == 3
    assert caplog.text.count("not verified") == 1
    assert restored(copy) == 3
    assert not digests.damage(copy / "3")
    flip_a_bit(next(copy.glob("3/state/d/*")))
    assert restored(copy) == 2, "which still has none"


def test_no_checkpoint_is_ever_committed_without_digests(tmp_path, monkeypatch):
    """However soon after the renaming the process dies."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep=3)
    monkeypatch.setattr(checkpoints, "_finish", lambda: None)  # as if it died before
    checkpoints.save(1, state_of(1), jnp.zeros(1))
    response, checkpoints._response = checkpoints._response, None
    present(response).result()
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "1"
    assert not digests.damage(folder)
    flip_a_bit(next(folder.glob("state/d/*")))
    assert "state/d/" in digests.damage(folder)


def test_a_system_that_refuses_to_write_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "some/file")

    checkpoints = Checkpoints(tmp_path / "checkpoints", every=2, keep=3)
    checkpoints.save(2, state_of(2), jnp.zeros(1))
    checkpoints.wait()
    monkeypatch.setattr(digests, "write_json", full)
    checkpoints.save(4, state_of(4), jnp.zeros(1))
    with pytest.raises(InputError, match=mentions(tmp_path, "(No space left on device)", "step 2")):
        checkpoints.wait()
    with pytest.raises(InputError, match="No space left"):
        checkpoints.close()
    assert restored(tmp_path / "checkpoints") == 2


def test_forty_saves_leave_no_descriptor_no_thread_no_memory_and_no_program(tmp_path):
    compiled = []

    def listen(event, duration_secs, **_):
        compiled.append("compile" in event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    checkpoints, state, positions = Checkpoints(tmp_path / "checkpoints", every=1, keep=2), state_of(0), jnp.zeros(1)
    usage = []
    for step in range(1, 41):
        checkpoints.save(step, state, positions)
        if step in (5, 40):
            checkpoints.wait()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            usage.append((len(os.listdir("/proc/self/fd")), threading.active_count(), sum(compiled), pages >> 12))
    checkpoints.close()
    (descriptors, threads, programs, memory), after = usage
    assert after[0] <= descriptors
    assert after[1] <= threads
    assert after[2] == programs
    assert after[3] <= memory + 1  # in units of 16 MB
