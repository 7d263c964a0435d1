"""Prepared records as a TFDS builder: features, metadata, the TFDS layout of the files. Needs the extra `prepare`.

A frame becomes several records, one after the other: with labels the *scan* (every point in its order, and its label),
then for each camera that sees something a *view*. A view holds just what distillation needs of that camera: the points
of the voxels that it sees, voxel by voxel, so that reading needs no sort and no pairing. A sample reads one record: on
PandaSet a view has 0.8 MB where a record of all six cameras has 5.2 MB and takes 2 to 3 ms to read (2026-11-22).

Arrays are byte strings (`Text` features): TFDS stores lists of integers as varints, and parsing them takes longer than
everything else. Little-endian, C order; [n] points, [v] voxels.

TFDS needs no TensorFlow for this. `tfds.builder_from_directory(DIR).as_data_source("train")` opens what was prepared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core import splits as splits_lib

from scalr_jax.prepare.layout import FEATURES, FORMAT, NAME, VERSION


class LidarFrames(tfds.core.ShardBasedBuilder):
    """TFDS's view of a prepared dataset, with `metadata` (JSON-serialisable) that the records' reader needs to know.

    `scalr_jax.prepare` takes features and metadata from here and writes the shards itself, because TFDS's own
    `download_and_prepare` begins from nothing after an interruption. `options` are every TFDS builder's, `data_dir` at
    least; only TFDS's own writing needs `shards` (split -> one function a shard that yields (key, example)).
    """

    VERSION = tfds.core.Version(VERSION)
    name = NAME

    def __init__(
        self,
        metadata: dict | None = None,
        shards: Mapping[str, list[Callable[[], Iterator[tuple[int, dict[str, bytes]]]]]] | None = None,
        **options: object,
    ) -> None:
        self._extra, self._shards = dict(metadata or {}), dict(shards or {})
        super().__init__(file_format=FORMAT, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Lidar scans and camera views, prepared by scalr_jax.prepare.",
            features=features(),
            metadata=tfds.core.MetadataDict(self._extra),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: object) -> dict:
        return self._shards


def features() -> Any:  # TFDS's own annotations do not fit one another
    """The features of every record."""
    return tfds.features.FeaturesDict({name: tfds.features.Text(doc=text) for name, text in FEATURES.items()})


def make_serializer() -> Callable[[dict[str, bytes]], bytes]:
    """example -> tf.train.Example, as TFDS writes it; features that are not given are empty.

    Unlike TFDS's own call the order of the features is always the same, so that two runs write the same bytes.
    """
    described = features()
    serializer = example_serializer.ExampleSerializer(described.get_serialized_info())
    empty = dict.fromkeys(FEATURES, b"")

    def serialize(example: dict[str, bytes]) -> bytes:
        encoded = described.encode_example(empty | example)
        return serializer.get_tf_example(encoded).SerializeToString(deterministic=True)

    return serialize


def write_tfds_files(folder: Path, splits: Mapping[str, tuple[list[int], int]], metadata: dict) -> None:
    """Writes dataset_info.json, features.json and metadata.json beside the shards; `splits`: split -> records of each
    shard, bytes of all."""
    template = tfds.core.ShardedFileTemplate(data_dir=epath.Path(folder), dataset_name=NAME, filetype_suffix=FORMAT)
    infos = [
        tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=size, filename_template=template)
        for name, (lengths, size) in splits.items()
    ]
    builder = LidarFrames(metadata, data_dir=folder)
    builder.info.set_splits(splits_lib.SplitDict(infos))
    builder.info.write_to_directory(folder)
