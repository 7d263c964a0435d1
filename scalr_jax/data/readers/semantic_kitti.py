"""SemanticKITTI: KITTI odometry's scans and left colour images, with semantic labels of every point.

    pixel = P2 * Tr * point          visible: x > 1 m, strictly between 0 and the image's size - 1

P2 [3, 4] and Tr [4, 4] (lidar -> camera) come from calib.txt, which lies in `calib/dataset/sequences/XX` or beside the
scans in `dataset/sequences/XX`. The lidar's frame is the student's frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalr_jax.data.readers import files
from scalr_jax.data.readers.raw import RawDataset
from scalr_jax.data.scenes import Frame
from scalr_jax.runtime.errors import BadFrameError

CAMERAS = ("image_2",)
INTENSITY = (0.28613698, 0.14090556)  # mean, standard deviation
MIN_DISTANCE = 1.0  # metres ahead of the lidar, of a visible point
CENTRE_TOLERANCE = 0.08  # how far the principal point may lie from the image's middle, as a share of its size
LAYOUT = "<root>/dataset/sequences/XX/velodyne/*.bin"
SPLITS = {
    "train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    "validation": ("08",),
    "test": tuple(f"{sequence}" for sequence in range(11, 22)),
    "all": tuple(f"{sequence:02d}" for sequence in range(22)),
}
# Scans of sequences 00 to 21, as KITTI's odometry benchmark has them: 23,201 with labels and 20,351 of the test.
_COUNTS = (4541, 1101, 4661, 801, 271, 2761, 1101, 1101, 4071, 1591, 1201)
_COUNTS += (921, 1061, 3281, 631, 1901, 1731, 491, 1801, 4981, 831, 2721)
NUM_SCANS = dict(zip(SPLITS["all"], _COUNTS, strict=True))


class _Entry(NamedTuple):
    sequence: str
    number: str  # of the scan: "000000"
    images: tuple[str, ...]  # CAMERAS, or () where there is none
    labels: bool  # there are some


class _Calibration(NamedTuple):
    matrix: np.ndarray  # [3, 4]: lidar -> pixel, homogeneous
    centre: tuple[float, float]  # principal point x, y (pixels)
    path: Path


class SemanticKITTI(RawDataset[_Entry]):
    """The scans of a split, in the order of sequence and number.

    Args:
      root: the folder that holds `dataset/sequences` (and `calib/`, where calib.txt is unpacked apart).
      split: "train" (00 to 07, 09, 10), "validation" (08), "test" (11 to 21) or "all".
      sequences: names of sequences of the split to use ("00"); None for all on disk.
      cameras: ("image_2",) or () for no images. None: the image, or none with `labels`.
      labels: list only scans with labels, and read them.

    Raises InputError: nothing to read at `root`, or an argument that does not fit the files.
    """

    known_cameras, statistics = CAMERAS, INTENSITY

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        sequences: Sequence[str] | None = None,
        cameras: Sequence[str] | None = None,
        labels: bool = False,
    ) -> None:
        files.check_choice("split", split, SPLITS)
        self.root, self.split, self.labels = Path(root), split, labels
        self._choose_cameras(cameras, CAMERAS)
        self._label_map = files.read_label_map("semantic_kitti")
        self.class_names = self._label_map.class_names
        self._calibrations: dict[str, _Calibration] = {}  # filled as frames are read
        files.check_folder(self.root, LAYOUT)
        self._base = self.root / "dataset" / "sequences"
        self._sequences = [name for name in SPLITS[split] if (self._base / name / "velodyne").is_dir()]
        files.check_all_in("sequence", sequences, self._sequences, self._base)
        self._sequences = [name for name in self._sequences if sequences is None or name in sequences]
        found = [entry for sequence in self._sequences for entry in self._find_scans(sequence)]
        self._choose_entries(found)
        if not self._entries:
            among = f"{len(found)} of sequences {', '.join(SPLITS[split])}"
            raise self._nothing(among, f"expected {LAYOUT}, image_2, labels")

    def name(self, index: int) -> str:
        """As "semantic_kitti/08/000000"."""
        return f"semantic_kitti/{self._entries[index].sequence}/{self._entries[index].number}"

    def describe(self) -> str:
        """A short table of what was found."""
        absent = [name for name in SPLITS[self.split] if name not in self._sequences]
        sequences = f"{', '.join(self._sequences)} (missing or not asked for: {', '.join(absent) or 'none'})"
        return self._table("SemanticKITTI", ("sequences", sequences), f"{self._num_found} scans", self._left_out)

    def _folder(self, sequence: str) -> Path:
        """Where a sequence's velodyne/ and labels/ are."""
        return self._base / sequence

    def _read(self, entry: _Entry, name: str) -> Frame:
        """The scan, with points [N, 4] float32 in the lidar's frame (metres, intensity 0 to 1)."""
        path = self._folder(entry.sequence) / "velodyne" / f"{entry.number}.bin"
        points = files.read_floats(path, 4)
        labels, instances = self._read_labels(entry, len(points)) if self.labels else (None, None)
        return files.without_bad(Frame(name, points, np.eye(4), labels=labels, instances=instances), path)

    def _find_scans(self, sequence: str) -> list[_Entry]:
        folder = self._folder(sequence)
        images, labels = files.listing(folder / "image_2"), files.listing(folder / "labels")
        scans = sorted(scan for scan in files.listing(folder / "velodyne") if scan.endswith(".bin"))
        numbers = [scan.removesuffix(".bin") for scan in scans]
        return [_Entry(sequence, n, CAMERAS if f"{n}.png" in images else (), f"{n}.label" in labels) for n in numbers]

    def _read_labels(self, entry: _Entry, num_points: int) -> tuple[np.ndarray, np.ndarray]:
        """Classes [N] uint8, and instances [N] uint32: the upper half numbers them, the lower half is the class."""
        path = self._folder(entry.sequence) / "labels" / f"{entry.number}.label"
        return files.read_labels(path, "<u4", self._label_map.class_of_id, num_points)

    def _image_path(self, entry: _Entry, camera: str) -> Path:
        return self._base / entry.sequence / camera / f"{entry.number}.png"

    def _pair(self, frame: Frame, entry: _Entry, camera: str) -> Frame:
        if entry.sequence not in self._calibrations:
            self._calibrations[entry.sequence] = self._read_calibration(entry.sequence)
        calibration = self._calibrations[entry.sequence]
        path = self._image_path(entry, camera)
        image = files.read_image(path, decode=self.decode)
        height, width = image.shape[:2]
        off = np.array(calibration.centre) / (width, height) - 0.5
        if np.abs(off).max() > CENTRE_TOLERANCE:  # KITTI's sizes differ by day, and no file contains them
            raise BadFrameError(
                f"{path}: the image is {width} x {height} pixels, but {calibration.path} has its centre at "
                f"({calibration.centre[0]:.0f}, {calibration.centre[1]:.0f}); use the sequence's original images."
            )
        ahead = frame.points[:, 0] > MIN_DISTANCE
        homogeneous = np.column_stack([frame.points[:, :3], np.ones(len(ahead))])  # [N, 4] float64
        projected = homogeneous @ calibration.matrix.T  # [N, 3]
        depth = np.where(ahead & (projected[:, 2] != 0), projected[:, 2], 1.0)
        x, y = projected[:, 0] / depth, projected[:, 1] / depth  # [N] each, pixels
        visible = ahead & (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
        return self._paired(frame, camera, image, np.stack([y, x], axis=1), visible, f"check {calibration.path}")

    def _read_calibration(self, sequence: str) -> _Calibration:
        places = [self.root / "calib" / "dataset" / "sequences" / sequence / "calib.txt"]
        places.append(self._base / sequence / "calib.txt")
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise BadFrameError(f"{places[0]}: no calibration there or at {places[1]}; copy calib.txt to either.")
        try:
            lines = [line.split(":", 1) for line in path.read_text().splitlines() if ":" in line]
            entries = {key.strip(): np.array([float(x) for x in value.split()]) for key, value in lines}
            camera, lidar = entries["P2"].reshape(3, 4), np.eye(4)
            lidar[:3] = entries["Tr"].reshape(3, 4)
        except (OSError, KeyError, ValueError) as error:
            raise BadFrameError(f"{path}: no 12 numbers each of P2 and Tr ({error}); copy it again.") from error
        return _Calibration(camera @ lidar, (camera[0, 2], camera[1, 2]), path)
