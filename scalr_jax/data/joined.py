"""Several datasets, one after the other, as one; and a share of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from scalr_jax.data.scenes import Frame


def intensity_statistics(dataset: Any, index: int) -> tuple[float, float]:
    """(mean, standard deviation) of the raw intensity at a frame: one pair a dataset, or a function of the frame."""
    statistics: Any = dataset.intensity
    return cast(Any, statistics)(index) if callable(statistics) else cast(Any, statistics)


class Joined:
    """The frames of all `datasets`; each frame keeps the intensity statistics of its own dataset."""

    def __init__(self, datasets: Sequence[Any]):
        self.datasets = tuple(datasets)
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.datasets[0].class_names

    def _find(self, index: int) -> tuple[Any, int]:
        k = int(np.searchsorted(self._ends, index, side="right"))
        return self.datasets[k], index - int(self._ends[k]) + len(self.datasets[k])

    def frame(self, index: int, rng: np.random.Generator) -> Frame:
        dataset, local = self._find(index)
        return dataset.frame(local, rng)

    def intensity(self, index: int) -> tuple[float, float]:
        """(mean, standard deviation) of the raw intensity of the sensor that made this frame."""
        dataset, local = self._find(index)
        return intensity_statistics(dataset, local)


class EveryNth:
    """Frames 0, n, 2n, ... of a dataset: the published way to train with few labels (1 %: every 100th)."""

    def __init__(self, dataset: Any, n: int):
        self.dataset, self.n = dataset, n

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.n)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    def frame(self, index: int, rng: np.random.Generator) -> Frame:
        return self.dataset.frame(index * self.n, rng)

    def intensity(self, index: int) -> tuple[float, float]:
        """(mean, standard deviation) of the raw intensity of the sensor that made this frame."""
        return intensity_statistics(self.dataset, index * self.n)
