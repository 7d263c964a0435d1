"""Laws of files: a killed writer leaves the old file or the new one, a lock names who holds it."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import (
    check_writable,
    checksum,
    locked,
    read_json,
    write_arrays,
    write_json,
    written_beside,
    written_whole,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def other_process(code):
    """A process that runs `code`, after it has printed a line."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_file_may_be_read_by_whom_umask_says(tmp_path):
    """Those of a folder that others share, as rendered streets."""
    before = os.umask(0o027)
    try:
        write_arrays(tmp_path / "new" / "a.npz", {"a": np.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "a.npz").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_writes(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    process = other_process(
        "import time; from pathlib import Path; from scalr_jax.runtime.storage import written_whole\n"
        f"with written_whole(Path({str(path)!r})) as file:\n"
        "    file.write(b'half'); file.flush(); print('writing', flush=True); time.sleep(60)"
    )
    assert len(names(tmp_path)) == 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read_json(path, "") == {"old": 1}
    write_json(path, {"new": 2})
    assert read_json(path, "") == {"new": 2}
    with locked(tmp_path / "lock", ""):
        assert names(tmp_path) == ["a.json", "lock"], "what the killed one left is gone"


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_nothing(tmp_path, kind):
    with pytest.raises(kind), written_whole(tmp_path / "folder" / "a") as file:
        file.write(b"half")
        raise kind
    assert names(tmp_path / "folder") == []


def test_an_error_of_the_system_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"a\.npz"), written_whole(tmp_path / "a.npz"):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError, match="absent"), written_beside(tmp_path / "absent" / "a") as partial:
        partial.write_bytes(b"")


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with written_whole(tmp_path / "a") as first, written_whole(tmp_path / "a") as second:
        first.write(b"one")
        second.write(b"two")
    assert (tmp_path / "a").read_bytes() == b"one", "of the writer that ended last"
    assert names(tmp_path) == ["a"]


def test_what_is_written_is_read(tmp_path):
    arrays = {"x": np.arange(6.0).reshape(2, 3), "names": np.array(["a", "b"])}
    write_arrays(tmp_path / "a.npz", arrays)
    with np.load(tmp_path / "a.npz") as found:
        assert set(found) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
    write_json(tmp_path / "a.json", {"a": [1, None]}, indent=None)
    assert json.loads((tmp_path / "a.json").read_text()) == read_json(tmp_path / "a.json", "") == {"a": [1, None]}
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-2
    assert (
        checksum(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )  # FIPS 180-2


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json: .*; copy it again$"):
        read_json(tmp_path / "a.json", "copy it again")


def test_a_lock_names_its_holder_until_that_ends(tmp_path):
    lock = tmp_path / "lock"
    process = other_process(
        "import time; from pathlib import Path; from scalr_jax.runtime.storage import locked\n"
        f"with locked(Path({str(lock)!r}), ''):\n    print('held', flush=True); time.sleep(60)"
    )
    with pytest.raises(InputError, match=rf"process {process.pid} on .*; stop it"), locked(lock, "stop it"):
        pass
    process.kill()
    process.communicate()
    with locked(lock, ""):
        assert lock.read_text().startswith(f"process {os.getpid()} on ")


def test_where_nothing_can_be_written_is_said_before(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "deep" / "a.npz")
    with pytest.raises(InputError, match=r"a\.npz .*file is no folder"):
        check_writable(tmp_path / "file" / "a.npz")
    assert names(tmp_path) == ["file"]
