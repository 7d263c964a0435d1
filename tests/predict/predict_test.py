"""`scalr_jax.predict`: a row for every point in every format, folders that resume, programs that are kept."""

import json
import os
import sys

import numpy as np
import plyfile
import pytest
from PIL import Image

from scalr_jax.data.readers.files import read_label_map
from scalr_jax.data.scenes import IGNORE
from scalr_jax.data.sensors import raw_labels
from scalr_jax.predict import run as predict
from tests.support.predict_runs import (
    EXPLICIT,
    command,
    load,
    loaded_once,
    make_points,
    run,
    sentence_of,
    write_bin,
    write_models,
)
from tests.support.scan_writers import make_table, write_pcd, write_ply


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", autouse=True)
def _loaded_once():
    with loaded_once():
        yield


# ------------------------------------------------------------------------------------------------------------ one scan


def test_one_scan_in_every_output_format(models, tmp_path):
    points = make_points()
    scan = write_bin(tmp_path / "scan.bin", points)
    run(models / "probed.pth", scan, f"--output={tmp_path}/out/a.npz", "--formats=npy,label,ply,png")
    model = load(models / "probed.pth")
    expected = model.segment(points)
    with np.load(tmp_path / "out" / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["labels"], expected)
        assert tuple(arrays["class_names"]) == model.class_names == tuple(f"class {k}" for k in range(7))
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "a.npy"), expected)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out" / "a.label", "<u4"), expected)
    vertices = plyfile.PlyData.read(tmp_path / "out" / "a.ply")["vertex"].data
    for k, name in enumerate(("x", "y", "z", "intensity")):
        np.testing.assert_array_equal(vertices[name], points[:, k])
    np.testing.assert_array_equal(vertices["label"], expected)
    colors = np.stack([vertices["red"], vertices["green"], vertices["blue"]], axis=1)
    for k in np.unique(expected):
        assert len(np.unique(colors[expected == k], axis=0)) == 1
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert min(image.size) > 500
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"a.{k}" for k in ("label", "npy", "npz", "ply", "png")
    ]


@pytest.mark.slow
def test_features_and_distilled_features(models, tmp_path):
    points = make_points()
    scan = write_bin(tmp_path / "scan.bin", points)
    model = load(models / "distilled.pth")
    run(models / "distilled.pth", scan, f"--output={tmp_path}/a.npz", "--dtype=float16")
    with np.load(tmp_path / "a.npz") as arrays:
        assert list(arrays) == ["features"]
        assert arrays["features"].dtype == np.float16
        np.testing.assert_allclose(arrays["features"], model.embed(points), rtol=2e-3, atol=1e-3)
    run(models / "distilled.pth", scan, f"--output={tmp_path}/b.npy", "--what=distilled")
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), model.distilled(points))


def test_every_input_format_gives_the_same(models, tmp_path):
    table = make_table(400)
    for name in "xyz":
        table[name] *= 0.08 if name == "z" else 0.3
    points = np.stack([table[name] for name in ("x", "y", "z", "intensity")], axis=1)
    folder = tmp_path / "scans"
    write_bin(folder / "a.bin", points)
    write_bin(folder / "b.pcd.bin", np.column_stack([points, table["ring"]]))  # nuScenes': five columns
    np.save(folder / "c.npy", points)
    write_pcd(folder / "d.pcd", table)
    write_ply(folder / "e.ply", table)
    run(models / "probed.pth", folder, f"--output={tmp_path}/out", "--formats=npy")
    expected = load(models / "probed.pth").segment(points)
    for name in "abcde":
        np.testing.assert_array_equal(np.load(tmp_path / "out" / f"{name}.npy"), expected)


def test_only_a_sector(models, tmp_path, capsys):
    """The points of the sector get what they get alone; the others nothing."""
    points = make_points(600)
    scan = write_bin(tmp_path / "scan.bin", points)
    run(models / "probed.pth", scan, f"--output={tmp_path}/a.npy", "--sector=-50,60")
    angle = np.degrees(np.arctan2(points[:, 1], points[:, 0]))
    inside = (angle > -50) & (angle < 60)
    labels = np.load(tmp_path / "a.npy")
    assert (labels[~inside] == IGNORE).all()
    np.testing.assert_array_equal(labels[inside], load(models / "probed.pth").segment(points[inside]))
    assert "out.npz" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sector", "inside"), [((-45, 45), "E"), ((45, -45), "NWS"), ((100, 260), "W"), ((0, 360 - 1e-9), "ENWS")]
)
def test_sectors_run_counter_clockwise(sector, inside):
    points = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1], [np.nan, 1]])
    assert "".join(np.array([*"ENWS?"])[predict.in_sector(points, sector)]) == inside


def test_points_that_are_no_numbers_get_an_answer_and_a_warning(models, tmp_path, capsys):
    points = make_points()
    points[3, 0], points[8, 1], points[9, 3] = np.nan, np.inf, np.nan
    scan = write_bin(tmp_path / "scan.bin", points)
    run(models / "probed.pth", scan, f"--output={tmp_path}/a.npz", "--formats=ply,png,label")
    labels = np.load(tmp_path / "a.npz")["labels"]
    assert np.flatnonzero(labels == IGNORE).tolist() == [3, 8]
    warnings = capsys.readouterr().err
    assert "2 of 300 points have coordinates that are no finite numbers" in warnings
    assert "1 of 300 points have an intensity that is no finite number" in warnings
    run(models / "distilled.pth", scan, f"--output={tmp_path}/b.npz", "--formats=ply,png")
    features = np.load(tmp_path / "b.npz")["features"]
    assert np.isfinite(features).all()
    assert np.flatnonzero((features == 0).all(axis=1)).tolist() == [3, 8]


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    for k in range(3):
        write_bin(tmp_path / "scans" / f"{k}.bin", make_points(seed=k))
    return tmp_path / "scans"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_folder_resumes(models, folder, tmp_path, capsys):
    """Finished files are left alone; what is missing or half-written is made; the colours stay those of before."""
    output = tmp_path / "out"
    flags = (f"--output={output}", "--formats=npz,ply")
    run(models / "distilled.pth", folder, *flags)
    whole, times = contents(output), {path: path.stat().st_mtime_ns for path in output.glob("*.npz")}
    assert set(whole) == {"predict.json", "colors.npz", *(f"{k}.{kind}" for k in range(3) for kind in ("npz", "ply"))}
    (output / "1.ply").unlink()
    (output / ".1.ply.77.partial").write_bytes(b"half")
    run(models / "distilled.pth", folder, *flags)
    assert contents(output) == whole
    assert not (output / ".1.ply.77.partial").exists()
    assert "features of 1 scan," in capsys.readouterr().out
    assert (output / "0.npz").stat().st_mtime_ns == times[output / "0.npz"]
    run(models / "distilled.pth", folder, *flags, "--overwrite")
    assert contents(output) == whole
    assert (output / "0.npz").stat().st_mtime_ns != times[output / "0.npz"]


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # ffmpeg's pipes
def test_pictures_of_a_folder_show_the_same_square_and_make_a_video(models, folder, tmp_path):
    """Also those of a run that goes on; without imageio it is one sentence."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs the video extra: pip install 'scalr_jax[video]'")
    output = tmp_path / "out"
    run(models / "probed.pth", folder, f"--output={output}", "--formats=mp4")
    assert {path.name for path in output.iterdir()} >= {"video.mp4", "0.png", "1.png", "2.png"}
    first, square = (output / "1.png").read_bytes(), dict(np.load(output / "colors.npz"))
    (output / "1.png").unlink()
    run(models / "probed.pth", folder, f"--output={output}", "--formats=mp4")
    assert (output / "1.png").read_bytes() == first
    assert float(np.load(output / "colors.npz")["side"]) == square["side"]
    video = ffmpeg.read_frames(str(output / "video.mp4"))
    (width, height), frames = next(video)["size"], list(video)
    assert len(frames) == 3
    for frame, name in zip(frames, "012", strict=True):
        with Image.open(output / f"{name}.png") as picture:
            assert picture.size == (width, height)
            found = np.frombuffer(frame, np.uint8).reshape(height, width, 3).astype(int)
            assert np.abs(found - np.asarray(picture.convert("RGB")).astype(int)).mean() < 5


def test_a_video_without_its_package_is_one_sentence(models, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    arguments = (f"--model={models}/probed.pth", f"--input={folder}", f"--output={tmp_path}/out", "--formats=mp4")
    assert "pip install 'scalr_jax[video]'" in sentence_of(capsys, *arguments, *EXPLICIT)
    assert not (tmp_path / "out").exists()


def test_another_model_does_not_go_on_in_a_folder(models, folder, tmp_path):
    flags = (f"--output={tmp_path}/out", "--formats=npy", "--what=features")
    run(models / "probed.pth", folder, *flags)
    with pytest.raises(ValueError, match=r"other settings \(activation: .* now; weights: \w+ saved, \w+ now"):
        run(models / "distilled.pth", folder, *flags, "--activation=gelu")
    with pytest.raises(ValueError, match=r"\(sector: None saved, \['0', '90'\] now\)"):
        run(models / "probed.pth", folder, *flags, "--sector=0,90")
    run(models / "distilled.pth", folder, *flags, "--overwrite")
    np.testing.assert_array_equal(
        np.load(tmp_path / "out" / "0.npy"), load(models / "distilled.pth").embed(make_points(seed=0))
    )


def test_bad_scans_among_others(models, folder, tmp_path, capsys):
    (folder / "3_zero.bin").write_bytes(b"")
    (folder / "1_cut.bin").write_bytes(b"1234567")
    write_bin(folder / "2_far.bin", make_points() + 500)
    text = sentence_of(
        capsys, f"--model={models}/probed.pth", f"--input={folder}", f"--output={tmp_path}/out", *EXPLICIT
    )
    assert "3 of 6 scans are bad, the others are done; the first: " in text
    assert f"{folder}/1_cut.bin" in text
    assert {path.name for path in (tmp_path / "out").glob("*.npz")} == {"0.npz", "1.npz", "2.npz"}


def test_two_at_once_are_refused(models, folder, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        predict.claimed(tmp_path / "out", {}, anew=True),
        pytest.raises(ValueError, match=f"in use by .*process {os.getpid()} on"),
    ):
        run(models / "probed.pth", folder, f"--output={tmp_path}/out")


# ------------------------------------------------------------------------------------------------------ what it says


def test_raw_label_numbers():
    """SemanticKITTI's own inverse map, of its published configuration; 0 where there is no class."""
    names = read_label_map("semantic_kitti").class_names
    raw, dataset = raw_labels(np.array([*range(19), IGNORE]), names)
    assert dataset == "semantic_kitti"
    expected = [10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81, 0]
    assert raw.tolist() == expected
    assert raw.dtype == np.uint32


@pytest.mark.parametrize("dataset", ["semantic_kitti", "nuscenes", "pandaset"])
def test_raw_label_numbers_read_back(dataset):
    known = read_label_map(dataset)
    labels = np.array([*range(len(known.class_names)), IGNORE])
    raw, named = raw_labels(labels, known.class_names)
    assert named == dataset
    assert [known.class_of_id[int(number)] for number in raw] == labels.tolist()


def test_unknown_classes_stay_class_ids():
    raw, dataset = raw_labels(np.array([0, 1, IGNORE]), ("a", "b"))
    assert (raw.tolist(), dataset) == ([0, 1, IGNORE], None)


def test_settings_of_an_output_folder_are_json(models, folder, tmp_path):
    run(models / "probed.pth", folder, f"--output={tmp_path}/out", "--formats=npy")
    found = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert found["what"] == "labels"
    assert found["grids"] == [[16, 16], [16, 8], [16, 8]]


@pytest.mark.slow
def test_a_second_process_does_not_compile(models, tmp_path):
    """Programs of the first process are found by the second, which adds nothing."""
    scan = write_bin(tmp_path / "scan.bin", make_points())
    flags = [flag for flag in EXPLICIT if not flag.startswith("--cache")]
    arguments = (f"--model={models}/probed.pth", f"--input={scan}", f"--output={tmp_path}/out.npz", *flags)
    assert command(*arguments, f"--cache={tmp_path}/cache").returncode == 0
    first = {path.name for path in (tmp_path / "cache").glob("*-cache")}
    (tmp_path / "out.npz").unlink()
    assert command(*arguments, f"--cache={tmp_path}/cache").returncode == 0
    assert any("lambda" in name for name in first)
    assert {path.name for path in (tmp_path / "cache").glob("*-cache")} == first
    assert (tmp_path / "out.npz").exists()
