"""Frames that are bad, incomplete or of another kind when a dataset is prepared."""

import itertools
import json

import numpy as np
import pytest

from scalr_jax.data.readers.records import Records
from scalr_jax.data.streets.streets import Streets
from scalr_jax.prepare import run as prepare
from scalr_jax.prepare.writing import plan_shards
from scalr_jax.runtime.errors import InputError
from tests.support import raw_datasets as raw
from tests.support.prepared_datasets import make

NUM_SCANS = 24


@pytest.fixture
def kitti(tmp_path):
    raw.write_semantic_kitti(tmp_path / "semantic_kitti", num_scans=NUM_SCANS)
    return tmp_path


def scan_of(root, number):
    return root / "semantic_kitti" / "dataset/sequences/00/velodyne" / f"{number:06d}.bin"


def test_one_bad_frame_is_skipped_named_and_counted(kitti, capsys):
    scan_of(kitti, 3).write_bytes(b"12345")
    folder = make("semantic_kitti", kitti, kitti / "out")
    assert "skipped a bad frame:" in capsys.readouterr().out
    records = Records(folder)
    assert len(records) == NUM_SCANS - 1
    assert "semantic_kitti/00/000003" not in [records.name(i) for i in range(len(records))]
    assert records.frame(3).name.startswith(records.name(3))
    parts = json.loads((folder / "records.json").read_text())["splits"]["train"]["shards"]
    assert ["000003.bin" in text for part in parts for text in part["bad"]] == [True]


def test_more_than_one_percent_is_refused_and_goes_on_when_repaired(kitti):
    good = scan_of(kitti, 3).read_bytes()
    scan_of(kitti, 3).write_bytes(b"12345")
    scan_of(kitti, 20).write_bytes(b"12345")
    with pytest.raises(InputError, match=r"2 of 24 frames are bad, more than 1 %: .*000003\.bin.*000020\.bin"):
        make("semantic_kitti", kitti, kitti / "out")
    scan_of(kitti, 3).write_bytes(good)
    scan_of(kitti, 20).write_bytes(good)
    assert len(Records(make("semantic_kitti", kitti, kitti / "out"))) == NUM_SCANS


def test_an_unreadable_image_is_left_out_and_named(tmp_path, capsys):
    raw.write_pandaset(tmp_path / "pandaset", numbers=(0, 1, 2), cameras=("front_camera", "left_camera"))
    path = tmp_path / "pandaset" / "001" / "camera" / "left_camera" / "01.jpg"
    path.write_bytes(path.read_bytes()[:900])
    folder = make("pandaset", tmp_path, tmp_path / "out")
    assert "left out an image: " in capsys.readouterr().out
    records = Records(folder)
    assert ["left_camera" in records.cameras_of(i) for i in range(3)] == [True, False, True]


def test_a_camera_that_sees_nothing_is_not_listed(tmp_path):
    raw.write_pandaset(tmp_path / "pandaset", numbers=(0, 1, 2, 3), cameras=("front_camera", "back_camera"))
    backwards = [raw.pandaset_pose(number, (0.5, -0.5, -0.5, 0.5)) for number in range(4)]
    raw.write_json(tmp_path / "pandaset" / "001" / "camera" / "back_camera" / "poses.json", backwards)
    records = Records(make("pandaset", tmp_path, tmp_path / "out"))
    assert [records.cameras_of(i) for i in range(4)] == [("front_camera",)] * 4
    assert records.frame(0).name.endswith("/front_camera"), "no draw among one"


def test_frames_with_labels_only_and_with_images_only(tmp_path):
    root = tmp_path / "semantic_kitti" / "dataset" / "sequences" / "00"
    raw.write_semantic_kitti(tmp_path / "semantic_kitti", num_scans=4)
    (root / "image_2" / "000001.png").unlink()
    (root / "labels" / "000002.label").unlink()
    folder = make("semantic_kitti", tmp_path, tmp_path / "out", "--labels")
    numbers = [[d.name(i)[-1] for i in range(len(d))] for d in (Records(folder), Records(folder, labels=True))]
    assert numbers == [["0", "2", "3"], ["0", "3", "1"]]
    for records in (Records(folder), Records(folder, labels=True)):
        for i in range(len(records)):
            np.testing.assert_array_equal(
                np.sort(records.frame(i).points[:, 0])[-1:] <= 40, [True], err_msg=records.name(i)
            )


def test_a_folder_without_images_can_be_prepared_for_its_labels_only(tmp_path):
    raw.write_folder(tmp_path / "folder", classes=["car", "road"], cameras={})
    for path in sorted((tmp_path / "folder" / "a" / "labels").iterdir())[:1]:
        path.unlink()
    with pytest.raises(InputError, match="distillation needs images and their calibration"):
        make("folder", tmp_path, tmp_path / "out", "--split=train")
    folder = make("folder", tmp_path, tmp_path / "out", "--labels", "--split=train")
    assert len(Records(folder, labels=True)) == 3
    with pytest.raises(InputError, match="no frame to use"):
        Records(folder)


def test_streets_can_be_prepared(tmp_path, street_cache):
    folder = tmp_path / "out"
    line = ["--dataset=streets", f"--root={street_cache}", f"--output={folder}", "--num_scenes=2", "--labels"]
    prepare.run(["prepare", *line, "--num_processes=1", "--split=train"])
    plain = Streets(street_cache, split="train", num_scenes=2)
    views, scans = Records(folder), Records(folder, labels=True)
    np.testing.assert_array_equal(views.frame(1).image, plain.frame(1).image)
    np.testing.assert_array_equal(scans.frame(1).labels, plain.frame(1).labels)
    assert views.intensity(0) == plain.intensity(0)


def test_small_splits_have_several_files_and_large_ones_as_many_frames_in_each():
    assert [shard.last - shard.first for shard in plan_shards("train", 20, 128)] == [4] * 5
    assert [shard.last - shard.first for shard in plan_shards("train", 3, 128)] == [3]
    large = plan_shards("train", 28_130, 128)
    assert len(large) == 220
    assert {shard.last - shard.first for shard in large} == {127, 128}
    assert all(a.last == b.first for a, b in itertools.pairwise(large))
