"""PandaSet in its raw layout: two lidars (Pandar64 around, PandarGT ahead), six cameras, semantic labels.

Points are stored in world coordinates, both lidars in one table. With the poses T (sensor -> world) of frame number n:

    pixel     = K * (inverse(T_camera[n]) * point)       visible: depth > 0 m, strictly between 0 and the image's size
    to_ego    = shift(z - 1.6 m) * inverse(T_lidar[n])   the student's frame
    to_sensor = inverse(T_lidar(t) * MOUNT)              the Pandar64 at time t

The published distillation voxelises in world coordinates, before `to_ego`, so `Frame.points` stay in the world; the
published segmentation does after it. T_lidar is
not a lidar's pose but the car's at the end of the sweep; the Pandar64 stands higher and further ahead on it.
Files have gaps (some frames may be absent); poses.json has one pose a frame *number*, not one a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalr_jax.data.readers import files
from scalr_jax.data.readers.pickles import read_dataframe
from scalr_jax.data.readers.raw import RawDataset
from scalr_jax.data.scenes import Frame
from scalr_jax.runtime.errors import BadFrameError, InputError

CAMERAS = ("back_camera", "front_camera", "front_left_camera", "front_right_camera", "left_camera", "right_camera")
IMAGE_SIZE = (1920, 1080)  # pixels, of every camera
SPLIT_LATITUDE = 37.6  # degrees north: scenes that begin south of it validate
GROUND_SHIFT = 1.6  # metres: puts the road about 1.7 m below the origin, as in the other datasets
# The Pandar64 on the car: rotation (w, x, y, z), place (metres). Where the front camera's poses and its calibration
# against the Pandar64 (docs/static_extrinsic_calibration.yaml of PandaSet's devkit) put it in 76 frames of scene 002,
# which agree within 3 mm and 0.02 degrees; then 3 cm and 0.03 degrees from there, where points lie on the beams.
MOUNT_ROTATION, MOUNT_PLACE = (0.01589, 0.00044, 0.00783, -0.99984), (0.0042, 0.7787, 1.8571)
ELEVATIONS = np.array([  # of the Pandar64's beams, degrees, by Hesai's manual
    -24.897, -18.889, -13.930, -12.974, -12.006, -11.032, -9.885, -9.060, -8.059, -7.063, -6.061, -5.898, -5.726,
    -5.565, -5.391, -5.229, -5.057, -4.892, -4.720, -4.558, -4.385, -4.221, -4.050, -3.884, -3.712, -3.548, -3.375,
    -3.210, -3.040, -2.873, -2.700, -2.536, -2.365, -2.198, -2.028, -1.860, -1.688, -1.522, -1.351, -1.184, -1.013,
    -0.845, -0.675, -0.508, -0.337, -0.169, 0.0, 0.169, 0.337, 0.508, 0.675, 0.846, 1.013, 1.184, 1.351, 1.522, 1.688,
    1.860, 2.028, 3.040, 5.057, 8.059, 11.032, 14.882
])  # fmt: skip
LAYOUT = "PandaSet's raw layout, <root>/<scene>/{lidar,camera,meta,annotations}"


class _Sensor(NamedTuple):
    number: int  # column `d` of the tables
    cameras: tuple[str, ...]  # that the published recipe pairs it with
    intensity: tuple[float, float]  # mean, standard deviation


SENSORS = {
    "pandar64": _Sensor(0, CAMERAS, (18.23640649, 25.86983417)),
    "pandargt": _Sensor(1, ("front_camera",), (23.06113565, 16.76273235)),
}


class _Entry(NamedTuple):
    scene: str
    number: int  # of the frame: 0 to 79
    scan: str  # file name below lidar/: "00.pkl.gz"
    labels: str | None  # file name below annotations/semseg/
    images: tuple[str, ...]  # the cameras, of those that are drawn, whose image is there


class PandaSet(RawDataset[_Entry]):
    """The frames of one lidar of PandaSet, in the order of scene and frame number.

    Args:
      root: the folder that holds the scenes ("001", "002", ...).
      sensor: "pandar64" or "pandargt".
      split: "train", "validation" (scenes whose first GPS latitude is at most 37.6 degrees) or "all".
      scenes: names of scenes to use. None: as published, the scenes with semantic labels; all, where none has any.
      frames: numbers of frames to use; None for all.
      cameras: which images `frame` may draw. None: the published ones (six for Pandar64, the front one for PandarGT),
        or none at all with `labels`. A frame is listed when one of them is there.
      labels: list only frames with semantic labels, and read them.

    Raises InputError: nothing to read at `root`, or an argument that does not fit the files.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        sensor: str = "pandar64",
        split: str = "train",
        scenes: Sequence[str] | None = None,
        frames: Sequence[int] | None = None,
        cameras: Sequence[str] | None = None,
        labels: bool = False,
    ) -> None:
        files.check_choice("sensor", sensor, SENSORS)
        files.check_choice("split", split, ("train", "validation", "all"))
        self.root, self.lidar, self.split, self.labels = Path(root), sensor, split, labels
        self.known_cameras, self.statistics = CAMERAS, SENSORS[sensor].intensity
        self._choose_cameras(cameras, SENSORS[sensor].cameras)
        self._label_map = files.read_label_map("pandaset")
        self.class_names = self._label_map.class_names
        self._poses: dict[Path, np.ndarray] = {}  # filled as frames are read
        self._ends: dict[Path, np.ndarray] = {}
        self._scenes, self._num_unlabelled = self._find_scenes(scenes)
        wanted = None if frames is None else frozenset(frames)
        found = [entry for scene in self._scenes for entry in self._find_frames(scene)]
        found = [entry for entry in found if wanted is None or entry.number in wanted]
        self._choose_entries(found)
        if not self._entries:
            among = f"{len(found)} scans of {len(self._scenes)} scenes, frames={frames}"
            raise self._nothing(among, f"expected {LAYOUT}")

    def name(self, index: int) -> str:
        """As "pandaset/002/45"."""
        entry = self._entries[index]
        return f"pandaset/{entry.scene}/{entry.number:02d}"

    def sensor(self, index: int) -> str:
        return self.lidar

    def describe(self) -> str:
        """A short table of what was found."""
        left_out = f"{self._left_out}; {self._num_unlabelled} scenes without labels"
        left_out += " (name them in scenes= to use them)" if self._num_unlabelled else ""
        title = f"PandaSet {self.lidar}"
        return self._table(title, ("scenes", len(self._scenes)), f"{self._num_found} scans", left_out)

    def _find_scenes(self, wanted: Sequence[str] | None) -> tuple[list[str], int]:
        """The scenes of the split, and how many were left out for having no labels."""
        files.check_folder(self.root, LAYOUT)
        found = sorted(folder.name for folder in self.root.iterdir() if (folder / "lidar").is_dir())
        if not found:
            raise InputError(f"{self.root}: no scene with a folder lidar; expected {LAYOUT}.")
        files.check_all_in("scene", wanted, found, self.root)
        labelled = [scene for scene in found if (self.root / scene / "annotations" / "semseg").is_dir()]
        chosen = sorted(set(wanted)) if wanted is not None else labelled or found
        left_out = 0 if wanted is not None else len(found) - len(chosen)
        return [scene for scene in chosen if self._in_split(scene)], left_out

    def _in_split(self, scene: str) -> bool:
        if self.split == "all":
            return True
        path = self.root / scene / "meta" / "gps.json"
        try:
            latitude = float(files.read_json(path)[0]["lat"])  # degrees
        except (BadFrameError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: no latitude, which decides whether a scene trains or validates ({error}); "
                "copy the file, or use split='all'."
            ) from error
        return (latitude > SPLIT_LATITUDE) == (self.split == "train")

    def _find_frames(self, scene: str) -> list[_Entry]:
        folder = self.root / scene
        scans = _pickles(folder / "lidar")
        labels = _pickles(folder / "annotations" / "semseg")
        images = {camera: files.listing(folder / "camera" / camera) for camera in self.cameras}
        return [
            _Entry(
                scene, int(stem), scan, labels.get(stem), tuple(c for c in self.cameras if f"{stem}.jpg" in images[c])
            )
            for stem, scan in sorted(scans.items())
            if stem.isdecimal()
        ]

    def _read(self, entry: _Entry, name: str) -> Frame:
        """The scan, with points [N, 4] float64 in the world (metres, raw intensity)."""
        path = self.root / entry.scene / "lidar" / entry.scan
        table = read_dataframe(path)
        if missing := [column for column in "xyzid" if column not in table]:
            raise BadFrameError(f"{path}: no column {', '.join(missing)}; a scan has columns x, y, z, i, t, d.")
        mine = table["d"] == SENSORS[self.lidar].number
        points = np.stack([np.asarray(table[column], np.float64)[mine] for column in "xyzi"], axis=1)
        if not len(points):
            raise BadFrameError(f"{path}: no point of sensor {self.lidar}; copy the file again.")
        good = files.usable_points(points, path)
        times = np.asarray(table["t"], np.float64)[mine][good] if "t" in table else None  # seconds
        labels = self._read_labels(entry, mine)[good] if self.labels else None
        to_sensor, beams = self._find_sensor(entry, points[good], times)
        to_ego = np.linalg.inv(self._pose(self.root / entry.scene / "lidar" / "poses.json", entry.number))
        to_ego[2, 3] -= GROUND_SHIFT
        scan = Frame(name, points[good], to_ego, labels=labels, to_sensor=to_sensor, beams=beams)
        return scan._replace(num_dropped=len(good) - int(good.sum()))

    def _read_labels(self, entry: _Entry, mine: np.ndarray) -> np.ndarray:
        """Classes [N] of the points that are `mine` ([all points] bool)."""
        path = self.root / entry.scene / "annotations" / "semseg" / str(entry.labels)
        table = read_dataframe(path)
        if "class" not in table:
            raise BadFrameError(f"{path}: no column class; copy the file again.")
        return files.map_labels(table["class"], self._label_map.class_of_id, len(mine), path)[mine]

    def _find_sensor(
        self, entry: _Entry, points: np.ndarray, times: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """World -> Pandar64 [4, 4] in the middle of the sweep, and the beam of each point [N] uint8 as the Pandar64
        stood when it saw the point. No beams without `labels` (they matter in evaluations alone, and take 0.03 s), of
        the PandarGT (whose own place is not known here: within a metre), and where there are no times.

        Between two sweeps' ends, 0.1 s apart, the car's poses are interpolated linearly; without times they are those
        of the end.
        """
        folder = self.root / entry.scene / "lidar"
        before = after = np.linalg.inv(self._pose(folder / "poses.json", entry.number))
        ends = self._sweep_ends(folder / "timestamps.json")
        second = max(entry.number, 1)
        known = len(ends) > second and ends[second] > ends[second - 1]
        if known:
            before, after = (np.linalg.inv(self._pose(folder / "poses.json", n)) for n in (second - 1, second))
        middle = entry.number - second + 0.5  # in sweeps: 0 is the end of the one before, 1 of this
        mount = np.eye(4)
        mount[:3, :3], mount[:3, 3] = files.rotation(MOUNT_ROTATION), MOUNT_PLACE
        to_sensor = np.linalg.inv(mount) @ ((1 - middle) * before + middle * after)
        if not self.labels or self.lidar != "pandar64" or times is None or not known or not np.isfinite(times).all():
            return to_sensor, None
        share = (times - ends[second - 1]) / (ends[second] - ends[second - 1])
        share = np.clip(share, middle - 1, middle + 1)  # of points whose time is no time of the sweep
        before, after = (np.linalg.inv(mount) @ pose for pose in (before, after))
        start = before[:3, :3] @ points[:, :3].T + before[:3, 3:]  # [3, N], if the car had stood still
        change = after - before
        x, y, z = start + share * (change[:3, :3] @ points[:, :3].T + change[:3, 3:])
        between = np.tan(np.radians((ELEVATIONS[1:] + ELEVATIONS[:-1]) / 2))
        return to_sensor, np.searchsorted(between, z / np.sqrt(x * x + y * y)).astype(np.uint8)

    def _sweep_ends(self, path: Path) -> np.ndarray:
        """Seconds at which each sweep of a scene ended; empty without the file."""
        if path not in self._ends:
            try:
                self._ends[path] = np.array(files.read_json(path) if path.is_file() else [], np.float64).reshape(-1)
            except (TypeError, ValueError) as error:
                raise BadFrameError(f"{path}: no list of seconds; copy it again.") from error
        return self._ends[path]

    def _image_path(self, entry: _Entry, camera: str) -> Path:
        return self.root / entry.scene / "camera" / camera / f"{entry.scan.split('.')[0]}.jpg"

    def _pair(self, frame: Frame, entry: _Entry, camera: str) -> Frame:
        folder = self.root / entry.scene / "camera" / camera
        image = files.read_image(self._image_path(entry, camera), IMAGE_SIZE, decode=self.decode)
        lens = files.read_json(folder / "intrinsics.json")
        try:
            focal, centre = (np.array([lens[a], lens[b]], np.float64) for a, b in (("fx", "fy"), ("cx", "cy")))
        except (KeyError, TypeError, ValueError) as error:
            raise BadFrameError(f"{folder / 'intrinsics.json'}: no numbers fx, fy, cx, cy; copy it again.") from error
        to_camera = np.linalg.inv(self._pose(folder / "poses.json", entry.number))
        local = to_camera[:3, :3] @ frame.points[:, :3].T + to_camera[:3, 3:]  # [3, N]
        in_front = local[2] > 0.0
        depth = np.where(in_front, local[2], 1.0)
        # As a matrix product would round it: fx * x + cx * z, then divided by z.
        x, y = (focal[:, None] * local[:2] + centre[:, None] * local[2]) / depth  # [N] each, pixels
        visible = in_front & (x > 0) & (x < image.shape[1]) & (y > 0) & (y < image.shape[0])
        return self._paired(frame, camera, image, np.stack([y, x], axis=1), visible, f"check {folder}")

    def _pose(self, path: Path, number: int) -> np.ndarray:
        """Pose of a frame number, sensor -> world [4, 4]."""
        if path not in self._poses:
            self._poses[path] = _read_poses(path)
        poses = self._poses[path]
        if number >= len(poses):
            raise BadFrameError(f"{path}: {len(poses)} poses, none for frame {number}; copy the file again.")
        return poses[number]


def _pickles(folder: Path) -> dict[str, str]:
    """Frame ("00") -> name of its pickle; of a compressed and a plain one the compressed."""
    names = sorted(files.listing(folder))
    return {name.split(".")[0]: name for name in names if name.endswith((".pkl", ".pkl.gz"))}


def _read_poses(path: Path) -> np.ndarray:
    """A poses.json -> [frames, 4, 4], sensor -> world."""
    poses: list[np.ndarray] = []
    try:
        for entry in files.read_json(path):
            pose = np.eye(4)
            pose[:3, :3] = files.rotation([float(entry["heading"][axis]) for axis in "wxyz"])
            pose[:3, 3] = [float(entry["position"][axis]) for axis in "xyz"]
            poses.append(pose)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BadFrameError(f"{path}: entry {len(poses)} is no pose of heading and position; copy it again.") from error
    return np.array(poses).reshape(-1, 4, 4)
