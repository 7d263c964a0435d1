"""Features of a prepared record and names of its files. Imports no TFDS, which only writing records needs."""

from __future__ import annotations

import numpy as np

NAME = "lidar_frames"  # of the files: lidar_frames-train.array_record-00000-of-00012
FORMAT = "array_record"
VERSION = "1.2.0"  # raise it when the features change
FEATURES = {
    "name": "name of the frame or view in logs, utf-8",
    "camera": "its name, utf-8; empty for a scan",
    "points": "[n, 4] float32: x, y, z in the student's frame (metres), raw intensity",
    "voxel_start": "[v + 1] int32: where each voxel's run begins; views only",
    "labels": "[n] uint8: class, or 255; scans only",
    "beams": "[n] uint8: the beam of each point, 0 the lowest; scans of nuScenes and of the Pandar64 only",
    "to_sensor": "[4, 4] float64: the student's frame -> the lidar's; scans of PandaSet only",
    "visible": "[n] uint8: 1 where the camera sees the point; views only",
    "pixels": "[n, 2] float64: row, column in the original image; views only",
    "image": "the original file, or resized as metadata's image_format says; views only",
    "image_shape": "[4] int32: rows and columns of the original image, then of the stored one; views only",
}


def shard_name(split: str, shard: int, num_shards: int) -> str:
    """TFDS's file name of a shard."""
    return f"{NAME}-{split}.{FORMAT}-{shard:05d}-of-{num_shards:05d}"


def to_bytes(array: np.ndarray, dtype: str) -> bytes:
    """An array's little-endian bytes in C order."""
    return np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<")).tobytes()
