"""From a raw dataset's frames to the examples of their records; `builders.py` says what is in them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from scalr_jax.data import transforms
from scalr_jax.data.readers import files
from scalr_jax.data.readers.raw import RawDataset
from scalr_jax.data.readers.scan_inputs import student_points
from scalr_jax.data.scenes import Dataset, Frame, Voxels
from scalr_jax.prepare.builders import to_bytes
from scalr_jax.runtime.errors import BadFrameError, NothingVisibleError

JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}  # 4:4:4
FORMATS = ("original", "jpeg", "raw")


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

    def __init__(self, reader: Dataset | None, labelled: Dataset | None, voxel_size: float, images: Images) -> None:
        self.reader, self.labelled, self.voxel_size, self.images = reader, labelled, voxel_size, images
        names = {} if reader is None else {reader.name(i): i for i in range(len(reader)) if self._cameras_of(i)}
        in_labelled = {} if labelled is None else {labelled.name(i): i for i in range(len(labelled))}
        order = [*names, *(name for name in in_labelled if name not in names)]
        self._plain = np.array([names.get(name, -1) for name in order], np.int32)
        self._labelled = np.array([in_labelled.get(name, -1) for name in order], np.int32)

    def __len__(self) -> int:
        return len(self._plain)

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras that a frame may have; "camera" where a reader's images are no files (generated streets)."""
        if self.reader is None:
            return ()
        return self.reader.cameras if isinstance(self.reader, RawDataset) else ("camera",)

    @property
    def dataset(self) -> Dataset:
        """The reader, or `labelled` where there is none."""
        dataset = self.labelled if self.reader is None else self.reader
        assert dataset is not None
        return dataset

    def _place(self, index: int) -> tuple[Dataset, int]:
        """The reader that names a frame, and the frame's number there."""
        plain = int(self._plain[index])
        if self.labelled is None or plain >= 0:
            return self.dataset, plain
        return self.labelled, int(self._labelled[index])

    def _cameras_of(self, plain: int) -> tuple[str, ...]:
        return self.reader.cameras_of(plain) if isinstance(self.reader, RawDataset) else self.cameras

    def name(self, index: int) -> str:
        reader, number = self._place(index)
        return reader.name(number)

    def scan_file(self, index: int) -> str:
        """The scan's path below the dataset's root; "" where the reader does not know it."""
        reader, number = self._place(index)
        return reader.scan_file(number)

    def prepare(self, index: int) -> Prepared:
        """Everything that is stored of a frame. Raises BadFrameError when its scan or labels cannot be used."""
        plain, labelled = int(self._plain[index]), int(self._labelled[index])
        reader, number = self._place(index)
        if self.labelled is not None and labelled >= 0:
            reader, number = self.labelled, labelled
        name, scan = self.name(index), reader.frame(number, camera=None)
        if len(scan.points) == 0:
            raise BadFrameError(f"{name}: the scan has no points")
        voxels, points = transforms.find_voxels(scan.points, self.voxel_size), student_points(scan)
        prepared = Prepared(name, [], labelled >= 0, [], [], scan.points.dtype.name)
        if labelled >= 0:
            prepared.examples.append(scan_example(scan, points))
        for camera in self._cameras_of(plain) if plain >= 0 else ():
            try:
                view, path = self._view(scan, plain, camera)
                content = self._image(view, path)
            except NothingVisibleError:
                continue
            except BadFrameError as error:
                prepared.problems.append(str(error))
                continue
            prepared.examples.append(view_example(view, points, voxels, camera, content))
            prepared.cameras.append(camera)
        if not prepared.examples:
            problems = " ".join(prepared.problems)
            raise BadFrameError(f"{name}: no camera sees anything, or no image can be read {problems}")
        return prepared

    def an_image(self, index: int) -> list[np.ndarray]:
        """One of a frame's images [h, w, 3] uint8 as the raw reader gives it; none where there is none."""
        plain, image = int(self._plain[index]), None
        with contextlib.suppress(BadFrameError):
            image = None if plain < 0 else self.dataset.frame(plain, np.random.default_rng(index)).image
        return [] if image is None else [image]

    def _view(self, scan: Frame, plain: int, camera: str) -> tuple[Frame, Path | None]:
        """A scan paired with one camera, and the image's file; None where it is no file."""
        if isinstance(self.reader, RawDataset):
            return self.reader.view(scan, plain, camera), self.reader.image_path(plain, camera)
        return self.dataset.frame(plain), None

    def _image(self, view: Frame, path: Path | None) -> tuple[bytes, tuple[int, int]]:
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


def encode_image(image: np.ndarray, image_format: str) -> bytes:
    """[h, w, 3] uint8 -> bytes. "original", where there is no file, is a PNG."""
    if image_format == "raw":
        return image.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **(JPEG if image_format == "jpeg" else {"format": "PNG"}))
    return buffer.getvalue()


def scan_example(scan: Frame, points: np.ndarray) -> dict[str, bytes]:
    """A whole scan: every point, in its order. points [N, 4]: `student_points(scan)`.

    Without voxels: finding those of the student's frame takes 5 ms of the scan's 35 to 180 (Pandar64, 2026-11-27).
    """
    example = {"name": scan.name.encode(), "points": to_bytes(points, "f4")}
    if scan.labels is not None:
        example["labels"] = to_bytes(scan.labels, "u1")
    if scan.beams is not None:
        example["beams"] = to_bytes(scan.beams, "u1")
    if scan.to_sensor is not None:
        example["to_sensor"] = to_bytes(scan.to_sensor @ np.linalg.inv(scan.to_ego), "f8")
    return example


def view_example(
    view: Frame, points: np.ndarray, voxels: Voxels, camera: str, image: tuple[bytes, tuple[int, int]]
) -> dict[str, bytes]:
    """The points of the voxels that a camera sees, voxel by voxel, with their pixels and the image.

    points [N, 4]: `student_points` of the scan. image: what is stored, and its rows and columns.
    """
    assert view.visible is not None and view.pixels is not None and view.image is not None  # noqa: PT018
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
    psnr = float(10 * np.log10(255.0**2 / max(float(np.square(difference).mean()), 1e-9)))
    largest = float(difference.max())
    return {"mean_abs": float(difference.mean()), "max_abs": largest, "psnr_db": psnr, "images": len(views)}
