"""MinkUNet: sizes as published, and scenes, packs and padding do not touch each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax.data.scenes import PackedVoxels
from scalr_jax.models import minkunet
from scalr_jax.ops.voxels import count_levels, extent_of, sizes_for

VIEW = ((-3.2, -3.2, -1.6), (3.2, 3.2, 1.6))
SMALL = minkunet.MinkUNet((1, 0, 0, 0, 1, 0, 0, 0), (4, 6, 8, 10, 8, 6, 6, 6), 4)
SIZE, POINTS = 0.1, 200
EXTENT = extent_of(VIEW, SIZE)


def scene(seed, number=POINTS):
    """Points on a wavy ground, and features."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(-2.5, 2.5, (number, 3)).astype(np.float32)
    xyz[:, 2] = 0.3 * np.sin(xyz[:, 0]) + rng.normal(0, 0.1, number)
    return np.concatenate([rng.normal(size=(number, 2)), xyz], axis=1).astype(np.float32)


def coordinates(xyz):
    return (xyz - np.array(VIEW[0], np.float32)) / SIZE


@functools.lru_cache
def sizes(num_scenes):
    """With room for so many scenes, and more."""
    counts = np.max([count_levels(np.floor(coordinates(scene(seed)[:, 2:]))) for seed in range(4)], axis=0)
    return sizes_for(num_scenes * (counts + 9))


def pack(shards, num_scenes, num_points, padding=0.0):
    """feats [D, P, F] and scene [D, P] of lists of scenes."""
    feats = np.full((len(shards), num_points, 5), padding, np.float32)
    index = np.full((len(shards), num_points), num_scenes, np.int32)
    for d, members in enumerate(shards):
        rows = np.concatenate(members)
        feats[d, : len(rows)] = rows
        index[d, : len(rows)] = np.repeat(np.arange(len(members)), [len(member) for member in members])
    return feats, index


def voxels_of(feats, index, num_scenes):
    packed = PackedVoxels(coordinates(feats[..., 2:5]), sizes(num_scenes))
    return minkunet.tables_of(packed, index, EXTENT, num_scenes=num_scenes)


def forward(variables, feats, index, num_scenes, train):
    voxels = voxels_of(feats, index, num_scenes)
    out, _ = SMALL.apply(variables, feats, voxels, train=train, mutable=["batch_stats"])
    return out.reshape(*index.shape, -1), voxels.missing


compiled = jax.jit(forward, static_argnums=(3, 4))


@pytest.fixture(scope="module")
def variables():
    feats, index = pack([[scene(0)]], 1, POINTS)

    def init(feats, index):
        return SMALL.init(jax.random.key(0), feats, voxels_of(feats, index, 1), train=False)

    made = jax.jit(init)(feats, index)
    rng = np.random.default_rng(0)  # norms that do something
    return jax.tree.map(lambda x: x + rng.uniform(0.0, 0.2, x.shape).astype(np.float32), made)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "millions"), [("minkunet18", 21.7), ("minkunet34", 37.9)])
def test_as_many_parameters_as_published(name, millions):
    """Published are models of three colours with a stem of 5x5x5 and a last layer to 20 classes."""
    feats, index = pack([[scene(0)]], 1, POINTS)
    voxels = jax.eval_shape(functools.partial(voxels_of, num_scenes=1), feats, index)
    model = minkunet.MinkUNet(minkunet.BLOCKS[name])
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), feats, voxels)
    total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["params"]))
    total += (125 * 3 - 27 * 5) * minkunet.STEM + (minkunet.WIDTHS[-1] + 1) * 20
    assert round(total / 1e6, 1) == millions


@pytest.mark.slow
def test_packed_equals_apart(variables):
    members = [scene(seed, POINTS - 30 * seed) for seed in range(4)]
    feats, index = pack([members[:2], members[2:]], 2, 2 * POINTS + 17)
    packed, missing = compiled(variables, feats, index, 2, False)
    assert not np.asarray(missing).any()
    assert (np.asarray(packed)[index == 2] == 0).all()
    for number, member in enumerate(members):
        alone, _ = compiled(variables, *pack([[member]], 1, POINTS), 1, False)
        shard, place = divmod(number, 2)
        np.testing.assert_allclose(
            np.asarray(packed)[shard][index[shard] == place], np.asarray(alone)[0, : len(member)], rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
def test_padding_changes_nothing_and_gradients_are_finite(variables):
    members = [scene(0), scene(1)]

    @jax.jit
    @jax.value_and_grad
    def loss(params, feats, index):
        out, _ = forward({**variables, "params": params}, feats, index, 2, True)
        return jnp.square(out).sum()

    tight = pack([members], 2, 2 * POINTS)
    padded = pack([members], 2, 2 * POINTS + 50, padding=np.nan)
    value, gradient = loss(variables["params"], *tight)
    other, other_gradient = loss(variables["params"], *padded)
    np.testing.assert_allclose(value, other, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * largest)
        assert np.abs(a).max() > 0


def test_points_far_outside_count_as_the_border(variables):
    near, far = scene(0), scene(0)
    near[0, 2:], far[0, 2:] = (3.19, 0.0, 0.0), (900.0, 0.0, 0.0)
    far[0, :2], near[0, :2] = 0.5, 0.5
    cell = jax.jit(lambda feats, index: voxels_of(feats, index, 1).cell)
    np.testing.assert_array_equal(*(cell(*pack([[points]], 1, POINTS)) for points in (near, far)))


def test_to_jax_sizes_are_static():
    """A step is compiled for them, and batches of other sizes are other trees."""
    packed = PackedVoxels(np.zeros((1, POINTS, 3), np.float32), sizes(1))
    (leaf,), tree = jax.tree.flatten(packed)
    assert leaf is packed.coordinates
    assert jax.tree.unflatten(tree, [leaf]).sizes == sizes(1)
    assert jax.tree.structure(PackedVoxels(leaf, sizes(2))) != tree
    traced = []
    program = jax.jit(lambda packed: traced.append(packed.sizes) or packed.coordinates.sum())
    for each in (packed, PackedVoxels(leaf + 1, sizes(1)), PackedVoxels(leaf, sizes(2))):
        program(each)
    assert traced == [sizes(1), sizes(2)]
