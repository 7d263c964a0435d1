"""Real processes: the same run on one or four of them; killed, stopped, cut off, and started again."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from scalr_jax import config as defaults
from scalr_jax.runtime import distributed, workdir
from scalr_jax.runtime.checkpoint import load_variables
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings, record_of
from tests.support.fast import FAST
from tests.support.paths import ROOT

TINY = (
    "--config.data.num_scenes=8",
    "--config.data.points_per_shard=3072",
    "--config.data.scenes_per_shard=2",
    "--config.data.max_points=1500",
    "--config.model.channels=16",
    "--config.model.depth=1",
)


@pytest.fixture(scope="module")
def start(shared_folder, street_cache):
    """(workdir, *flags, of=(process, number, port), devices=n) -> a running `scalr_jax.main` on n CPU devices."""
    running = []

    def run(workdir, *flags, of=(0, 1, 0), devices=1):
        process, number, port = of
        cluster = (f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={number}", f"--process_id={process}")
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join([f"--xla_force_host_platform_device_count={devices}", *FAST]),
            "JAX_COMPILATION_CACHE_DIR": str(shared_folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "scalr_jax.main", "--config=configs/smoke.py", f"--workdir={workdir}"]
        command += [*TINY, f"--config.data.root={street_cache}", *(cluster if number > 1 else ()), *flags]
        output = (workdir.parent / f"{workdir.name}.{process}.log").open("a+")
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output))
        running[-1].output = output
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.wait()
        process.output.close()


def end_of(process, timeout=240):
    """Exit code and output of a process that ends by itself."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        code = f"none after {timeout} s"
    process.output.seek(0)
    return code, process.output.read()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def group(start, number, devices, workdir, *flags):
    port = free_port()
    return [start(workdir, *flags, of=(k, number, port), devices=devices) for k in range(number)]


def losses(workdir):
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def wait_for_step(workdir, step, resumes=None, timeout=240):
    """Until step `step` is logged, after `resumes` resumptions: before, a line may be of a run that went on further."""
    limit = time.monotonic() + timeout
    while time.monotonic() < limit:
        path = workdir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        if f'"step": {step},' in text and resumes in (None, text.count('"event": "resume"')):
            return
        time.sleep(0.05)
    raise AssertionError(f"{workdir} did not come to step {step}")


def parameters(workdir):
    return jax.tree.leaves(load_variables(workdir / "checkpoints"))


def same_parameters(a, b, **tolerance):
    for x, y in zip(parameters(a), parameters(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.slow
def test_one_or_two_processes_give_the_same_run(start, tmp_path):
    """Four devices in both; the losses depend on which scenes are in which pack, so the data's order is the same."""
    for number in (1, 2):
        flags = ("--config.mesh.data=4", "--config.num_steps=4")
        processes = group(start, number, 4 // number, tmp_path / str(number), *flags)
        ended = [end_of(process) for process in processes]
        assert [code for code, _ in ended] == [0] * number, "\n".join(output for _, output in ended)
        assert sum("step 4/4" in output for _, output in ended) == 1  # one process reports and writes
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert sorted(one) == list(range(1, 5))
    np.testing.assert_allclose([two[k] for k in one], list(one.values()), rtol=0, atol=1e-5)
    pairs = zip(*(map(np.asarray, parameters(tmp_path / name)) for name in "12"), strict=True)
    # Of each array's scale: Adam divides a small gradient by its own size, so that an element shows its rounding.
    assert max(np.abs(x - y).max() / max(np.abs(y).max(), 0.1) for x, y in pairs) < 1e-4


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_is_the_same_run(start, tmp_path):
    """SIGKILL twice, while checkpoints of every step are being written, and SIGTERM once; with and without data
    workers."""
    flags = ("--config.checkpoint_every_steps=1", "--config.num_steps=9")
    code, output = end_of(start(tmp_path / "whole", *flags))
    assert code == 0, output
    seed = random.randrange(10**6)
    moments, path = random.Random(seed), tmp_path / "killed"
    for attempt, asked in enumerate((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)):
        process = start(path, *flags, f"--config.data.num_workers={attempt % 2}")
        known = max(losses(path)) if attempt else 0
        wait_for_step(path, known + 1)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(asked)
        code, output = end_of(process)
        if code == 0 and asked is signal.SIGTERM:
            assert "stopped as asked" in output or max(losses(path)) == 9, f"seed {seed}"
        else:
            assert code in (-signal.SIGKILL, 0), f"seed {seed}: {output}"
        if max(losses(path)) == 9:
            break
    code, output = end_of(start(path, *flags))
    assert code == 0, f"seed {seed}: {output}"
    assert losses(path) == losses(tmp_path / "whole"), f"seed {seed}"
    same_parameters(path, tmp_path / "whole", rtol=0, atol=0)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_one_step_and_the_same_command_resumes(start, tmp_path):
    flags = ("--config.num_steps=400", "--config.checkpoint_every_steps=1000")
    first, second = group(start, 2, 1, tmp_path / "run", *flags)
    wait_for_step(tmp_path / "run", 3)
    second.send_signal(signal.SIGTERM)
    ends = [end_of(process) for process in (first, second)]
    assert [code for code, _ in ends] == [0, 0], ends
    sentences = [output.strip().splitlines()[-1] for _, output in ends]
    assert sentences[0] == sentences[1]
    assert "stopped as asked after step" in sentences[0]
    step = int(sentences[0].split("after step ")[1].split()[0])
    assert 3 <= step < 400
    # Once more: it goes on there. Now a process dies, and the other one says so within a minute.
    for resumes, victim in ((1, 1), (2, 0)):
        both = group(start, 2, 1, tmp_path / "run", *flags)
        wait_for_step(tmp_path / "run", step + 3, resumes)
        both[victim].kill()
        code, output = end_of(both[1 - victim], timeout=60)
        assert code == 1, output
        assert "another process of this run died" in output.strip().splitlines()[-1]
        assert f'{{"event": "resume", "step": {step}}}' in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_sigterm_before_the_first_step_and_ctrl_c_in_the_loop_end_well(start, tmp_path):
    process = start(tmp_path / "run")
    while not (tmp_path / "run" / "settings.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, output = end_of(process)
    assert (code, "stopped as asked" in output) == (0, True), output
    assert not (tmp_path / "run" / "config.json").exists()
    process = start(tmp_path / "run", "--config.num_steps=400")
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGINT)
    code, output = end_of(process)
    assert (code, "stopped as asked after step" in output) == (0, True), output


@pytest.mark.slow
def test_processes_with_different_configs_both_stop(start, tmp_path):
    port = free_port()
    rates = ("0.001", "0.002")
    both = [
        start(tmp_path / "run", f"--config.optimizer.learning_rate={rate}", of=(k, 2, port))
        for k, rate in enumerate(rates)
    ]
    ends = [end_of(process) for process in both]
    assert [code for code, _ in ends] == [2, 2], ends
    for _, output in ends:
        assert "processes of one run have different configs" in output
    assert "optimizer.learning_rate: 0.001 on process 0, 0.002 on process 1" in ends[1][1]
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("process", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_processes_that_never_meet_end_in_a_sentence(start, tmp_path, process):
    code, output = end_of(start(tmp_path / "run", "--connect_seconds=3", of=(process, 2, free_port())), timeout=120)
    assert code == 2, output
    words = "was not reached within 3 s" if process else "not all processes of this run came together"
    assert words in output.strip().splitlines()[-1]


def test_incomplete_or_wrong_cluster_flags_are_refused():
    with pytest.raises(InputError, match="--num_processes and --process_id must be given too"):
        distributed.start("localhost:1234")
    with pytest.raises(InputError, match="--process_id=2 is not between 0 and --num_processes=2"):
        distributed.start("localhost:1234", 2, 2)
    with pytest.raises(InputError, match="localhost is not host:port"):
        distributed.start("localhost", 2, 1)


def test_a_workdir_serves_one_live_run(tmp_path):
    config, keys = record_of(read_settings(defaults.get_config())), defaults.all_keys()
    with (
        workdir.claim(tmp_path, config, keys),
        pytest.raises(InputError, match=f"in use by a live run .process {os.getpid()} on"),
        workdir.claim(tmp_path, config, keys),
    ):
        pass
    with workdir.claim(tmp_path, config, keys):  # free again
        assert (tmp_path / "config.json").is_file()


def test_a_workdir_that_cannot_be_one_is_refused(tmp_path):
    config, keys = record_of(read_settings(defaults.get_config())), defaults.all_keys()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file"), workdir.claim(tmp_path / "file", config, keys):
        pass
    (tmp_path / "config.json").write_text("{")
    with (
        pytest.raises(InputError, match=r"config\.json: .*; use another --workdir, or remove it"),
        workdir.claim(tmp_path, config, keys),
    ):
        pass
