"""A MinkUNet as the student: by `model.name` in any config, in the same tasks and packs as a WaffleIron."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import scalr_jax
from scalr_jax import tasks
from scalr_jax.compile import abstract
from scalr_jax.data import packing
from scalr_jax.data.grids import cell_position
from scalr_jax.data.pipeline import Pipeline
from scalr_jax.data.scenes import SceneNeeds
from scalr_jax.export.run import export_model
from scalr_jax.models import minkunet
from scalr_jax.models.build import make_backbone, make_student
from scalr_jax.ops.voxels import count_levels, extent_of
from scalr_jax.runtime import sharding
from scalr_jax.runtime.checkpoint import load_variables
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings
from scalr_jax.train import optim
from tests.support.checks import mentions
from tests.support.collectives import check_only_sums
from tests.support.random_scenes import FIELD_OF_VIEW
from tests.support.runs import distill, losses, on_devices, on_one_device, open_split, scene_settings, small_config

pytestmark = pytest.mark.usefixtures("few_blocks")

NARROW = {"model.name": "minkunet14", "model.minkunet.width": 0.1}


@pytest.fixture(scope="module")
def scenes(street_cache):
    """Four training scenes for a probe, as a MinkUNet takes them, and the settings."""
    config = small_config(street_cache, **NARROW, task="probe")
    return _scenes(config)


def _scenes(config):
    dataset = open_split(config, "train", cache=Path("unused"))
    settings = scene_settings(config, task="segment", train=True)
    return Pipeline(dataset, settings, seed=1).sample(4), settings


def test_voxels_are_those_of_the_augmented_points(scenes, street_cache):
    """As the cells of a WaffleIron: the published augmentation turns coordinates and features by different angles."""
    sparse, settings = scenes
    planar, planar_settings = _scenes(small_config(street_cache, task="probe"))
    low = np.array(settings.needs.field_of_view[0])
    for a, b in zip(sparse, planar, strict=True):
        assert (a.neighbors.shape, a.planes) == ((len(a.feats), 0), ())
        xyz = low + a.voxels.coordinates * settings.needs.voxel_size
        assert np.abs(xyz[:, :2] - a.feats[:, 1:3]).max() > 0.5
        cells = cell_position(xyz, (0, 1), planar_settings.needs.grids[0], settings.needs.field_of_view)
        assert len(a.feats) == len(b.feats)
        assert (np.sort(cells) == np.sort(b.planes[0].position[b.planes[0].cell])).mean() > 0.999  # rounded to float32
        np.testing.assert_array_equal(a.voxels.counts, count_levels(np.floor(a.voxels.coordinates)))


def test_voxels_are_counted_as_by_looking_at_each():
    rng = np.random.default_rng(0)
    coordinates = rng.integers(-3, 5, (60, 3))
    for number, pairs in count_levels(coordinates, 3):
        occupied = {tuple(row) for row in coordinates.tolist()}
        steps = [(x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1) if (x, y, z) != (0, 0, 0)]
        near = [sum(tuple(np.add(voxel, step).tolist()) in occupied for voxel in occupied) for step in steps]
        assert (number, pairs) == (len(occupied), sum(near))
        coordinates = coordinates // 2
    assert extent_of(((-64, -64, -8), (64, 64, 8)), 0.1) == (1280, 1280, 160)


def test_a_pack_that_is_full_of_pairs_is_followed_by_another(scenes):
    """Nothing is dropped: what does not fit opens the next pack, and a scene that fits in none is named."""
    members, _ = scenes
    needs = [packing.sizes(scene) for scene in members]
    roomy = packing.derive_capacities(members, points=6000, scenes=4)
    assert len(list(packing.pack_stream(iter(members), roomy))) == 1
    most = max(need.pairs[1] for need in needs)
    tight = roomy._replace(pairs=(roomy.pairs[0], most, *roomy.pairs[2:]))
    packs = list(packing.pack_stream(iter(members), tight))
    assert len(packs) > 1
    assert [scene.stream_index for pack in packs for scene in pack.scenes] == [scene.stream_index for scene in members]
    with pytest.raises(InputError, match=mentions("data.pairs_per_shard", "pairs")):
        list(packing.pack_stream(iter(members), tight._replace(pairs=(*tight.pairs[:4], 1))))


def test_what_a_scene_is_said_to_need_is_enough(scenes, street_cache):
    members, _ = scenes
    roomy = packing.derive_capacities(members, points=6000, scenes=4)
    data = small_config(street_cache, **NARROW).data
    data.pairs_per_shard = (1500, 900, 2**20, 300, 100)
    tight = packing.given_tables(roomy, data)
    assert tight.pairs == data.pairs_per_shard
    for scene in members:
        (text,) = packing.overflow(packing.sizes(scene), tight)
        data.pairs_per_shard = tuple(int(n) for n in re.findall(r"\d+", text.partition(" pairs where ")[0]))
        assert not packing.overflow(packing.sizes(scene), packing.given_tables(roomy, data))
    data.pairs_per_shard = (1500, 900)
    with pytest.raises(InputError, match=r"data\.pairs_per_shard = \(1500, 900\) has 2 numbers.* 5"):
        packing.given_tables(roomy, data)


def test_one_scene_alone_gets_sizes_of_a_short_list(scenes):
    members, _ = scenes
    rounded = [packing.static_capacities(scene, ()) for scene in members]
    for scene, capacities in zip(members, rounded, strict=True):
        assert not packing.overflow(packing.sizes(scene), capacities)
        for have, needed in zip(capacities.voxels, packing.sizes(scene).voxels, strict=True):
            assert have < 2 * needed


@pytest.fixture(scope="module")
def run(street_cache, tmp_path_factory):
    """Two steps of distillation on two devices, and what they left."""
    workdir = tmp_path_factory.mktemp("distilled")
    with pytest.MonkeyPatch.context() as patch:
        return workdir, distilled(street_cache, workdir, patch)


def distilled(street_cache, workdir, monkeypatch):
    on_devices(monkeypatch, 2)
    config = small_config(street_cache, **NARROW, **{"num_steps": 2, "mesh.data": 2})
    return jax.device_get(distill(config, workdir))


@pytest.mark.slow
def test_distilled_probed_and_loaded(run, street_cache, tmp_path, monkeypatch):
    workdir, state = run
    on_one_device(monkeypatch)
    assert np.isfinite(list(losses(workdir).values())).all()
    config = small_config(street_cache, **NARROW, task="probe", checkpoint=str(workdir), num_steps=2)
    config.mesh.data, config.data.points_per_shard = 1, 16_384
    results = tasks.probe(read_settings(config), tmp_path)
    assert 0 <= results["miou"] <= 1
    probed = load_variables(tmp_path / "checkpoints")
    for kind, tree in (("params", state.params), ("batch_stats", state.batch_stats)):
        jax.tree.map(np.testing.assert_array_equal, tree["backbone"], probed[kind]["backbone"])

    model = scalr_jax.load(tmp_path)
    frame = open_split(config, "validation", cache=tmp_path).frame(0)
    features = model.embed(frame.points)
    assert features.shape == (len(frame.points), make_backbone(config.model).channels)
    assert np.isfinite(features).all()
    assert features.std(axis=0).max() > 0
    with pytest.raises(InputError, match=mentions("minkunet14", "stablehlo", "orbax")):
        export_model(model, "onnx", tmp_path / "exported")


@pytest.mark.slow
def test_the_same_run_twice_is_bit_identical(run, street_cache, tmp_path, monkeypatch):
    workdir, state = run
    again = distilled(street_cache, tmp_path, monkeypatch)
    assert losses(tmp_path) == losses(workdir)
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.slow
def test_finetuned_with_layer_decay(run, street_cache, tmp_path, monkeypatch):
    """How far AdamW goes, by formula and by layer. The head begins at zero, so the backbone's first gradient is that of
    the second step, when its moments are (1 - beta1) g and (1 - beta2) g^2, over 1 - beta1^2 and 1 - beta2^2."""
    on_one_device(monkeypatch)
    config = small_config(street_cache, **NARROW, task="finetune", checkpoint=str(run[0]), num_steps=2)
    config.mesh.data, config.data.points_per_shard = 1, 16_384
    config.optimizer.update(layer_decay=0.5, weight_decay=0.0, schedule="constant", warmup_share=0.0)
    config.optimizer.learning_rate = 1e-2
    results = tasks.finetune(read_settings(config), tmp_path)
    assert 0 <= results["miou"] <= 1
    far = 1e-2 * (1 + config.optimizer.beta2) ** 0.5 / (1 + config.optimizer.beta1)
    backbone = make_backbone(config.model)
    before, after = run[1].params["backbone"], load_variables(tmp_path / "checkpoints")["params"]["backbone"]

    def check(path, old, new):
        names = ("backbone", *(key.key for key in path))
        if old.ndim == 3:
            wanted = far * 0.5 ** (backbone.depth + 1 - backbone.layer_numbers(names))
            assert np.median(np.abs(new - old)) == pytest.approx(wanted, rel=0.02), names

    jax.tree_util.tree_map_with_path(check, before, after)


@pytest.mark.slow
def test_another_student_is_refused(run, street_cache):
    workdir, _ = run
    changes = {**NARROW, "model.minkunet.width": 0.2, "task": "probe", "checkpoint": str(workdir)}
    with pytest.raises(InputError, match=mentions("minkunet.width", 0.1, 0.2)):
        tasks.load_backbone(read_settings(small_config(street_cache, **changes)))
    with pytest.raises(InputError, match=mentions("name", "minkunet14", "waffleiron")):
        tasks.load_backbone(read_settings(small_config(street_cache, task="probe", checkpoint=str(workdir))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.minkunet.voxel_size": 0.3}, r"minkunet\.voxel_size is 0\.1 there, 0\.3 in config\.model"),
        ({"model.minkunet.reading": "trilinear"}, r"reading is nearest there, trilinear in config\.model"),
        ({"data.intensity": (0.0, 1.0)}, mentions("intensity", (), (0.0, 1.0))),
    ],
)
def test_the_same_weights_on_other_inputs_are_refused(run, street_cache, change, said):
    config = small_config(street_cache, **NARROW, task="probe", checkpoint=str(run[0]))
    assert set(tasks.load_backbone(read_settings(config)).variables) == {"params", "batch_stats"}
    config.update_from_flattened_dict(change)
    with pytest.raises(InputError, match=said):
        tasks.load_backbone(read_settings(config))


def test_voxels_too_many_for_their_keys_are_one_sentence(street_cache):
    config = small_config(street_cache, **NARROW)
    config.model.minkunet.voxel_size = 0.01
    scene_settings(config, task="distill", train=True)
    config.model.minkunet.voxel_size = 0.003
    with pytest.raises(InputError, match=mentions("voxel_size", 0.003, "42667 x 42667 x 5334", "model.field_of_view")):
        scene_settings(config, task="distill", train=True)


@pytest.mark.slow
@pytest.mark.parametrize(("reading", "enough"), [("nearest", False), ("trilinear", True)])
def test_without_room_for_a_voxel_nothing_passes_as_a_result(scenes, street_cache, reading, enough):
    (scene, *_), _ = scenes
    config = small_config(street_cache, **NARROW)
    config.model.minkunet.reading = reading
    student = make_student(config.model, head="none", out_features=0, platform="cpu")
    need = packing.sizes(scene)
    room = need if enough else need._replace(voxels=(need.voxels[0] - 1, *need.voxels[1:]))
    batch = jax.tree.map(lambda x: jax.numpy.asarray(x)[None], packing.pack_shard([scene], room, scene, ()))
    shapes = jax.eval_shape(lambda: student.init(jax.random.key(0), batch, train=False))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), shapes)
    program = jax.jit(lambda variables: student.apply(variables, batch, train=False))
    out = np.asarray(program(variables))
    assert np.isfinite(out).all() == enough


@pytest.mark.slow
def test_only_sums_cross_a_device(street_cache):
    """Gradients and batch norms, in the compiled gradient of eight shards on eight devices; no table, no rows."""
    config = small_config(street_cache, **NARROW)
    student = make_student(config.model, head="none", out_features=0, platform="cpu")
    scenes = scene_settings(config, task="distill", train=True)
    capacities = abstract.choose_capacities(read_settings(config).data, student.needs)
    check_only_sums(student, scenes, capacities, sharding.make_mesh(8, 1))


def test_layer_decay_counts_residual_blocks():
    backbone = minkunet.MinkUNetBackbone(SceneNeeds(FIELD_OF_VIEW), "minkunet34")
    number = lambda name: backbone.layer_numbers(("backbone", name, "kernel"))  # noqa: E731
    names = ("stem", "stem_norm", "down_0", "stage_0_0", "stage_0_1", "down_1_norm", "stage_7_1")
    assert [number(name) for name in names] == [0, 0, 1, 1, 2, 3, 23]
    updates = {"backbone": {"stage_7_1": np.ones(2)}, "head": {"kernel": np.ones(2)}}
    scaled: Any = optim.scale_by_layer(backbone, 0.5).update(updates, optax.EmptyState())[0]
    np.testing.assert_allclose(scaled["backbone"]["stage_7_1"], 0.5)
    np.testing.assert_allclose(scaled["head"]["kernel"], 1.0)


def test_settings_without_voxels_are_a_waffleirons(street_cache):
    planar = make_backbone(small_config(street_cache).model).needs
    assert (planar.voxel_size, len(planar.grids)) == (None, 3)
    sparse = make_backbone(small_config(street_cache, **NARROW).model).needs
    assert (sparse.voxel_size, sparse.grids, sparse.num_neighbors) == (0.1, (), 0)
