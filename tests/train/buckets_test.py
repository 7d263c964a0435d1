"""Packs of several sizes: the same losses as in one, and a run that was stopped goes on to the same bits."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from scalr_jax.data.scenes import Frame
from scalr_jax.runtime import distributed, stopping
from scalr_jax.train import loop
from tests.support.datasets import Frames
from tests.support.plain_runs import finetune
from tests.support.runs import lines, losses, on_one_device


@dataclasses.dataclass(frozen=True)
class Sizes(Frames):
    """Nine scans of 12 to 60 points."""

    class_names = ("a", "b")

    def __len__(self):
        return 9

    def frame(self, index, rng=None, *, camera=None):
        own, number = np.random.default_rng(index), 12 + 6 * index
        points = own.uniform(-6, 6, (number, 4)) * [1, 1, 0.2, 1]
        return Frame(self.name(index), points, np.eye(4), labels=own.integers(0, 2, number).astype(np.uint8))


def test_a_run_in_buckets_is_the_run_and_resumes_to_the_same_bits(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    sizes, original = [], loop._Log.add

    def noted(self, step, metrics, item, **more):
        sizes.append(item.batch.feats.shape[1])
        original(self, step, metrics, item, **more)

    monkeypatch.setattr(loop._Log, "add", noted)
    given: dict = {"num_steps": 8, "log_every_steps": 1, "checkpoint_every_steps": 4, "data.points_per_shard": 512}
    given |= {"data.scenes_per_shard": 6, "data.scenes_per_step": 6, "model.num_neighbors": 1}
    given |= {"data.cells_per_shard": (512,), "data.halo_per_shard": (1024,)}
    finetune(Sizes(), tmp_path / "one", **given)
    assert set(sizes) == {512}
    given["data.buckets"] = (0.5, 0.25)
    whole = finetune(Sizes(), tmp_path / "whole", **given)
    assert len(set(sizes[8:])) == 2
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "preemption", lambda: contextlib.nullcontext(lambda step: step == 3))
        with pytest.raises(stopping.Preempted):
            finetune(Sizes(), tmp_path / "run", **given)
    state = finetune(Sizes(), tmp_path / "run", **given)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(whole))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    fills = [
        [line["train/point_fill"] for line in lines(tmp_path / name) if "train/loss" in line]
        for name in ("whole", "one")
    ]
    assert all(ours / plain == 512 / size for ours, plain, size in zip(*fills, sizes[8:16], strict=True))
