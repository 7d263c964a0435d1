"""The content of a prepared record: images, voxels, the layout that TFDS opens."""

from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from scalr_jax.data import grids, transforms
from scalr_jax.data.readers.nuscenes import NuScenes
from scalr_jax.data.readers.pandaset import PandaSet
from scalr_jax.data.readers.records import Records, parse_example
from scalr_jax.data.scenes import Frame
from scalr_jax.prepare import builders
from scalr_jax.prepare import source as record_source
from scalr_jax.prepare.layout import FEATURES
from tests.support import raw_datasets as raw
from tests.support.checks import present
from tests.support.prepared_datasets import CAMERAS, assert_equal, make, scenes

# -------------------------------------------------------------------------------------------------------------- images


def smooth_image(height, width):
    y, x = np.mgrid[:height, :width]
    channels = [128 + 100 * np.sin(x / 90 + k) * np.cos(y / 70) for k in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


@pytest.fixture
def photographs(tmp_path):
    """nuScenes with images that are not one shade."""
    raw.write_nuscenes(tmp_path / "nuscenes")
    for path in (tmp_path / "nuscenes" / "samples" / "CAM_FRONT").iterdir():
        Image.fromarray(smooth_image(450, 800)).save(path, quality=90)
    return tmp_path


def test_original_files_are_kept_byte_for_byte(photographs):
    folder = make("nuscenes", photographs, photographs / "out")
    records = Records(folder)
    parts = records._read(0, 0)
    (path, *_) = (photographs / "nuscenes" / "samples" / "CAM_FRONT").iterdir()
    assert bytes(parts["image"]) == path.read_bytes()


def test_raw_images_are_what_resizing_the_original_gives(photographs):
    folder = make("nuscenes", photographs, photographs / "out", "--image_size=56,112", "--image_format=raw")
    plain, records = NuScenes(photographs / "nuscenes"), Records(folder, image_size=(56, 112))
    assert present(records.frame(0).image).shape == (56, 112, 3)
    assert_equal(scenes(plain, 0, "CAM_FRONT"), scenes(records, 0, "CAM_FRONT"))


def test_resized_jpeg_loses_what_the_metadata_says(photographs):
    folder = make("nuscenes", photographs, photographs / "out", "--image_size=56,112", "--image_format=jpeg")
    plain, records = NuScenes(photographs / "nuscenes"), Records(folder)
    one, other = (scenes(dataset, 0, "CAM_FRONT") for dataset in (plain, records))
    assert_equal(one._replace(image=None), other._replace(image=None))
    difference = np.abs(present(one.image).astype(float) - other.image)
    assert difference.max() > 0
    stated = records.metadata["fidelity"]
    assert stated["mean_abs"] == pytest.approx(difference.mean(), rel=1e-6)
    assert stated["max_abs"] == difference.max()
    assert stated["psnr_db"] == pytest.approx(10 * np.log10(255**2 / np.square(difference).mean()))


def test_scaled_decoding_stays_large_enough_and_close(photographs):
    folder = make("nuscenes", photographs, photographs / "out")
    whole, scaled = (Records(folder, image_size=(56, 112), scaled_decode=on) for on in (False, True))
    frame = scaled.frame(0)
    assert present(frame.image).shape == (57, 100, 3) or present(frame.image).shape == (113, 200, 3)
    assert frame.image_shape == (450, 800)
    one, other = (scenes(dataset, 0, "CAM_FRONT") for dataset in (whole, scaled))
    np.testing.assert_array_equal(one.pixels, other.pixels)
    assert np.abs(present(one.image).astype(float) - other.image).mean() < 1.0


# -------------------------------------------------------------------------------------------------- records and layout


def test_tfds_opens_what_was_prepared(tmp_path):
    root = tmp_path / "pandaset"
    raw.write_pandaset(root, numbers=(2, 5, 7), cameras=CAMERAS)
    folder = make("pandaset", tmp_path, tmp_path / "out", "--labels")
    builder: Any = tfds.builder_from_directory(str(folder))
    source = builder.as_data_source("train")
    assert builder.info.metadata["sensor"] == "pandar64"
    assert len(source) == 3 * (1 + len(CAMERAS))
    scan, view = source[0], source[1]
    assert (scan["camera"], view["camera"]) == (b"", b"back_camera")
    plain = PandaSet(root, labels=True).frame(0)
    np.testing.assert_array_equal(np.frombuffer(scan["labels"], np.uint8), plain.labels)
    np.testing.assert_array_equal(
        np.frombuffer(scan["points"], "<f4").reshape(-1, 4)[:, :3], transforms.to_ego(plain.points, plain.to_ego)
    )
    assert view["image"][:2] == b"\xff\xd8"


def test_our_parser_reads_what_tfds_writes():
    serialize = builders.make_serializer()
    rng = np.random.default_rng(0)
    for size in (0, 1, 127, 128, 20_000, 3_000_000):
        example = {"points": rng.bytes(size), "name": "Straße".encode()}
        parsed = {name: bytes(part) for name, part in parse_example(serialize(example)).items()}
        assert parsed == dict.fromkeys(FEATURES, b"") | example
    record = serialize({"points": b"12345"})
    for damaged in (record[:-1], record[:3], b"\x08" + record[1:], b"\xff" + record):
        with pytest.raises((ValueError, IndexError, KeyError)):
            parse_example(damaged)


def test_tfds_own_writing_gives_the_same_records(tmp_path):
    root = tmp_path / "nuscenes"
    raw.write_nuscenes(root)
    folder = make("nuscenes", tmp_path, tmp_path / "out", "--labels", "--split=train")
    source = record_source.Source(NuScenes(root), NuScenes(root, labels=True), 0.1, record_source.Images("original"))
    serialized = builders.make_serializer()
    empty = dict.fromkeys(FEATURES, b"")

    def shard():
        yield from enumerate(empty | example for example in source.prepare(0).examples)

    builder: Any = builders.LidarFrames({}, {"train": [shard]}, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    prepared: Any = tfds.builder_from_directory(str(folder))
    ours = prepared.as_data_source("train")
    theirs = builder.as_data_source("train")
    assert [serialized(example) for example in ours] == [serialized(example) for example in theirs]


def test_a_view_holds_the_voxels_that_its_camera_sees_and_no_others():
    rng = np.random.default_rng(1)
    points = np.concatenate([rng.uniform(0, 1, (400, 3)), rng.uniform(0, 255, (400, 1))], axis=1).astype(np.float32)
    visible = points[:, 0] > 0.55
    frame = Frame("a", points, np.eye(4), np.zeros((8, 8, 3), np.uint8), points[:, :2].astype(float), visible)
    voxels = grids.find_voxels(points, 0.1)
    example = record_source.view_example(frame, points, voxels, "c", (b"", (8, 8)))
    keys = grids.voxel_keys(points, 0.1)
    wanted = sorted(np.flatnonzero(np.isin(keys, keys[visible])), key=lambda i: (keys[i], i))
    np.testing.assert_array_equal(np.frombuffer(example["points"], "f4").reshape(-1, 4), points[wanted])
    np.testing.assert_array_equal(np.frombuffer(example["visible"], bool), visible[wanted])
    start = np.frombuffer(example["voxel_start"], "i4")
    np.testing.assert_array_equal(start, np.append(0, np.flatnonzero(np.diff(keys[wanted], append=-1)) + 1))
