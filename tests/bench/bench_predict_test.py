"""`bench predict` on a small scan: every stage is measured, and the two networks agree before they are compared."""

import json
import sys

import jax
import numpy as np
import pytest

from scalr_jax.bench import predict as bench_predict
from scalr_jax.bench import run as bench
from scalr_jax.export import onnx as export_onnx

SMALL = ("predict", "--channels=8", "--depth=3", "--runs=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a KITTI scan of 3,000 points."""
    root = tmp_path_factory.mktemp("bench_predict")
    folder = root / "semantic_kitti" / "dataset" / "sequences" / "00" / "velodyne"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    points = rng.uniform((-40, -40, -2, 0), (40, 40, 2, 1), (3_000, 4)).astype("<f4")
    points.tofile(folder / "000000.bin")
    return root


@pytest.fixture(autouse=True)
def _careless():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.slow
def test_every_stage_is_measured(root, capsys):
    bench.main([*SMALL, f"--root={root}"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["points"], result["rows"], result["device"], result["runs"]) == (3_000, 4_096, "cpu", 1)
    assert tuple(result["stages_ms"]) == bench_predict.STAGES
    assert min(result["stages_ms"].values()) > 0
    assert result["ratio"] == pytest.approx(result["stages_ms"]["network"] / result["onnxruntime_ms"], rel=1e-4)
    others = sum(result["stages_ms"].values()) - result["stages_ms"]["network"]
    assert result["onnxruntime_total_ms"] == pytest.approx(others + result["onnxruntime_ms"], rel=1e-4)
    assert result["total_ms"] > result["stages_ms"]["neighbours"]


@pytest.mark.slow
def test_networks_that_differ_are_not_compared(root, capsys, monkeypatch):
    """Another network beside ours, as a wrong export would be."""
    right = export_onnx.serialize

    def wrong(student, variables, settings):
        variables["params"]["embedding"]["final"]["bias"] += 1.0
        return right(student, variables, settings)

    monkeypatch.setattr(export_onnx, "serialize", wrong)
    fails(capsys, "the exported network differs", *SMALL, f"--root={root}")


def test_what_is_missing_is_one_sentence(root, tmp_path, capsys, monkeypatch):
    fails(capsys, "has no semantic_kitti", *SMALL, f"--root={tmp_path}")
    monkeypatch.delitem(sys.modules, "scalr_jax.export.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    fails(capsys, 'pip install "scalr_jax[export]"', *SMALL, f"--root={root}")


def fails(capsys, match, *arguments):
    with pytest.raises(SystemExit) as ended:
        bench.main(list(arguments))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert match in line
