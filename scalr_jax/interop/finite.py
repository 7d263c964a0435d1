"""NaN and infinity, refused where numbers come in (weights) and where they go out (features, classes)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from numpy.typing import DTypeLike

from scalr_jax.runtime.errors import InputError


def check_weights(tree: Mapping, name: str) -> None:
    """Raises InputError that begins with `name` when an array of a tree holds a value that is not finite in float32."""
    bad = {}
    for path, leaf in tree_leaves_with_path(tree):
        with np.errstate(all="ignore"):
            number = np.size(leaf) - np.count_nonzero(np.isfinite(np.asarray(leaf, np.float32)))
        if number:
            bad[keystr(path, simple=True, separator="/")] = f"{number} of {np.size(leaf)} values"
    if bad:
        first = ", ".join(f"{key} ({values})" for key, values in list(bad.items())[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise InputError(
            f"{name} is damaged or its training diverged, nothing was loaded: not finite are {first}{more}; copy it "
            "again, or take an earlier checkpoint"
        )


def check_outputs(rows: np.ndarray, what: str) -> None:
    """Raises InputError unless `rows` are finite values [N, C], or classes [N] without -1, which stands for logits that
    are not finite."""
    wrong = rows < 0 if rows.dtype.kind == "i" else ~np.isfinite(rows).all(axis=-1)
    if wrong.any():
        raise InputError(
            f"the model's {what} are not finite for {np.count_nonzero(wrong)} of {len(rows)} points: its weights or "
            "the scan's intensities are too large; check both, or leave the scan out"
        )


def narrowed(rows: np.ndarray, dtype: DTypeLike, remedy: str) -> np.ndarray:
    """Finite `rows` in another dtype. Raises InputError, which ends with the `remedy`, when a value does not fit."""
    with np.errstate(over="ignore"):
        narrow = rows.astype(dtype)
    if not np.isfinite(narrow).all():
        raise InputError(f"features up to {np.abs(rows).max():.3g} do not fit {np.dtype(dtype)}; {remedy}")
    return narrow
