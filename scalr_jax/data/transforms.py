"""From a frame to a scene, as published (ScaLR, section 3 and its released code), in NumPy.

Distillation: voxelise in the reader's frame, keep what the camera sees, limit, move to the student's frame,
rotate/flip/scale, cut to the field of view, features, neighbours, cells; of several cameras voxelise what they see
together. Segmentation: the same without a camera, all
of it in the student's frame (on PandaSet the voxels are others); with `augmentation="published"` the features are
computed before the augmentation, whose rotations of coordinates and of features then differ (a quirk of the published
code); with "vavit" the features are those of the same points augmented another time, as VaViT's released code does it.
Every random choice comes from the `rng` argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image
from pykdtree.kdtree import KDTree

from scalr_jax.data.grids import (
    cell_position,
    make_pillars,
    make_plane,
    one_a_voxel,
    pairs_a_voxel,
    pillar_keys,
    sort_by,
    voxelize,
)
from scalr_jax.data.scenes import (
    IGNORE,
    PLANE_AXES,
    Cloud,
    Frame,
    Mix,
    SceneNeeds,
    SceneView,
    SceneVoxels,
    Tokens,
)
from scalr_jax.ops.voxels import coordinates_in, count_levels, extent_of
from scalr_jax.runtime.errors import BadFrameError

FIELD_OF_VIEW_EPS = 1e-4  # metres
VAVIT_FLIP = 0.66  # probability, as released


@dataclasses.dataclass(frozen=True)
class SceneSettings:
    """Settings of `make_scene`, from the model and the task."""

    task: str  # "distill", "segment", or "features" for scenes whose features the dataset has
    train: bool
    needs: SceneNeeds  # of the backbone
    voxel_size: float = 0.1  # metres; one point a voxel is kept
    max_points: int = 20_000
    image_size: tuple[int, int] = (224, 448)
    antialias: bool = True
    image_dtype: str = "uint8"  # "uint8", or "float32": not rounded
    augmentation: str = "published"  # "published", "vavit", "consistent" or "none"
    fixed: bool = False  # the same random choices in every epoch
    mixing: Mix | None = None  # of training scans for segmentation
    votes: bool = False  # evaluation: scans are augmented, to be voted on
    views: int = 1  # distillation: images of a scene
    pairs: int = 1  # of several views: pixels of a point, at most


def limit(points: np.ndarray, max_points: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Indices of the `max_points` points nearest to a random point (to the origin without `rng`), nearest first.

    All indices in order when there are not more points than that.
    """
    if len(points) <= max_points:
        return np.arange(len(points))
    center = np.zeros((1, 3)) if rng is None else points[rng.integers(len(points))][None, :3]
    return np.argsort(np.square(points[:, :3] - center).sum(axis=1))[:max_points]


def in_view(xyz: np.ndarray, needs: SceneNeeds) -> np.ndarray:
    """Indices [n] of the points inside the field of view (by 0.1 mm or more), ordered by their cell in the first plane,
    their column of voxels or their pillar: neighbours in the grid are then near each other in memory."""
    good = np.ones(len(xyz), bool)
    for column, low, high in zip(xyz.T, *np.asarray(needs.field_of_view, np.float64), strict=True):
        good &= (column > low + FIELD_OF_VIEW_EPS) & (column < high - FIELD_OF_VIEW_EPS)
    kept = np.flatnonzero(good)
    if needs.pillar_size is not None:
        return kept[np.argsort(pillar_keys(xyz[kept], needs.pillar_size), kind="stable")]
    size = needs.voxel_size
    grid = needs.grids[0] if size is None else extent_of(needs.field_of_view, size)[:2]
    return kept[sort_by(cell_position(xyz[kept], PLANE_AXES[0], grid, needs.field_of_view))]


def rotation(angle: float) -> np.ndarray:
    """[2, 2], to be applied to row vectors (x, y)."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def augment(xyz: np.ndarray, rng: np.random.Generator, flip: float = 2 / 3) -> np.ndarray:
    """Rotate about z by U(-pi, pi), flip x or y with probability `flip`, scale by U(0.9, 1.1). [N, 3] -> [N, 3]."""
    xyz = xyz.copy()
    xyz[:, :2] = xyz[:, :2] @ rotation(rng.uniform(-np.pi, np.pi))
    if rng.random() < flip:
        xyz[:, rng.integers(2)] *= -1.0
    return xyz * rng.uniform(0.9, 1.1)


def make_features(xyz: np.ndarray, intensity: np.ndarray, statistics: tuple[float, float]) -> np.ndarray:
    """[N, F] float32: (intensity - mean) / std, x, y, z, distance to the origin (metres)."""
    mean, std = statistics
    columns = [(intensity[:, None] - mean) / std, xyz, np.linalg.norm(xyz, axis=1, keepdims=True)]
    with np.errstate(over="ignore"):  # a huge intensity becomes infinite, and training skips the scene and says so
        return np.concatenate(columns, axis=1).astype(np.float32)


def find_neighbors(xyz: np.ndarray, num_neighbors: int) -> np.ndarray:
    """[N, K] int32: the nearest other points, nearest first. Points that coincide may stand in any order."""
    if num_neighbors == 0:
        return np.zeros((len(xyz), 0), np.int32)
    xyz = np.ascontiguousarray(xyz)
    _, found = KDTree(xyz).query(xyz, k=num_neighbors + 1, sqr_dists=True)
    own = np.arange(len(xyz), dtype=found.dtype)
    others = found[:, 1:].astype(np.int32)
    if len(moved := np.flatnonzero(found[:, 0] != own)):  # another point at the same place came first
        mine = found[moved] == own[moved, None]
        mine[~mine.any(axis=1), -1] = True  # so many coincide that the point itself was not returned
        others[moved] = found[moved][~mine].reshape(len(moved), num_neighbors)
    return others


def resize_image(image: np.ndarray, size: tuple[int, int], *, antialias: bool, dtype: str = "uint8") -> np.ndarray:
    """Bilinear resize of [h, w, 3] uint8 to `size` (rows, columns), without cropping; "float32" is not rounded, 0 to
    255."""
    if image.shape[:2] == tuple(size):
        return image.astype(dtype, copy=False)
    if antialias:
        planes = [image] if dtype == "uint8" else np.moveaxis(image.astype(np.float32), -1, 0)
        resized = [Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.BILINEAR) for plane in planes]
        return np.asarray(resized[0]) if dtype == "uint8" else np.stack(list(map(np.asarray, resized)), axis=-1)
    rows, columns = (_sample_axis(image.shape[axis], size[axis]) for axis in (0, 1))
    out = image.astype(np.float32)
    out = out[rows[0]] * (1 - rows[2])[:, None, None] + out[rows[1]] * rows[2][:, None, None]
    out = out[:, columns[0]] * (1 - columns[2])[None, :, None] + out[:, columns[1]] * columns[2][None, :, None]
    return np.rint(out).astype(np.uint8) if dtype == "uint8" else out


def _sample_axis(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper source index and the upper one's weight, pixel centres at half integers."""
    source = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.floor(source).astype(np.int64)
    return low, np.minimum(low + 1, old - 1), (source - low).astype(np.float32)


def to_ego(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """[N, 3] float32 in the student's frame."""
    return (points[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.float32)


def make_scene(
    frame: Frame,
    index: int,
    intensity: tuple[float, float],
    settings: SceneSettings,
    rng: np.random.Generator,
    others: Sequence[tuple[Frame, tuple[float, float]]] = (),
    views: Sequence[Frame] = (),
) -> SceneView:
    """Everything between the reader and the packer, for one frame. Raises `BadFrameError`.

    `others`: the frames that `settings.mixing` drew, with the statistics of their intensities; `views`: the same scan
    with further cameras.
    """
    for each in (frame, *(other for other, _ in others), *views):
        if len(each.points) == 0:
            raise BadFrameError(f"{each.name}: the scan has no points")
    if settings.task == "distill":
        return _distillation_scene([frame, *views], index, intensity, settings, rng)
    if settings.votes:
        return _vote_scene(frame, index, intensity, settings, rng)
    raw = to_ego(frame.points, frame.to_ego)
    cloud = _cloud(frame, raw, intensity, settings, rng)
    if others and settings.mixing:
        more = [_cloud(other, to_ego(other.points, other.to_ego), said, settings, rng) for other, said in others]
        cloud = settings.mixing.clouds([cloud, *more], rng)
        kept = limit(cloud.xyz, settings.max_points, rng)
        cloud = Cloud(*(part[kept] for part in cloud))
    return _segmentation_scene(frame, raw, index, cloud, settings)


def _distillation_scene(
    frames: Sequence[Frame],
    index: int,
    intensity: tuple[float, float],
    settings: SceneSettings,
    rng: np.random.Generator,
) -> SceneView:
    """A scene of what the cameras of one scan see; `frames` differ in camera, image and, prepared, in points."""
    frame, sizes = frames[0], []
    for each in frames:
        size = each.image_shape or (None if each.image is None else each.image.shape[:2])
        if size is None or each.pixels is None or each.visible is None:
            raise BadFrameError(f"{each.name}: distillation needs an image, and the frame has none")
        sizes.append(size)
    points, pixels, visible = (
        np.concatenate([getattr(f, key) for f in frames]) for key in ("points", "pixels", "visible")
    )
    if settings.views == 1:
        kept = one_a_voxel(frame, settings.voxel_size, rng)
        kept = kept[visible[kept]][:, None]
    else:
        rows = np.flatnonzero(visible)
        kept = pairs_a_voxel(points[rows], settings.voxel_size, settings.pairs, rng) if len(rows) else rows[:, None]
        kept = np.where(kept < 0, -1, rows[kept])
    if len(kept) == 0:
        raise BadFrameError(f"{frame.name}: no point of the scan projects into the image; check the calibration")
    kept = kept[limit(points[kept[:, 0]], settings.max_points, rng)]
    xyz = to_ego(points[kept[:, 0]], frame.to_ego)
    if settings.augmentation != "none":
        xyz = augment(xyz, rng)
    cut = in_view(xyz, settings.needs)
    xyz, kept = xyz[cut], kept[cut]
    feats = make_features(xyz, points[kept[:, 0], 3], intensity)
    view = np.repeat(np.arange(len(frames), dtype=np.int32), [len(each.points) for each in frames])[kept]  # [n, pairs]
    ratio = np.array(settings.image_size) / np.array(sizes)
    places = np.floor(np.floor(pixels[kept]) * ratio[view]).astype(np.int32)  # the published readers floor first
    name = frame.name if settings.views == 1 else frame.name.rsplit("/", 1)[0]
    scene = _finish(name, index, xyz, feats, settings.needs)
    images = [_resized(each, settings) for each in frames]
    if settings.views == 1:
        return scene._replace(image=images[0], pixels=places[:, 0], tokens=frame.tokens)
    scene = scene._replace(pixels=places, views=np.where(kept < 0, -1, view))
    return scene._replace(image=_slots(images, settings.views), tokens=_token_slots(frames, settings.views))


def _resized(frame: Frame, settings: SceneSettings) -> np.ndarray | None:
    if frame.image is None:
        return None
    return resize_image(frame.image, settings.image_size, antialias=settings.antialias, dtype=settings.image_dtype)


def _slots(parts: Sequence[np.ndarray | None], number: int) -> np.ndarray | None:
    """Parts of one shape, stacked and filled up with zeros to [number, ...]; None where there are none."""
    found = [part for part in parts if part is not None]
    return np.stack([*found, *[np.zeros_like(found[0])] * (number - len(found))]) if found else None


def _token_slots(frames: Sequence[Frame], number: int) -> tuple[Tokens, ...]:
    """The tokens of each teacher, of all frames."""
    of_teachers = zip(*(frame.tokens for frame in frames), strict=True)
    stacked = ([_slots(parts, number) for parts in zip(*tokens, strict=True)] for tokens in of_teachers)
    return tuple(Tokens(values, scale) for values, scale in stacked if values is not None)


def check_classes(frame: Frame, num_classes: int) -> None:
    """Raises `BadFrameError` for a label that is neither a class nor 255: it would reach the loss as none."""
    labels = labels_of(frame)
    if len(outside := labels[(labels >= num_classes) & (labels != IGNORE)]):
        raise BadFrameError(
            f"{frame.name}: {len(outside)} labels are up to {outside.max()}, and the classes are 0 to "
            f"{num_classes - 1}; write or prepare its labels again"
        )


def labels_of(frame: Frame) -> np.ndarray:
    """[N] uint8, 255 where the frame has none."""
    return frame.labels if frame.labels is not None else np.full(len(frame.points), IGNORE, np.uint8)


def _cloud(
    frame: Frame, raw: np.ndarray, intensity: tuple[float, float], settings: SceneSettings, rng: np.random.Generator
) -> Cloud:
    """One point a voxel; in training a random one, of so many points as the settings allow, augmented.

    raw [N, 3]: the frame's points as the student sees them.
    """
    kept = voxelize(raw, settings.voxel_size, rng if settings.train else None)
    if settings.train:
        kept = kept[limit(raw[kept], settings.max_points, rng)]
    xyz = raw[kept]
    seen, kind = xyz, settings.augmentation if settings.train else "none"
    if kind == "consistent":
        seen = xyz = augment(xyz, rng)
    elif kind == "vavit":
        seen, xyz = augment(xyz, rng, VAVIT_FLIP), augment(xyz, rng, VAVIT_FLIP)
    feats = make_features(seen, frame.points[kept, 3], intensity)
    if kind == "published":
        xyz, feats = _augment_published(xyz, feats, rng)
    return Cloud(xyz, feats, labels_of(frame)[kept])


def _segmentation_scene(frame: Frame, raw: np.ndarray, index: int, cloud: Cloud, settings: SceneSettings) -> SceneView:
    cut = in_view(cloud.xyz, settings.needs)
    xyz, feats, labels = (part[cut] for part in cloud)
    scene = _finish(frame.name, index, xyz, feats, settings.needs)._replace(labels=labels)
    if settings.train:
        return scene
    return _with_raw(scene, xyz, raw, labels_of(frame), np.linalg.norm(raw, axis=1))


def _vote_scene(
    frame: Frame, index: int, intensity: tuple[float, float], settings: SceneSettings, rng: np.random.Generator
) -> SceneView:
    """One augmented copy of a whole scan, as WaffleIron's evaluation makes them: before the voxels are found.

    `published` turns coordinates and features by different angles, and flips and scales the coordinates alone;
    `consistent` computes the features of the augmented coordinates, `vavit` of another augmentation. The distances are
    those of the scan as it is.
    """
    labels, raw = labels_of(frame), to_ego(frame.points, frame.to_ego)
    ranges = np.linalg.norm(raw, axis=1)
    kind, seen, raw = settings.augmentation, raw, augment(raw, rng)
    if kind != "published":
        seen = augment(seen, rng) if kind == "vavit" else raw
    feats = make_features(seen, frame.points[:, 3], intensity)
    if kind == "published":
        feats[:, 1:3] = feats[:, 1:3] @ rotation(rng.uniform(-np.pi, np.pi))
    kept = voxelize(raw, settings.voxel_size)
    kept = kept[in_view(raw[kept], settings.needs)]
    scene = _finish(frame.name, index, raw[kept], feats[kept], settings.needs)._replace(labels=labels[kept])
    return _with_raw(scene, raw[kept], raw, labels, ranges)


def _with_raw(scene: SceneView, xyz: np.ndarray, raw: np.ndarray, labels: np.ndarray, ranges: np.ndarray) -> SceneView:
    """The scene with its original points' labels [N_raw] and distances [N_raw], and which of xyz [N, 3] is nearest."""
    _, nearest = KDTree(np.ascontiguousarray(xyz)).query(raw, k=1)
    return scene._replace(upsample=nearest.astype(np.int32), raw_labels=labels, raw_ranges=ranges.astype(np.float32))


def _augment_published(xyz: np.ndarray, feats: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As released: two rotations by different angles, flips of coordinates only, scaling of features only (x, y, z and
    radius)."""
    xyz, feats = xyz.copy(), feats.copy()
    xyz[:, :2] = xyz[:, :2] @ rotation(rng.uniform(-np.pi, np.pi))
    feats[:, 1:3] = feats[:, 1:3] @ rotation(rng.uniform(-np.pi, np.pi))
    if rng.random() < 2 / 3:
        xyz[:, rng.integers(2)] *= -1.0
    feats[:, 1:5] *= rng.uniform(0.9, 1.1)
    return xyz, feats


def _finish(name: str, index: int, xyz: np.ndarray, feats: np.ndarray, needs: SceneNeeds) -> SceneView:
    """Adds the backbone's tables to a scene's points xyz [N, 3] and feats [N, F]. Raises `BadFrameError`."""
    if len(xyz) <= needs.num_neighbors:
        raise BadFrameError(
            f"{name}: {len(xyz)} points are left in the field of view, and {needs.num_neighbors + 1} are needed"
        )
    xyz = xyz.astype(np.float32)
    axes_and_grids = zip(PLANE_AXES, needs.grids, strict=False)  # empty without planes
    planes = tuple(make_plane(xyz, axes, grid, needs.field_of_view) for axes, grid in axes_and_grids)
    scene = SceneView(name, index, feats, find_neighbors(xyz, needs.num_neighbors), planes, None, None, None)
    if needs.pillar_size is not None:
        scene = scene._replace(pillars=make_pillars(xyz, needs.pillar_size))
    if needs.voxel_size is None:
        return scene
    coordinates = coordinates_in(xyz, needs.field_of_view, needs.voxel_size)
    return scene._replace(voxels=SceneVoxels(coordinates, count_levels(np.floor(coordinates))))
