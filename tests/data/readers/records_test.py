"""Prepared records read as the raw files do: same scenes, same labels, same order; damage is named."""

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scalr_jax.data import transforms
from scalr_jax.data.pipeline import Pipeline
from scalr_jax.data.readers.pandaset import PandaSet
from scalr_jax.data.readers.records import Records
from scalr_jax.data.scenes import RANDOM
from scalr_jax.prepare import run as prepare
from scalr_jax.runtime.errors import BadFrameError, InputError
from tests.support import raw_datasets as raw
from tests.support.checks import mentions, present
from tests.support.paths import SAMPLES
from tests.support.prepared_datasets import (
    READERS,
    SEGMENTATION,
    SETTINGS,
    assert_equal,
    make,
    make_config,
    scenes,
    write_raw,
)
from tests.support.runs import open_split


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Raw datasets, and the same prepared with labels; name -> (raw reader's arguments, prepared folder)."""
    root, output = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("records")
    write_raw(root)
    return {name: (root / name, make(name, root, output, "--labels")) for name in READERS}


# ------------------------------------------------------------------------------------------------ the same as raw files


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_views_give_the_scenes_that_the_raw_files_give(tiny, name, split):
    root, folder = tiny[name]
    plain, records = READERS[name](root, split=split), Records(folder, split=split)
    assert [records.name(i) for i in range(len(records))] == [plain.name(i) for i in range(len(plain))]
    assert records.intensity(0) == plain.intensity(0)
    assert records.class_names == plain.class_names
    for i in range(len(plain)):
        for camera in plain.cameras_of(i):
            assert_equal(scenes(plain, i, camera), scenes(records, i, camera))


@pytest.mark.parametrize("name", READERS)
def test_evaluation_sees_every_point_in_its_order(tiny, name):
    root, folder = tiny[name]
    plain = READERS[name](root, split="validation", labels=True)
    records = Records(folder, split="validation", labels=True)
    assert len(records) == len(plain)
    for i in range(len(plain)):
        assert_equal(scenes(plain, i, None, SEGMENTATION), scenes(records, i, None, SEGMENTATION))
        assert_equal(scenes(plain, i, RANDOM, SEGMENTATION), scenes(records, i, RANDOM, SEGMENTATION))
        trained = dataclasses.replace(SEGMENTATION, train=True, augmentation="published")
        one, other = (
            transforms.make_scene(d.frame(i), 0, d.intensity(i), trained, np.random.default_rng(i))
            for d in (plain, records)
        )
        assert_equal(one, other)


def test_a_prepared_scan_keeps_its_lidar(tmp_path):
    """Corruptions of prepared records find the beams that those of the raw files find."""
    raw.write_pandaset(tmp_path / "pandaset", numbers=(2, 5))
    raw.write_json(tmp_path / "pandaset" / "001" / "lidar" / "timestamps.json", list(range(0, 60, 10)))
    folder = make("pandaset", tmp_path, tmp_path / "records", "--labels")
    plain = PandaSet(tmp_path / "pandaset", split="train", labels=True).frame(0)
    record = Records(folder, split="train", labels=True).frame(0)
    assert len(np.unique(present(plain.beams))) > 5
    np.testing.assert_array_equal(record.beams, plain.beams)
    seen, again = (transforms.to_ego(frame.points, present(frame.to_sensor)) for frame in (plain, record))
    np.testing.assert_allclose(seen, again, atol=1e-5)


@pytest.mark.samples
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the real frames")
@pytest.mark.parametrize("name", ["pandaset", "semantic_kitti", "nuscenes"])
def test_real_frames_give_the_same_scenes(tmp_path, name, monkeypatch):
    """One frame of each dataset; PandaSet's points are rotated out of the world and rounded before they are stored."""
    monkeypatch.setattr(prepare, "open_raw", lambda split, labels: READERS[name](SAMPLES / name, **subset))
    subset = {"frames": [45]} if name == "pandaset" else {}
    folder = make(name, SAMPLES, tmp_path)
    plain, records = READERS[name](SAMPLES / name, **subset), Records(folder)
    for camera in plain.cameras_of(0)[:3]:
        assert_equal(scenes(plain, 0, camera), scenes(records, 0, camera))


def test_all_is_every_split(tiny):
    _, folder = tiny["semantic_kitti"]
    assert len(Records(folder, split="all")) == len(Records(folder)) + len(Records(folder, split="validation")) == 7


def test_each_camera_is_drawn_as_by_the_raw_reader(tiny):
    root, folder = tiny["pandaset"]
    plain, records = PandaSet(root), Records(folder)
    drawn = [[d.frame(0, np.random.default_rng(seed)).name for seed in range(30)] for d in (plain, records)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 3
    with pytest.raises(InputError, match="rng"):
        records.frame(0)
    with pytest.raises(InputError, match=mentions("side", "front_camera")):
        records.frame(0, camera="side")


def test_scenes_and_frames_can_be_chosen(tiny):
    _, folder = tiny["pandaset"]
    assert [Records(folder, frames=[5, 6, 7]).name(i) for i in range(2)] == ["pandaset/001/05", "pandaset/001/07"]
    assert len(Records(folder, split="all", scenes=["002"])) == 1
    with pytest.raises(InputError, match="no frame"):
        Records(folder, scenes=["009"])


def test_records_travel_small_and_open_their_files_in_each_process(tiny):
    _, folder = tiny["pandaset"]
    records = Records(folder)
    records.frame(0, camera="front_camera")
    again = pickle.loads(pickle.dumps(records))
    assert again._readers == {}
    assert_equal(again.frame(1, camera="front_camera"), records.frame(1, camera="front_camera"))


def test_few_files_stay_open(tiny, monkeypatch):
    _, folder = tiny["semantic_kitti"]
    records = Records(folder, split="all")
    monkeypatch.setattr("scalr_jax.data.readers.records.MAX_OPEN", 1)
    points = [records.frame(i).points for i in (0, 6, 0, 6)]
    assert len(records._readers) == 1
    assert_equal(points[0], points[2])


def test_reading_imports_neither_jax_nor_tfds():
    loaded = "{'jax', 'tensorflow_datasets', 'tensorflow'} & set(sys.modules)"
    code = f"import sys, scalr_jax.data.readers.records; print({loaded})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------------------ from a config


def test_data_root_may_be_prepared_records(tiny, tmp_path):
    for name in ("semantic_kitti", "nuscenes", "folder"):
        config = make_config(tiny[name][1], dataset=name)
        dataset = open_split(config, "train", cache=tmp_path)
        assert isinstance(dataset, Records)
        assert Pipeline(dataset, SETTINGS).sample(1)[0].error is None
    panda = make_config(tiny["pandaset"][1].parent, dataset="pandaset", sensors=("pandar64",))
    assert open_split(panda, "train", cache=tmp_path).name(0) == "pandaset/001/02"
    panda.data.frames = ("05",)
    assert len(open_split(panda, "train", cache=tmp_path)) == 1
    panda.task = "probe"
    assert present(open_split(panda, "train", cache=tmp_path).frame(0, None).labels).shape == (60,)


def test_one_scene_can_be_trained_and_validated_on_by_frame(tiny, tmp_path):
    for root in (tiny["pandaset"][0], tiny["pandaset"][1].parent):
        config = make_config(root, dataset="pandaset", sensors=("pandar64",), frames=(5,), validation_frames=(2,))
        config.task = "probe"
        names = [open_split(config, split, cache=tmp_path).name(0) for split in ("train", "validation")]
        assert [Path(name).name for name in names] == ["05", "02"]
        for frames in ((2, 5), ()):
            config.data.frames = frames
            with pytest.raises(InputError, match="validation_frames"):
                open_split(config, "validation", cache=tmp_path)


def test_sensors_that_nothing_would_read_are_refused(tiny, tmp_path):
    root = tiny["pandaset"][1].parent
    config = make_config(root, dataset="pandar64", sensors=("pandargt",))
    with pytest.raises(InputError, match=mentions("pandar64", "sensors", "data.dataset", "pandargt")):
        open_split(config, "train", cache=tmp_path)
    config.data.sensors = ("pandar64",)
    assert len(open_split(config, "train", cache=tmp_path)) == 3
    with pytest.raises(InputError, match=mentions("sensors", "nuscenes")):
        open_split(make_config(root, dataset="nuscenes", sensors=("solid",)), "train", cache=tmp_path)


def test_what_a_config_asks_for_must_be_what_is_prepared(tiny, tmp_path):
    for changes, match in (
        (
            {"root": str(tiny["nuscenes"][1]), "dataset": "semantic_kitti"},
            "nuscenes.*semantic_kitti",
        ),
        ({"root": str(tiny["pandaset"][1].parent), "dataset": "pandargt"}, "pandargt"),
    ):
        with pytest.raises(InputError, match=match):
            open_split(make_config(**{"root": "", **changes}), "train", cache=tmp_path)
    root, _ = tiny["semantic_kitti"]
    small = make("semantic_kitti", root.parent, tmp_path, "--image_size=28,56", "--image_format=jpeg")
    with pytest.raises(InputError, match=mentions((28, 56), "data.image_size", (56, 112))):
        open_split(make_config(small, dataset="semantic_kitti"), "train", cache=tmp_path)
    config = make_config(small, dataset="semantic_kitti", image_size=(28, 56), antialias=False)
    with pytest.raises(InputError, match="antialias"):
        open_split(config, "train", cache=tmp_path)
    config.data.antialias, config.data.image_dtype = True, "float32"
    with pytest.raises(InputError, match=r"data\.image_dtype"):
        open_split(config, "train", cache=tmp_path)
    config.task, config.data.image_dtype = "probe", "uint8"
    with pytest.raises(InputError, match="--labels"):
        open_split(config, "train", cache=tmp_path)
    with pytest.raises(InputError, match=mentions("whole scans", "--labels")):
        Records(small).frame(0, camera=None)
    with pytest.raises(InputError, match=mentions("'test'", "train, validation")):
        Records(small, split="test")


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def kitti(tmp_path):
    raw.write_semantic_kitti(tmp_path / "semantic_kitti", num_scans=9)
    return make("semantic_kitti", tmp_path, tmp_path / "out")


def a_file(folder):
    return sorted(folder.glob("*.array_record-*"))[0]


def test_a_file_cut_short_is_named_when_the_records_are_opened(kitti):
    path = a_file(kitti)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match=mentions(path.name, size - 500, size, "--verify")):
        Records(kitti)
    path.unlink()
    with pytest.raises(InputError, match=mentions(path.name, "missing")):
        Records(kitti)


@pytest.mark.parametrize("place", ["header", "middle"])
def test_damage_of_the_same_size_is_a_bad_frame(kitti, place):
    records, path = Records(kitti), a_file(kitti)
    content = bytearray(path.read_bytes())
    if place == "header":
        content[:] = bytes(len(content))
    else:
        at = content.index(b"semantic_kitti/00/000001") + 60
        content[at] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(BadFrameError, match=mentions(path.name, "record 1", "--verify")):
        records.frame(1)
    scene = Pipeline(records, SETTINGS).order()
    assert any(scene[i].error and path.name in scene[i].error for i in range(len(records)))
    if place == "middle":
        assert records.frame(0).points.shape[1] == 4, "the others can be read"


def test_a_file_cut_short_while_training_is_a_bad_frame(kitti):
    records, path = Records(kitti), a_file(kitti)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadFrameError, match=mentions(path.name, "record 0")):
        records.frame(0)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 99}', "\0"])
def test_a_damaged_manifest_is_named(kitti, content):
    (kitti / "records.json").write_text(content)
    with pytest.raises(InputError, match=r"records\.json: (cannot be read|not valid JSON|must be|format)"):
        Records(kitti)


def test_an_unfinished_folder_is_no_dataset(kitti, tmp_path):
    (kitti / "records.json").rename(kitti / "prepare.json")
    with pytest.raises(InputError, match=mentions(kitti, "prepare")):
        open_split(make_config(kitti, dataset="semantic_kitti"), "train", cache=tmp_path)
