"""The form of spatial mixing for a TPU equals the plain forms; its kernels run in interpret mode here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from scalr_jax.data.packing import Capacities, pack_shard
from scalr_jax.ops import windows
from scalr_jax.ops.cell_conv import conv_taps
from scalr_jax.ops.pallas import cell_conv, rows
from scalr_jax.runtime import sharding
from tests.support.cell_planes import (
    ADVERSARIAL,
    AREA,
    CHANNELS,
    GRID,
    POINTS,
    WEIGHTS,
    dense_gradient,
    gradients,
    mixed_dense,
    packed_plane,
)
from tests.support.random_scenes import GRIDS, random_scene, stack
from tests.support.small_student import init, small_student


@pytest.fixture(scope="module", autouse=True)
def _small_tiles():
    """Tiles so small that small tables make several of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", 48)
        patch.setattr(rows, "WINDOW", 16)
        yield


@jax.jit
def mixed_windows(points, plane, kernel1, bias, kernel2):
    plane = windows.make_windows(jax.tree.map(lambda x: x[None], plane), GRID)
    table = windows.flatten(points[None], plane)
    halo = jax.nn.relu(windows.conv_up(table, plane, kernel1) + bias)
    return windows.inflate(windows.conv_down(halo, plane, kernel2), plane)[0]


GRADIENT = gradients(mixed_windows, WEIGHTS)


def random_arguments(seed, plane):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(POINTS, CHANNELS)).astype(np.float32)
    rest = [rng.normal(size=shape).astype(np.float32) for shape in ((9, CHANNELS), (CHANNELS,), (9, CHANNELS))]
    return points, plane, *rest


def check_agreement(positions, seed):
    arguments = random_arguments(seed, packed_plane(positions))
    ours = mixed_windows(*arguments)
    np.testing.assert_allclose(ours, mixed_dense(*arguments), rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(ours)[sum(map(len, positions)) :] == 0)
    for a, b in zip(GRADIENT(*arguments), dense_gradient(*arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.slow
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_windows_equal_dense_on_adversarial_occupancy(name):
    check_agreement(ADVERSARIAL[name], 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, AREA - 1), max_size=POINTS // 2),
    st.lists(st.integers(0, AREA - 1), max_size=POINTS // 2),
    st.integers(0, 1000),
)
def test_windows_equal_dense(first, second, seed):
    check_agreement((first, second), seed)


def test_gradients_are_deterministic():
    arguments = random_arguments(0, packed_plane(([1, 1, 1, 2, 7], [7, 7, 0])))
    runs = [GRADIENT(*arguments) for _ in range(3)]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


NUM_LINKS, NUM_ROWS = 100, 70  # neither divides into tiles


@functools.partial(jax.jit, static_argnames="dtype")
def select_and_sum(table, values, index, dtype):
    links = rows.make_links(index[:, None], NUM_ROWS)
    table, values = table.astype(dtype), values.astype(dtype)
    return rows.select_rows(table, links, NUM_LINKS), rows.sum_rows(values, links, NUM_ROWS)


def select_rows_reference(table, index):
    """The plain form: [D, R, C], [D, Q] -> [D, Q, C]."""
    num_rows = table.shape[1]
    index = jnp.where(index < 0, num_rows, index)
    return jax.vmap(lambda t, i: jnp.take(t, i, axis=0, mode="fill", fill_value=0))(table, index)


def sum_rows_reference(values, index, num_rows):
    """The plain form: [D, Q, C], [D, Q] -> [D, R, C] float32."""
    index = jnp.where(index < 0, num_rows, index)
    return jax.vmap(lambda v, i: jax.ops.segment_sum(v.astype(jnp.float32), i, num_rows))(values, index)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(-1, NUM_ROWS - 1), st.integers(0, NUM_ROWS + 1))
def test_rows_in_any_order_equal_the_plain_forms(dtype, seed, lowest, highest):
    """Two shards; rows that are none, outside the table, never read, or read by all."""
    rng = np.random.default_rng(seed)
    index = rng.integers(lowest, max(highest, lowest + 1), (2, NUM_LINKS), dtype=np.int32)
    if seed % 2:
        index.sort(axis=1)
    table, values = (rng.normal(size=(2, size, 5)).astype(np.float32) for size in (NUM_ROWS, NUM_LINKS))
    index = jnp.asarray(index)
    selected, sums = select_and_sum(table, values, index, dtype)
    np.testing.assert_array_equal(selected, select_rows_reference(jnp.asarray(table, dtype), index))
    expected = sum_rows_reference(jnp.asarray(values, dtype), index, NUM_ROWS)
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)


def test_selecting_and_adding_up_are_each_others_gradient():
    rng = np.random.default_rng(0)
    index = jnp.asarray(rng.integers(-1, NUM_ROWS, (1, NUM_LINKS)), jnp.int32)
    table, values = (rng.normal(size=(1, size, 3)).astype(np.float32) for size in (NUM_ROWS, NUM_LINKS))

    def inner(table, values):
        links = rows.make_links(index[:, None], NUM_ROWS)
        return jnp.vdot(rows.select_rows(table, links, NUM_LINKS), values), jnp.vdot(
            rows.sum_rows(values, links, NUM_ROWS), table
        )

    one, other = jax.jit(inner)(table, values)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    by_select, by_sum = (jax.jit(jax.grad(lambda t, v, i=i: inner(t, v)[i], argnums=(0, 1))) for i in range(2))
    for a, b in zip(by_select(table, values), by_sum(table, values), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_tiles_of_a_large_table_fit_their_list():
    own, window = rows.tile_sizes(3, 100_000, 5_000, cell_conv.MARGIN)
    assert window > rows.WINDOW
    assert 3 * -(-100_000 // own) * -(-5_000 // window) <= rows.MAX_TILES


@pytest.mark.slow
def test_bfloat16_convolutions_round_as_the_plain_form():
    """Within two bfloat16 roundings (2^-8 each) of the sum of the terms: of a row of three products, and of the result.

    The plain form rounds the result only; its sums, as these, are float32.
    """
    rng = np.random.default_rng(3)
    plane = packed_plane((rng.integers(0, AREA, 12), rng.integers(0, AREA, 12)))
    packed = windows.make_windows(jax.tree.map(lambda x: x[None], plane), GRID)
    num_cells, num_halo = plane.cell_taps.shape[0], plane.halo_taps.shape[0]
    kernel = rng.normal(size=(9, CHANNELS)).astype(np.float32)
    for size, convolve, taps in (
        (num_cells, windows.conv_up, (plane.halo_taps, plane.cell_taps)),
        (num_halo, windows.conv_down, (plane.cell_taps, plane.halo_taps)),
    ):
        table = jnp.asarray(rng.normal(size=(size, CHANNELS)), jnp.bfloat16)
        ours = jax.jit(convolve)(table[None], packed, kernel)[0].astype(jnp.float32)
        plain = conv_taps(table.astype(jnp.float32), *taps, kernel)
        terms = conv_taps(jnp.abs(table).astype(jnp.float32), *taps, jnp.abs(kernel))
        assert np.all(np.abs(ours - plain) <= terms * 2.0**-7)


@pytest.mark.slow
def test_a_student_on_a_mesh_equals_the_plain_form():
    """Two shards on two devices, through shard_map, against `cells` on one: outputs and gradients in training."""
    scenes = [random_scene(0), random_scene(1)]
    capacities = Capacities(64, 2, (64, 64, 64), (256, 64, 64))
    batch = stack([pack_shard([scene], capacities, scene, GRIDS) for scene in scenes])
    variables = init(small_student(depth=1), batch)

    def run(implementation, variables, batch):
        student = small_student(depth=1, implementation=implementation)

        def loss_of(params):
            out, _ = student.apply({**variables, "params": params}, batch, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(out[:, :40])), out[:, :40]

        return jax.jit(jax.value_and_grad(loss_of, has_aux=True))(variables["params"])

    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    placed = jax.device_put(variables, sharding.replicated(mesh))
    (_, expected), plain = run("cells", variables, batch)
    (_, out), gradient = run("windows", placed, jax.device_put(batch, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(jnp.abs(b).max())))


def test_the_platform_is_that_of_the_mesh():
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    array = jax.device_put(np.zeros(2), sharding.batch_sharding(mesh))
    assert sharding.platform_of(array) == sharding.platform_of(jnp.zeros(2)) == "cpu"


def test_what_a_cpu_compiles_for_a_tpu_has_no_loops_of_a_cpu():
    """The mesh decides, not the machine that compiles."""

    def loops(platform):
        device = AbstractDevice(platform, 1, platform)
        mesh = AbstractMesh((1, 1), ("data", "fsdp"), (AxisType.Auto,) * 2, abstract_device=device)
        place = NamedSharding(mesh, PartitionSpec())
        shapes = [((16, 4), jnp.float32), ((24, 9), jnp.int32), ((16, 9), jnp.int32), ((9, 4), jnp.float32)]
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
        gradient = jax.grad(lambda *arrays: conv_taps(*arrays).sum(), (0, 3))
        equations = jax.make_jaxpr(gradient)(*arguments).jaxpr.eqns
        return [equation.params["unroll"] for equation in equations if equation.primitive.name == "scan"]

    assert loops("cpu") == [1, 1, 1]  # forward, gradient of the table, gradient of the kernel
    assert loops("tpu") == [9]
