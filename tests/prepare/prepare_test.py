"""The command that prepares: kills, several processes, full disks, refusals, bad frames."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from scalr_jax.data.readers.records import Records
from scalr_jax.prepare import run as prepare
from scalr_jax.prepare import session as record_run
from scalr_jax.prepare import source as record_source
from scalr_jax.prepare import writing as record_writing
from scalr_jax.prepare.writing import plan_shards
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import write_json
from tests.support import raw_datasets as raw
from tests.support.checks import assert_one_sentence
from tests.support.datasets import Frames
from tests.support.prepared_datasets import make

NUM_SCANS = 24


@pytest.fixture
def kitti(tmp_path):
    raw.write_semantic_kitti(tmp_path / "semantic_kitti", num_scans=NUM_SCANS)
    return tmp_path


def arguments(root, *more):
    return [f"--dataset=semantic_kitti --root={root}/semantic_kitti --output={root}/out/semantic_kitti", *more]


def command(root, *more, largest_file=None):
    """The command in its own process -> its return code and what it said. `largest_file`: bytes that a file may have,
    set by a shell, as Python could set them only in a fork, which JAX does not allow."""
    words = " ".join(arguments(root, *more)).split()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "scalr_jax.prepare", *words]
    if largest_file is not None:
        line = ["sh", "-c", f'ulimit -f {largest_file // 512}; exec "$@"', "sh", *line]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


def contents(folder):
    """Bytes of the shards, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("lidar_frames-*"))}


# ------------------------------------------------------------------------------------------------------------- the run


def test_several_processes_write_what_one_writes(kitti):
    one = make("semantic_kitti", kitti, kitti / "one", "--labels")
    code, out, err = command(kitti, "--labels", "--num_processes=3")
    assert code == 0, err
    assert contents(one) == contents(kitti / "out" / "semantic_kitti")
    manifests = [json.loads((folder / "records.json").read_text()) for folder in (one, kitti / "out/semantic_kitti")]
    assert manifests[0] == manifests[1]
    assert "SemanticKITTI, split train" in out
    assert "MB are needed" in out
    assert "split validation is left out" in out
    assert f"{NUM_SCANS}/{NUM_SCANS}" in err, "the progress bar reaches its end"
    left = {path.name for path in one.iterdir()} - set(contents(one))
    assert left == {"records.json", "dataset_info.json", "features.json", "metadata.json", "prepare.lock"}


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_at_any_time_it_goes_on(kitti, num_processes):
    whole = contents(make("semantic_kitti", kitti, kitti / "whole"))
    folder = kitti / "out" / "semantic_kitti"
    slow = kitti / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import numpy as np, time\n"
        "from scalr_jax.data.readers.semantic_kitti import SemanticKITTI as K\n"
        "frame = K.frame\n"
        "K.frame = lambda *a, **k: (time.sleep(0.05), frame(*a, **k))[1]\n"
    )
    path = os.pathsep.join([str(slow), *filter(None, [os.environ.get("PYTHONPATH")]), os.getcwd()])
    line = [sys.executable, "-m", "scalr_jax.prepare", *" ".join(arguments(kitti)).split()]
    for kept in (1, 3):
        process = subprocess.Popen(
            [*line, f"--num_processes={num_processes}"],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while len(contents(folder) if folder.is_dir() else ()) < kept and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert kept <= len(contents(folder)) < len(whole)
        with pytest.raises(InputError, match="not prepared to the end"):
            Records(folder)
    first = min(contents(folder))
    stamp = (folder / first).stat().st_mtime_ns
    code, out, err = command(kitti)
    assert code == 0, err
    assert f" of {NUM_SCANS} frames" in out
    assert f"to write: {NUM_SCANS} of" not in out
    assert contents(folder) == whole
    assert (folder / first).stat().st_mtime_ns == stamp, "finished files are kept"
    assert not list(folder.glob(".*partial"))
    assert len(Records(folder)) == NUM_SCANS


def test_workers_end_with_the_process_that_started_them(kitti):
    """They notice at the next frame, and a worker that waits for work notices at once."""
    line = [sys.executable, "-m", "scalr_jax.prepare", *" ".join(arguments(kitti)).split(), "--num_processes=2"]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    folder = kitti / "out" / "semantic_kitti"
    while not (folder.is_dir() and list(folder.glob(".*partial"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert_all_end(process.pid)


def assert_all_end(group):
    """Multiprocessing's own tracker ends a moment after the others."""
    deadline = time.monotonic() + 30
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members(group)


def test_an_interrupt_is_one_sentence(kitti):
    line = [sys.executable, "-m", "scalr_jax.prepare", *" ".join(arguments(kitti)).split(), "--num_processes=2"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit to ignore it
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while len(members(process.pid)) < 4 and time.monotonic() < deadline:  # two workers, multiprocessing's tracker
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 2
    assert_one_sentence(err, "interrupted; the same command goes on where it stopped")
    assert_all_end(process.pid)


def members(group):
    """The living processes of a process group."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                state, _, process_group = file.read().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            found.append(int(entry))
    return found


def test_workers_do_not_import_jax():
    code = "import sys, scalr_jax.prepare.writing, scalr_jax.prepare.run; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_killed_worker_is_told_of(kitti):
    source = record_source.Source(Fatal(), None, 0.1, record_source.Images("original"))
    (kitti / "parts").mkdir()
    with pytest.raises(InputError, match="was ended by signal 9"):
        list(record_writing.write_shards(kitti, {"train": source}, plan_shards("train", 8, 4), 2, lambda frames: None))


class Fatal(Frames):
    """A dataset that ends its process."""

    def __len__(self):
        return 8

    def frame(self, index, rng=None, *, camera=None):
        os.kill(os.getpid(), signal.SIGKILL)
        return super().frame(index)


# ---------------------------------------------------------------------------------------------------------------- space


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(kitti):
    for path in (kitti / "semantic_kitti" / "dataset/sequences/00/image_2").iterdir():
        path.write_bytes(path.read_bytes() + bytes(100_000))  # the decoder does not mind, the disk does
    code, _, err = command(kitti, largest_file=250_000)
    assert code == 2
    assert_one_sentence(err, "File too large")
    assert_one_sentence(err, "free space on the disk and run the same command again")
    folder = kitti / "out" / "semantic_kitti"
    assert not folder.exists(), "nothing was finished, so nothing is left"
    code, _, err = command(kitti, "--num_processes=1", largest_file=250_000)
    assert code == 2
    assert_one_sentence(err, "File too large")
    assert command(kitti)[0] == 0
    assert len(Records(folder)) == NUM_SCANS


def test_a_disk_that_fills_later_keeps_what_is_finished(kitti, monkeypatch):
    written = []

    def full_after_two(path, content, indent):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write_json(path, content, indent)

    monkeypatch.setattr(record_writing, "write_json", full_after_two)
    with pytest.raises(InputError, match=r"No space left on device .*array_record-00002"):
        make("semantic_kitti", kitti, kitti / "out")
    monkeypatch.undo()
    stamps = [path.stat().st_mtime_ns for path in written]
    assert stamps == [path.stat().st_mtime_ns for path in sorted((kitti / "out/semantic_kitti/parts").iterdir())]
    assert len(Records(make("semantic_kitti", kitti, kitti / "out"))) == NUM_SCANS


def test_it_begins_only_where_there_is_space(kitti, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(InputError, match=r"not enough space: .* MB are needed, 0\.0 MB are free at .*--image_size"):
        make("semantic_kitti", kitti, kitti / "out")
    assert not (kitti / "out" / "semantic_kitti").exists(), "so other settings may be tried there"


def test_the_estimate_is_near(kitti):
    folder = make("semantic_kitti", kitti, kitti / "out")
    sources = {"train": prepare_source(kitti)}
    found = record_run.estimate(sources)
    payload = sum(len(b"".join(prepare_source(kitti).prepare(i).examples[0].values())) for i in range(NUM_SCANS))
    assert payload < NUM_SCANS * found.bytes_per_frame < 1.2 * payload
    assert found.points_dtype == "float32"
    assert sum(len(content) for content in contents(folder).values()) >= payload


def prepare_source(root):
    from scalr_jax.data.readers.semantic_kitti import SemanticKITTI

    return record_source.Source(SemanticKITTI(root / "semantic_kitti"), None, 0.1, record_source.Images("original"))


# ------------------------------------------------------------------------------------------------------------- refusals


def test_without_its_extra_it_says_so_before_anything_is_read(kitti, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(SystemExit) as ended:
        prepare.main(["prepare", *" ".join(arguments(kitti / "nowhere")).split()])
    assert ended.value.code == 2
    assert_one_sentence(capsys.readouterr().err, 'pip install "scalr_jax[prepare]"')


def test_nothing_is_overwritten(kitti):
    make("semantic_kitti", kitti, kitti / "out")
    code, _, err = command(kitti)
    assert code == 2
    assert_one_sentence(err, f"is complete, {NUM_SCANS} frames: nothing is overwritten")


def test_other_settings_and_other_files_are_refused_with_the_differences(kitti):
    folder = make("semantic_kitti", kitti, kitti / "out")
    (folder / "prepare.json").write_text(json.dumps(json.loads((folder / "records.json").read_text())["settings"]))
    (folder / "records.json").unlink()
    with pytest.raises(InputError, match=r"other settings.*image_format: original saved, jpeg now; image_size: None"):
        make("semantic_kitti", kitti, kitti / "out", "--image_size=28,56")
    with pytest.raises(InputError, match=r"frames_per_shard: 128 saved, 7 now; labels: False saved, True now"):
        make("semantic_kitti", kitti, kitti / "out", "--labels", "--frames_per_shard=7")
    raw.write_semantic_kitti(kitti / "semantic_kitti", num_scans=NUM_SCANS + 1)
    with pytest.raises(InputError, match=r"splits.train.frames: 24 saved, 25 now"):
        make("semantic_kitti", kitti, kitti / "out")


def test_a_folder_with_something_else_is_refused(kitti):
    (kitti / "out" / "semantic_kitti").mkdir(parents=True)
    (kitti / "out" / "semantic_kitti" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"is not empty \(it has thesis\.tex\)"):
        make("semantic_kitti", kitti, kitti / "out")


def test_two_runs_do_not_write_into_one_folder(kitti):
    folder = kitti / "out"
    with (
        record_run.claimed(folder, {"a": 1}, record_run.finished_records),
        pytest.raises(InputError, match=f"in use by .*process {os.getpid()} on"),
        record_run.claimed(folder, {"a": 1}, record_run.finished_records),
    ):
        pass


def test_verify_names_damaged_files_and_only_these_are_written_again(kitti):
    folder = make("semantic_kitti", kitti, kitti / "out")
    whole = contents(folder)
    prepare.run(["prepare", f"--output={folder}", "--verify"])
    flipped, cut, kept = sorted(folder.glob("*.array_record-*"))[:3]
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(bytes(content))
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"2 of \d files are damaged: {flipped.name} has other bytes.*{cut.name} has"):
        prepare.run(["prepare", f"--output={folder}", "--verify"])
    flipped.unlink()
    stamp = kept.stat().st_mtime_ns
    make("semantic_kitti", kitti, kitti / "out")
    assert contents(folder) == whole
    assert kept.stat().st_mtime_ns == stamp
    prepare.run(["prepare", f"--output={kitti / 'out' / 'semantic_kitti'}", "--verify"])


def test_write_errors_reach_the_caller_from_both_ways_of_writing(kitti):
    source = prepare_source(kitti)
    shards = plan_shards("train", len(source), 128)
    for num_processes in (1, 2):
        with pytest.raises(InputError, match="No such file"):
            list(record_writing.write_shards(kitti / "no", {"train": source}, shards, num_processes, lambda n: None))
