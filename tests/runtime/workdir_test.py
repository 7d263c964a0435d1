"""A workdir is bound to a config from the first step on, and not before."""

import json

import pytest

from scalr_jax.runtime import workdir
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.keys import Row
from scalr_jax.runtime.logging import MetricWriter
from scalr_jax.runtime.stopping import Preempted
from tests.support.checks import mentions

KEYS: tuple[Row, ...] = ()


def record(rate):
    return {"task": "distill", "data": {}, "optimizer": {"learning_rate": rate}}


def claim(path, rate):
    return workdir.claim(path, record(rate), KEYS)


@pytest.mark.parametrize("error", [InputError, RuntimeError, Preempted, KeyboardInterrupt])
def test_a_run_that_did_no_step_leaves_no_config(error, tmp_path):
    with pytest.raises(error), claim(tmp_path, 1):
        (tmp_path / "settings.json").write_text("{}")
        (tmp_path / "checkpoints").mkdir()
        assert json.loads((tmp_path / "config.json").read_text()) == record(1)
        raise error("over")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "lock"]


@pytest.mark.parametrize("begun", ["metrics.jsonl", "results.json", "checkpoints/5", "distill"])
def test_another_config_is_accepted_until_something_was_done(begun, tmp_path):
    """Also after SIGKILL, which leaves the config of the run that did nothing."""
    for rate in (1, 2):
        with claim(tmp_path, rate):
            pass
    (tmp_path / begun).mkdir(parents=True) if "." not in begun else (tmp_path / begun).touch()
    with pytest.raises(InputError, match=mentions("optimizer.learning_rate", 2, 3)), claim(tmp_path, 3):
        pass
    with pytest.raises(KeyError), claim(tmp_path, 2):
        raise KeyError
    assert json.loads((tmp_path / "config.json").read_text()) == record(2)


@pytest.mark.parametrize("content", ['{"architectures": ["ViT"]}', "[1]", "{"])
def test_a_config_of_something_else_is_not_overwritten(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError), claim(tmp_path, 1):
        pass
    assert (tmp_path / "config.json").read_text() == content


def test_metrics_from_before_the_first_checkpoint_are_written_once(tmp_path):
    for _ in range(2):  # the second after a SIGKILL
        writer = MetricWriter(tmp_path, num_steps=9)
        writer.restart()
        for step in (1, 2):
            writer.write(step, {"train/loss": 1.0, "train/points_per_s": 1.0, "train/point_fill": 1.0})
        writer.close()
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
