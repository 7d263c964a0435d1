"""Your own lidar: a folder of scans, optionally with images and labels.

    <root>/dataset.json                       cameras, classes, columns of .bin files (folder_settings.py)
    <root>/<scene>/scans/<name>.bin           or .npy, .pcd, .ply (scan_files.py), in the lidar's frame, metres
    <root>/<scene>/<camera>/<name>.jpg        or .png; a camera of dataset.json
    <root>/<scene>/labels/<name>.label        uint32, lower half the class (SemanticKITTI); .npy integers; .bin uint8
    <root>/<scene>/cameras.json               where a scene's calibration differs: replaces cameras of dataset.json

The same name pairs a scan with its images and labels. `<root>/scans` directly is one scene. Pixels: calibration.py. A
row whose x, y, z are all NaN or all 0 is no echo: it is dropped with its label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scalr_jax.data.readers import calibration, files, folder_settings
from scalr_jax.data.readers.calibration import Camera
from scalr_jax.data.readers.raw import RawDataset
from scalr_jax.data.readers.scan_files import SUFFIXES, load_array, read_scan
from scalr_jax.data.scan_checks import find_usable
from scalr_jax.data.scenes import Frame
from scalr_jax.runtime.errors import BadFrameError, InputError

IMAGES = (".jpg", ".jpeg", ".png")
LABELS = (".label", ".npy", ".bin")
SPLITS = ("train", "validation", "all")
LAYOUT = "<root>/<scene>/scans/*.bin (or .npy, .pcd, .ply), or <root>/scans"
MEASURED_SCANS = 20  # read to measure the intensity, when dataset.json does not say it


class _Entry(NamedTuple):
    scene: str
    scan: Path
    images: dict[str, Path]  # by camera
    labels: Path | None


class Folder(RawDataset[_Entry]):
    """The scans of a split, in the order of scenes and names.

    Args:
      root: the folder; `dataset.json` in it is needed for cameras, classes and .bin files of other than 4 columns.
      split: "train" (scenes that dataset.json does not list under "validation"), "validation" or "all".
      scenes: names of scenes of the split to use; None for all.
      cameras: which images `frame` may draw. None: all calibrated ones, or none with `labels`. A scan is listed when
        one of its images is there; with () every scan is.
      labels: list only scans with labels, and read them.

    Attributes:
      statistics: mean, standard deviation of the intensity: dataset.json's, or measured over those of 20 scans of all
        scenes that have one; (0, 1) without intensity.
      warnings: sentences about what looks wrong but may be meant.

    Raises:
      InputError: nothing to read at `root`, a wrong dataset.json (all its problems are listed), or an argument that
        does not fit the files.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        split: str = "train",
        scenes: Sequence[str] | None = None,
        labels: bool = False,
        cameras: Sequence[str] | None = None,
    ) -> None:
        files.check_choice("split", split, SPLITS)
        self.root, self.split, self.labels = Path(root), split, labels
        files.check_folder(self.root, LAYOUT)
        self.settings = folder_settings.read_settings(self.root / folder_settings.FILE)
        self.class_names = self.settings.classes
        self._folders = _find_scenes(self.root)
        self._calibrations = {scene: self._scene_cameras(folder) for scene, folder in self._folders.items()}
        self.known_cameras = tuple(dict.fromkeys(name for found in self._calibrations.values() for name in found))
        self._choose_cameras(cameras, self.known_cameras)
        if labels and not self.class_names:
            raise InputError(
                f"{self.root / folder_settings.FILE}: no classes; labels need their names. {folder_settings.HELP}"
            )
        self._all = [entry for scene, folder in self._folders.items() for entry in self._find_scans(scene, folder)]
        chosen = self._choose_scenes(scenes)
        self._found = [entry for entry in self._all if entry.scene in chosen]
        self._choose_entries(self._found)
        if not self._entries:
            raise self._nothing(f"{len(self._found)} scans", self._expected())
        self._has_intensity, self.statistics, self.warnings = self._measure_intensity()
        cameras_once = {id(camera): camera for own in self._calibrations.values() for camera in own.values()}
        for camera in cameras_once.values():
            alone = len(self.known_cameras) == 1
            self.warnings += tuple(calibration.check_mounting(camera, self.settings.to_student, alone=alone))
        self.warnings = tuple(dict.fromkeys(self.warnings))

    def name(self, index: int) -> str:
        """As "folder/<scene>/<name of the scan>"."""
        return f"folder/{self._entries[index].scene}/{self._entries[index].scan.stem}"

    def scan_file(self, index: int) -> str:
        """The scan's path below `root`."""
        return str(self._entries[index].scan.relative_to(self.root))

    def describe(self) -> str:
        """A short table of what was found, what is missing and what looks wrong."""
        found, mean, std = self._found, *self.statistics
        rows: list[tuple[str, object]] = [("scenes", ", ".join(dict.fromkeys(e.scene for e in found)))]
        rows.append(("frames", f"{len(self)} of {len(found)} scans"))
        for camera in self.known_cameras:
            rows.append((f"images of {camera}", f"{sum(camera in e.images for e in found)} of {len(found)}"))
        rows.append(("labelled scans", f"{sum(e.labels is not None for e in found)} of {len(found)}"))
        rows.append(("classes", ", ".join(self.class_names) or "none in dataset.json"))
        source = f"measured; write it as {[round(mean, 4), round(std, 4)]}"
        text = f"mean {mean:.4g}, std {std:.4g} ({'dataset.json' if self.settings.intensity else source})"
        no_intensity = "none in the files: the student gets 0 everywhere"
        rows.append(("intensity", text if self._has_intensity else no_intensity))
        if missing := self._missing_to_distill():
            rows.append(("to distil, missing", missing))
        rows += [("warning", text) for text in self.warnings]
        return files.format_table(f"Folder of scans, split {self.split}: {self.root}", rows)

    def check_distillable(self) -> None:
        """Raises InputError that says what is missing to distil: cameras, or their images."""
        if missing := self._missing_to_distill():
            raise InputError(f"{self.root}: distillation needs images and their calibration; {missing}.")

    def _read(self, entry: _Entry, name: str) -> Frame:
        """The scan, with points [N, 4] float32 in the lidar's frame (metres, raw intensity)."""
        points = read_scan(entry.scan, columns=self.settings.columns).points
        echo = ~(np.isnan(points[:, :3]).all(axis=1) | (points[:, :3] == 0).all(axis=1))
        labels = self._read_labels(entry, len(points))[echo] if self.labels else None
        dropped = len(points) - int(echo.sum())
        scan = Frame(name, points[echo], self.settings.to_student, labels=labels, num_dropped=dropped)
        if not len(scan.points):
            raise BadFrameError(f"{entry.scan}: no point of the scan has an echo (all are NaN or 0); leave it out.")
        return files.without_bad(scan, entry.scan)

    def _image_path(self, entry: _Entry, camera: str) -> Path:
        return entry.images[camera]

    def _pair(self, frame: Frame, entry: _Entry, camera: str) -> Frame:
        if camera not in entry.images:
            raise BadFrameError(f"{frame.name}: no image of {camera}; add it, or leave this camera out.")
        lens = self._calibrations[entry.scene][camera]
        image = files.read_image(entry.images[camera], lens.size, decode=self.decode)
        scan = (frame.points, lens, self.settings.min_depth)
        pixels, visible = calibration.project(*scan)
        reason = "" if visible.any() else calibration.explain_nothing_visible(*scan)
        return self._paired(frame, camera, image, pixels, visible, reason)

    def _read_labels(self, entry: _Entry, num_points: int) -> np.ndarray:
        path = entry.labels
        assert path is not None
        remedy = f"add it to labels in {self.root / folder_settings.FILE}, null for ignored, or write the file again"
        if path.suffix == ".npy":
            raw = load_array(path)
            if raw.ndim != 1 or raw.dtype.kind not in "iu":
                raise BadFrameError(f"{path}: labels must be one integer a point, shape [N]; write it again.")
            largest = int(np.iinfo(raw.dtype).max) if raw.dtype.kind == "u" else None
            return files.map_labels(raw, self._known_labels(largest), num_points, path, remedy)
        dtype, largest = ("<u4", 0xFFFF) if path.suffix == ".label" else ("u1", 0xFF)
        return files.read_labels(path, dtype, self._known_labels(largest), num_points, remedy)[0]

    def _known_labels(self, minus_one: int | None) -> Mapping[int, int]:
        """The class of each label number; `minus_one` is what -1 becomes in a file of unsigned numbers."""
        known = self.settings.class_of_id
        return known if minus_one is None or -1 not in known else {minus_one: known[-1], **known}

    # ------------------------------------------------------------------------------------------------ what is there

    def _scene_cameras(self, folder: Path) -> Mapping[str, Camera]:
        own = folder / "cameras.json"
        return {**self.settings.cameras, **(folder_settings.read_cameras(own) if own.exists() else {})}

    def _find_scans(self, scene: str, folder: Path) -> list[_Entry]:
        scans = _by_stem(folder / "scans", SUFFIXES)
        images = {camera: _by_stem(folder / camera, IMAGES) for camera in self._calibrations[scene]}
        labels = _by_stem(folder / "labels", LABELS)
        entries = []
        for stem, path in sorted(scans.items()):
            own = {camera: found[stem] for camera, found in images.items() if stem in found}
            entries.append(_Entry(scene, path, own, labels.get(stem)))
        return entries

    def _choose_scenes(self, wanted: Sequence[str] | None) -> set[str]:
        held_out, path = self.settings.validation, self.root / folder_settings.FILE
        files.check_all_in("validation scene", held_out, self._folders, path)
        if self.split == "validation" and not held_out:
            found = ", ".join(self._folders)
            raise InputError(f'{path}: no scenes to validate on; list some under "validation", among {found}.')
        validation = self.split == "validation"
        names = {name for name in self._folders if self.split == "all" or (name in held_out) == validation}
        files.check_all_in(f"{self.split} scene", wanted, names, self.root)
        return names if wanted is None else set(wanted)

    def _expected(self) -> str:
        """How files must be named, and the names that were found."""
        text = f"expected {LAYOUT}, and beside scans/ the folders of cameras and labels/"
        for entry in self._found[:1]:
            there = sorted(p for p in entry.scan.parent.parent.glob("*/*") if p.suffix.lower() in (*IMAGES, ".label"))
            text += f"; scans are named like {entry.scan.name}"
            text += f", other files like {there[0].parent.name}/{there[0].name}: one stem pairs them" if there else ""
        return text

    def _missing_to_distill(self) -> str:
        if not any(self._calibrations.values()):
            return f'no cameras in {folder_settings.FILE}: add "cameras" with intrinsics, size and lidar_to_camera'
        if not any(entry.images for entry in self._found):
            return "no image is named like its scan in a folder of a camera"
        return ""

    def _measure_intensity(self) -> tuple[bool, tuple[float, float], tuple[str, ...]]:
        """Whether the files have one, its mean and standard deviation, and a warning about scans without; the same for
        every split."""
        sample = self._all[:: -(-len(self._all) // MEASURED_SCANS) or 1]
        values, without, error = [], [], None
        for entry in sample:
            try:
                scan = read_scan(entry.scan, columns=self.settings.columns)
            except BadFrameError as bad:
                error = bad
                continue
            intensity = scan.points[find_usable(scan.points)[1], 3].astype(np.float64)
            if scan.has_intensity and intensity.any():
                values.append(intensity)
            else:
                without.append(str(entry.scan.relative_to(self.root)))
        if error is not None and not values and not without:
            raise InputError(f"no scan can be read; the last one: {error}")
        if not values:
            return False, self.settings.intensity or (0.0, 1.0), ()
        pooled = np.concatenate(values)
        mean, std = float(pooled.mean()), float(pooled.std())
        warning = f"{len(without)} of {len(sample)} scans looked at have no intensity, or 0 for every point, and the "
        warning += f"student gets 0 there: {', '.join(without[:5])}{', ...' if len(without) > 5 else ''}"
        return True, self.settings.intensity or (mean, std if std > 1e-9 else 1.0), (warning,) if without else ()


def _find_scenes(root: Path) -> dict[str, Path]:
    """The folders that hold scans/, by name."""
    if (root / "scans").is_dir():
        return {root.resolve().name: root}
    found = {folder.name: folder for folder in sorted(root.iterdir()) if (folder / "scans").is_dir()}
    if not found:
        raise InputError(f"{root}: no folder scans/ in it or in a folder of it; expected {LAYOUT}.")
    return found


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files of a folder with one of these endings, by name without it. Raises InputError when two share one."""
    found: dict[str, Path] = {}
    for name in sorted(files.listing(folder)):
        path = folder / name
        if path.suffix.lower() not in suffixes or name.startswith("."):
            continue
        if path.stem in found:
            raise InputError(f"{folder}: {found[path.stem].name} and {name} share one name; remove one of them.")
        found[path.stem] = path
    return found
