"""Sparse convolutions are measured at every level, beside their products and, where they fit, dense ones."""

import argparse
import json

import bench_sparse_conv
import numpy as np
import pytest

from scalr_jax.bench import scenes
from scalr_jax.bench.run import report
from scalr_jax.models import minkunet
from scalr_jax.ops.voxels import count_levels, sizes_for
from scalr_jax.train import steps
from tests.support.bench_batch import save_batch


@pytest.fixture(scope="module")
def batch_file(tmp_path_factory):
    return save_batch(tmp_path_factory.mktemp("bench") / "batch.npz")


@pytest.mark.slow
def test_convolutions(capsys, batch_file):
    """Coarse voxels: levels whose dense grids are small, and two that are not."""
    flags = ["--channels=4", "--levels=3", "--voxel_size=4", "--runs=1", "--dense_gib=0.0003"]
    report(bench_sparse_conv.main, [f"--batch={batch_file}", *flags])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["device"] == "cpu"
    assert [row["level"] for row in result["convolutions"]] == [0, 1, 2]
    for row in result["convolutions"]:
        for key in ("voxels", "pairs", "forward_s", "step_s", "products_s", "products_step_s", "bytes"):
            assert row[key] > 0, key
        assert row["rate"] == pytest.approx(row["products_s"] / row["forward_s"], rel=1e-4)
    assert result["least_rate"] == min(row["rate"] for row in result["convolutions"])
    assert [row["dense_s"] is None for row in result["convolutions"]] == [True, False, False]


@pytest.mark.slow
def test_a_network(capsys, batch_file, monkeypatch):
    """A network of two residual blocks."""
    monkeypatch.setitem(minkunet.BLOCKS, "minkunet14", (1, 0, 0, 0, 0, 0, 0, 1))
    monkeypatch.setattr(steps, "compiler_options", lambda platform: {"xla_backend_optimization_level": 0})
    batch = scenes.load(batch_file).batch
    voxels = np.floor((batch.feats[0, :, 1:4] - bench_sparse_conv.LOW) / 4)
    counts = count_levels(voxels) + 27 * batch.scene_points.size  # of all scenes at once, and some more
    arguments = argparse.Namespace(network="minkunet14", voxel_size=4.0, runs=1)
    found, times = bench_sparse_conv.network(arguments, batch, (32, 32, 4), sizes_for(counts))
    assert (found["name"], set(times)) == ("minkunet14", {"forward", "step"})
    assert all(found[key] > 0 for key in ("forward_s", "step_s", "step_bytes"))
    with pytest.raises(SystemExit):
        report(bench_sparse_conv.main, ["--levels=3", "--network=minkunet14"])
    assert "--network has 5 levels; leave --levels out" in capsys.readouterr().err


def test_a_voxel_size_of_nothing_is_refused(capsys, batch_file):
    with pytest.raises(SystemExit) as stopped:
        report(bench_sparse_conv.main, [f"--batch={batch_file}", "--voxel_size=0"])
    assert stopped.value.code == 2
    assert "--voxel_size=0.0 is not positive" in capsys.readouterr().err
