"""A VaViT as the student: by `model.name` in any config, in the same tasks and packs as the others."""

import jax
import numpy as np
import pytest

import scalr_jax
from scalr_jax import tasks
from scalr_jax.data import packing
from scalr_jax.data.pipeline import Pipeline
from scalr_jax.models.build import make_backbone, make_student
from scalr_jax.runtime import sharding
from scalr_jax.runtime.checkpoint import load_variables
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings
from tests.support.checks import mentions
from tests.support.collectives import check_only_sums
from tests.support.runs import config_of, distill, losses, on_one_device, open_split, scene_settings, small_config

TINY = {"model.name": "vavit_tiny", "model.vavit.width": 16, "model.vavit.num_heads": 2, "model.vavit.depth": 2}
TINY |= {
    "model.vavit.hidden": 24,
    "model.vavit.point_hidden": 8,
    "model.vavit.point_depth": 2,
    "model.num_neighbors": 4,
}


@pytest.fixture(scope="module")
def run(street_cache, tmp_path_factory):
    """Four steps of distillation with dropped branches, a checkpoint after two, on one device."""
    workdir = tmp_path_factory.mktemp("distilled")
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        state = distill(config(street_cache), workdir)
    return workdir, jax.device_get(state)


def config(street_cache, **changes):
    tiny = small_config(street_cache, **TINY, num_steps=4, checkpoint_every_steps=2, log_every_steps=1)
    tiny.mesh.data, tiny.model.drop_path = 1, 0.3
    tiny.update_from_flattened_dict(changes)
    return tiny


@pytest.mark.slow
def test_resuming_is_bit_identical(run, street_cache, tmp_path, monkeypatch):
    import shutil

    workdir, state = run
    on_one_device(monkeypatch)
    shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    again = jax.device_get(distill(config(street_cache), tmp_path / "again"))
    assert losses(tmp_path / "again") == losses(workdir)
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.slow
def test_distilled_probed_fine_tuned_and_loaded(run, street_cache, tmp_path, monkeypatch):
    """A probe leaves the backbone as it was; fine-tuning moves it by layers; a run's folder is loaded."""
    workdir, state = run
    on_one_device(monkeypatch)
    more = {"checkpoint": str(workdir), "num_steps": 2, "data.points_per_shard": 16_384}
    results = tasks.probe(read_settings(config(street_cache, task="probe", **more)), tmp_path / "probe")
    assert 0 <= results["miou"] <= 1
    probed = load_variables(tmp_path / "probe" / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, state.params["backbone"], probed["params"]["backbone"])

    tune = config(
        street_cache, task="finetune", **more, **{"optimizer.layer_decay": 0.5, "optimizer.weight_decay": 0.0}
    )
    tune.optimizer.update(schedule="constant", warmup_share=0.0, learning_rate=1e-2)
    tasks.finetune(read_settings(tune), tmp_path / "tune")
    moved = load_variables(tmp_path / "tune" / "checkpoints")["params"]["backbone"]["blocks"]["attention"]["qkv"]
    before = state.params["backbone"]["blocks"]["attention"]["qkv"]["kernel"]
    first, last = np.median(np.abs(moved["kernel"] - before), axis=(1, 2))
    assert last / first == pytest.approx(2.0, rel=0.05)

    model = scalr_jax.load(tmp_path / "probe")
    frame = open_split(config(street_cache), "validation", cache=tmp_path).frame(0)
    features = model.embed(frame.points)
    assert features.shape == (len(frame.points), make_backbone(read_settings(config(street_cache)).model).channels)
    assert np.isfinite(features).all()
    assert features.std(axis=0).max() > 0
    assert model.segment(frame.points).shape == (len(frame.points),)


@pytest.mark.slow
def test_only_sums_cross_a_device(street_cache):
    """Gradients and batch norms, in the compiled gradient of eight shards on eight devices; no table, no rows. Loops
    over keys depend on each device's own scenes."""
    settings = read_settings(config(street_cache, **{"mesh.data": 8}))
    student = make_student(settings.model, head="none", out_features=0, platform="cpu")
    points, number = settings.data.points_per_shard, settings.data.scenes_per_shard
    capacities = packing.Capacities(points, number, (), (), pillars=(384,))
    scenes = scene_settings(config(street_cache), task="distill", train=True)
    check_only_sums(student, scenes, capacities, sharding.make_mesh(8, 1))


def test_pillars_are_counted_from_the_origin_and_packed_by_scene(street_cache, tmp_path):
    """Whatever the field of view; points stand in their order; a pack full of pillars is followed by another."""
    tiny = config(street_cache)
    tiny.model.field_of_view = ((-30.2, -20.3, -4.0), (30.1, 20.2, 6.0))
    scenes = Pipeline(
        open_split(tiny, "train", cache=tmp_path), scene_settings(tiny, task="distill", train=True)
    ).sample(3)
    for scene in scenes:
        assert scene.pillars is not None
        xy, centres = scene.feats[:, 1:3], scene.pillars.coordinates
        np.testing.assert_array_equal(np.floor(xy / 0.5) * 0.5 + 0.25, centres[scene.pillars.cell])
        assert (np.diff(scene.pillars.cell) >= 0).all()
        assert len(np.unique(centres, axis=0)) == len(centres) == scene.pillars.cell[-1] + 1
    counts = [packing.sizes(scene).pillars[0] for scene in scenes]
    capacities = packing.Capacities(10_000, 4, (), (), pillars=(counts[0] + counts[1],))
    first, second = packing.pack_stream(iter(scenes), capacities)
    assert [len(pack.scenes) for pack in (first, second)] == [2, 1]
    shard = packing.pack_shard(first.scenes, capacities, scenes[0], ())
    assert shard.pillars is not None
    assert shard.pillars.counts.tolist() == [*counts[:2], 0, 0]
    total = len(scenes[0].feats) + len(scenes[1].feats)
    assert (shard.pillars.cell[total:] == sum(counts[:2])).all()
    with pytest.raises(InputError, match=mentions("data.pillars_per_shard", counts[0])):
        packing.check_fits(scenes[0], capacities._replace(pillars=(counts[0] - 1,)))


def test_heads_that_rotary_positions_cannot_turn():
    demo = config_of("demo")
    demo.model.update(name="vavit_tiny")
    demo.model.vavit.num_heads = 5
    with pytest.raises(InputError, match=mentions("model.vavit.num_heads", 5, "model.vavit.width", 48)):
        make_backbone(read_settings(demo).model)


def test_sizes_by_name():
    """Parameters of the backbones: `vavit_b` as published without its classifier (86 million), tiny for the demo."""
    sizes = {}
    for name in ("vavit_tiny", "vavit_b"):
        demo = config_of("demo")
        demo.model.name = name
        from scalr_jax.interop.model import shapes_of

        student = make_student(read_settings(demo).model, head="none", out_features=0, platform="cpu")
        sizes[name] = sum(int(np.prod(shape)) for shape in shapes_of(student, 5)["params"].values())
    assert 90_000 < sizes["vavit_tiny"] < 130_000
    assert 85e6 < sizes["vavit_b"] < 87e6
