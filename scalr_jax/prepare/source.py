"""From a raw dataset's frames to the examples of their records; `builders.py` says what is in them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from scalr_jax.data import transforms
from scalr_jax.data.readers import files
from scalr_jax.data.scenes import Frame, Voxels
from scalr_jax.prepare.builders import to_bytes
from scalr_jax.runtime.errors import BadFrameError, NothingVisibleError

JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}  # 4:4:4
FORMATS = ("original", "jpeg", "raw")


@runtime_checkable
class ManyViews(Protocol):
    """A reader that can pair one scan with each of its cameras, from image files."""

    cameras: tuple[str, ...]

    def frame(self, index: int, rng: Any = None, *, camera: str | None = ...) -> Frame: ...
    def cameras_of(self, index: int) -> Sequence[str]: ...
    def image_path(self, index: int, camera: str) -> Path: ...
    def view(self, scan: Frame, index: int, camera: str) -> Frame: ...


class Images(NamedTuple):
    """How images are stored."""

    format: str  # "original": the file's bytes; "jpeg": quality 95, 4:4:4; "raw": [h, w, 3] uint8
    size: tuple[int, int] | None = None  # rows, columns; None: as they are


class Prepared(NamedTuple):
    """One frame's records."""

    name: str
    examples: list[dict[str, bytes]]
    has_scan: bool  # the first example is the whole scan
    cameras: list[str]  # of the other examples, in order
    problems: list[str]  # images that were left out, and why
    dtype: str  # of the raw points


class Source:
    """The frames of one split: those with an image, and with `labelled` those with labels.

    Args:
      reader: the dataset, opened without labels; None where no frame has an image.
      labelled: the same split opened with `labels=True`; None: whole scans and labels are not stored.
      voxel_size: metres.
      images: how they are stored.
    """

    def __init__(self, reader: Any, labelled: Any, voxel_size: float, images: Images) -> None:
        self.reader, self.labelled, self.voxel_size, self.images = reader, labelled, voxel_size, images
        names = {} if reader is None else {reader.name(i): i for i in range(len(reader)) if _has_image(reader, i)}
        in_labelled = {} if labelled is None else {labelled.name(i): i for i in range(len(labelled))}
        order = [*names, *(name for name in in_labelled if name not in names)]
        self._plain = np.array([names.get(name, -1) for name in order], np.int32)
        self._labelled = np.array([in_labelled.get(name, -1) for name in order], np.int32)

    def __len__(self) -> int:
        return len(self._plain)

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras that a frame may have."""
        if self.reader is None:
            return ()
        return tuple(self.reader.cameras) if isinstance(self.reader, ManyViews) else ("camera",)

    def _place(self, index: int) -> tuple[Any, int]:
        """The reader that names a frame, and the frame's number there."""
        plain = int(self._plain[index])
        return (self.reader, plain) if plain >= 0 else (self.labelled, int(self._labelled[index]))

    def name(self, index: int) -> str:
        reader, number = self._place(index)
        return reader.name(number)

    def scan_file(self, index: int) -> str | None:
        """The scan's path below the dataset's root, where the reader knows it."""
        reader, number = self._place(index)
        return reader.scan_file(number) if hasattr(reader, "scan_file") else None

    def prepare(self, index: int) -> Prepared:
        """Everything that is stored of a frame. Raises BadFrameError when its scan or labels cannot be used."""
        plain, labelled = int(self._plain[index]), int(self._labelled[index])
        name = self.name(index)
        if plain >= 0 and not isinstance(self.reader, ManyViews):
            return self._prepare_single(name, self.reader.frame(plain), labelled >= 0)
        scan = self.labelled.frame(labelled, camera=None) if labelled >= 0 else self.reader.frame(plain, camera=None)
        if len(scan.points) == 0:
            raise BadFrameError(f"{name}: the scan has no points")
        voxels, points = transforms.find_voxels(scan.points, self.voxel_size), student_points(scan)
        prepared = Prepared(name, [], labelled >= 0, [], [], scan.points.dtype.name)
        if labelled >= 0:
            prepared.examples.append(scan_example(scan, points))
        for camera in self.reader.cameras_of(plain) if plain >= 0 else ():
            try:
                view = self.reader.view(scan, plain, camera)
                content = self._image(view, self.reader.image_path(plain, camera))
            except NothingVisibleError:
                continue
            except BadFrameError as error:
                prepared.problems.append(str(error))
                continue
            prepared.examples.append(view_example(view, points, voxels, camera, content))
            prepared.cameras.append(camera)
        if not prepared.examples:
            raise BadFrameError(
                f"{name}: no camera sees anything, or no image can be read {' '.join(prepared.problems)}"
            )
        return prepared

    def an_image(self, index: int) -> list[np.ndarray]:
        """One of a frame's images [h, w, 3] uint8 as the raw reader gives it; none where there is none."""
        plain = int(self._plain[index])
        try:
            return [] if plain < 0 else [self.reader.frame(plain, np.random.default_rng(index)).image]
        except BadFrameError:
            return []

    def _prepare_single(self, name: str, frame: Frame, with_scan: bool) -> Prepared:
        """Of a reader without image files (generated streets): one image a frame, and labels where there are any."""
        if frame.image is None or len(frame.points) == 0:
            raise BadFrameError(f"{name}: no image, or no points")
        voxels, points = transforms.find_voxels(frame.points, self.voxel_size), student_points(frame)
        examples = [scan_example(frame, points)] if with_scan else []
        examples.append(view_example(frame, points, voxels, "camera", self._image(frame)))
        return Prepared(name, examples, with_scan, ["camera"], [], frame.points.dtype.name)

    def _image(self, view: Frame, path: Path | None = None) -> tuple[bytes, tuple[int, int]]:
        """What is stored of a view's image, and its rows and columns."""
        image = view.image
        assert image is not None
        if self.images.size is not None:
            image = transforms.resize_image(image, self.images.size, antialias=True)
        elif self.images.format == "original" and path is not None:
            try:
                return path.read_bytes(), (image.shape[0], image.shape[1])
            except OSError as error:
                raise BadFrameError(f"{path}: cannot be read ({error.strerror}).") from error
        return encode_image(image, self.images.format), (image.shape[0], image.shape[1])


def _has_image(reader: Any, index: int) -> bool:
    return not isinstance(reader, ManyViews) or bool(reader.cameras_of(index))


def encode_image(image: np.ndarray, image_format: str) -> bytes:
    """[h, w, 3] uint8 -> bytes. "original", where there is no file, is a PNG."""
    if image_format == "raw":
        return image.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **(JPEG if image_format == "jpeg" else {"format": "PNG"}))
    return buffer.getvalue()


def student_points(frame: Frame) -> np.ndarray:
    """[N, 4] float32: x, y, z in the student's frame (metres) as `make_scene` computes them, raw intensity."""
    xyz = transforms.to_ego(frame.points, frame.to_ego)
    return np.concatenate([xyz, frame.points[:, 3:4].astype(np.float32)], axis=1)


def scan_example(scan: Frame, points: np.ndarray) -> dict[str, bytes]:
    """A whole scan: every point, in its order. points [N, 4]: `student_points(scan)`.

    Without voxels: finding those of the student's frame takes 5 ms of the scan's 35 to 180 (Pandar64, 2026-11-27).
    """
    to_sensor = None if scan.to_sensor is None else scan.to_sensor @ np.linalg.inv(scan.to_ego)
    return {
        "name": scan.name.encode(),
        "points": to_bytes(points, "f4"),
        "labels": b"" if scan.labels is None else to_bytes(scan.labels, "u1"),
        "beams": b"" if scan.beams is None else to_bytes(scan.beams, "u1"),
        "to_sensor": b"" if to_sensor is None else to_bytes(to_sensor, "f8"),
    }


def view_example(
    view: Frame, points: np.ndarray, voxels: Voxels, camera: str, image: tuple[bytes, tuple[int, int]]
) -> dict[str, bytes]:
    """The points of the voxels that a camera sees, voxel by voxel, with their pixels and the image.

    points [N, 4]: `student_points` of the scan. image: what is stored, and its rows and columns.
    """
    assert view.visible is not None
    assert view.pixels is not None
    assert view.image is not None
    lengths = np.diff(voxels.start)  # [v]
    seen = np.add.reduceat(view.visible[voxels.order], voxels.start[:-1]) > 0  # [v]
    kept = voxels.order[np.repeat(seen, lengths)]  # [n]
    content, stored_size = image
    return {
        "name": view.name.encode(),
        "camera": camera.encode(),
        "points": to_bytes(points[kept], "f4"),
        "voxel_start": to_bytes(np.append(0, np.cumsum(lengths[seen])), "i4"),
        "visible": to_bytes(view.visible[kept], "u1"),
        "pixels": to_bytes(view.pixels[kept], "f8"),
        "image": content,
        "image_shape": to_bytes(np.array([*view.image.shape[:2], *stored_size]), "i4"),
    }


def fidelity(views: Sequence[np.ndarray], images: Images) -> dict[str, float] | None:
    """What storing costs: images [h, w, 3] uint8, resized with all their bits, beside what is read back.

    Returns mean and largest absolute difference (of 255) and the PSNR in dB; None when nothing is lost.
    """
    if images.format != "jpeg" or not views:
        return None
    differences = []
    for image in views:
        if images.size is not None:
            image = transforms.resize_image(image, images.size, antialias=True)
        back = files.decode_image(encode_image(image, images.format), "sample")
        differences.append(np.abs(back.astype(np.float64) - image).ravel())
    difference = np.concatenate(differences)
    square = float(np.square(difference).mean())
    return {
        "mean_abs": float(difference.mean()),
        "max_abs": float(difference.max()),
        "psnr_db": float(10 * np.log10(255.0**2 / max(square, 1e-9))),
        "images": len(views),
    }
