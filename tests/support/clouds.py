"""Small random frames, and the pipeline and packs that hold them."""

import dataclasses

import numpy as np

from scalr_jax.data.packing import Capacities
from scalr_jax.data.pipeline import Pipeline
from scalr_jax.data.scenes import Frame, SceneNeeds
from scalr_jax.data.transforms import SceneSettings
from scalr_jax.runtime.errors import BadFrameError
from tests.support.datasets import Frames

SETTINGS = SceneSettings(
    task="distill",
    train=True,
    needs=SceneNeeds(((-8.0, -8.0, -2.0), (8.0, 8.0, 2.0)), 4, ((16, 16), (16, 4), (16, 4))),
    image_size=(8, 12),
)
CAPACITIES = Capacities(300, 4, (300,) * 3, (900,) * 3)


@dataclasses.dataclass(frozen=True)
class Clouds(Frames):
    """`number` random frames of 30 to 90 points; those in `bad` cannot be read."""

    number: int = 23
    bad: tuple[int, ...] = ()

    def __len__(self):
        return self.number

    def frame(self, index, rng=None, *, camera=None):
        if index in self.bad:
            raise BadFrameError(f"clouds/{index}: cannot be read")
        own = np.random.default_rng(index)
        count = int(own.integers(30, 90))
        points = own.uniform(-6, 6, (count, 4)) * [1, 1, 0.2, 1]
        return Frame(
            name=f"clouds/{index}",
            points=points,
            to_ego=np.eye(4),
            image=own.integers(0, 255, (16, 24, 3), dtype=np.uint8),
            pixels=own.random((count, 2)) * [16, 24],
            visible=np.ones(count, bool),
        )


def pipeline(**changes):
    return Pipeline(**{"dataset": Clouds(), "settings": SETTINGS, "seed": 7, **changes})
