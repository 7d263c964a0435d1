"""An inspection reports what is in the files: on scans whose figures are known."""

import json

import numpy as np
import pytest
from PIL import Image

from scalr_jax.data.joined import Joined, Subset
from scalr_jax.data.readers.folder import Folder
from scalr_jax.data.readers.nuscenes import CAMERAS, NuScenes
from scalr_jax.data.scan_checks import ground_height
from scalr_jax.prepare import inspect, inspect_pictures, summary
from scalr_jax.runtime.errors import InputError
from tests.support import raw_datasets as raw
from tests.support import scan_writers as writers
from tests.support.checks import present

GROUND = -1.5


def ground_and_wall(seed=0, spread=0.02):
    """A plane at z = -1.5 m out to 28 m, 2 points a square metre, and a wall at x = 20 m, up to z = 3 m."""
    rng = np.random.default_rng(seed)
    plane = np.column_stack([rng.uniform(-28, 28, (6000, 2)), rng.normal(GROUND, spread, 6000)])
    wall = np.column_stack([np.full(1000, 20.0), rng.uniform(-10, 10, 1000), rng.uniform(GROUND, 3, 1000)])
    xyz = np.concatenate([plane, wall])
    return np.column_stack([xyz, rng.normal(40, 10, len(xyz))]).astype(np.float32)


@pytest.fixture
def root(tmp_path):
    raw.write_folder(tmp_path / "data", classes=["car", "road"])
    for seed, path in enumerate(sorted((tmp_path / "data").glob("*/scans/*.bin"))):
        writers.write_bin(path, ground_and_wall(seed))
    for path in (tmp_path / "data").glob("*/labels/*"):
        path.write_bytes(np.resize([0, 1, 1, 1], 7000).astype("<u4").tobytes())
    return tmp_path / "data"


@pytest.fixture
def no_pictures(monkeypatch):
    """They take two seconds."""
    monkeypatch.setattr(inspect_pictures, "draw_all", lambda *_: [])


def test_figures(root, tmp_path, capsys):
    report = inspect.inspect_dataset(Folder(root), tmp_path / "out")
    points = [ground_and_wall(seed) for seed in range(4)]
    everything = np.concatenate(points)
    assert report["frames"] == {"in_dataset": 4, "read": 4, "bad": {}}
    assert report["points"] == {"min": 7000, "mean": 7000, "max": 7000}
    for k, axis in enumerate("xyz"):
        row = report["ranges"][axis]
        np.testing.assert_allclose(
            [row["min"], row["max"]], [everything[:, k].min(), everything[:, k].max()], atol=1e-3
        )
        np.testing.assert_allclose(row["50%"], np.median(everything[:, k]), atol=0.7)
    assert report["ranges"]["radius"]["max"] == pytest.approx(np.linalg.norm(everything[:, :3], axis=1).max(), abs=1e-3)
    (entry,) = report["intensity"]
    values = everything[:, 3].astype(np.float64)
    np.testing.assert_allclose(entry["measured"], [values.mean(), values.std()], rtol=1e-4)
    np.testing.assert_allclose(entry["configured"], entry["measured"], rtol=1e-4)
    assert report["ground_height"] == pytest.approx(GROUND, abs=0.05)
    frame = Folder(root).frame(0)
    levels = report["minkunet_levels"]
    assert [level["voxels"]["max"] for level in levels] == sorted(level["voxels"]["max"] for level in levels)[::-1]
    assert levels[0]["voxels"]["max"] <= report["voxels"]["max"] < 8 ** len(levels) * levels[-1]["voxels"]["max"]
    assert all(level["pairs"]["max"] <= 26 * level["voxels"]["max"] for level in levels)
    for key, kind in (("voxels_per_shard", "voxels"), ("pairs_per_shard", "pairs")):
        room = report["suggestion"][key]
        for size, level in zip(room, levels, strict=True):
            assert 2.5 * level[kind]["max"] <= size < 20 * level[kind]["max"] + 128
    assert (
        0 < report["voxels_in_one_image"]["max"] <= max(present(Folder(root).frame(i).visible).sum() for i in range(4))
    )
    assert report["voxels"]["max"] <= 7000
    assert present(frame.visible).sum() < 7000
    assert report["warnings"] == []
    written = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert written == json.loads(json.dumps(report))
    printed = capsys.readouterr()
    assert "config.model.field_of_view = ((-48.0, -48.0, -4.0), (48.0, 48.0, 4.0))" in printed.out
    assert f"config.data.voxels_per_shard = {report['suggestion']['voxels_per_shard']}" in printed.out
    assert "inspect: 4 of 4 frames" in printed.err
    for name in ("over_front_0.png", "over_front_1.png", "top_view.png", "histograms.png"):
        assert name in report["pictures"]
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 800


def test_suggested_view_is_in_published_cells_and_covers_what_it_says():
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-1, 1, (20_000, 3)) * np.array([70, 30, 6])
    best = summary.suggest(xyz, [5_000, 9_000])
    assert best["field_of_view"] == ((-80, -80, -8), (80, 80, 8))
    assert best["grids"] == ((320, 320), (320, 32), (320, 32))
    assert best["covers"] == 1.0
    assert best["max_points"] == 10_000
    assert best["points_per_shard"] >= 8 * 7_000
    assert summary.covered(xyz, 35.0, 8.0) == pytest.approx(0.5, abs=0.02)
    assert summary.suggest(xyz / 10, [100])["field_of_view"][1] == (32, 32, 4)
    assert summary.suggest(xyz * 10, [90_000])["field_of_view"][1] == (128, 128, 32)
    assert summary.suggest(xyz * 10, [90_000])["max_points"] == 20_000


@pytest.mark.parametrize("height", [-2.0, 0.3])
def test_ground_height_ignores_what_stands_on_it(height):
    xyz = ground_and_wall()[:, :3] + np.array([0, 0, height - GROUND])
    assert ground_height(xyz) == pytest.approx(height, abs=0.05)
    assert ground_height(xyz[np.linalg.norm(xyz, axis=1) > 22]) is None


def test_edges_are_where_a_near_thing_ends():
    """A square 10 m away before a wall at 30 m: its border, not its inside and not the wall."""
    rows, columns = np.mgrid[0:100:4, 0:200:4]
    pixels = np.stack([rows.ravel(), columns.ravel()], axis=1).astype(float)
    square = (np.abs(pixels[:, 0] - 50) <= 20) & (np.abs(pixels[:, 1] - 100) <= 20)
    edge = inspect_pictures.find_edges(pixels, np.where(square, 10.0, 30.0), width=300)
    border = square & ((np.abs(pixels[:, 0] - 50) > 16) | (np.abs(pixels[:, 1] - 100) > 16))
    np.testing.assert_array_equal(edge, border)
    assert not inspect_pictures.find_edges(pixels[:5], np.arange(5.0), 300).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intensity": [400, 10]}, "the intensity has mean 40.02 and std 9.983, and is normalised with 400 and 10"),
        ({"intensity": [40, 1]}, "normalised with 40 and 1"),
        ({"sensor_height": 0.2}, "ground lies at z = -3.0 m"),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_what_disagrees_is_a_warning(root, tmp_path, settings, message, capsys):
    raw.rewrite_settings(root, **settings)
    (warning,) = inspect.inspect_dataset(Folder(root), tmp_path / "out")["warnings"]
    assert message in warning
    assert f"WARNING: {warning}" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_a_wrong_calibration_is_a_warning(root, tmp_path):
    matrix = np.linalg.inv(raw.FOLDER_CAMERA["lidar_to_camera"])
    raw.change_camera(root, lidar_to_camera=matrix.tolist())
    warnings = inspect.inspect_dataset(Folder(root), tmp_path / "out")["warnings"]
    assert any("the inverse, camera to lidar" in text for text in warnings)


@pytest.mark.usefixtures("no_pictures")
def test_bad_frames_are_named_and_echoes_counted(root, tmp_path):
    (root / "a/scans/000.bin").write_bytes(b"")
    points = ground_and_wall()
    points[:70, :3] = np.nan
    writers.write_bin(root / "a/scans/001.bin", points)
    report = inspect.inspect_dataset(Folder(root), tmp_path / "out")
    assert list(report["frames"]["bad"]) == ["folder/a/000"]
    assert report["rows_dropped"]["max"] == 70
    assert any("1 bad frames: " in text and "no points" in text for text in report["warnings"])
    for path in root.glob("*/front/*"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 4 frames can be read; the last one: .*unreadable image"):
        inspect.inspect_dataset(Folder(root), tmp_path / "out")


def test_labels_without_images(root, tmp_path):
    report = inspect.inspect_dataset(Folder(root, labels=True), tmp_path / "out", num_frames=2)
    assert report["labels"] == {"car": 0.25, "road": 0.75, "ignored": 0.0}
    assert report["voxels_in_one_image"] is None
    assert report["frames"]["read"] == 2
    assert report["pictures"] == ["top_view.png", "histograms.png"]


@pytest.mark.usefixtures("no_pictures")
def test_scans_without_intensity(root, tmp_path):
    for path in root.glob("*/scans/*.bin"):
        writers.write_bin(path, ground_and_wall()[:, :3])
    raw.rewrite_settings(root, columns=3)
    assert (
        "the intensity is 0 for every point" in inspect.inspect_dataset(Folder(root), tmp_path / "out")["warnings"][0]
    )


@pytest.mark.slow
def test_every_camera_of_a_short_dataset_is_drawn(tmp_path):
    raw.write_nuscenes(tmp_path)
    report = inspect.inspect_dataset(NuScenes(tmp_path, split="all"), tmp_path / "out", num_frames=3)
    assert report["frames"]["read"] == 3
    assert [name for name in report["pictures"] if name.startswith("over")] == [
        "over_CAM_FRONT_0.png",
        "over_CAM_FRONT_1.png",
    ]
    assert NuScenes(tmp_path).cameras == CAMERAS


@pytest.mark.usefixtures("no_pictures")
def test_joined_readers_and_parts(root, tmp_path):
    """Two sensors have two lines of intensity; the reader of each frame is found."""
    raw.write_nuscenes(tmp_path / "nuscenes")
    nuscenes = NuScenes(tmp_path / "nuscenes", split="all", cameras=["CAM_FRONT"])
    joined = Joined([Subset(nuscenes, [1]), Folder(root)])
    assert (joined.name(0), joined.name(2)) == (nuscenes.name(1), Folder(root).name(1))
    assert joined.cameras == ("CAM_FRONT", "front")
    report = inspect.inspect_dataset(joined, tmp_path / "out", num_frames=5)
    found = {entry["frames"]: entry["configured"] for entry in report["intensity"]}
    np.testing.assert_allclose(found[1], nuscenes.statistics, atol=1e-5)
    np.testing.assert_allclose(found[4], Folder(root).statistics, atol=1e-5)
