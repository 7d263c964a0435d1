"""The command line: help, mistakes and bad input. Exit code 2 and one sentence, never a traceback."""

import os
import subprocess
import sys

import numpy as np
import pytest

from scalr_jax import main, tasks
from scalr_jax.data.streets.streets import Streets
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings
from tests.support.paths import ROOT
from tests.support.raw_datasets import write_semantic_kitti
from tests.support.runs import config_of, open_split
from tests.support.tiny_student import write_workdir


def command(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, "-m", "scalr_jax.main", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_help_says_what_the_command_does():
    result = command("--help")
    assert result.returncode == 0
    assert "--workdir" in result.stdout
    assert "configs/demo.py" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model"), [("distill", "."), ("demo", "probe_distilled")])
def test_a_run_ends_with_where_its_results_are_and_what_to_try_next(task, model, tmp_path, capsys):
    for name in (f"{model}/settings.json", "results.json", "figures/loss.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    main._say_next(task, tmp_path)
    said = capsys.readouterr().out
    assert f"{tmp_path}/results.json, {tmp_path}/figures/loss.png" in said
    assert f"scalr_jax.visualize --model={tmp_path / model} " in said


def test_bad_labels_and_weights_are_one_sentence(tmp_path):
    """A probe on a checkpoint of another width; scans without a labelled point; labels outside the map."""
    write_workdir(tmp_path / "run", "probe", "segment", 19, dataset="semantic_kitti")
    write_semantic_kitti(tmp_path, "08")
    evaluate, probe = config_of("evaluate", str(tmp_path / "run")), config_of("smoke")
    evaluate.data.root, probe.task, probe.checkpoint = str(tmp_path), "probe", str(tmp_path / "run")
    labels = list((tmp_path / "dataset" / "sequences" / "08" / "labels").iterdir())
    for config, label, words in (
        (probe, 10, "channels is 8 there, 32 in config.model"),
        (evaluate, 0, "the evaluation set has no labelled point"),
        (evaluate, 77, r"labels \[77\] are in no class"),
    ):
        for path in labels:
            path.write_bytes(np.full(50, label, "<u4").tobytes())
        config.data.num_workers = 0
        with pytest.raises(InputError, match=words):
            main.run(config, tmp_path / str(label))
        assert not (tmp_path / str(label) / "results.json").exists()


@pytest.mark.parametrize("task", ["probe", "finetune"])
def test_a_validation_set_without_labels_is_refused_before_training(task, tmp_path):
    write_semantic_kitti(tmp_path, "00", num_scans=3)
    write_semantic_kitti(tmp_path, "08", num_scans=3)
    labels = sorted((tmp_path / "dataset" / "sequences" / "08" / "labels").iterdir())
    config = config_of("smoke")
    config.task = task
    config.data.update(dataset="semantic_kitti", root=str(tmp_path))
    for scans in (labels[:2], labels):  # one that is left is enough
        for path in scans:
            path.write_bytes(np.zeros(50, "<u4").tobytes())
        if len(scans) < 3:
            assert len(open_split(config, "validation", cache=tmp_path)) == 3
    with pytest.raises(InputError, match=r"none of 3 validation scans looked at \(3 in all\) has a labelled point"):
        open_split(config, "validation", cache=tmp_path)
    assert len(open_split(config, "train", cache=tmp_path)) == 3


@pytest.mark.slow
def test_one_truncated_scan_is_skipped_and_many_stop(tmp_path, street_cache):
    """A cut cache file is named; with two of them more than 1 % of the frames are bad."""
    root = tmp_path / "streets"
    root.mkdir()
    files = sorted(street_cache.glob("train-*-112x224-*.npz"))[:4]
    for i, file in enumerate(files):
        content = file.read_bytes()
        (root / file.name).write_bytes(content if i < 2 else content[: len(content) // 2])
    dataset = Streets(root, split="train", num_scenes=4, image_size=(112, 224))
    with pytest.raises(Exception, match=files[2].name):
        dataset.frame(2, np.random.default_rng(0))
    config = config_of("smoke")
    config.data.update(root=str(root), num_scenes=4)
    with pytest.raises(InputError, match="2 of 4 frames are bad"):
        tasks.distill(read_settings(config), tmp_path / "run")
