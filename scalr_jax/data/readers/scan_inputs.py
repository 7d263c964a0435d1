"""Input of predict and visualize: a scan's file, a folder of them, or one frame of a dataset, as a `Frame`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scalr_jax.data import transforms
from scalr_jax.data.readers import calibration, files, folder_settings
from scalr_jax.data.readers.folder import Folder
from scalr_jax.data.readers.nuscenes import VERSIONS, NuScenes
from scalr_jax.data.readers.pandaset import SENSORS as PANDASET
from scalr_jax.data.readers.pandaset import PandaSet
from scalr_jax.data.readers.raw import RawDataset
from scalr_jax.data.readers.scan_files import SUFFIXES, read_scan
from scalr_jax.data.readers.semantic_kitti import SemanticKITTI
from scalr_jax.data.scenes import Dataset, Frame
from scalr_jax.runtime.errors import BadFrameError, InputError

PANDASET_SUFFIXES = (".pkl.gz", ".pkl")
NUSCENES_SUFFIX = ".pcd.bin"  # headerless, in spite of the name, and of five columns
KINDS = (*SUFFIXES, *PANDASET_SUFFIXES)
MIN_DEPTH = 1.0  # metres before the camera, of a visible point


def list_scans(path: str | Path) -> list[Path]:
    """The scans that an input names: the file itself, or those of a folder by name (its own, not of folders in it).

    Raises InputError: a missing path, a folder without a scan, or two scans that would write to the same output.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; give a scan ({', '.join(KINDS)}) or a folder of scans")

    def in_folder(folder: Path) -> list[Path]:
        return [folder / name for name in sorted(files.listing(folder)) if name.lower().endswith(KINDS)]

    scans = [scan for scan in in_folder(path) if scan.name[0] != "." and scan.is_file()]
    if not scans:
        inside = sorted(child.name for child in path.iterdir() if in_folder(child))
        hint = f"; its folders {', '.join(inside[:5])} have some" if inside else ""
        raise InputError(f"{path}: no scan in this folder, no file that ends in {', '.join(KINDS)}{hint}")
    by_stem: dict[str, Path] = {}
    for scan in scans:
        if (other := by_stem.setdefault(stem(scan), scan)) is not scan:
            raise InputError(
                f"{path}: {other.name} and {scan.name} would write to the same output; put them in separate folders"
            )
    return scans


def stem(path: Path) -> str:
    """A scan's name without its ending: "000000", "45" of "45.pkl.gz"."""
    ending = next((suffix for suffix in (".pkl.gz", NUSCENES_SUFFIX) if path.name.lower().endswith(suffix)), None)
    return path.name[: -len(ending)] if ending else path.stem


def read_frame(path: Path, *, columns: int | None = None, sensor: str | None = None) -> Frame:
    """One scan's file as a frame without image or labels. Raises as `read_scan`.

    Args:
      path: .bin, .npy, .pcd or .ply; or PandaSet's `<root>/<scene>/lidar/45.pkl.gz`, whose poses lie beside it.
      columns: of a .bin file. None: 5 for nuScenes (`.pcd.bin`, or `sensor`), else 4.
      sensor: whose scan it is; for PandaSet's files, which hold both lidars, "pandar64" (None) or "pandargt".
    """
    if path.name.lower().endswith(PANDASET_SUFFIXES):
        return _read_pandaset(path, sensor or "pandar64")
    if columns is None and (path.name.lower().endswith(NUSCENES_SUFFIX) or sensor == "nuscenes"):
        columns = 5
    return Frame(path.name, read_scan(path, columns=columns).points, np.eye(4))


def _read_pandaset(path: Path, sensor: str) -> Frame:
    if not path.is_file():
        raise BadFrameError(f"{path}: no such file.")
    number, folder = stem(path), path.resolve().parent
    if sensor not in PANDASET or folder.name != "lidar" or not number.isdecimal():
        raise InputError(
            f"{path}: a .pkl.gz file is read as PandaSet's <scene>/lidar/NN.pkl.gz, with its sensor= one of "
            f"{', '.join(PANDASET)} ({sensor!r} was given)"
        )
    scene = folder.parent
    dataset = PandaSet(scene.parent, sensor=sensor, split="all", scenes=[scene.name], frames=[int(number)], cameras=())
    return dataset.frame(0, camera=None)


def student_points(frame: Frame) -> np.ndarray:
    """A frame's points [N, 4] float32 in the student's frame: x, y, z (metres), raw intensity."""
    points = np.empty((len(frame.points), 4), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # points that are no numbers stay so
        points[:, :3] = transforms.to_ego(frame.points, frame.to_ego)
        points[:, 3] = frame.points[:, 3]
    return points


def pair_image(frame: Frame, image: Path, cameras: Path, camera: str | None = None) -> Frame:
    """A scan (in the lidar's frame) with its photograph, by a calibration as docs/data.md has it.

    cameras: JSON, as "cameras" of dataset.json: {"front": {"intrinsics": ..., "size": ..., "lidar_to_camera": ...}}.
    camera: which of them; None when there is one. Raises InputError or BadFrameError: the calibration or the image is
    none, or no point projects into it.
    """
    known = folder_settings.read_cameras(cameras)
    if camera is None and len(known) != 1:
        raise InputError(f"{cameras}: {len(known)} cameras, {', '.join(known)}; name one of them")
    name = camera or next(iter(known))
    files.check_choice("camera", name, known)
    finite = np.asarray(np.isfinite(frame.points[:, :3]).all(axis=1))  # points that are no numbers are not visible
    pixels, visible = calibration.project(np.where(finite[:, None], frame.points[:, :3], 0.0), known[name], MIN_DEPTH)
    visible &= finite
    if not visible.any():
        reason = calibration.explain_nothing_visible(frame.points, known[name], MIN_DEPTH)
        raise BadFrameError(f"{frame.name}/{name}: none of {len(visible)} points projects into the image; {reason}.")
    return frame._replace(image=files.read_image(image, known[name].size), pixels=pixels, visible=visible)


def dataset_frame(dataset: Dataset, index: int, camera: str | None = None) -> Frame:
    """Frame `index` of a reader, with an image where it has one: of the named camera, or of the first.

    Raises InputError for an unknown index or camera, BadFrameError for a damaged frame.
    """
    if not 0 <= index < len(dataset):
        raise InputError(f"frame {index} is none of 0 to {len(dataset) - 1}")
    if not isinstance(dataset, RawDataset):  # streets and records: each frame has its image, or none
        if camera is not None:
            raise InputError(f"{dataset.name(index)}: camera {camera!r} cannot be chosen, the frame has one image")
        return dataset.frame(index, np.random.default_rng(0))
    cameras = dataset.cameras_of(index)
    if camera is not None:
        files.check_choice("camera", camera, cameras or ("none: the frame has no image",))
    preferred = [name for name in cameras if "front" in name.lower()] or list(cameras)
    return dataset.frame(index, camera=camera or (min(preferred, key=len) if preferred else None))


def open_reader(name: str, root: Path, *, sensor: str = "", **options: Any) -> RawDataset:
    """A raw dataset's reader; for nuScenes the version on disk. Raises InputError.

    name: nuscenes, semantic_kitti, folder, pandaset or one of its lidars. sensor: of pandaset. options: the reader's.
    """
    readers: dict[str, Callable[..., RawDataset]]
    readers = {"nuscenes": NuScenes, "semantic_kitti": SemanticKITTI, "folder": Folder}
    files.check_choice("dataset", name, (*readers, "pandaset", *PANDASET))
    if name == "nuscenes":
        options = {"version": next((v for v in VERSIONS if (root / v).is_dir()), "v1.0-mini"), **options}
    elif name not in readers:
        options["sensor"] = sensor or (name if name in PANDASET else "pandar64")
    return readers.get(name, PandaSet)(root, **options)


def open_dataset(name: str, root: Path, *, split: str = "all", labels: bool | None = None) -> RawDataset:
    """As `open_reader`, for looking at frames: with images, and with labels where the same frames have some.

    labels: True for frames with labels, also when they have no image; False for no labels.
    """
    reader = functools.partial(open_reader, name, root, split=split)
    try:
        plain = reader(labels=False)
    except InputError:  # no frame has an image
        plain = reader(labels=bool(labels), cameras=())
    if labels is False:
        return plain
    for cameras in (plain.cameras, ()) if labels else (plain.cameras,):
        try:
            return reader(labels=True, cameras=cameras)
        except InputError:
            if labels and not cameras:
                raise
    return plain
