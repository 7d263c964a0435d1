"""One whole scan, as prediction sees it: what goes through the network, and whose result each point gets.

NumPy alone, so that an exported model is served without JAX.
"""

from __future__ import annotations

import sys

import numpy as np
from pykdtree.kdtree import KDTree

from scalr_jax.data.scan_checks import FARTHEST, check_place, count_unusable, find_usable
from scalr_jax.data.scenes import Frame, SceneNeeds, SceneView
from scalr_jax.data.transforms import SceneSettings, make_scene
from scalr_jax.runtime.errors import BadFrameError, InputError

COLUMNS = (("x",), ("y",), ("z",), ("intensity", "i", "reflectance", "remission"))  # of a table, by their names


def as_array(points: object) -> np.ndarray:
    """An array of what holds one: also a tensor of PyTorch, on any device, and a pandas frame, of which the columns x,
    y, z and intensity (or i, reflectance, remission) are taken. Raises InputError for a frame without them."""
    torch, pandas = sys.modules.get("torch"), sys.modules.get("pandas")  # who has such points has imported it
    if torch is not None and isinstance(points, torch.Tensor):
        tensor = torch.Tensor.float(points) if torch.is_floating_point(points) else points
        return torch.Tensor.numpy(tensor, force=True)
    if pandas is not None and isinstance(points, pandas.DataFrame):
        given = list(pandas.DataFrame.keys(points))
        found = [next((name for name in names if name in given), None) for names in COLUMNS]
        if None in found:
            listed = ", ".join(map(str, given))
            raise InputError(f"the frame has columns {listed}, and x, y, z, intensity are needed; rename its columns")
        points = pandas.DataFrame.__getitem__(points, found)
    return np.asarray(points)


def check_points(points: object) -> np.ndarray:
    """The points as [N, 4] float32: x, y, z in metres and raw intensity. Raises InputError when they are none, or far
    away for a lidar at the origin. `as_array` says what may hold them."""
    points = as_array(points)  # an ArrayLike, or another holder of one
    if points.ndim != 2 or points.shape[1] != 4 or points.dtype.kind not in "fiu":
        raise InputError(
            f"points have shape {points.shape} and dtype {points.dtype}, and numbers [N, 4] are needed: x, y, z in "
            "metres and raw intensity"
        )
    if len(points) == 0:
        raise InputError("points have shape (0, 4): the scan is empty")
    if problem := check_place(points)[0]:
        raise InputError(problem)
    with np.errstate(over="ignore", invalid="ignore"):
        return points.astype(np.float32)


def whole_scan(
    points: np.ndarray, needs: SceneNeeds, intensity: tuple[float, float], voxel_size: float
) -> tuple[SceneView, np.ndarray]:
    """The points that go through the network, and for each input point [N] the nearest of them (-1: none).

    As in the published evaluation that is the first point of each voxel (of `voxel_size` metres) inside the field of
    view. A point whose intensity is not finite is treated like one outside; one without finite coordinates has no
    nearest one. Raises InputError: too few points are left.

    points: [N, 4] float32, of `check_points`. needs: the backbone's. intensity: mean and deviation of the raw one.
    """
    located, usable = find_usable(points)
    settings = SceneSettings(task="segment", train=False, needs=needs, voxel_size=voxel_size, augmentation="none")
    if not usable.any():
        raise InputError(f"{count_unusable(points)}; write or copy the scan again, or leave it out")
    frame = Frame("the scan", points[usable], np.eye(4))
    try:
        scene = make_scene(frame, 0, intensity, settings, np.random.default_rng(0))
    except BadFrameError as error:
        found = str(error).removeprefix(f"{frame.name}: ")
        bad = f" ({unusable})" if (unusable := count_unusable(points)) else ""
        raise InputError(f"{found}{bad}; shift or scale the points into it, or leave the scan out") from None
    nearest = np.full(len(points), -1, np.int64)
    nearest[usable] = scene.upsample  # type: ignore[assignment]
    others = np.flatnonzero(located & ~usable)
    if len(others):
        xyz = np.clip(points[others, :3], -FARTHEST, FARTHEST)
        nearest[others] = KDTree(np.ascontiguousarray(scene.feats[:, 1:4])).query(xyz, k=1)[1]
    return scene._replace(labels=None, upsample=None, raw_labels=None), nearest
