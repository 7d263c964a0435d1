"""Prepared records as a dataset: random access to what `scalr_jax.prepare` wrote, with the raw readers' interface.

A frame of distillation is one *view* (the voxels that one camera sees, voxel by voxel), a frame of segmentation the
whole *scan*; `prepare/layout.py` lists the fields. Only that record is read, and only the drawn
camera's image is decoded.

The ArrayRecord files are opened directly and `tf.train.Example` parsed here. TFDS's data source reads as fast (0.4 ms
a view of Pandar64 without decoding its image, one of 2 shared cores, 2026-11-22), but importing TFDS takes every data
worker 0.4 s and 22 MB more, and its errors do not name the file.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from scalr_jax.data.manifest import MANIFEST, Part, read_manifest
from scalr_jax.data.readers import files
from scalr_jax.data.scenes import RANDOM, Dataset, Frame, Voxels
from scalr_jax.runtime.errors import BadFrameError, InputError

SETTINGS = "prepare.json"  # there until then
MAX_OPEN = 128  # files a process keeps open
READER_OPTIONS = "readahead_buffer_size:0"  # random access
REMEDY = "run scalr_jax.prepare with --verify, and then as before to write it again"


def is_prepared(root: str | Path) -> bool:
    """Whether a folder holds finished records."""
    return (Path(root) / MANIFEST).is_file()


def is_begun(root: str | Path) -> bool:
    """Whether a folder holds records, finished or not: then it is no raw dataset."""
    return is_prepared(root) or (Path(root) / SETTINGS).is_file()


def file_size(path: Path) -> int | None:
    """A file's bytes; None when there is no such file."""
    return path.stat().st_size if path.is_file() else None


class Records(Dataset):
    """The frames of a prepared split.

    Args:
      root: the folder that `scalr_jax.prepare` wrote (for PandaSet that of one sensor, <output>/pandar64).
      split: a prepared split, or "all" of them.
      labels: frames with labels, whole, without images; else frames with an image, what one camera sees of them.
      image_size: rows, columns that the images will be resized to. Images that were resized when they were prepared
        must have this size.
      scaled_decode: decode JPEG files at 1/2, 1/4 or 1/8 as long as they stay larger than `image_size`.
      scenes: names of scenes to use, the second part of a frame's name; None for all.
      frames: numbers of frames to use, its last part; None for all.

    Raises:
      InputError: not (completely) prepared, a file is missing or cut, or the records do not hold what is asked for.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        labels: bool = False,
        image_size: Sequence[int] | None = None,
        scaled_decode: bool = False,
        scenes: Sequence[str] | None = None,
        frames: Sequence[int] | None = None,
    ) -> None:
        self.root, self.split, self.labels = Path(root), split, labels
        manifest = read_manifest(root)
        self.metadata: dict[str, Any] = {key: value for key, value in manifest.items() if key != "splits"}
        mean, std = manifest["intensity"]
        self._statistics, self.class_names = (float(mean), float(std)), tuple(manifest["class_names"])
        self.cameras = () if labels else tuple(manifest["cameras"])
        self._dtype = np.dtype(manifest["points_dtype"])
        self._scale_to = (image_size[0], image_size[1]) if image_size is not None and scaled_decode else None
        if labels and not manifest["labels"]:
            raise InputError(f"{self.root}: prepared without labels; prepare it again with --labels")
        prepared = manifest["image_size"]
        if prepared is not None and image_size is not None and tuple(prepared) != tuple(image_size):
            raise InputError(
                f"{root}: images were prepared at {tuple(prepared)}, and data.image_size = {tuple(image_size)}; set it "
                "to the prepared size, or prepare again with another --image_size, or without it to keep the original "
                "images"
            )
        splits = manifest["splits"]
        if split not in (*splits, "all"):
            raise InputError(f"{self.root}: no split {split!r} is prepared; there are {', '.join(splits)}")
        chosen = list(splits.values()) if split == "all" else [splits[split]]
        shards = [shard for part in chosen for shard in part["shards"]]
        self._files = np.array([shard["file"] for shard in shards], np.str_)
        self._num_records = np.array([shard["records"] for shard in shards], np.int32)
        self._check_files([shard["bytes"] for shard in shards])
        self._places = _find_places(shards, labels, scenes, frames)
        if not len(self):
            raise InputError(f"{self.root}: no frame to use (split={split!r}, {labels=}, {scenes=}, {frames=})")
        self._start()

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_readers", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._readers: OrderedDict[int, Any] = OrderedDict()  # opened when first needed, in each process
        self._lock = threading.Lock()

    def intensity(self, index: int) -> tuple[float, float]:
        return self._statistics

    def sensor(self, index: int) -> str:
        return str(self.metadata["sensor"] or self.metadata["dataset"])

    def name(self, index: int) -> str:
        """As the raw reader has it."""
        return self._places[index]["name"].decode()

    def scan_file(self, index: int) -> str:
        """The scan's path below the raw dataset's root; empty where the raw reader does not know it."""
        return self._places[index]["scan_file"].decode()

    def describe(self) -> str:
        """A short table of what is prepared."""
        what, size = self.metadata, self.metadata["image_size"]
        views = int(np.bitwise_count(self._places["cameras"]).sum())
        images = f"{what['image_format']}, " + (f"{size[0]} x {size[1]}" if size else "of their own size")
        reads = "whole scans and labels" if self.labels else f"views: {views} images, {images}"
        written = f"{len(self._files)}, prepared by scalr_jax {what['scalr_jax']}"
        rows = [("frames", len(self)), ("reads", reads), ("files", written)]
        of = f"{what['dataset']} {what['sensor']}".strip()
        return files.format_table(f"Prepared records of {of}, split {self.split}: {self.root}", rows)

    def frame(self, index: int, rng: np.random.Generator | None = None, *, camera: str | None = RANDOM) -> Frame:
        """As `Dataset.frame`: a view [n, 4] with its voxels, or (camera=None, or opened with `labels`) the whole scan
        [N, 4], points in the student's frame (`to_ego` is the identity).

        Raises InputError when this camera or the whole scan is not prepared, BadFrameError for a damaged record.
        """
        cameras, place = self.cameras_of(index), self._places[index]
        camera = files.pick_camera(camera, () if self.labels else cameras, self.metadata["cameras"], rng)
        shard, record, has_scan = int(place["shard"]), int(place["record"]), bool(place["has_scan"])
        if camera is None:
            if not has_scan:
                raise InputError(f"{self.root}: whole scans are prepared with --labels only")
            return self._scan(self._read(shard, record), self.name(index))
        if camera not in cameras:
            raise BadFrameError(f"{self.name(index)}: {camera} sees nothing, or its image could not be used")
        return self._view(self._read(shard, record + has_scan + cameras.index(camera)))

    def cameras_of(self, index: int) -> tuple[str, ...]:
        mask = int(self._places[index]["cameras"])
        return tuple(camera for k, camera in enumerate(self.metadata["cameras"]) if mask >> k & 1)

    def _scan(self, parts: dict[str, memoryview], name: str) -> Frame:
        labels = _array(parts, "labels", "u1") if self.labels else None
        beams = _array(parts, "beams", "u1") if parts.get("beams") else None  # not in records before 2026-11-23
        to_sensor = _array(parts, "to_sensor", "<f8").reshape(4, 4) if parts.get("to_sensor") else None
        return Frame(name, self._points(parts), np.eye(4), labels=labels, to_sensor=to_sensor, beams=beams)

    def _view(self, parts: dict[str, memoryview]) -> Frame:
        name = str(parts["name"], "utf-8")
        points, start = self._points(parts), _array(parts, "voxel_start", "<i4")
        height, width, *stored = (int(size) for size in _array(parts, "image_shape", "<i4"))
        if not self.decode:
            image = files.undecoded(height, width)
        elif self.metadata["image_format"] == "raw":
            image = _array(parts, "image", "u1").reshape(*stored, 3)
        else:
            image = files.decode_image(bytes(parts["image"]), f"{self.root}: {name}", at_least=self._scale_to)
        pixels, visible = _array(parts, "pixels", "<f8").reshape(-1, 2), _array(parts, "visible", "u1").view(np.bool_)
        voxels = Voxels(self.metadata["voxel_size"], np.arange(len(points), dtype=np.int32), start)
        return Frame(name, points, np.eye(4), image, pixels, visible, voxels=voxels, image_shape=(height, width))

    def _points(self, parts: dict[str, memoryview]) -> np.ndarray:
        """[n, 4], in the raw reader's dtype, so that what is computed from them rounds alike."""
        return _array(parts, "points", "<f4").reshape(-1, 4).astype(self._dtype, copy=False)

    def _read(self, shard: int, record: int) -> dict[str, memoryview]:
        """The fields of one record. Raises BadFrameError that names the file."""
        try:
            return parse_example(self._reader(shard).read([record])[0])
        except (RuntimeError, ValueError, IndexError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadFrameError(
                f"{self.root / self._files[shard]}: record {record} is damaged ({reason}); {REMEDY}"
            ) from error

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
            path = str(self.root / self._files[shard])
            reader = array_record_module.ArrayRecordReader(path, options=READER_OPTIONS, file_reader_buffer_size=32768)
            if reader.num_records() != self._num_records[shard]:
                raise ValueError(f"{reader.num_records()} records instead of {self._num_records[shard]}")
            self._readers[shard] = reader
            if len(self._readers) > MAX_OPEN:  # a thread that still reads it keeps it alive
                self._readers.popitem(last=False)
            return reader

    def _check_files(self, sizes: Sequence[int]) -> None:
        """Raises InputError that names files which are missing or have another size than was written."""
        wrong = []
        for path, size in zip(map(self.root.joinpath, self._files), sizes, strict=True):
            if (found := file_size(path)) != size:
                wrong.append(f"{path} " + ("is missing" if found is None else f"has {found} bytes instead of {size}"))
        if wrong:
            more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise InputError(f"{'; '.join(wrong[:3])}{more}: {REMEDY}")


def _find_places(
    shards: list[Part], labels: bool, scenes: Sequence[str] | None, frames: Sequence[int] | None
) -> np.ndarray:
    """Where each chosen frame is, as one array: every data worker gets a copy. A name is "dataset/scene/frame"."""
    places = []
    for number, shard in enumerate(shards):
        record = 0
        columns = shard["names"], shard["scan_files"], shard["cameras"], shard["scans"]
        for name, scan_file, cameras, has_scan in zip(*columns, strict=True):
            parts = name.split("/")
            wanted = scenes is None or parts[1] in scenes
            wanted &= frames is None or (parts[-1].isdecimal() and int(parts[-1]) in frames)
            if wanted and (has_scan if labels else cameras):
                mask = sum(1 << k for k in cameras)
                places.append((name.encode(), scan_file.encode(), number, record, mask, has_scan))
            record += has_scan + len(cameras)
    names = [(key, f"S{max([1, *(len(place[k]) for place in places)])}") for k, key in enumerate(("name", "scan_file"))]
    return np.array(places, [*names, ("shard", "i4"), ("record", "i4"), ("cameras", "u8"), ("has_scan", "?")])


def _array(parts: dict[str, memoryview], name: str, dtype: str) -> np.ndarray:
    """A field as an array [n], copied so that it is aligned."""
    return np.frombuffer(bytes(parts[name]), dtype)


def parse_example(record: bytes) -> dict[str, memoryview]:
    """A serialised tf.train.Example of one byte string a feature -> name -> the bytes, without copying.

    The wire format: Example {1: Features {1: entry {1: key, 2: Feature {1: BytesList {1: value}}}, ...}}. Raises
    ValueError: anything else.
    """
    view, parts = memoryview(record), {}
    (features,) = _fields(view)[1]
    for entry in _fields(features)[1]:
        fields = _fields(entry)
        (value,) = _fields(_fields(fields[2][0])[1][0])[1]
        parts[str(fields[1][0], "utf-8")] = value
    return parts


def _fields(message: memoryview) -> dict[int, list[memoryview]]:
    """The length-delimited fields of a protobuf message, by number."""
    found, at, end = {}, 0, len(message)
    while at < end:
        tag = message[at]
        if tag & 7 != 2 or tag >= 128:
            raise ValueError(f"field tag {tag} is not one of bytes or messages")
        at, length, shift = at + 1, 0, 0
        while True:
            byte = message[at]
            length |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                break
        if at + length > end:
            raise ValueError(f"a field of {length} bytes in the {end - at} that are left")
        found.setdefault(tag >> 3, []).append(message[at : at + length])
        at += length
    return found
