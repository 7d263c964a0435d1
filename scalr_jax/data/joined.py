"""Several datasets as one, with weights or without; and a part of one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scalr_jax.data.scenes import RANDOM, Dataset, Frame
from scalr_jax.runtime.errors import InputError


class Derived(Dataset):
    """Frames of other datasets: says where each is, and leaves the rest to them."""

    def __init__(self, datasets: Sequence[Dataset]):
        self.datasets = tuple(datasets)
        self.class_names = self.datasets[0].class_names if self.datasets else ()
        self.cameras = tuple(dict.fromkeys(camera for part in self.datasets for camera in part.cameras))
        self.warnings = tuple(dict.fromkeys(text for part in self.datasets for text in part.warnings))

    @abstractmethod
    def locate(self, index: int) -> tuple[Dataset, int]:
        """The dataset of a frame, and its number there."""

    def name(self, index: int) -> str:
        dataset, local = self.locate(index)
        return dataset.name(local)

    def frame(self, index: int, rng: np.random.Generator | None = None, *, camera: str | None = RANDOM) -> Frame:
        dataset, local = self.locate(index)
        return dataset.frame(local, rng, camera=camera)

    def intensity(self, index: int) -> tuple[float, float]:
        dataset, local = self.locate(index)
        return dataset.intensity(local)

    def cameras_of(self, index: int) -> tuple[str, ...]:
        dataset, local = self.locate(index)
        return dataset.cameras_of(local)

    def sensor(self, index: int) -> str:
        dataset, local = self.locate(index)
        return dataset.sensor(local)

    def scan_file(self, index: int) -> str:
        dataset, local = self.locate(index)
        return dataset.scan_file(local)


class Joined(Derived):
    """The frames of all `datasets`.

    Args:
      weights: None, and an epoch has every frame once; or one number a dataset, in proportion to which an epoch draws
        from them: as many scenes as there are frames in all, so that small datasets may repeat and large ones be cut.
      intensity: mean and standard deviation for every frame, instead of those of its sensor.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float] | None = None,
        intensity: tuple[float, float] | None = None,
    ):
        super().__init__(datasets)
        self._intensity = intensity
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets])
        self.weights = None if weights is None else tuple(map(float, weights))
        if self.weights is not None and len(self.weights) != len(self.datasets):
            raise InputError(f"{len(self.weights)} weights for {len(self.datasets)} datasets; give one for each")
        if not all(0 < weight < np.inf for weight in self.weights or ()):
            raise InputError(f"the weights {self.weights} must be positive; leave a dataset out instead")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[Dataset, int]:
        k = int(np.searchsorted(self._ends, index, side="right"))
        return self.datasets[k], index - int(self._ends[k]) + len(self.datasets[k])

    def intensity(self, index: int) -> tuple[float, float]:
        return self._intensity or super().intensity(index)

    def describe(self) -> str:
        """The datasets' own tables, and how an epoch draws from them."""
        tables = [dataset.describe() for dataset in self.datasets]
        if self.weights is None or len(self.datasets) < 2:
            return "\n".join(tables)
        shares = ", ".join(f"{weight / sum(self.weights):.1%}" for weight in self.weights)
        return "\n".join([*tables, f"scenes drawn in the proportions {shares}"])


class Subset(Derived):
    """Some frames of a dataset, by number: a label fraction or a list of frames."""

    def __init__(self, dataset: Dataset, indices: Sequence[int] | np.ndarray):
        super().__init__([dataset])
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def locate(self, index: int) -> tuple[Dataset, int]:
        return self.datasets[0], int(self.indices[index])

    def describe(self) -> str:
        (whole,) = self.datasets
        return f"{whole.describe()}\n{len(self)} of these {len(whole)} frames are used"


def every_nth(dataset: Dataset, n: int) -> Subset:
    """Frames 0, n, 2n, ...: the published way to train with few labels (1 %: every 100th). Where sensors take turns (in
    streets), the same of each sensor."""
    turn = next((i for i in range(1, len(dataset)) if dataset.sensor(i) == dataset.sensor(0)), len(dataset))
    return Subset(dataset, [i for i in range(len(dataset)) if i // turn % n == 0])


def listed(dataset: Dataset, path: Path) -> Subset:
    """The frames that a text file names, one a line, in the dataset's order; "#" begins a comment.

    A frame may be named as in logs ("nuscenes/scene-0061/1532402927647951"), without the dataset's name, or by the path
    or the file name of its scan where the reader knows it. Raises `InputError` for names that are not in the dataset.
    """
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: this list of frames cannot be read ({error}); give a text file") from error
    wanted = {line for line in lines if line}
    found, missing = [], set(wanted)
    for index in range(len(dataset)):
        name, scan = dataset.name(index), dataset.scan_file(index)
        if hit := {name, name.split("/", 1)[-1], scan, scan.rsplit("/", 1)[-1]} & wanted:
            found.append(index)
            missing -= hit
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(wanted)} names are not in the dataset, as {min(missing)!r}; "
            f"its frames are named like {dataset.name(0)!r}"
        )
    if not found:
        raise InputError(f"{path}: the list names no frame; one name a line, like {dataset.name(0)!r}")
    return Subset(dataset, np.array(found))
