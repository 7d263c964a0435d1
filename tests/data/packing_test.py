"""Packing then unpacking returns the scenes; nothing is dropped; the order is kept."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalr_jax.data.packing import Capacities, derive_capacities, overflow, pack_shard, pack_stream, round_up, sizes
from scalr_jax.data.scenes import SceneVoxels
from scalr_jax.ops.voxels import count_levels
from scalr_jax.runtime.errors import InputError
from tests.support.checks import mentions, present
from tests.support.random_scenes import GRIDS, random_scene

ROOMY = Capacities(400, 5, (400,) * 3, (1200,) * 3)


def unpack(batch, capacities):
    """Scenes back out of one shard: feats, neighbours, positions per plane, labels, pixels, image."""
    scenes = []
    for s in range(capacities.scenes):
        rows = np.flatnonzero(batch.scene == s)
        if not len(rows):
            continue
        positions = [
            plane.grid_index[plane.cell[rows]] - s * h * w for plane, (h, w) in zip(batch.planes, GRIDS, strict=True)
        ]
        scenes.append(
            (
                batch.feats[rows],
                batch.neighbors[rows] - rows[0],
                positions,
                batch.labels[rows],
                batch.pixels[rows],
                batch.images[s],
            )
        )
    return scenes


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(6, 70), min_size=0, max_size=5), st.integers(0, 1000))
def test_unpacking_returns_the_scenes(counts, seed):
    scenes = [random_scene(seed + i, count) for i, count in enumerate(counts)]
    batch = pack_shard(scenes, ROOMY, random_scene(0), GRIDS)
    found = unpack(batch, ROOMY)
    assert len(found) == len(scenes)
    for scene, (feats, neighbors, positions, labels, pixels, image) in zip(scenes, found, strict=True):
        np.testing.assert_array_equal(feats, scene.feats)
        np.testing.assert_array_equal(neighbors, scene.neighbors)
        for position, plane in zip(positions, scene.planes, strict=True):
            np.testing.assert_array_equal(position, plane.position[plane.cell])
        np.testing.assert_array_equal(labels, scene.labels)
        np.testing.assert_array_equal(pixels, scene.pixels)
        np.testing.assert_array_equal(image, scene.image)
    padding = batch.scene == ROOMY.scenes
    assert padding.sum() == ROOMY.points - sum(counts)
    assert (present(batch.labels)[padding] == 255).all()
    assert all((plane.cell[padding] == ROOMY.cells[k]).all() for k, plane in enumerate(batch.planes))
    np.testing.assert_array_equal(batch.scene_points[: len(counts)], counts)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(6, 120), min_size=1, max_size=12))
def test_greedy_packing_keeps_order_and_drops_nothing(counts):
    capacities = Capacities(150, 3, (150,) * 3, (900,) * 3)
    scenes = [random_scene(i, count, index=2 * i) for i, count in enumerate(counts)]
    packs = list(pack_stream(iter(scenes), capacities))
    assert [scene.stream_index for pack in packs for scene in pack.scenes] == [scene.stream_index for scene in scenes]
    for pack, following in itertools.pairwise(packs):
        assert pack.waiting == (following.scenes[0].stream_index,)
        joined = [*pack.scenes, following.scenes[0]]
        assert len(joined) > 3 or sum(len(scene.feats) for scene in joined) > 150
    assert packs[-1].waiting == (scenes[-1].stream_index + 1,)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(6, 120), min_size=1, max_size=40), st.integers(2, 5))
def test_with_a_lookahead_nothing_is_dropped_and_who_waited_longest_comes_first(counts, lookahead):
    capacities = Capacities(150, 3, (150,) * 3, (900,) * 3)
    scenes = [random_scene(i, count, index=2 * i) for i, count in enumerate(counts)]
    packs = list(pack_stream(iter(scenes), capacities, lookahead=lookahead))
    places = [scene.stream_index for pack in packs for scene in pack.scenes]
    assert sorted(places) == list(range(0, 2 * len(scenes), 2))
    for pack, following in itertools.pairwise(packs):
        assert len(pack.waiting) <= lookahead
        assert pack.waiting[0] == following.scenes[0].stream_index
        read = set(places[: places.index(pack.waiting[0])]) | set(pack.waiting)
        if len(pack.waiting) == lookahead:  # else the stream has ended
            assert read == set(range(0, pack.waiting[-1] + 1, 2)), "from the last that waits on, nothing has been read"


def test_a_lookahead_fills_packs():
    sizes = np.random.default_rng(0).integers(6, 60, 120)
    scenes = [random_scene(i, count, index=i) for i, count in enumerate(sizes)]
    capacities = Capacities(150, 10, (150,) * 3, (900,) * 3)
    plain, fuller = (len(list(pack_stream(iter(scenes), capacities, lookahead=n))) for n in (1, 4))
    assert fuller < 0.93 * plain


def test_an_exact_number_of_scenes():
    scenes = [random_scene(i, 20, index=i) for i in range(6)]
    packs = list(pack_stream(iter(scenes), ROOMY, exactly=2))
    assert [len(pack.scenes) for pack in packs] == [2, 2, 2]
    assert [pack.waiting for pack in packs] == [(2,), (4,), (6,)]


def test_a_scene_that_does_not_fit_names_the_capacity():
    scenes = [random_scene(0, 20), random_scene(1, 90)]
    with pytest.raises(InputError, match=mentions("scene 1", 90, "data.points_per_shard", 50)):
        list(pack_stream(iter(scenes), ROOMY._replace(points=50)))
    with pytest.raises(InputError, match=mentions("data.cells_per_shard", (3, 3, 3))):
        list(pack_stream(iter(scenes), ROOMY._replace(cells=(3, 3, 3))))
    with pytest.raises(InputError, match=mentions("2 scenes", "scene 1")):
        list(pack_stream(iter(scenes), ROOMY._replace(points=100), exactly=2))


def test_derived_capacities_hold_full_packs_of_such_scenes():
    scenes = [random_scene(i, 60 + 5 * (i % 4)) for i in range(32)]
    capacities = derive_capacities(scenes, points=400, scenes=5)
    packs = list(pack_stream(iter(scenes), capacities))
    assert all(not overflow(sizes(scene), capacities) for scene in scenes)
    assert np.mean([len(pack.scenes) for pack in packs[:-1]]) >= 4.5


@pytest.mark.parametrize("exactly", [1, 2, 8])
def test_derived_capacities_hold_every_group_of_an_exact_number(exactly):
    """With few large scenes among small ones, some groups hold the large ones alone: a pack cannot end before them."""
    scenes = [_scene_of_voxels(index, 200 if index % 8 == 0 else 20 + index % 5) for index in range(32)]
    points = exactly * 200
    capacities = derive_capacities(scenes, points=points, scenes=exactly, exactly=exactly)
    assert max(*capacities.cells, *capacities.voxels) <= -(-points // 128) * 128
    largest = [scene for scene in scenes if len(scene.feats) == 200] * exactly
    packs = list(pack_stream(iter(largest + scenes), capacities, exactly=exactly))
    assert {len(pack.scenes) for pack in packs} == {exactly}


def _scene_of_voxels(index, num_points):
    """With the tables of both students."""
    scene = random_scene(index, num_points, index=index)
    coordinates = np.random.default_rng(index).uniform(0, 12, (num_points, 3)).astype(np.float32)
    return scene._replace(voxels=SceneVoxels(coordinates, count_levels(np.floor(coordinates))))


@given(st.integers(1, 300_000), st.integers(1, 40_000))
def test_sizes_of_the_short_list_hold_a_scene_with_little_room_left(points, cells):
    """From 4,096 on at most an eighth more rows than points, a multiple of 512; a size of the list is its own."""
    cells = min(cells, points, 256 * 32)
    need = Capacities(points, 1, (cells,) * 3, (min(9 * cells, 256 * 32),) * 3)
    given_sizes = round_up(need, ((256, 256), (256, 32), (256, 32)))
    assert not overflow(need, given_sizes)
    assert given_sizes.points <= max(4_096, 1.125 * points)
    assert given_sizes.points % 512 == 0
    assert given_sizes == round_up(
        given_sizes._replace(cells=need.cells, halo=need.halo), ((256, 256), *[(256, 32)] * 2)
    )
