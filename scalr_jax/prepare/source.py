"""From a raw dataset's frames to the examples of their records; `layout.py` lists their fields."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from scalr_jax.data import grids, transforms
from scalr_jax.data.readers import files
from scalr_jax.data.readers.raw import RawDataset
from scalr_jax.data.readers.scan_inputs import student_points
from scalr_jax.data.scenes import Dataset, Frame, Voxels
from scalr_jax.prepare.layout import to_bytes
from scalr_jax.runtime.errors import BadFrameError, NothingVisibleError

JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}  # 4:4:4


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
        # Each frame's name, and its number in `reader` and in `labelled`; None where it is not there.
        self._frames = [(name, names.get(name), in_labelled.get(name)) for name in {**names, **in_labelled}]

    def __len__(self) -> int:
        return len(self._frames)

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
        """The reader that a frame's scan is read by, with its labels where there are some, and its number there."""
        _, plain, labelled = self._frames[index]
        if self.labelled is not None and labelled is not None:
            return self.labelled, labelled
        assert plain is not None
        return self.dataset, plain

    def _cameras_of(self, plain: int) -> tuple[str, ...]:
        return self.reader.cameras_of(plain) if isinstance(self.reader, RawDataset) else self.cameras

    def name(self, index: int) -> str:
        return self._frames[index][0]

    def scan_file(self, index: int) -> str:
        """The scan's path below the dataset's root; "" where the reader does not know it."""
        reader, number = self._place(index)
        return reader.scan_file(number)

    def prepare(self, index: int) -> Prepared:
        """Everything that is stored of a frame. Raises BadFrameError when its scan or labels cannot be used."""
        (name, plain, labelled), (reader, number) = self._frames[index], self._place(index)
        scan = reader.frame(number, camera=None)
        if len(scan.points) == 0:
            raise BadFrameError(f"{name}: the scan has no points")
        voxels, points = grids.find_voxels(scan.points, self.voxel_size), student_points(scan)
        prepared = Prepared(name, [], labelled is not None, [], [], scan.points.dtype.name)
        if prepared.has_scan:
            prepared.examples.append(scan_example(scan, points))
        for camera in self._cameras_of(plain) if plain is not None else ():
            assert plain is not None
            try:
                view, content = self._view(scan, plain, camera)
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
        plain, image = self._frames[index][1], None
        with contextlib.suppress(BadFrameError):
            image = None if plain is None else self.dataset.frame(plain, np.random.default_rng(index)).image
        return [] if image is None else [image]

    def _view(self, scan: Frame, plain: int, camera: str) -> tuple[Frame, tuple[bytes, tuple[int, int]]]:
        """A scan paired with one camera; what is stored of its image, and that image's rows and columns."""
        raw = self.reader if isinstance(self.reader, RawDataset) else None  # the others' images are no files
        view = self.dataset.frame(plain) if raw is None else raw.view(scan, plain, camera)
        image = view.image
        assert image is not None
        if self.images.size is not None:
            image = transforms.resize_image(image, self.images.size, antialias=True)
        elif self.images.format == "original" and raw is not None:
            return view, (files.read_bytes(raw.image_path(plain, camera)), (image.shape[0], image.shape[1]))
        return view, (encode_image(image, self.images.format), (image.shape[0], image.shape[1]))


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
    """The loss in storing: images [h, w, 3] uint8, resized with all their bits, beside what is read back.

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
