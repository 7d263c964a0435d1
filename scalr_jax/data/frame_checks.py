"""Checks of a frame, whoever made it: the shapes of `data.scenes.Frame`, and nothing that is not finite."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import numpy as np

from scalr_jax.data.scenes import RANDOM, Dataset, Frame
from scalr_jax.runtime.errors import BadFrameError, InputError, NothingVisibleError

PACKAGE = Path(__file__).parents[1]


def read_views(dataset: Dataset, index: int, number: int, rng: np.random.Generator) -> list[Frame]:
    """One scan with each of up to `number` of its cameras that see something, drawn with `rng`, in their own order.

    Raises as `read_frame`, also for one camera's damaged image.
    """
    cameras = dataset.cameras_of(index)
    if len(cameras) < 2:
        return [read_frame(dataset, index, rng)]
    frames, nothing = [], None
    for k in sorted(rng.permutation(len(cameras))[:number].tolist()):
        try:
            frames.append(read_frame(dataset, index, rng, camera=cameras[k]))
        except NothingVisibleError as error:
            nothing = error
    if nothing is not None and not frames:
        raise nothing
    return frames


def read_frame(dataset: Dataset, index: int, rng: np.random.Generator, *, camera: str | None = RANDOM) -> Frame:
    """A checked frame of a dataset; `camera` as `Dataset.frame` takes it.

    Raises:
        BadFrameError: the dataset's own, or the frame is not as `data.scenes.Frame` says.
        InputError: the dataset's own, or its code, from outside of this package, failed: with the file and the line.
    """
    try:
        frame = dataset.frame(index, rng, camera=camera)
    except (BadFrameError, InputError):
        raise
    except Exception as error:
        outside = [at for at in traceback.extract_tb(error.__traceback__) if not _known(at.filename)]
        if not outside:
            raise
        at = f"{outside[-1].filename}, line {outside[-1].lineno}"
        raise InputError(f"frame {index} of the dataset: {type(error).__name__}: {error} ({at})") from error
    check_frame(frame)
    return frame


def _known(file: str) -> bool:
    """Whether code is this package's or installed, so that an error in it may be a defect of this package."""
    path = Path(file)
    installed = path.is_relative_to(sysconfig.get_path("stdlib")) or "site-packages" in path.parts
    return path.is_relative_to(PACKAGE) or installed or file.startswith("<frozen")


def check_frame(frame: Frame) -> None:
    """Raises BadFrameError, which names the frame and the field, for other shapes than `data.scenes.Frame` says."""
    number = np.shape(frame.points)[:1]
    needed = {"points": (*number, 4), "to_ego": (4, 4)}
    others = {"pixels": (*number, 2), "visible": number, "labels": number, "instances": number}
    given = {name: shape for name, shape in others.items() if getattr(frame, name) is not None}
    for name, shape in (needed | given).items():
        value = getattr(frame, name)
        if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype.kind not in "fiub":
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise BadFrameError(f"{frame.name}: {name} must be a numeric array of shape {shape}; got {found}")
        if name in needed and not np.isfinite(value).all():
            raise BadFrameError(f"{frame.name}: {name} has values that are not finite; leave those points out")
    image = frame.image
    if image is not None and not (image.dtype == np.uint8 and image.shape[2:] == (3,) and image.ndim == 3):
        raise BadFrameError(f"{frame.name}: image must be uint8 [h, w, 3]; got {image.dtype} {image.shape}")
