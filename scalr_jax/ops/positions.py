"""Where a ViT's patches are: resampled position tables and rotary angles, as constants in NumPy.

A table of 37 x 37 learned positions serves a grid of th x tw patches through separable interpolation. The weights
depend on sizes only, so each axis is one constant matrix: positions = rows @ table @ columns^T. Three codes do it
bicubically in three ways, a few 1e-3 apart, and two bilinearly; they are named after what they do (Keys, "Cubic
convolution interpolation", 1981):

    "dinov2"     scale factor (size + 0.1)/37, also for the coordinates; a = -0.75, clamped borders (DINO, DINOv2)
    "size"       scale factor size/37; a = -0.75, clamped borders (transformers' DINOv2)
    "antialias"  scale factor size/37; a = -0.5, widened by the scale when shrinking, weights cut at the border and
                 normalised (DINOv2 with registers, timm)
    "radio"      bilinear, to a square as large as the longer side, of which the rest is cut off (C-RADIO)
    "naflex"     bilinear, widened as above (SigLIP 2 of any size)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

INTERPOLATIONS = ("dinov2", "size", "antialias", "radio", "naflex")


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with parameter a (equation 4 has a = -0.5); x in samples."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _clamped(num_in: int, num_out: int, scale: float) -> np.ndarray:
    """[num_out, num_in] bicubic weights; samples outside read the border. `scale`: input samples an output sample."""
    center = (np.arange(num_out) + 0.5) * scale - 0.5  # [num_out]
    taps = np.floor(center)[:, None] + np.arange(-1, 3)  # [num_out, 4]
    weights = _cubic(center[:, None] - taps, a=-0.75)
    matrix = np.zeros((num_out, num_in))
    source = np.clip(taps, 0, num_in - 1).astype(int)
    np.add.at(matrix, (np.arange(num_out)[:, None], source), weights)
    return matrix


def _tent(x: np.ndarray) -> np.ndarray:
    """The kernel of linear interpolation; x in samples."""
    return np.maximum(1 - np.abs(x), 0.0)


def _bilinear(num_in: int, num_out: int) -> np.ndarray:
    """[num_out, num_in] weights of the two nearest samples; beyond the borders these alone."""
    center = np.clip((np.arange(num_out) + 0.5) * num_in / num_out - 0.5, 0, num_in - 1)
    return _tent(center[:, None] - np.arange(num_in))


def _antialiased(num_in: int, num_out: int, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[num_out, num_in] weights of a kernel as wide as the scale, cut at the border and normalised."""
    scale = num_in / num_out
    center = (np.arange(num_out) + 0.5) * scale  # [num_out]
    distance = (np.arange(num_in) + 0.5 - center[:, None]) / max(scale, 1.0)  # [num_out, num_in]
    weights = kernel(distance)
    return weights / weights.sum(1, keepdims=True)


def resample_matrix(num_in: int, num_out: int, interpolation: str, *, longest: int = 0) -> np.ndarray:
    """[num_out, num_in] float32: one axis of the interpolation. The identity when the sizes are equal.

    longest: patches of the longer side, of both axes ("radio").

    Raises:
      ValueError: `interpolation` is not one of INTERPOLATIONS.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"position_interpolation = {interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
    if interpolation in ("antialias", "naflex"):
        kernel = _tent if interpolation == "naflex" else partial(_cubic, a=-0.5)
        return _antialiased(num_in, num_out, kernel).astype(np.float32)
    if interpolation == "radio":
        return _bilinear(num_in, max(num_out, longest))[:num_out].astype(np.float32)
    offset = 0.1 if interpolation == "dinov2" else 0.0
    return _clamped(num_in, num_out, num_in / (num_out + offset)).astype(np.float32)


def rotary_periods(head_dim: int, base: float) -> tuple[float, ...]:
    """base^(2 i / (head_dim / 2)) for i < head_dim / 4, in units of half the image (DINOv3)."""
    return tuple(base ** (i / (head_dim // 4)) for i in range(head_dim // 4))


def rotary_angles(grid: tuple[int, int], periods: tuple[float, ...]) -> np.ndarray:
    """[th * tw, 2 len(periods)] float32, radians: axial rotary positions (DINOv3, `rope_position_encoding.py`).

    Patch centres run over -1..1 on each axis separately; angle = 2 pi coordinate / period, first for the row and then
    for the column.
    """
    centers = [2 * (np.arange(size) + 0.5) / size - 1 for size in grid]
    coords = np.stack(np.meshgrid(*centers, indexing="ij"), -1).reshape(-1, 2)  # [th * tw, 2]
    angles = 2 * np.pi * coords[:, :, None] / np.asarray(periods)
    return angles.reshape(len(coords), -1).astype(np.float32)
