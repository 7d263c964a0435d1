"""Several datasets as one, with weights or without; and a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from scalr_jax.data.scenes import Frame
from scalr_jax.data.streets.streets import Streets
from scalr_jax.runtime.errors import InputError


def intensity_statistics(dataset: Any, index: int) -> tuple[float, float]:
    """(mean, standard deviation) of the raw intensity at a frame: one pair a dataset, or a function of the frame."""
    statistics: Any = dataset.intensity
    return cast(Any, statistics)(index) if callable(statistics) else cast(Any, statistics)


class Joined:
    """The frames of all `datasets`; each frame keeps the intensity statistics of its own dataset.

    weights: None, and an epoch has every frame once; or one number a dataset, in proportion to which an epoch draws
    from them: as many scenes as there are frames in all, so that small datasets may repeat and large ones be cut.
    """

    def __init__(self, datasets: Sequence[Any], weights: Sequence[float] | None = None):
        self.datasets = tuple(datasets)
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets])
        self.weights = None if weights is None else tuple(float(weight) for weight in weights)
        if self.weights is not None:
            if len(self.weights) != len(self.datasets):
                raise InputError(f"{len(self.weights)} weights for {len(self.datasets)} datasets; give one for each")
            if not all(0 < weight < np.inf for weight in self.weights):
                raise InputError(f"the weights {self.weights} must be positive; leave a dataset out instead")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.datasets[0].class_names

    def locate(self, index: int) -> tuple[Any, int]:
        """The dataset of a frame, and its number there."""
        k = int(np.searchsorted(self._ends, index, side="right"))
        return self.datasets[k], index - int(self._ends[k]) + len(self.datasets[k])

    def name(self, index: int) -> str:
        """What errors and logs call a frame."""
        dataset, local = self.locate(index)
        return dataset.name(local)

    def frame(self, index: int, rng: np.random.Generator) -> Frame:
        dataset, local = self.locate(index)
        return dataset.frame(local, rng)

    def intensity(self, index: int) -> tuple[float, float]:
        """(mean, standard deviation) of the raw intensity of the sensor that made this frame."""
        dataset, local = self.locate(index)
        return intensity_statistics(dataset, local)

    def describe(self) -> str:
        """The datasets' own tables, and how an epoch draws from them."""
        tables = [dataset.describe() for dataset in self.datasets]
        if self.weights is None or len(self.datasets) < 2:
            return "\n".join(tables)
        shares = ", ".join(f"{weight / sum(self.weights):.1%}" for weight in self.weights)
        return "\n".join([*tables, f"scenes drawn in the proportions {shares}"])


class Subset:
    """Some frames of a dataset, by number: a label fraction or a list of frames."""

    def __init__(self, dataset: Any, indices: Sequence[int] | np.ndarray):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    def name(self, index: int) -> str:
        """What errors and logs call a frame."""
        return self.dataset.name(int(self.indices[index]))

    def frame(self, index: int, rng: np.random.Generator) -> Frame:
        return self.dataset.frame(int(self.indices[index]), rng)

    def intensity(self, index: int) -> tuple[float, float]:
        """(mean, standard deviation) of the raw intensity of the sensor that made this frame."""
        return intensity_statistics(self.dataset, int(self.indices[index]))

    def describe(self) -> str:
        return f"{self.dataset.describe()}\n{len(self)} of these {len(self.dataset)} frames are used"


def every_nth(dataset: Any, n: int) -> Subset:
    """Frames 0, n, 2n, ...: the published way to train with few labels (1 %: every 100th). Of streets, whose sensors
    take turns, the same of each sensor."""
    turn = len(dataset.sensors) if isinstance(dataset, Streets) else 1
    return Subset(dataset, [i for i in range(len(dataset)) if i // turn % n == 0])


def listed(dataset: Any, path: Path) -> Subset:
    """The frames that a text file names, one a line, in the dataset's order; "#" begins a comment.

    A frame may be named as in logs ("nuscenes/scene-0061/1532402927647951"), without the dataset's name, or by the path
    or the file name of its scan where the reader knows it. Raises `InputError` for names that are not in the dataset.
    """
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: this list of frames cannot be read ({error}); give a text file") from error
    wanted = {line for line in lines if line}
    found, known = [], set()
    for index in range(len(dataset)):
        names = {dataset.name(index), dataset.name(index).split("/", 1)[-1]}
        if hasattr(dataset, "scan_file"):
            names |= {dataset.scan_file(index), dataset.scan_file(index).rsplit("/", 1)[-1]}
        if hit := names & wanted:
            found.append(index)
            known |= hit
    if missing := sorted(wanted - known):
        raise InputError(
            f"{path}: {len(missing)} of {len(wanted)} names are no frame of the dataset, as {missing[0]!r}; "
            f"its frames are named like {dataset.name(0)!r}"
        )
    if not found:
        raise InputError(f"{path}: the list names no frame; one name a line, like {dataset.name(0)!r}")
    return Subset(dataset, np.array(found))
