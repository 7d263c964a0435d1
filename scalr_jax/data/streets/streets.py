"""Generated streets as a dataset: rendered once into a cache, read back with NumPy only.

A street is a pure function of one integer (`split_seed`); a cache file also depends on the sensor, the image size and
`VERSION`, and its name says all of them. Rendering (`sensors.render`) needs JAX and happens in the main
process, before data workers start; reading needs none, so that a worker never starts a JAX backend.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from scalr_jax.data.readers import files
from scalr_jax.data.scenes import RANDOM, Dataset, Frame
from scalr_jax.data.streets.layout import CLASSES
from scalr_jax.data.streets.sensors import SENSORS, render
from scalr_jax.runtime.chips import check_room
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.runtime.logging import format_seconds
from scalr_jax.runtime.storage import reason, write_arrays

VERSION = 2  # raise it whenever a rendered byte changes
SPLITS = ("train", "validation", "teacher")
SCENES_PER_STREAM = 100_000  # index < this
STREAMS_PER_SPLIT = 10_000_000  # seed < this
PROGRESS_SECONDS = 3.0
BYTES_A_PIXEL = 1_500  # the most that rendering takes (896 x 1792, 2026-11-28)
FIELDS = ("points", "labels", "image", "pixels", "visible")


def split_seed(split: str, index: int, seed: int = 0) -> int:
    """The street's seed for scene `index` of `split`, another one for every (split, seed, index).

    Raises InputError: unknown split, or an index or seed outside its range (the ranges of two splits never meet).
    """
    if split not in SPLITS:
        raise InputError(f"split = {split!r} is none of {', '.join(SPLITS)}")
    if not 0 <= index < SCENES_PER_STREAM or not 0 <= seed < STREAMS_PER_SPLIT:
        raise InputError(
            f"scene {index} of seed {seed}: needs 0 <= scene < {SCENES_PER_STREAM} and 0 <= seed < {STREAMS_PER_SPLIT}"
        )
    return (SPLITS.index(split) * STREAMS_PER_SPLIT + seed) * SCENES_PER_STREAM + index


class Streets(Dataset):
    """Scenes 0 to `num_scenes` - 1 of a split; scene i is seen by `sensors[i % len(sensors)]`, keys of `SENSORS`.

    root: folder of the cache; made when missing. split: "train", "validation" or "teacher". image_size: rows and
    columns. Raises InputError: an unknown split or sensor, or a seed out of range.
    """

    class_names = CLASSES

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        split: str,
        num_scenes: int,
        sensors: Sequence[str] = ("beams32",),
        image_size: tuple[int, int] = (112, 224),
        seed: int = 0,
    ):
        unknown = [sensor for sensor in sensors if sensor not in SENSORS]
        if unknown or not sensors:
            raise InputError(f"sensors = {tuple(sensors)}: give some of {', '.join(SENSORS)}")
        split_seed(split, max(num_scenes - 1, 0), seed)
        self.root = Path(root)
        self.split, self.num_scenes, self.sensors = split, num_scenes, tuple(sensors)
        self.image_size, self.seed = (int(image_size[0]), int(image_size[1])), seed

    def __len__(self) -> int:
        return self.num_scenes

    def name(self, index: int) -> str:
        """As "streets/train/0"."""
        return f"streets/{self.split}/{index}"

    def describe(self) -> str:
        """A short table of what there is."""
        h, w = self.image_size
        rows = [("scenes", len(self)), ("sensors", ", ".join(self.sensors)), ("images", f"{h} x {w}")]
        rows.append(("labelled frames", len(self)))
        return files.format_table(f"Generated streets, split {self.split}: {self.root}", rows)

    def sensor(self, index: int) -> str:
        return self.sensors[index % len(self.sensors)]

    def intensity(self, index: int) -> tuple[float, float]:
        return SENSORS[self.sensor(index)].intensity

    def path(self, index: int) -> Path:
        """The cache file of scene `index`."""
        h, w = self.image_size
        return self.root / f"{self.split}-{self.sensor(index)}-{h}x{w}-seed{self.seed}-v{VERSION}-{index:05d}.npz"

    def render_missing(self, progress: Callable[[str], None] | None = print, part: tuple[int, int] = (0, 1)) -> int:
        """Renders the scenes that the cache lacks and returns their number; `progress` gets a line now and then.

        `part` (k, n): only every n-th scene from the k-th on, one process's share.
        """
        missing = [index for index in range(part[0], self.num_scenes, part[1]) if not self.path(index).exists()]
        if missing:
            needed = BYTES_A_PIXEL * self.image_size[0] * self.image_size[1]
            check_room(needed, f"rendering streets at an image size of {self.image_size}", "give a smaller one")
        self.root.mkdir(parents=True, exist_ok=True)
        if progress and missing:
            progress(f"streets: rendering {len(missing)} scenes of {self.split}, compiling")
        start = said = time.monotonic()
        for done, index in enumerate(missing):
            seed = split_seed(self.split, index, self.seed)
            scene = render(seed, self.sensor(index), self.image_size)
            write_arrays(self.path(index), {field: getattr(scene, field) for field in FIELDS})
            now = time.monotonic()
            if done == 0:  # which waited for the compiler
                start = said = now
            elif progress and (now - said > PROGRESS_SECONDS or done == len(missing) - 1):
                left = format_seconds((now - start) / done * (len(missing) - 1 - done))
                progress(f"streets: rendering {self.split}, {done + 1} of {len(missing)}, {left} left")
                said = now
        return len(missing)

    def frame(self, index: int, rng: np.random.Generator | None = None, *, camera: str | None = RANDOM) -> Frame:
        """Scene `index` from the cache; points in the lidar's frame, which is the student's.

        Its one image is of a camera without a name; `camera=None` leaves it out. `rng` is not used. Raises
        BadFrameError: the cache file is missing or unreadable; the message names it.
        """
        files.pick_camera(camera, (), (), rng)
        path = self.path(index)
        try:
            with path.open("rb") as file, files.NUMPY_LOAD, np.load(file) as archive:
                arrays = {field: archive[field] for field in FIELDS}
        except FileNotFoundError:
            raise BadFrameError(f"{path} is missing: call render_missing() first") from None
        except (KeyError, *files.UNREADABLE_ARRAYS) as error:
            raise BadFrameError(
                f"{path} cannot be read ({reason(error)}); delete it to have it rendered again"
            ) from error
        scan = Frame(self.name(index), arrays["points"], np.eye(4), labels=arrays["labels"])
        if camera is None:
            return scan
        pixels = arrays["pixels"].astype(np.float64)
        return scan._replace(image=arrays["image"], pixels=pixels, visible=arrays["visible"])
