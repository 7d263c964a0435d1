"""`scalr_jax.predict` and what it is given wrong: exit code 2, one sentence, nothing half-written."""

import re

import numpy as np
import pytest

from scalr_jax.data.readers import scan_inputs
from scalr_jax.predict import run as predict
from scalr_jax.runtime.command_line import use_cache
from tests.support.predict_runs import EXPLICIT, command, loaded_once, make_points, sentence_of, write_bin, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", autouse=True)
def _loaded_once():
    with loaded_once():
        yield


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input=none.bin"], "none.bin: no such file or folder"),
        (["--input=empty"], "empty: no scan in this folder"),
        (["--input=parent"], "its folders empty, scans have some|its folders scans have some"),
        (["--input=zero.bin"], "zero.bin: the scan has no points"),
        (["--input=out.bin"], "0 points are left in the field of view.*; shift or scale the points into it"),
        (["--input=far.bin"], "far.bin: coordinates in a map's frame .x = 5e.03.*subtract the sensor's position"),
        (["--input=nan.bin"], "nan.bin: 301 of 301 points are NaN or infinite; write or copy the scan again"),
        (["--input=dark.bin"], "dark.bin: 301 of 301 points have an intensity that is no finite number"),
        (["--input=doubles.bin"], "doubles.bin: the scan reads as float64, and 4 columns of"),
        (["--input=scan.txt"], "a scan is a file that ends in .bin, .npy, .pcd, .ply"),
        (["--input=00.pkl.gz"], "PandaSet's <scene>/lidar/NN.pkl.gz"),
        (["--output=a.csv"], "no output format .csv; there are .npz, .npy, .label, .ply, .png"),
        (["--formats=npz,xyz"], "no output format .xyz"),
        (["--output=file/a.npz"], "file is no folder, or a read-only one"),
        (["--output=scan.bin", "--input=scan.bin"], "scan.bin is an input and would be overwritten"),
        (["--output=points.npy", "--input=points.npy"], "is an input and would be overwritten"),
        (["--input=scans", "--output=a.npz"], "names one file, and scans is a folder"),
        (["--input=scans", "--output=scan.bin"], "scan.bin is a file, and scans is a folder"),
        (["--what=labels"], "only distilled and has no classes"),
        (["--output=a.label"], "a .label file holds classes, and features were asked for"),
        (["--what=colors"], "value should be one of"),
        (["--sector=1"], "--sector=1 must be 2 numbers"),
        (["--sector=100,101"], "none of 301 points lies between"),
        (["--intensity=1,2,3"], "--intensity=1,2,3 must be 2 numbers"),
        (["--columns=5"], "scan.bin: the scan reads as 4 columns, and 5 columns"),
        (["--grids=1e300,16,16,8,16,8"], "grids"),
        (["--grids=1000000,16,16,8,16,8"], "grids = .*1 to 8,192"),
        (["--grids=16.5,16,16,8,16,8"], "grids = ..rows, columns"),
        (["--field_of_view=-1e300,-16,-4,16,16,4"], "field_of_view = .*-10,?000 to 10,?000"),
        (["--columns=7"], "a .bin file has 3, 4, 5, 6 columns"),
        (["--sensor=velodyne"], "sensor = 'velodyne' is none of nuscenes"),
        (["--sector=nan,40"], "--sector=nan,40 must be 2 numbers"),
        (["--model=none.pth"], "none.pth does not exist; give a workdir of distill, probe or finetune, an exported"),
        (["--model=model.onnx"], "model.onnx is a program, which the README.md beside it says how to run"),
        (["--model=empty"], r"empty is no workdir .*no exported folder.*; give a workdir of"),
        (["--model="], "--model and --input are required"),
        (["extra"], "unexpected arguments: extra"),
        (["--outptu=x"], "Unknown command line flag 'outptu'"),
    ],
)
def test_one_sentence_for_what_is_wrong(models, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    write_bin(tmp_path / "scan.bin", make_points(301))
    write_bin(tmp_path / "nan.bin", np.full((301, 4), np.nan))
    make_points(301).astype(np.float64).tofile(tmp_path / "doubles.bin")
    write_bin(tmp_path / "dark.bin", np.where(np.arange(4) < 3, make_points(301), np.float32(3e38)))
    write_bin(tmp_path / "out.bin", make_points(301) + np.array([50, 0, 0, 0], np.float32))
    write_bin(tmp_path / "far.bin", make_points(301) + np.array([5000, 0, 0, 0], np.float32))
    write_bin(tmp_path / "scans" / "0.bin", make_points())
    write_bin(tmp_path / "parent" / "scans" / "0.bin", make_points())
    np.save("points.npy", make_points())
    for name in ("zero.bin", "scan.txt", "model.onnx", "00.pkl.gz", "file"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    text = sentence_of(capsys, f"--model={models}/distilled.pth", "--input=scan.bin", *EXPLICIT, *flags)
    assert re.search(message, text), text
    assert not list(tmp_path.rglob("*.npz"))
    assert not list(tmp_path.rglob("*.partial"))


def test_two_scans_of_one_name(models, tmp_path):
    write_bin(tmp_path / "scans" / "0.bin", make_points())
    np.save(tmp_path / "scans" / "0.npy", make_points())
    with pytest.raises(ValueError, match=r"0\.bin and 0\.npy have one name"):
        scan_inputs.list_scans(tmp_path / "scans")


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(models, tmp_path):
    scan = write_bin(tmp_path / "scan.bin", make_points(20_000))
    done = command(
        f"--model={models}/probed.pth", f"--input={scan}", f"--output={tmp_path}/out.npz", *EXPLICIT, limit=16
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"File too large: '{tmp_path}/out.npz'" in done.stderr
    assert "run the same command again" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.bin"]


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert use_cache(tmp_path / "file" / "cache") is None
    assert "compiled programs are not kept" in capsys.readouterr().out


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        predict.main(["predict", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.count("python -m scalr_jax.predict --model=") == 3
    for name in predict.FLAGS:
        if name not in ("?", "help", "helpfull", "helpshort", "helpxml", "only_check_args", "flagfile", "undefok"):
            assert f"--{name} " in text, name
