"""Mixing of labelled scans in training, in NumPy: polar-mix, then instance cut-mix, as WaffleIron's public code does;
PillarMix, as VaViT's does.

Polar-mix (Xiao et al., NeurIPS 2022): with probability 1/2 a half turn of the scan, from a random azimuth on, is
replaced by the same half turn of another random scan; then the other scan's points of some classes are added as they
are and twice more, each time turned about the sensor by U(-pi, pi).

Instance cut-mix: of every class of a bank of instances up to 39 are added. Each is mirrored in x or in y, turned by
U(-pi, pi), scaled by U(0.9, 1.1) and set on a point of a ground class; such places are points of different 1 m voxels.

Both work on raw scans, in the student's frame; labels follow their points.

PillarMix (VaViT, arXiv 2605.31177, 2026) mixes three scans, each voxelised and augmented, with their features: of each
pillar of 7.5 m (from the origin) that the first scan and others occupy, one of these is kept, drawn uniformly. The
public code takes the others from a memory of eight earlier scans; here they are drawn from the whole dataset, which
costs reading them, so that all randomness comes from `rng`: a scene depends on (seed, epoch, record) alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from scalr_jax.data.grids import pillar_keys, voxelize
from scalr_jax.data.instances import InstanceBank
from scalr_jax.data.scenes import Cloud, Dataset, Frame
from scalr_jax.data.transforms import labels_of, rotation, to_ego

PLACES = 1.0  # metre, the voxels from which places are drawn
Scan = tuple[np.ndarray, np.ndarray]  # points [N, 4] float32 (student's frame, metres, raw intensity), labels [N] uint8


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Mixes other scans into a training scan. An empty `polar_classes` (class numbers), no `bank` or a `pillar_size`
    (metres) of 0 turns that part off."""

    polar_classes: tuple[int, ...] = ()
    bank: InstanceBank | None = None
    ground_classes: tuple[int, ...] = ()
    max_instances: int = 40  # of each class, this one excluded
    pillar_size: float = 0.0
    num_clouds: int = 3  # that PillarMix mixes

    def __call__(self, frame: Frame, record: int, dataset: Dataset, rng: np.random.Generator) -> Frame:
        """`frame` is record `record` of `dataset`. Raises `BadFrameError` of the other scan."""
        scan = in_ego(frame)
        if self.polar_classes:
            there = int(rng.integers(len(dataset)))
            other, other_labels = in_ego(dataset.frame(there, rng))
            other = rescale_intensity(other, dataset, there, record)
            scan = polar_mix(scan, (other, other_labels), self.polar_classes, rng)
        if self.bank is not None:
            scan = self.cut_mix(*scan, dataset.intensity(record), rng)
        return Frame(frame.name, scan[0], np.eye(4), labels=scan[1])

    def others(self, record: int, num_frames: int, rng: np.random.Generator) -> list[int]:
        """The frames that PillarMix draws beside `record`: others, unless there is no other."""
        number = self.num_clouds - 1 if self.pillar_size else 0
        return [int(record + rng.integers(1, max(num_frames, 2))) % num_frames for _ in range(number)]

    def clouds(self, clouds: Sequence[Cloud], rng: np.random.Generator) -> Cloud:
        return pillar_mix(clouds, self.pillar_size, rng)

    def cut_mix(
        self, points: np.ndarray, labels: np.ndarray, statistics: tuple[float, float], rng: np.random.Generator
    ) -> Scan:
        """The scan with instances of the bank behind it."""
        assert self.bank is not None, "without a bank there is nothing to add"
        ground = voxelize(points, PLACES, rng)
        ground = rng.permutation(ground[np.isin(labels[ground], self.ground_classes)])
        parts, part_labels = [points], [labels]
        for label in self.bank.classes:
            number = min(int(rng.integers(self.max_instances)), len(ground))
            places, ground = ground[:number], ground[number:]
            for place, k in zip(places, rng.integers(self.bank.count(label), size=number), strict=True):
                instance = place_instance(self.bank.instance(label, int(k), statistics), points[place, :3], rng)
                parts.append(instance)
                part_labels.append(np.full(len(instance), label, labels.dtype))
        return np.concatenate(parts), np.concatenate(part_labels)


def in_ego(frame: Frame) -> Scan:
    points = np.concatenate([to_ego(frame.points, frame.to_ego), frame.points[:, 3:4]], axis=1).astype(np.float32)
    return points, labels_of(frame)


def rescale_intensity(points: np.ndarray, dataset: Dataset, there: int, here: int) -> np.ndarray:
    """Raw intensities of frame `there` as frame `here`'s sensor would count them: equal once normalised."""
    (mean, deviation), (new_mean, new_deviation) = (dataset.intensity(k) for k in (there, here))
    points = points.copy()
    points[:, 3] = (points[:, 3] - mean) / deviation * new_deviation + new_mean
    return points


def polar_mix(scan: Scan, other_scan: Scan, classes: Sequence[int], rng: np.random.Generator) -> Scan:
    """Two scans in the sensor's frame -> the mixed scan."""
    (points, labels), (other, other_labels) = scan, other_scan
    if rng.random() < 0.5:
        start = rng.uniform(-np.pi, np.pi)
        mine, theirs = ~in_half_turn(points, start), in_half_turn(other, start)
        points = np.concatenate([points[mine], other[theirs]])
        labels = np.concatenate([labels[mine], other_labels[theirs]])
    chosen = np.isin(other_labels, classes)
    objects, object_labels = other[chosen], other_labels[chosen]
    turned = [turn(objects, rng.uniform(-np.pi, np.pi)) for _ in range(2)]
    return np.concatenate([points, objects, *turned]), np.concatenate([labels, *[object_labels] * 3])


def pillar_mix(clouds: Sequence[Cloud], size: float, rng: np.random.Generator) -> Cloud:
    """The first cloud, whose pillars of `size` metres may be exchanged for those of the others."""
    keys = [pillar_keys(cloud.xyz, size) for cloud in clouds]
    pillars = np.unique(keys[0])
    occupied = np.stack([np.isin(pillars, key) for key in keys])  # [clouds, pillars]
    chosen = np.where(occupied, rng.random(occupied.shape), -1.0).argmax(axis=0)
    kept = []
    for k, key in enumerate(keys):
        row = np.minimum(np.searchsorted(pillars, key), len(pillars) - 1)
        kept.append((pillars[row] == key) & (chosen[row] == k))
    return Cloud(
        *(
            np.concatenate([part[own] for part, own in zip(parts, kept, strict=True)])
            for parts in zip(*clouds, strict=True)
        )
    )


def in_half_turn(points: np.ndarray, start: float) -> np.ndarray:
    """Mask [N]: azimuth between `start` and `start` + pi (radians)."""
    azimuth = (np.arctan2(points[:, 1], points[:, 0]) - start) % (2 * np.pi)
    return (azimuth > 0) & (azimuth < np.pi)


def turn(points: np.ndarray, angle: float) -> np.ndarray:
    """Points [N, 4] turned about z."""
    points = points.copy()
    points[:, :2] = points[:, :2] @ rotation(angle)
    return points


def place_instance(instance: np.ndarray, place: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A centred instance [n, 4], mirrored, turned, scaled and moved to `place` [3] (metres)."""
    instance = instance.copy()
    instance[:, rng.integers(2)] *= -1.0
    instance = turn(instance, rng.uniform(-np.pi, np.pi))
    instance[:, :3] = instance[:, :3] * rng.uniform(0.9, 1.1) + place
    return instance
