"""A dataset whose frames have the teacher's tokens in place of an image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from scalr_jax.data.joined import Derived
from scalr_jax.data.readers.files import pick_camera
from scalr_jax.data.scenes import RANDOM, Dataset, Frame
from scalr_jax.data.tokens.store import TokenStore, look
from scalr_jax.runtime.errors import BadFrameError, InputError

TOLERANCE = 8  # of 255: what resizing or storing an image anew changes a `look` by is less


def images_of(dataset: Dataset) -> Iterator[tuple[int, str | None, str]]:
    """(frame, camera or None, name) of every image that a dataset's frames may be drawn with."""
    for index in range(len(dataset)):
        name = dataset.name(index)
        for camera in dataset.cameras_of(index):
            yield index, camera, f"{name}/{camera}"
        if not dataset.cameras_of(index):
            yield index, None, name


def image_of(dataset: Dataset, index: int, camera: str | None) -> np.ndarray:
    """An image [h, w, 3] uint8 of those that `images_of` lists. Raises BadFrameError."""
    image = dataset.frame(index, camera=camera or RANDOM).image
    if image is None:
        raise BadFrameError(f"{dataset.name(index)}: the frame has no image")
    return image


class WithTokens(Derived):
    """The frames of `dataset`, with tokens and without images; the same cameras are drawn. `dataset` is taken over: it
    does not decode images any more.

    Raises InputError when the store lacks an image of the dataset, or is of another dataset.
    """

    def __init__(self, dataset: Dataset, store: TokenStore):
        super().__init__([dataset])
        self._path, self._files = store.path, store.files
        places, counts, missing, total = [], [], [], 0
        for index, _, name in images_of(dataset):
            total += 1
            counts.append(index)
            places.append(store.rows.get(name, (-1, -1)))
            if name not in store.rows:
                missing.append(name)
        if missing:
            raise InputError(
                f"teacher.cache = {store.path} has tokens of {total - len(missing)} of the {total} images of the data, "
                f"and none of {missing[0]} (its own are named like {next(iter(store.rows))}); give the cache of this "
                "dataset, or write it with scalr_jax.prepare --teacher for all its frames"
            )
        self._places = np.array(places, np.int32).reshape(-1, 2)  # file and row of each image
        self._first = np.searchsorted(counts, np.arange(len(dataset)))  # each frame's first image
        self._compare(dataset, store)
        _leave_images(dataset)

    def _compare(self, dataset: Dataset, store: TokenStore) -> None:
        """Raises InputError when one of the dataset's images does not look like that of its name in the store."""
        shards = [shard for header in store.headers.values() for shard in header["shards"]]
        looks = {shard["images"][0]: shard["look"] for shard in shards if shard["look"] and shard["images"]}
        for index, camera, name in images_of(dataset) if looks else ():
            if name in looks:
                try:
                    here = np.array(look(image_of(dataset, index, camera)))
                except BadFrameError:
                    continue
                if here.shape != (len(looks[name]),) or np.abs(here - looks[name]).max() > TOLERANCE:
                    raise InputError(
                        f"teacher.cache = {store.path} was made from other images: its {name} does not look like the "
                        "dataset's; give the cache of this dataset, or write it with scalr_jax.prepare --teacher"
                    )
                return

    def __len__(self) -> int:
        return len(self.datasets[0])

    def locate(self, index: int) -> tuple[Dataset, int]:
        return self.datasets[0], index

    def describe(self) -> str:
        return f"{self.datasets[0].describe()}\nno image is decoded: the teacher's tokens are in {self._path}"

    def frame(self, index: int, rng: np.random.Generator | None = None, *, camera: str | None = RANDOM) -> Frame:
        """As `Dataset.frame`, also when the tokens are missing or damaged."""
        (dataset,), cameras = self.datasets, self.datasets[0].cameras_of(index)
        if camera == RANDOM and cameras:
            camera = pick_camera(RANDOM, cameras, cameras, rng)
        frame = dataset.frame(index, rng, camera=camera)
        if camera is None:
            return frame
        number, row = self._places[self._first[index] + (cameras.index(camera) if cameras else 0)]
        if number < 0:
            raise BadFrameError(f"{frame.name}: {self._path} has no tokens of it, as its image was bad")
        shape = frame.image_shape or (None if frame.image is None else (frame.image.shape[0], frame.image.shape[1]))
        return frame._replace(image=None, image_shape=shape, tokens=self._files[number].read(int(row)))


def _leave_images(dataset: Dataset) -> None:
    dataset.decode = False
    for part in dataset.datasets if isinstance(dataset, Derived) else ():
        _leave_images(part)
