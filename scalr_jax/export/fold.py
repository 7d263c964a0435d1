"""Parameters with their batch norms folded and their layer scales merged, in the same layout and with equal outputs.

    norm, linear:     (x * a + b) @ W + c           =  x @ (a W) + (b @ W + c)
    linear, scale:    (x @ W + c) * s               =  x @ (W s) + c s

What is folded away stays as an identity: scale 1, bias 0, mean 0, and the variance whose deviation is 1. A layer norm
keeps its statistics, which are each row's own, and gives its scale and bias to the linear layer of channel mixing. The
norm of spatial mixing keeps scale and bias (a batch norm's statistics go into them): its bias reaches occupied cells
only, so no bias of a convolution can take it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import DTypeLike

from scalr_jax.models.layers import BATCH_NORM_EPS
from scalr_jax.models.student import Variables

IDENTITY_VARIANCE = 1.0 - BATCH_NORM_EPS


def norm_affine(norm: Mapping, stats: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """(multiplier, shift) float64 such that a batch norm with its running statistics is x * multiplier + shift."""
    scale, bias, mean, variance = (
        np.asarray(x, np.float64) for x in (norm["scale"], norm["bias"], stats["mean"], stats["variance"])
    )
    deviation = np.sqrt((variance + BATCH_NORM_EPS).astype(np.float32)).astype(np.float64)  # 1 of an identity, exactly
    multiplier = scale / deviation
    return multiplier, bias - mean * multiplier


def fold(variables: Variables) -> dict:
    """{"params", "batch_stats"} of NumPy arrays -> the same, folded."""
    params, stats = (_as_type(variables.get(kind, {}), np.float64) for kind in ("params", "batch_stats"))
    _fold_embedding(params["embedding"], stats["embedding"])
    for kind, planes in params.get("backbone", {}).items():  # "groups", stacked, and "rest"
        for plane, layer in planes.items():
            running = stats.get("backbone", {}).get(kind, {}).get(plane)  # None: layer norms
            spatial, channel, norm = layer["spatial"], layer["channel"], "batch" if running else "layer"
            if running:
                batch = spatial["norm"]["batch"], running["spatial"]["norm"]["batch"]
                _set_norm(*batch, *norm_affine(*batch))
            of_channel = running["channel"]["norm"]["batch"] if running else None
            _into_linear(channel["norm"][norm], of_channel, channel["linear_1"])
            _merge_scale(spatial, spatial, "kernel_2", "bias_2")
            _merge_scale(channel, channel["linear_2"], "kernel", "bias")
    head = params.get("head", {})
    if "norm" in head:
        _into_linear(head["norm"], stats["head"]["norm"], head.get("hidden", head))
    return {"params": _as_type(params, np.float32), "batch_stats": _as_type(stats, np.float32)}


def _fold_embedding(params: dict, stats: dict) -> None:
    """The input norm goes into the points' layer, all three norms of the neighbourhood into its first matrix and the
    bias of its second norm (`models/embedding.py`)."""
    multiplier, _ = norm_affine(params["norm"], stats["norm"])
    multiplier_0, shift_0 = norm_affine(params["neighbor_norm_0"], stats["neighbor_norm_0"])
    multiplier_1, shift_1 = norm_affine(params["neighbor_norm_1"], stats["neighbor_norm_1"])
    kernel = params["neighbor_in"]
    params["neighbor_in"] = (multiplier * multiplier_0)[:, None] * kernel * multiplier_1
    bias = shift_0 @ kernel * multiplier_1 + shift_1
    _into_linear(params["norm"], stats["norm"], params["point"])
    for name, shift in (("neighbor_norm_0", np.zeros_like(shift_0)), ("neighbor_norm_1", bias)):
        _set_norm(params[name], stats[name], np.ones_like(shift), shift)


def _into_linear(norm: dict, stats: dict | None, linear: dict) -> None:
    """A norm's multiplier and shift, or a layer norm's scale and bias, into the linear layer that follows."""
    multiplier, shift = (norm["scale"], norm["bias"]) if stats is None else norm_affine(norm, stats)
    linear["bias"] = linear["bias"] + np.einsum("...i,...io->...o", shift, linear["kernel"])
    linear["kernel"] = multiplier[..., None] * linear["kernel"]
    _set_norm(norm, stats, np.ones_like(multiplier), np.zeros_like(shift))


def _merge_scale(params: dict, layer: dict, kernel: str, bias: str) -> None:
    scale = params["scale"]
    layer[kernel], layer[bias] = layer[kernel] * scale[..., None, :], layer[bias] * scale
    params["scale"] = np.ones_like(scale)


def _set_norm(norm: dict, stats: dict | None, multiplier: np.ndarray, shift: np.ndarray) -> None:
    norm["scale"], norm["bias"] = multiplier, shift
    if stats is not None:
        stats["mean"], stats["variance"] = np.zeros_like(shift), np.full_like(shift, IDENTITY_VARIANCE)


def _as_type(tree: Mapping, dtype: DTypeLike) -> dict:
    """A copy whose leaves have another dtype."""
    return {k: _as_type(v, dtype) if isinstance(v, Mapping) else np.array(v, dtype) for k, v in tree.items()}
