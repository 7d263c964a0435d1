"""launch/slurm.sbatch on a real Slurm of one node (slurm_node.sh), from Debian's slurmctld, slurmd and munge."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.support.paths import ROOT

NODE = ROOT / "tests/launch/slurm_node.sh"
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun")

missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"Slurm is not installed: no {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd needs root"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """`slurm(command, ...)` runs a command of Slurm's and returns its output."""
    folder = tmp_path_factory.mktemp("slurm")
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    environment["PATH"] += ":/usr/sbin"
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))  # the resumed job's
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

    def run(*command, timeout=60, **settings):
        result = subprocess.run(
            command,
            cwd=ROOT,
            env={**environment, **settings},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run(NODE, "start", folder, "2")
    yield run
    run(NODE, "stop", folder)


class Job:
    """launch/slurm.sbatch, submitted."""

    def __init__(self, slurm, folder, *arguments, python=sys.executable, config="configs/smoke.py"):
        self.slurm, self.log, self.workdir = slurm, folder / "log", folder / "run"
        self.workdir.mkdir(exist_ok=True)
        options = ("--parsable", "--ntasks=2", f"--output={self.log}", "launch/slurm.sbatch")
        settings = {"CONFIG": str(config), "WORKDIR": str(self.workdir), "PYTHON": str(python)}
        self.id = slurm("sbatch", *options, *arguments, **settings).strip()

    def state(self):
        words = self.slurm("scontrol", "show", "job", self.id).split()
        return next(word.removeprefix("JobState=") for word in words if word.startswith("JobState="))

    def text(self):
        return self.log.read_text() if self.log.exists() else ""

    def await_true(self, condition, seconds=60):
        limit = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > limit:
                self.slurm("scancel", "--signal=KILL", "--full", self.id)
                pytest.fail(f"not within {seconds} s; the job is {self.state()} and said: {self.text()}")
            time.sleep(0.3)

    def end(self):
        """Slurm's warning before the time limit, as --signal=B:TERM@120 gives it."""
        self.slurm("scancel", "--batch", "--signal=TERM", self.id)

    def await_requeued(self):
        self.await_true(lambda: self.state() == "PENDING")
        self.slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now+3")  # Slurm itself takes 2 minutes

    def await_completed(self, seconds=60):
        self.await_true(lambda: self.state() not in ("PENDING", "RUNNING", "COMPLETING"), seconds)
        assert self.state() == "COMPLETED", self.text()


@pytest.fixture
def stand_in(tmp_path):
    """In the training's place: waits for SIGTERM and ends with 0; when started again it has finished."""
    path = tmp_path / "python"
    path.write_text(
        """#!/usr/bin/env bash
if [[ -e $WORKDIR/saved ]]; then echo "resumed: ${*: -1}"; touch "$WORKDIR/results.json"; exit 0; fi
trap 'touch "$WORKDIR/saved"; exit 0' TERM
echo "ready $SLURM_PROCID of $SLURM_NTASKS"
while :; do sleep 0.1; done
"""
    )
    path.chmod(0o755)
    return path


def test_a_job_that_was_stopped_and_saved_goes_back_into_the_queue(slurm, tmp_path, stand_in):
    job = Job(slurm, tmp_path, "--config.seed=1", python=stand_in)
    job.await_true(lambda: job.text().count("ready") == 2)
    assert "ready 0 of 2" in job.text()
    assert "ready 1 of 2" in job.text()
    job.end()
    job.await_requeued()
    job.await_completed()
    assert job.text().count("goes back into the queue") == 1
    assert job.text().count("resumed: --config.seed=1") == 2


def test_a_job_that_scancel_ended_stays_ended(slurm, tmp_path, stand_in):
    job = Job(slurm, tmp_path, python=stand_in)
    job.await_true(lambda: job.text().count("ready") == 2)
    slurm("scancel", job.id)
    job.await_true(lambda: job.state() == "CANCELLED")
    assert (job.workdir / "saved").exists()
    time.sleep(3)  # a job that was put back would be PENDING by now
    assert job.state() == "CANCELLED"


@pytest.mark.slow
def test_two_tasks_train_as_one_run_and_resume(slurm, tmp_path, street_cache):
    config = tmp_path / "config.py"
    config.write_text(f"""
from configs import smoke


def get_config():
    config = smoke.get_config()
    config.num_steps, config.checkpoint_every_steps = 60, 30
    config.data.update(num_scenes=8, root={str(street_cache)!r}, points_per_shard=2048, scenes_per_shard=1)
    config.data.max_points = 1000
    config.model.update(channels=16, depth=1)
    return config
""")
    job = Job(slurm, tmp_path, config=config)
    metrics = job.workdir / "metrics.jsonl"
    job.await_true(lambda: metrics.exists() and metrics.read_text(), 300)
    job.end()
    job.await_requeued()
    job.await_completed(300)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    resumed = [line["step"] for line in lines if line.get("event") == "resume"]
    assert len(resumed) == 1
    assert 1 <= resumed[0] < 60
    # Two runs alone would each have written every step.
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 61))
    assert "0: distill step 60/60" in job.text()
    assert "1: distill step" not in job.text()
    assert (job.workdir / "results.json").exists()
