"""The speed that a run writes: rates without the compiler, the model's FLOPs over the chip's peak."""

import json
import sys
import types

import numpy as np
import pytest

from scalr_jax.data.packing import Capacities
from scalr_jax.data.pipeline import Step
from scalr_jax.data.scenes import Batch
from scalr_jax.models import flops
from scalr_jax.models.vit import ViTConfig
from scalr_jax.runtime import chips
from scalr_jax.runtime import logging as run_logging
from scalr_jax.runtime.logging import MetricWriter
from scalr_jax.train import loop
from scalr_jax.train.teachers import Source
from tests.support.checks import present
from tests.support.small_student import small_student

PEAK = 1e6
TEACHER = ViTConfig(width=8, depth=1, num_heads=1, hidden=16, position_grid=(2, 2))


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = types.SimpleNamespace(seconds=1_000.0)
    for module in (run_logging, loop):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def item(points=(30, 20, 0)):
    zeros = np.zeros((1, 60), np.int32)
    batch = Batch(np.zeros((1, 60, 5)), zeros, np.array([points]), np.zeros((1, 60, 4)), ())
    return Step(batch, np.zeros(1), 2, 0, ())


def run(tmp_path, clock, student, seconds=(100.0, 2.0, 2.0, 2.0)):
    """Four steps, the first of which waits for the compiler; the line of the last."""
    writer = MetricWriter(tmp_path, num_steps=8, label="tiny")
    writer.restart()
    task = loop.Task("tiny", "distill", student, None, lambda: None, sources=(Source(6, (28, 28), TEACHER),))
    log = loop._Log(writer, task, Capacities(60, 3, (), ()), 1, every=4)
    for step, took in enumerate(seconds, 1):
        clock.seconds += took
        metrics = {"loss": np.float32(1), "points": np.int32(50), "scenes": np.int32(2), "skipped_steps": np.int32(0)}
        log.add(step, metrics, item(), now=False)
    return json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])


def test_rates_leave_out_the_step_that_compiles(tmp_path, clock, monkeypatch, capsys):
    monkeypatch.setattr(chips, "PEAKS", ((r"cpu", PEAK),))
    student = small_student()
    line = run(tmp_path, clock, student)
    assert line["train/examples_per_s"] == pytest.approx(1.0)
    assert line["train/points_per_s"] == pytest.approx(25.0)
    own = present(flops.step_flops(student, item().batch)) + flops.teacher_flops(TEACHER, 2, (28, 28))
    assert line["train/mfu"] == pytest.approx(own / 2.0 / PEAK)
    said = capsys.readouterr().out
    assert "tiny: compiling, then 8 steps" in said
    assert "tiny: compiled in 100 s" in said
    assert said.rstrip().endswith("0:08 left")  # four steps of two seconds


def test_on_a_cpu_there_is_no_share_of_a_peak(tmp_path, clock):
    assert {"train/mfu", "train/device_peak_bytes"}.isdisjoint(run(tmp_path, clock, small_student()))


def test_a_frozen_backbone_has_no_backward_pass():
    batch = item().batch
    whole, frozen, head = (
        present(flops.step_flops(small_student(**changes), batch))
        for changes in ({}, {"frozen_backbone": True}, {"depth": 0, "frozen_backbone": True})
    )
    assert whole - frozen == 50 * 2 * 8 * 8 * (3 * 4 + 4 * 2 + 2 * 2) + 50 * 2 * 5 * 8 * (2 + 4)
    assert head < frozen < whole


class FakeRun:
    def __init__(self, **options):
        self.options, self.lines, self.ended = options, [], False

    def log(self, data, step):
        self.lines.append({"step": step, **data})

    def finish(self):
        self.ended = True


def test_a_tracker_gets_the_lines_of_the_metrics(tmp_path, monkeypatch):
    """And a workdir that goes on the same run."""
    runs = []
    wandb = types.SimpleNamespace(init=lambda **options: runs.append(FakeRun(**options)) or runs[-1])
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (1, 2):
        writer = MetricWriter(tmp_path, num_steps=2, project="lidar")
        writer.resume(step - 1)
        writer.write(step, {"train/loss": 1.0 / step, "train/points_per_s": 1.0, "train/point_fill": 1.0})
        writer.close()
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line for run in runs for line in run.lines] == [line for line in lines if "event" not in line]
    assert runs[0].options["project"] == "lidar"
    assert runs[0].options == runs[1].options
    assert all(run.ended for run in runs)


def test_a_tracker_that_cannot_begin_is_one_sentence(tmp_path, monkeypatch):
    def fail(**_):
        raise RuntimeError("no key\nand more")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=fail))
    with pytest.raises(run_logging.InputError, match=r"lidar.*\(no key\).*WANDB_MODE=offline"):
        MetricWriter(tmp_path, num_steps=2, project="lidar")
