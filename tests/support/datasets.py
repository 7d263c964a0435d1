"""A dataset that a test makes up."""

import numpy as np

from scalr_jax.data.scenes import Dataset, Frame


class Frames(Dataset):
    """Frame n has one point, at (n, n, n). One, unless a test says how many there are."""

    class_names = ("thing",)

    def name(self, index):
        return f"frames/{index}"

    def __len__(self) -> int:
        return 1

    def frame(self, index, rng=None, *, camera=None):
        return Frame(self.name(index), np.full((1, 4), index), np.eye(4))

    def intensity(self, index):
        return 0.0, 1.0

    def describe(self):
        return "frames that a test made up"
