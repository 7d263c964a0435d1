"""Normalisation of a teacher's features, by statistics of its features at the lidar points of training scenes.

    none         q = x                                    (ScaLR)
    center       q = x - mean
    standardize  q = (x - mean) / deviation, each channel
    phi_s        q = H U^T (x - mean) / sqrt(mean variance),  covariance = U diag(l) U^T

H is a Hadamard matrix over sqrt(C), with which all channels of q have variance 1 and none of them means more than
another (Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation", 2024). The loss
compares directions and does not change under rotations: with it `phi_s` differs from `center` in what the optimiser
makes of it alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from scalr_jax.interop.finite import check_weights
from scalr_jax.interop.safetensors_file import read_safetensors
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import written_whole

Array = jax.Array

FILE = "teacher_statistics.safetensors"  # of a workdir
DEAD = 1e-6  # of the largest deviation: a channel below it is left out


class Normalization(NamedTuple):
    """q = (x - mean) * matrix, or (x - mean) @ matrix, of features x [..., C]."""

    mean: Array | np.ndarray  # [C] float32
    matrix: Array | np.ndarray  # [C] or [C, C] float32

    def __call__(self, x: Array) -> Array:
        """float32 [..., C] -> float32 [..., C]"""
        x = x.astype(jnp.float32) - self.mean
        return x * self.matrix if self.matrix.ndim == 1 else jnp.matmul(x, self.matrix, precision="highest")


def shapes(kind: str, channels: int) -> Normalization | None:
    """Zeros in the shapes of a normalisation of `kind`, until it is measured; None for "none".

    Raises `InputError` when phi_s is not possible with so many channels.
    """
    if kind == "none":
        return None
    if kind == "phi_s":
        hadamard(channels)
    matrix = (channels, channels) if kind == "phi_s" else (channels,)
    return Normalization(np.zeros(channels, np.float32), np.zeros(matrix, np.float32))


def batch_moments(x: Array, mask: Array, *, full: bool) -> tuple[Array, Array, Array]:
    """Number of features x [..., C] where `mask` [...], mean [C], and sum of squared deviations [C] or, with
    `full`, of products of deviations [C, C]."""
    x, mask = x.astype(jnp.float32).reshape(-1, x.shape[-1]), mask.reshape(-1, 1)
    count = mask.sum(dtype=jnp.float32)
    mean = jnp.where(mask, x, 0.0).sum(0) / jnp.maximum(count, 1.0)
    x = jnp.where(mask, x - mean, 0.0)
    return count, mean, jnp.matmul(x.T, x, precision="highest") if full else jnp.square(x).sum(0)


@dataclasses.dataclass
class Moments:
    """Moments of batches together, in float64 (Chan, Golub and LeVeque, 1983)."""

    full: bool
    count: float = 0.0
    mean: np.ndarray | float = 0.0  # [C]
    products: np.ndarray | float = 0.0  # [C] or [C, C]: sums over the points

    def add(self, count: float, mean: np.ndarray, products: np.ndarray) -> None:
        """Adds what `batch_moments` gives of one batch."""
        mean, total = mean.astype(np.float64), self.count + float(count)
        step, share = mean - self.mean, float(count) / max(total, 1.0)
        between = np.outer(step, step) if self.full else np.square(step)
        self.products = self.products + products.astype(np.float64) + between * self.count * share
        self.count, self.mean = total, self.mean + step * share

    def normalization(self, kind: str) -> Normalization:
        """The normalisation of these features that is called `kind`, "center", "standardize" or "phi_s"."""
        mean, variance = np.asarray(self.mean), np.asarray(self.products) / max(self.count, 1.0)
        matrix = np.ones_like(mean)
        if kind == "standardize":
            deviation = np.sqrt(variance)
            matrix = np.where(deviation > DEAD * deviation.max(), 1 / np.maximum(deviation, 1e-30), 0.0)
        elif kind == "phi_s":
            _, axes = np.linalg.eigh(variance)
            matrix = axes @ hadamard(len(mean)).T / np.sqrt(max(np.trace(variance), 1e-30))  # C times their mean
        return Normalization(mean.astype(np.float32), matrix.astype(np.float32))


def hadamard(size: int) -> np.ndarray:
    """A matrix [size, size] of 1 and -1 whose rows are orthogonal: Paley's for a prime, doubled as Sylvester's.

    Raises `InputError` for a size of which none is made so; of the widths of published ViTs all are.
    """
    core = size
    while core > 1 and not _is_paley(core):
        if core % 2:
            raise InputError(
                f"teacher.normalize = 'phi_s' makes no rotation of {size} channels, which are not 2^k or 2^k (p + 1), "
                "p a prime of 4 n + 3; use 'standardize'"
            )
        core //= 2
    matrix = np.ones((1, 1)) if core == 1 else _paley(core)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _is_paley(size: int) -> bool:
    prime = size - 1
    return prime % 4 == 3 and all(prime % k for k in range(2, int(prime**0.5) + 1))


def _paley(size: int) -> np.ndarray:
    """I + S, with S the skew matrix of the quadratic residues of the prime `size - 1` (Paley, 1933)."""
    prime = size - 1
    residue = np.full(prime, -1.0)
    residue[np.square(np.arange(1, prime, dtype=np.int64)) % prime] = 1.0
    residue[0] = 0.0
    skew = np.zeros((size, size))
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = residue[(np.arange(prime)[None] - np.arange(prime)[:, None]) % prime]
    return np.eye(size) + skew


def write_normalizations(path: Path, found: Sequence[Normalization | None]) -> None:
    """Writes those of several teachers, by their number."""
    arrays = {f"{k}/{name}": array for k, each in enumerate(found) if each for name, array in each._asdict().items()}
    with written_whole(path) as file:
        file.write(safetensors.numpy.save({name: np.asarray(array) for name, array in arrays.items()}))


def read_normalizations(path: Path, like: Sequence[Normalization | None]) -> list[Normalization | None]:
    """Reads what `write_normalizations` wrote of teachers that need arrays `like` these.

    Raises `InputError` when the file is missing, damaged or that of other teachers.
    """
    again = "copy the workdir again, or train in another one"
    if not path.is_file():
        raise InputError(f"{path} is missing, the statistics of the teacher's features; {again}")
    arrays = read_safetensors(path)[0]
    check_weights(arrays, str(path))
    needed = {f"{k}/{name}": x.shape for k, each in enumerate(like) if each for name, x in each._asdict().items()}
    if {name: array.shape for name, array in arrays.items()} != needed:
        raise InputError(f"{path} holds the statistics of other features than teacher.normalize needs; {again}")
    return [each and Normalization(arrays[f"{k}/mean"], arrays[f"{k}/matrix"]) for k, each in enumerate(like)]
