"""Packing: scenes of different sizes share one flat buffer of static size, as language models pack sequences.

Scenes are added in the order of their stream. One that would overflow any capacity waits, and opens the next pack; when
`lookahead` scenes wait the pack is closed. So nothing is dropped, a pack that closes at the first (`lookahead` 1) keeps
the order of the stream, and one that closes later is fuller. All in NumPy, in the main process.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from scalr_jax.config import DataSettings
from scalr_jax.data.scenes import (
    IGNORE,
    Batch,
    PackedTokens,
    PackedVoxels,
    Pillars,
    Plane,
    ScenePillars,
    ScenePlane,
    SceneView,
)
from scalr_jax.ops.voxels import sizes_for
from scalr_jax.runtime.errors import InputError


class Capacities(NamedTuple):
    """Static sizes of one data shard. `data.<field>_per_shard` is the config key of each."""

    points: int  # P
    scenes: int  # S
    cells: tuple[int, ...]  # M of each plane
    halo: tuple[int, ...]  # H of each plane
    voxels: tuple[int, ...] = ()  # of each level of a MinkUNet
    pairs: tuple[int, ...] = ()  # of neighbours, likewise
    pillars: tuple[int, ...] = ()  # of a VaViT: T alone


SMALLEST = 4096  # points


class Pack(NamedTuple):
    """Scenes that fill one shard for one step, and where their stream goes on."""

    scenes: tuple[SceneView, ...]
    waiting: tuple[int, ...]  # positions of the scenes read but in no pack yet; from the last on the stream is unread
    need: Capacities  # of all its scenes together


def sizes(scene: SceneView) -> Capacities:
    """Room that one scene needs of each capacity."""
    cells = tuple(len(plane.position) for plane in scene.planes)
    halo = tuple(len(plane.halo_taps) for plane in scene.planes)
    voxels, pairs = ((), ()) if scene.voxels is None else scene.voxels.counts.T.tolist()
    pillars = () if scene.pillars is None else (len(scene.pillars.coordinates),)
    return Capacities(len(scene.feats), 1, cells, halo, tuple(voxels), tuple(pairs), pillars)


def _each(combine: Callable[[int, int], int], a: Capacities, b: Capacities) -> Capacities:
    tables = (tuple(map(combine, u, v)) for u, v in zip(a[2:], b[2:], strict=True))
    return Capacities(combine(a.points, b.points), combine(a.scenes, b.scenes), *tables)


def add(a: Capacities, b: Capacities) -> Capacities:
    """The sum of each size: what two scenes need together."""
    return _each(operator.add, a, b)


def largest(a: Capacities, b: Capacities) -> Capacities:
    """The larger of each size: the least capacities that hold either."""
    return _each(max, a, b)


def flat(sizes: Capacities) -> np.ndarray:
    """Points and the sizes of all tables, but not the number of scenes."""
    return np.concatenate([[sizes.points], *sizes[2:]])


def in_buckets(capacities: Capacities, shares: Sequence[float]) -> list[Capacities]:
    """Sizes that a step may have, ascending: `shares` of each size but the scenes, in multiples of 128, and all."""

    def part(share: float) -> Capacities:
        points, *tables = (
            tuple(min(size, 128 * math.ceil(share * size / 128)) for size in table)
            for table in ((capacities.points,), *capacities[2:])
        )
        return Capacities(points[0], capacities.scenes, *tables)

    return [*map(part, sorted(shares)), capacities]


def bucket_of(packs: Sequence[Pack], rooms: Sequence[Capacities]) -> int:
    """The first of `rooms` that holds each of the packs; the last one does."""
    need = functools.reduce(largest, (pack.need for pack in packs))
    return next(k for k, room in enumerate(rooms) if not overflow(need, room))


def nothing_of(capacities: Capacities) -> Capacities:
    """The room that a pack without a scene needs."""
    return Capacities(0, 0, *((0,) * len(table) for table in capacities[2:]))


def overflow(need: Capacities, capacities: Capacities) -> list[str]:
    """One text for each capacity that is exceeded."""
    return [
        f"{needed} {name} where data.{name}_per_shard is {given}"
        for name, needed, given in zip(Capacities._fields, need, capacities, strict=True)
        if any(x > y for x, y in zip(np.atleast_1d(needed), np.atleast_1d(given), strict=True))
    ]


def derive_capacities(
    sample: Sequence[SceneView], *, points: int, scenes: int, exactly: int | None = None
) -> Capacities:
    """Table capacities for packs of `points` points and `scenes` scenes, from a sample of scenes.

    A pack holds at most `scenes` scenes and `points` points; its cells are estimated from the sample's cells a point
    and cells a scene, with a margin, and never below two and a half times the largest scene seen. With `exactly` a pack
    cannot end before it is full: there is room for that many scenes, each a tenth larger than the largest seen.
    """
    num_points = [len(scene.feats) for scene in sample]
    needs = [sizes(scene)[2:] for scene in sample]
    size = functools.partial(table_size, num_points=num_points, points=points, scenes=scenes, exactly=exactly)
    tables = (tuple(map(size, zip(*tables, strict=True))) for tables in zip(*needs, strict=True))
    derived = Capacities(points, scenes, *tables)
    most = -(-points // 128) * 128  # a point is in one cell of a plane, in one voxel and in one pillar
    bounded = {
        name: tuple(min(size, most) for size in getattr(derived, name)) for name in ("cells", "voxels", "pillars")
    }
    return derived._replace(**bounded)


def table_size(
    counts: Sequence[int], num_points: Sequence[int], *, points: int, scenes: int, exactly: int | None = None
) -> int:
    """The size of one table, a multiple of 128, from what each scene of a sample needs of it and its points."""
    if exactly:
        need = max(1.1 * exactly, 2.5) * max(counts)
    else:
        by_points = points * sum(counts) / sum(num_points)
        by_scenes = scenes * sum(counts) / len(counts)
        need = max(1.25 * min(by_points, by_scenes), 2.5 * max(counts))
    return int(-(-need // 128) * 128)


def given_tables(derived: Capacities, data: DataSettings) -> Capacities:
    """`derived` with the tables that `data.cells_per_shard` and the like give. Raises `InputError` for a wrong number
    of them."""
    for name in Capacities._fields[2:]:
        given, needed = tuple(getattr(data, f"{name}_per_shard")), getattr(derived, name)
        if given and needed and len(given) != len(needed):
            raise InputError(f"data.{name}_per_shard = {given} has {len(given)} numbers; it needs {len(needed)}")
        if given and needed:
            derived = derived._replace(**{name: given})
    return derived


def choose_capacities(data: DataSettings, sample: Sequence[SceneView], *, exactly: int | None = None) -> Capacities:
    """From `data` where it gives them, else derived from a sample; `exactly`: of packs of so many scenes."""
    derived = derive_capacities(sample, points=data.points_per_shard, scenes=data.scenes_per_shard, exactly=exactly)
    capacities = given_tables(derived, data)
    for scene in sample:
        check_fits(scene, capacities)
    return capacities


def check_fits(scene: SceneView, capacities: Capacities) -> None:
    """Raises `InputError` for a scene that no pack holds, naming what to raise."""
    if exceeded := overflow(sizes(scene), capacities):
        needs = ", ".join(exceeded)
        raise InputError(f"the scene {scene.name} needs {needs}; raise it (a training resumes with it)")


def static_capacities(scene: SceneView, grids: Sequence[tuple[int, int]]) -> Capacities:
    """Capacities of one scene alone, from a short list, so that scenes of all sizes compile few programs."""
    return round_up(sizes(scene), grids)


def round_up(need: Capacities, grids: Sequence[tuple[int, int]]) -> Capacities:
    """The least capacities of the list that hold one scene that needs `need`.

    Points are 8 to 15 times a power of two, from 4,096: at most an eighth is padding. Tables are an eighth, a quarter,
    a half or all of what so many points can fill; a MinkUNet's voxels on each level, and a VaViT's pillars, the points
    over a power of two, and pairs of voxels a whole number of neighbours, 1, 2, 4, 8, 16 or 26.
    """
    step = 1 << (max(need.points, SMALLEST) - 1).bit_length() - 4
    points = max(SMALLEST, -(-need.points // step) * step)
    halvings = range(points.bit_length())
    voxels, pillars = (
        tuple(next(points >> k for k in reversed(halvings) if points >> k >= number) for number in numbers)
        for numbers in (need.voxels, need.pillars)
    )
    pairs = tuple(
        next(n * rows for n in (1, 2, 4, 8, 16, 26) if n * rows >= number)
        for number, rows in zip(need.pairs, voxels, strict=True)
    )
    areas = [int(h) * int(w) for h, w in grids]
    for parts in (8, 4, 2, 1):
        cells = tuple(-(-min(points, area) // parts) for area in areas)
        halo = tuple(-(-min(9 * points, area) // parts) for area in areas)
        capacities = Capacities(points, 1, cells, halo, voxels, pairs, pillars)
        if not overflow(need, capacities):
            return capacities
    raise AssertionError("more cells than points or than the grid has")


def pack_stream(
    scenes: Iterator[SceneView], capacities: Capacities, *, exactly: int | None = None, lookahead: int = 1
) -> Iterator[Pack]:
    """Packs of a stream's scenes. With `exactly`, every pack holds that many consecutive scenes.

    Raises `InputError` for a scene (or, with `exactly`, a group of scenes) that does not fit, naming what to raise.
    """
    empty = nothing_of(capacities)
    waiting: list[SceneView] = []
    end = 0
    while True:
        source, waiting = itertools.chain(waiting, scenes), []
        held: list[SceneView] = []
        need = empty
        for scene in source:
            check_fits(scene, capacities)
            end, more = max(end, scene.stream_index + 1), add(need, sizes(scene))
            if exceeded := overflow(more, capacities):
                if exactly:
                    group = f"a group of {exactly} scenes up to {scene.name}"
                    raise InputError(f"{group} needs {', '.join(exceeded)}; raise it")
                waiting.append(scene)
            else:
                held.append(scene)
                need = more
            if len(waiting) == lookahead or len(held) == exactly:
                break
        if not held:
            return
        yield Pack(tuple(held), tuple(scene.stream_index for scene in waiting) or (end,), need)


def pack_shard(
    scenes: Sequence[SceneView], capacities: Capacities, template: SceneView, grids: Sequence[tuple[int, int]]
) -> Batch:
    """Concatenate scenes into one shard's arrays (no D axis). `template` gives widths and dtypes of an empty pack."""
    capacity = capacities.points
    counts = np.array([len(scene.feats) for scene in scenes], np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    total = int(starts[-1])
    parts = ([scene.planes[k] for scene in scenes] for k in range(len(grids)))
    batch = Batch(
        feats=_filled([scene.feats for scene in scenes], capacity, 0.0, template.feats),
        scene=np.full(capacity, capacities.scenes, np.int32),
        scene_points=np.zeros(capacities.scenes, np.int32),
        neighbors=np.empty((capacity, template.neighbors.shape[1]), np.int32),
        planes=tuple(_pack_plane(part, counts, capacities, k, grids[k]) for k, part in enumerate(parts)),
    )
    batch.scene[:total] = np.repeat(np.arange(len(scenes), dtype=np.int32), counts)
    batch.scene_points[: len(scenes)] = counts
    for scene, start in zip(scenes, starts, strict=False):
        np.add(scene.neighbors, start, out=batch.neighbors[start : start + len(scene.feats)])
    batch.neighbors[total:] = np.arange(total, capacity, dtype=np.int32)[:, None]  # padding is its own neighbour
    return _with_optional(batch, scenes, capacities, template)


def _with_optional(batch: Batch, scenes: Sequence[SceneView], capacities: Capacities, template: SceneView) -> Batch:
    """The batch with the fields that `template` has: images or tokens with pixels, voxels, pillars, labels."""
    if template.pixels is not None:
        pixels = _filled([scene.pixels for scene in scenes], capacities.points, 0, template.pixels)
        batch = batch._replace(pixels=pixels)
    if template.views is not None:
        batch = batch._replace(views=_pack_views(scenes, capacities, template))
    if template.image is not None:
        batch = batch._replace(images=_stacked([scene.image for scene in scenes], capacities, template.image))
    tokens = []
    for k, like in enumerate(template.tokens):
        columns = zip(
            like, zip(*(scene.tokens[k] for scene in scenes), strict=True) if scenes else ((), ()), strict=True
        )
        tokens.append(PackedTokens(*(x if x is None else _stacked(parts, capacities, x) for x, parts in columns)))
    batch = batch._replace(tokens=tuple(tokens))
    if template.voxels is not None:
        parts = [scene.voxels.coordinates for scene in scenes if scene.voxels is not None]
        coordinates = _filled(parts, capacities.points, 0.0, template.voxels.coordinates)
        counts = np.column_stack([capacities.voxels, capacities.pairs])
        batch = batch._replace(voxels=PackedVoxels(coordinates, sizes_for(counts)))
    if template.pillars is not None:
        batch = batch._replace(pillars=_pack_pillars([scene.pillars for scene in scenes if scene.pillars], capacities))
    if template.labels is not None:
        labels = _filled([scene.labels for scene in scenes], capacities.points, IGNORE, template.labels)
        batch = batch._replace(labels=labels.astype(np.int32))
    return batch


def _stacked(parts: Sequence[np.ndarray | None], capacities: Capacities, like: np.ndarray) -> np.ndarray:
    """Stacks arrays of which each scene of a shard has one, [S, ...]; zeros in empty slots."""
    stacked = np.zeros((capacities.scenes, *like.shape), like.dtype)
    for i, part in enumerate(parts):
        assert part is not None, "a scene without an image among scenes with one"
        stacked[i] = part
    return stacked


def stack_shards(shards: Sequence[Batch]) -> Batch:
    """[...] a shard -> [D_local, ...]."""
    first = shards[0]
    names = [name for name, value in first._asdict().items() if isinstance(value, np.ndarray)]
    arrays = {name: np.stack([getattr(shard, name) for shard in shards]) for name in names}
    planes = zip(*(shard.planes for shard in shards), strict=True)
    batch = first._replace(**arrays, planes=tuple(Plane(*map(np.stack, zip(*plane, strict=True))) for plane in planes))
    if first.tokens:
        of_teachers = (zip(*parts, strict=True) for parts in zip(*(shard.tokens for shard in shards), strict=True))
        stack = lambda parts: None if parts[0] is None else np.stack(parts)  # noqa: E731
        batch = batch._replace(tokens=tuple(PackedTokens(*map(stack, parts)) for parts in of_teachers))
    if first.pillars is not None:
        parts = zip(*(shard.pillars for shard in shards if shard.pillars is not None), strict=True)
        batch = batch._replace(pillars=Pillars(*map(np.stack, parts)))
    if first.voxels is None:
        return batch
    coordinates = np.stack([shard.voxels.coordinates for shard in shards if shard.voxels is not None])
    return batch._replace(voxels=PackedVoxels(coordinates, first.voxels.sizes))


def _filled(parts: Sequence, capacity: int, fill: float, like: np.ndarray) -> np.ndarray:
    """Concatenation of `parts`, filled up to `capacity` rows."""
    rest = np.full((capacity - sum(map(len, parts)), *like.shape[1:]), fill, like.dtype)
    return np.concatenate([*parts, rest], dtype=like.dtype, casting="unsafe")


def _pack_views(scenes: Sequence[SceneView], capacities: Capacities, template: SceneView) -> np.ndarray:
    """Which image of the shard each pair of a point is in: [P, R] int32."""
    images = template.image if template.image is not None else template.tokens[0].values
    assert template.views is not None
    number, none = len(images), capacities.scenes * len(images)
    parts = [scene.views for scene in scenes if scene.views is not None]
    numbered = [np.where(part < 0, none, part + k * number) for k, part in enumerate(parts)]
    return _filled(numbered, capacities.points, none, template.views)


def _pack_pillars(parts: Sequence[ScenePillars], capacities: Capacities) -> Pillars:
    (capacity,), counts = capacities.pillars, np.zeros(capacities.scenes, np.int32)
    counts[: len(parts)] = [len(part.coordinates) for part in parts]
    starts = np.cumsum(counts) - counts
    cells = [part.cell + start for part, start in zip(parts, starts, strict=False)]
    cell = _filled(cells, capacities.points, capacity, np.zeros(0, np.int32))
    coordinates = [part.coordinates for part in parts]
    return Pillars(cell, _filled(coordinates, capacity, 0.0, np.zeros((0, 2), np.float32)), counts)


def _pack_plane(
    parts: Sequence[ScenePlane], counts: np.ndarray, capacities: Capacities, k: int, grid: tuple[int, int]
) -> Plane:
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
