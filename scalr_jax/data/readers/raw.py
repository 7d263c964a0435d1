"""The base of the readers of raw files: which frames are used, and one scan paired with each of its cameras."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from scalr_jax.data.readers import files
from scalr_jax.data.scenes import RANDOM, Dataset, Frame
from scalr_jax.runtime.errors import InputError, NothingVisibleError


class Entry(Protocol):
    """The fields of a frame's entry that every reader has."""

    @property
    def images(self) -> Collection[str]: ...  # the cameras whose image is there
    @property
    def labels(self) -> object: ...  # false where there are none


E = TypeVar("E", bound=Entry)


class RawDataset(Dataset, Generic[E]):
    """Frames from a dataset's own files. A reader finds the entries, reads an entry's scan and pairs it with an image.

    Attributes:
      root, split, labels: as given.
      cameras: those that `frame` draws from. A frame is listed when one of their images is there.
      known_cameras: those that the dataset may have.
      statistics: mean and standard deviation of the raw intensity.
    """

    root: Path
    split: str
    labels: bool
    known_cameras: tuple[str, ...]
    statistics: tuple[float, float]

    def _choose_cameras(self, cameras: Sequence[str] | None, default: Sequence[str]) -> None:
        """Sets `cameras` to those that are given, or to the default ones, with labels to none."""
        self.cameras = tuple(cameras if cameras is not None else () if self.labels else default)
        for camera in self.cameras:
            files.check_choice("camera", camera, self.known_cameras or ["none: no camera is calibrated"])

    def _choose_entries(self, found: Sequence[E]) -> None:
        """Keeps the frames that have an image of one of `cameras`, and labels where they are asked for."""
        with_image = [e for e in found if self._drawn(e) or not self.cameras]
        labelled = [e for e in found if e.labels or not self.labels]
        self._entries = [e for e in with_image if e.labels or not self.labels]
        self._left_out = f"{len(found) - len(with_image)} without image, {len(found) - len(labelled)} without labels"
        self._num_found = len(found)

    def _nothing(self, among: str, remedy: str) -> InputError:
        """The error for a dataset without a chosen entry."""
        choice = f"split={self.split!r}, cameras={self.cameras}, labels={self.labels}"
        return InputError(f"{self.root}: no frame to use among {among} ({choice}); {remedy}.")

    def _drawn(self, entry: E) -> tuple[str, ...]:
        return tuple(camera for camera in self.cameras if camera in entry.images)

    def _table(self, title: str, scenes: tuple[str, object], scans: str, left_out: str) -> str:
        """The table of `describe`. scenes: a row; scans: their number and kind."""
        images = f"{sum(len(self._drawn(e)) for e in self._entries)} of {len(self) * len(self.cameras)}"
        labelled = sum(bool(entry.labels) for entry in self._entries)
        rows = [scenes, ("frames", f"{len(self)} of {scans}"), ("left out", left_out)]
        rows += [("images", images if self.cameras else "not read"), ("labelled frames", labelled)]
        return files.format_table(f"{title}, split {self.split}: {self.root}", rows)

    def __len__(self) -> int:
        return len(self._entries)

    def intensity(self, index: int) -> tuple[float, float]:
        return self.statistics

    def frame(self, index: int, rng: np.random.Generator | None = None, *, camera: str | None = RANDOM) -> Frame:
        camera = files.pick_camera(camera, self.cameras_of(index), self.known_cameras, rng)
        scan = self._read(self._entries[index], self.name(index))
        return scan if camera is None else self.view(scan, index, camera)

    def cameras_of(self, index: int) -> tuple[str, ...]:
        return self._drawn(self._entries[index])

    def view(self, scan: Frame, index: int, camera: str) -> Frame:
        """`frame(index, camera=camera)` from the frame's scan, `frame(index, camera=None)`. Raises BadFrameError."""
        return self._pair(scan, self._entries[index], camera)

    def image_path(self, index: int, camera: str) -> Path:
        """The image file of one of a frame's cameras."""
        return self._image_path(self._entries[index], camera)

    def _paired(
        self, scan: Frame, camera: str, image: np.ndarray, pixels: np.ndarray, visible: np.ndarray, reason: str
    ) -> Frame:
        """The scan with what its camera sees. Raises NothingVisibleError, with `reason`, when that is no point."""
        name = f"{scan.name}/{camera}"
        if not visible.any():
            raise NothingVisibleError(f"{name}: none of {len(visible)} points projects into the image; {reason}.")
        return scan._replace(name=name, image=image, pixels=pixels, visible=visible)

    @abstractmethod
    def _read(self, entry: E, name: str) -> Frame:
        """A scan without an image. Raises BadFrameError."""

    @abstractmethod
    def _image_path(self, entry: E, camera: str) -> Path: ...

    @abstractmethod
    def _pair(self, frame: Frame, entry: E, camera: str) -> Frame:
        """A scan with one camera's image and the pixels in it. Raises BadFrameError."""
