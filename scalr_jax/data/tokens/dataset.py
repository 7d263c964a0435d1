"""A dataset whose frames have teachers' tokens, in place of an image or beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from scalr_jax.data.joined import Derived
from scalr_jax.data.readers.files import pick_camera
from scalr_jax.data.scenes import RANDOM, Dataset, Frame
from scalr_jax.data.tokens.store import TokenStore, look
from scalr_jax.runtime.errors import BadFrameError, InputError

TOLERANCE = 8  # of 255: resizing or storing an image again changes a `look` by less


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
    """The frames of `dataset`, with the tokens of each store; the same cameras are drawn. Without `images` frames have
    none, and `dataset` is taken over: it does not decode images any more.

    Raises InputError when a store lacks an image of the dataset, or is of another dataset.
    """

    def __init__(self, dataset: Dataset, *stores: TokenStore, images: bool = False):
        super().__init__([dataset])
        self._paths, self._files = [store.path for store in stores], [store.files for store in stores]
        indices, names = [], []
        for index, _, name in images_of(dataset):
            indices.append(index)
            names.append(name)
        self._places = [_places_in(store, names) for store in stores]  # file and row of each image
        self._first = np.searchsorted(indices, np.arange(len(dataset)))  # each frame's first image
        for store in stores:
            self._compare(dataset, store)
        self._images = images
        if not images:
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
        decoded = "" if self._images else "no image is decoded: "
        return f"{self.datasets[0].describe()}\n{decoded}teachers' tokens are in {', '.join(map(str, self._paths))}"

    def frame(self, index: int, rng: np.random.Generator | None = None, *, camera: str | None = RANDOM) -> Frame:
        """As `Dataset.frame`, also when the tokens are missing or damaged."""
        (dataset,), cameras = self.datasets, self.datasets[0].cameras_of(index)
        if camera == RANDOM and cameras:
            camera = pick_camera(RANDOM, cameras, cameras, rng)
        frame = dataset.frame(index, rng, camera=camera)
        if camera is None:
            return frame
        place, tokens = self._first[index] + (cameras.index(camera) if cameras else 0), []
        for path, files, places in zip(self._paths, self._files, self._places, strict=True):
            number, row = places[place]
            if number < 0:
                raise BadFrameError(f"{frame.name}: {path} has no tokens of it, because its image was bad")
            tokens.append(files[number].read(int(row)))
        shape = frame.image_shape or (None if frame.image is None else (frame.image.shape[0], frame.image.shape[1]))
        image = frame.image if self._images else None
        return frame._replace(image=image, image_shape=shape, tokens=tuple(tokens))


def _places_in(store: TokenStore, names: Sequence[str]) -> np.ndarray:
    """File and row [images, 2] int32 of each image. Raises InputError when the store lacks one."""
    if missing := [name for name in names if name not in store.rows]:
        total = len(names)
        raise InputError(
            f"teacher.cache = {store.path} has tokens of {total - len(missing)} of the {total} images of the data, "
            f"and none of {missing[0]} (its own are named like {next(iter(store.rows))}); give the cache of this "
            "dataset, or write it with scalr_jax.prepare --teacher for all its frames"
        )
    return np.array([store.rows[name] for name in names], np.int32).reshape(-1, 2)


def _leave_images(dataset: Dataset) -> None:
    dataset.decode = False
    for part in dataset.datasets if isinstance(dataset, Derived) else ():
        _leave_images(part)
