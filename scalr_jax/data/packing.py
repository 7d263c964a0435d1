"""Packing: scenes of different sizes share one flat buffer of static size, as language models pack sequences.

Scenes are added in order until the next one would overflow any capacity; that one opens the next pack. So nothing
is dropped and the order is that of the stream. All in NumPy, in the main process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from scalr_jax.config import DataSettings
from scalr_jax.data.scenes import IGNORE, Batch, PackedVoxels, Plane, ScenePlane, SceneView
from scalr_jax.ops.voxels import DIRECTIONS, by_direction, pooled, room_for, turned
from scalr_jax.runtime.errors import InputError


class Capacities(NamedTuple):
    """Static sizes of one data shard. The config key that raises each is in `KEYS`."""

    points: int  # P
    scenes: int  # S
    cells: tuple[int, ...]  # M of each plane
    halo: tuple[int, ...]  # H of each plane
    voxels: tuple[int, ...] = ()  # of each level of a MinkUNet
    pairs: tuple[int, ...] = ()  # of neighbours, likewise
    directions: tuple[int, ...] = ()  # of the pairs, 13 a level, or `pooled`


KEYS = Capacities(*(f"data.{name}_per_shard" for name in Capacities._fields))._replace(  # type: ignore[arg-type]
    directions="data.pairs_per_shard"  # type: ignore[arg-type]
)

SMALLEST = 4096  # points


class Pack(NamedTuple):
    """Scenes that fill one shard for one step, and where their stream goes on."""

    scenes: tuple[SceneView, ...]
    next_index: int  # position in the stream of the first scene that is not in this pack or an earlier one


def sizes(scene: SceneView) -> Capacities:
    """What one scene needs of each capacity."""
    cells = tuple(len(plane.position) for plane in scene.planes)
    halo = tuple(len(plane.halo_taps) for plane in scene.planes)
    if scene.voxels is None:
        return Capacities(len(scene.feats), 1, cells, halo)
    counts = scene.voxels.counts
    voxels, pairs, directions = (tuple(part.ravel().tolist()) for part in np.split(counts, [1, 2], axis=1))
    return Capacities(len(scene.feats), 1, cells, halo, voxels, pairs, directions)


def add(a: Capacities, b: Capacities) -> Capacities:
    tables = (tuple(x + y for x, y in zip(u, v, strict=True)) for u, v in zip(a[2:], b[2:], strict=True))
    return Capacities(a.points + b.points, a.scenes + b.scenes, *tables)


def largest(a: Capacities, b: Capacities) -> Capacities:
    """The larger of each size: the least that hold what either does."""
    tables = (tuple(max(x, y) for x, y in zip(u, v, strict=True)) for u, v in zip(a[2:], b[2:], strict=True))
    return Capacities(max(a.points, b.points), max(a.scenes, b.scenes), *tables)


def flat(sizes: Capacities) -> np.ndarray:
    """Points and the sizes of all tables, but not the number of scenes."""
    return np.concatenate([[sizes.points], *sizes[2:]])


def overflow(need: Capacities, capacities: Capacities) -> list[str]:
    """One text for each capacity that is exceeded."""
    found = []
    # Pairs beyond the room of a direction are told as pairs, which is what the config gives.
    enough = need._replace(pairs=_enough_pairs(need, capacities), directions=capacities.directions)
    for key, name, needed, given in zip(KEYS, Capacities._fields, enough, capacities, strict=True):
        if any(x > y for x, y in zip(np.atleast_1d(needed), np.atleast_1d(given), strict=True)):
            found.append(f"{needed} {name} where {key} is {given}")
    return found


def _enough_pairs(need: Capacities, capacities: Capacities) -> tuple[int, ...]:
    """What would have to be given each level, of which `given_tables` makes all directions' room larger alike."""
    needed, room = (np.reshape(sizes.directions, (-1, len(DIRECTIONS))) for sizes in (need, capacities))
    larger = (needed / np.maximum(room - 1, 1)).max(axis=1)  # room was rounded up
    pairs = np.maximum(need.pairs, capacities.pairs)
    enough = np.where((needed > room).any(axis=1), np.ceil(larger * capacities.pairs), 0)
    return tuple(np.maximum(pairs, enough).astype(int).tolist())


def derive_capacities(
    sample: Sequence[SceneView], *, points: int, scenes: int, exactly: int | None = None, directions: bool = False
) -> Capacities:
    """Table capacities for packs of `points` points and `scenes` scenes, from a sample of scenes.

    A pack holds at most `scenes` scenes and `points` points; its cells are estimated from the sample's cells a point
    and cells a scene, with a margin, and never below two and a half times the largest scene seen. With `exactly` a pack
    cannot end before it is full: there is room for that many scenes, each a tenth larger than the largest seen. With
    `directions` the pairs get room by direction where that pays, whichever way scenes are turned.
    """

    def capacity(counts: list[int]) -> int:
        return table_size(counts, num_points, points=points, scenes=scenes, exactly=exactly)

    num_points = [len(scene.feats) for scene in sample]
    needs = [sizes(scene)[2:-1] for scene in sample]
    tables = [[capacity(list(counts)) for counts in zip(*of, strict=True)] for of in zip(*needs, strict=True)]
    cells, halo, voxels, pairs = tables
    most = -(-points // 128) * 128  # a point is in one cell of a plane and in one voxel
    cells, voxels = ([min(size, most) for size in table] for table in (cells, voxels))
    room = np.reshape(pooled(pairs), (-1, len(DIRECTIONS)))
    if directions and pairs:
        counts = np.stack([turned(scene.voxels.counts)[:, 2:] for scene in sample if scene.voxels], axis=-1)
        for level, needed in enumerate(counts.tolist()):
            by_themselves = [capacity(of_direction) for of_direction in needed]
            if by_direction(pairs[level], by_themselves):
                room[level] = by_themselves
    flat_room = tuple(room.ravel().tolist())
    return Capacities(points, scenes, tuple(cells), tuple(halo), tuple(voxels), tuple(pairs), flat_room)


def table_size(
    counts: Sequence[int], num_points: Sequence[int], *, points: int, scenes: int, exactly: int | None = None
) -> int:
    """Of one table, a multiple of 128: from what each scene of a sample needs of it, and how many points each has."""
    if exactly:
        need = max(1.1 * exactly, 2.5) * max(counts)
    else:
        by_points = points * sum(counts) / sum(num_points)
        by_scenes = scenes * sum(counts) / len(counts)
        need = max(1.25 * min(by_points, by_scenes), 2.5 * max(counts))
    return int(-(-need // 128) * 128)


def given_tables(derived: Capacities, data: Any) -> Capacities:
    """`derived` with the tables that `data.cells_per_shard` and its like give. Raises `InputError` for a wrong number
    of them. With other pairs the room by direction grows or shrinks as much."""
    tables = {}
    for name in ("cells", "halo", "voxels", "pairs"):
        given, needed = tuple(getattr(data, f"{name}_per_shard")), getattr(derived, name)
        if given and needed and len(given) != len(needed):
            raise InputError(f"data.{name}_per_shard = {given} has {len(given)} numbers, and {len(needed)} are needed")
        tables[name] = given if given and needed else needed
    by_level = np.reshape(derived.directions, (-1, len(DIRECTIONS)))
    scale = np.array(tables["pairs"], float) / np.maximum(derived.pairs, 1)
    directions = np.ceil(by_level * scale[:, None]).astype(int)
    return derived._replace(**tables, directions=tuple(directions.ravel().tolist()))


def static_capacities(scene: SceneView, grids: Sequence[tuple[int, int]]) -> Capacities:
    """Capacities of one scene alone, from a short list, so that scenes of all sizes compile few programs."""
    return round_up(sizes(scene), grids)


def round_up(need: Capacities, grids: Sequence[tuple[int, int]]) -> Capacities:
    """The least capacities of the list that hold one scene that needs `need`.

    Points are 8 to 15 times a power of two, from 4,096: at most an eighth is padding. Tables are an eighth, a quarter,
    a half or all of what so many points can fill; a MinkUNet's voxels on each level the points over a power of two, and
    their pairs a whole number of neighbours, 1, 2, 4, 8, 16 or 26.
    """
    step = 1 << (max(need.points, SMALLEST) - 1).bit_length() - 4
    points = max(SMALLEST, -(-need.points // step) * step)
    halvings = range(points.bit_length())
    voxels = tuple(next(points >> k for k in reversed(halvings) if points >> k >= number) for number in need.voxels)
    pairs = tuple(
        next(n * rows for n in (1, 2, 4, 8, 16, 26) if n * rows >= number)
        for number, rows in zip(need.pairs, voxels, strict=True)
    )
    areas = [int(h) * int(w) for h, w in grids]
    for parts in (8, 4, 2, 1):
        cells = tuple(-(-min(points, area) // parts) for area in areas)
        halo = tuple(-(-min(9 * points, area) // parts) for area in areas)
        capacities = Capacities(points, 1, cells, halo, voxels, pairs, pooled(pairs))
        if not overflow(need, capacities):
            return capacities
    raise AssertionError("more cells than points or than the grid has")


def pack_stream(scenes: Iterator[SceneView], capacities: Capacities, *, exactly: int | None = None) -> Iterator[Pack]:
    """Packs of consecutive scenes. With `exactly`, every pack holds that many scenes.

    Raises `InputError` for a scene (or, with `exactly`, a group of scenes) that does not fit, naming what to raise.
    """
    held: list[SceneView] = []
    empty = Capacities(0, 0, *((0,) * len(table) for table in capacities[2:]))
    need = empty
    for scene in scenes:
        size = sizes(scene)
        if exceeded := overflow(size, capacities):
            raise InputError(
                f"the scene {scene.name} needs {', '.join(exceeded)}; raise it (a training resumes with it)"
            )
        if exceeded := overflow(add(need, size), capacities):
            if exactly:
                group = f"a group of {exactly} scenes up to {scene.name}"
                raise InputError(f"{group} needs {', '.join(exceeded)}; raise it")
            yield Pack(tuple(held), scene.stream_index)
            held, need = [], empty
        held.append(scene)
        need = add(need, size)
        if exactly and len(held) == exactly:
            yield Pack(tuple(held), scene.stream_index + 1)
            held, need = [], empty
    if held:
        yield Pack(tuple(held), held[-1].stream_index + 1)


def pack_shard(scenes: Sequence[SceneView], capacities: Capacities, template: SceneView, grids) -> Batch:
    """Concatenate scenes into one shard's arrays (no D axis). `template` gives widths and dtypes of an empty pack."""
    capacity = capacities.points
    counts = np.array([len(scene.feats) for scene in scenes], np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    total = int(starts[-1])
    batch = Batch(
        feats=_filled([scene.feats for scene in scenes], capacity, 0.0, template.feats),
        scene=np.full(capacity, capacities.scenes, np.int32),
        scene_points=np.zeros(capacities.scenes, np.int32),
        neighbors=np.empty((capacity, template.neighbors.shape[1]), np.int32),
        planes=tuple(
            _pack_plane([scene.planes[k] for scene in scenes], counts, capacities, k, grids[k])
            for k in range(len(grids))
        ),
    )
    batch.scene[:total] = np.repeat(np.arange(len(scenes), dtype=np.int32), counts)
    batch.scene_points[: len(scenes)] = counts
    for scene, start in zip(scenes, starts, strict=False):
        np.add(scene.neighbors, start, out=batch.neighbors[start : start + len(scene.feats)])
    batch.neighbors[total:] = np.arange(total, capacity, dtype=np.int32)[:, None]  # padding is its own neighbour
    if template.image is not None and template.pixels is not None:
        images = np.zeros((capacities.scenes, *template.image.shape), np.uint8)
        for i, scene in enumerate(scenes):
            assert scene.image is not None, "a scene without an image among scenes with one"
            images[i] = scene.image
        batch = batch._replace(
            images=images, pixels=_filled([scene.pixels for scene in scenes], capacity, 0, template.pixels)
        )
    if template.voxels is not None:
        parts = [scene.voxels.coordinates for scene in scenes if scene.voxels is not None]
        coordinates = _filled(parts, capacity, 0.0, template.voxels.coordinates)
        directions = np.reshape(capacities.directions, (-1, len(DIRECTIONS)))
        counts = np.column_stack([capacities.voxels, capacities.pairs, directions])
        batch = batch._replace(voxels=PackedVoxels(coordinates, room_for(counts)))
    if template.labels is not None:
        labels = _filled([scene.labels for scene in scenes], capacity, IGNORE, template.labels)
        batch = batch._replace(labels=labels.astype(np.int32))
    return batch


def stack_shards(shards: Sequence[Batch]) -> Any:
    """[...] a shard -> [D_local, ...], through nested tuples and None."""

    def stack(*leaves):
        if leaves[0] is None:
            return None
        if isinstance(leaves[0], tuple):
            parts = [stack(*inner) for inner in zip(*leaves, strict=True)]
            return type(leaves[0])(*parts) if hasattr(leaves[0], "_fields") else tuple(parts)
        return np.stack(leaves)

    return stack(*shards)


def _filled(parts: Sequence, capacity: int, fill, like: np.ndarray) -> np.ndarray:
    """Concatenation of `parts`, filled up to `capacity` rows."""
    out = np.empty((capacity, *like.shape[1:]), like.dtype)
    start = 0
    for part in parts:
        out[start : start + len(part)] = part
        start += len(part)
    out[start:] = fill
    return out


def _pack_plane(parts: Sequence[ScenePlane], counts: np.ndarray, capacities: Capacities, k: int, grid) -> Plane:
    num_points, num_cells, num_halo = capacities.points, capacities.cells[k], capacities.halo[k]
    area = grid[0] * grid[1]
    cell = np.full(num_points, num_cells, np.int32)
    grid_index = np.full(num_cells, capacities.scenes * area, np.int32)
    order = np.arange(num_points, dtype=np.int32)
    count_in = np.zeros(num_cells, np.int64)
    halo_index = np.full(num_halo, capacities.scenes * area, np.int32)
    halo_taps = np.full((num_halo, 9), num_cells, np.int32)
    cell_taps = np.full((num_cells, 9), num_halo, np.int32)
    point, row, halo = 0, 0, 0
    for i, (part, count) in enumerate(zip(parts, counts, strict=True)):
        m, u = len(part.position), len(part.halo_taps)
        cell[point : point + count] = part.cell + row
        order[point : point + count] = part.order + point
        count_in[row : row + m] = np.bincount(part.cell, minlength=m)
        grid_index[row : row + m] = part.position + i * area
        halo_index[halo : halo + u] = part.halo_position + i * area
        halo_taps[halo : halo + u] = np.where(part.halo_taps < 0, num_cells, part.halo_taps + row)
        cell_taps[row : row + m] = np.where(part.cell_taps < 0, num_halo, part.cell_taps + halo)
        point, row, halo = point + count, row + m, halo + u
    start = np.concatenate([[0], np.cumsum(count_in)]).astype(np.int32)
    inverse = np.where(count_in > 0, 1.0 / (count_in + 1e-6), 0.0).astype(np.float32)  # + 1e-6 as published
    return Plane(cell, grid_index, order, start, inverse, halo_index, halo_taps, cell_taps)


def choose_capacities(data: DataSettings, sample: list[SceneView], *, exactly: int | None = None) -> Capacities:
    """From the config where it gives them, else derived from a sample; `exactly`: of packs of so many scenes."""
    derived = derive_capacities(
        sample,
        points=data.points_per_shard,
        scenes=data.scenes_per_shard,
        exactly=exactly,
        directions=jax.default_backend() == "cpu",
    )
    return given_tables(derived, data)
