"""nuScenes from its official JSON tables, without the devkit: keyframes of LIDAR_TOP and six cameras, lidarseg labels.

    lidar -> ego at the scan's time -> global -> ego at the image's time -> camera -> pixel
    visible: depth > 1 m, strictly between 0 and the image's size - 1

The published chain holds the points in float32 and rounds to it after every rotation and every translation; so does
this one (global coordinates of kilometres make that about 0.1 mm a step). The lidar's frame is the student's frame.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalr_jax.data.readers import files, nuscenes_tables
from scalr_jax.data.readers.nuscenes_tables import Keyframe, Shot
from scalr_jax.data.readers.raw import RawDataset
from scalr_jax.data.scenes import Frame
from scalr_jax.runtime.errors import BadFrameError

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
LIDAR = "LIDAR_TOP"
MIN_DEPTH = 1.0  # metres before the camera, of a visible point
NUM_RINGS = 32
INTENSITY = (18.742355, 22.04632)  # mean, standard deviation
VERSIONS = ("v1.0-trainval", "v1.0-mini", "v1.0-test")


class _Entry(NamedTuple):
    scene: str
    timestamp: int  # microseconds
    scan: Shot
    images: dict[str, Shot]  # by camera: those whose file is there
    labels: str | None  # lidarseg file


class NuScenes(RawDataset[_Entry]):
    """The keyframes of a split, in the order of the scenes' names and of time.

    Args:
      root: the folder that holds the tables' folder (`v1.0-mini/*.json`), `samples/` and perhaps `lidarseg/`.
      version: "v1.0-trainval", "v1.0-mini" or "v1.0-test".
      split: "validation" (the version's official validation scenes), "train" (its other scenes) or "all".
      cameras: which images `frame` may draw. None: all six, or none at all with `labels`. A keyframe is listed when
        one of them is there.
      labels: list only keyframes with lidarseg labels, and read them.

    Attributes:
      scan_tokens: of every keyframe in the tables' split, whether its files are there or not; "" for one without scan.

    Raises InputError: nothing to read at `root`, a damaged table, or an argument that does not fit the files.
    """

    known_cameras, statistics = CAMERAS, INTENSITY

    def __init__(
        self,
        root: str | Path,
        *,
        version: str = "v1.0-mini",
        split: str = "train",
        cameras: Sequence[str] | None = None,
        labels: bool = False,
    ) -> None:
        files.check_choice("version", version, VERSIONS)
        files.check_choice("split", split, ("train", "validation", "all"))
        self.root, self.version, self.split, self.labels = Path(root), version, split, labels
        self._choose_cameras(cameras, CAMERAS)
        label_map = files.read_label_map("nuscenes")
        self.class_names = label_map.class_names
        folder = self.root / version
        files.check_folder(folder, "nuScenes' tables, <root>/<version>/sample_data.json and the others")
        self._class_of_id = nuscenes_tables.read_class_of_id(folder, label_map)
        scenes = nuscenes_tables.read_scenes(folder)  # token -> name
        if split != "all":
            held_out = files.read_json(files.LABEL_MAPS / "nuscenes.json")["validation_scenes"].get(version, ())
            scenes = {token: n for token, n in scenes.items() if (n in held_out) == (split == "validation")}
        self._num_scenes = len(scenes)
        keyframes = nuscenes_tables.read_keyframes(folder, scenes, (LIDAR, *CAMERAS))
        found = _find_files(keyframes, nuscenes_tables.read_lidarseg(folder), self.root)
        self._num_keyframes = len(keyframes)
        scans = (keyframe.shots.get(LIDAR) for keyframe in keyframes)
        self.scan_tokens = {scan.token if scan else "" for scan in scans}
        self._choose_entries(found)
        if not self._entries:
            among = f"{len(keyframes)} in the tables of {version} and {len(found)} with a scan"
            raise self._nothing(among, "unpack samples/ (and lidarseg/ for labels) beside the tables")

    def name(self, index: int) -> str:
        """As "nuscenes/<scene>/<the scan's time in microseconds>"."""
        return f"nuscenes/{self._entries[index].scene}/{self._entries[index].timestamp}"

    def scan_file(self, index: int) -> str:
        """The scan's path below `root`, as published lists name keyframes."""
        return self._entries[index].scan.file

    def scan_token(self, index: int) -> str:
        """The scan's token in sample_data, by which the benchmark names its predictions."""
        return self._entries[index].scan.token

    def describe(self) -> str:
        """A short table of what was found."""
        left_out = f"{self._num_keyframes - self._num_found} keyframes without scan, {self._left_out}"
        title = f"nuScenes {self.version}"
        return self._table(title, ("scenes", self._num_scenes), f"{self._num_keyframes} keyframes", left_out)

    def _read(self, entry: _Entry, name: str) -> Frame:
        """The scan, with points [N, 4] float32 in the lidar's frame (metres, intensity 0 to 255)."""
        path = self.root / entry.scan.file
        rows = files.read_floats(path, 5)  # [N, 5]; the fifth column is the ring, 0 the lowest
        rings = rows[:, 4].astype(np.uint8) if np.isin(rows[:, 4], np.arange(NUM_RINGS)).all() else None
        labels = self._read_labels(entry, len(rows)) if self.labels else None
        scan = Frame(name, np.ascontiguousarray(rows[:, :4]), np.eye(4), labels=labels, beams=rings)
        return files.without_bad(scan, path)

    def _image_path(self, entry: _Entry, camera: str) -> Path:
        return self.root / entry.images[camera].file

    def _read_labels(self, entry: _Entry, num_points: int) -> np.ndarray:
        path = self.root / str(entry.labels)
        return files.read_labels(path, "u1", self._class_of_id, num_points)[0]

    def _pair(self, frame: Frame, entry: _Entry, camera: str) -> Frame:
        if camera not in entry.images:
            raise BadFrameError(f"{frame.name}: no image of {camera}; unpack it, or leave this camera out.")
        shot = entry.images[camera]
        image = files.read_image(self.root / shot.file, shot.size, decode=self.decode)
        local = _to_camera(frame.points[:, :3].T, entry.scan, shot)  # [3, N] float32
        in_front = local[2] > MIN_DEPTH
        pixels = shot.sensor.intrinsics @ local.astype(np.float64)  # [3, N]
        x, y = pixels[:2] / np.where(in_front, pixels[2], 1.0)  # [N] each
        visible = in_front & (x > 0) & (x < image.shape[1] - 1) & (y > 0) & (y < image.shape[0] - 1)
        reason = f"check {self.root / self.version / 'calibrated_sensor.json'}"
        return self._paired(frame, camera, image, np.stack([y, x], axis=1), visible, reason)


def _find_files(keyframes: list[Keyframe], lidarseg: dict[str, str], root: Path) -> list[_Entry]:
    """The keyframes whose scan is on disk, with those of their images and labels that are."""
    listing = functools.cache(files.listing)  # one a folder: 34,000 files each in v1.0-trainval

    def there(file: str | None) -> bool:
        return file is not None and Path(file).name in listing((root / file).parent)

    entries = []
    for keyframe in keyframes:
        scan = keyframe.shots.get(LIDAR)
        if scan is None or not there(scan.file):
            continue
        images = {camera: shot for camera, shot in keyframe.shots.items() if camera != LIDAR and there(shot.file)}
        labels = lidarseg.get(scan.token)
        entries.append(_Entry(keyframe.scene, keyframe.timestamp, scan, images, labels if there(labels) else None))
    return entries


def _to_camera(points: np.ndarray, scan: Shot, image: Shot) -> np.ndarray:
    """Points of the lidar's frame [3, N] -> the camera's, through float32 at every step."""
    for pose in (scan.sensor.pose, nuscenes_tables.pose(scan.ego)):
        points = (pose.rotation @ points).astype(np.float32)
        points = (points + pose.translation[:, None]).astype(np.float32)
    for pose in (nuscenes_tables.pose(image.ego), image.sensor.pose):
        points = (points - pose.translation[:, None]).astype(np.float32)
        points = (pose.rotation.T @ points).astype(np.float32)
    return points
