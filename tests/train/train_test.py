"""End to end on generated streets, shrunk: distillation learns, resumes exactly, refuses another config; probing."""

import json

import jax
import numpy as np
import pytest

import scalr_jax
from scalr_jax import tasks
from scalr_jax.runtime import sharding
from scalr_jax.runtime.checkpoint import load_variables
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.sharding import make_mesh
from scalr_jax.settings import read_settings
from scalr_jax.train.loop import train
from tests.support import runs
from tests.support.checks import mentions
from tests.support.runs import distill, lines, losses, on_devices, on_one_device, open_split, scene_settings


@pytest.fixture(scope="module", autouse=True)
def _four_devices():
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, 4)
        yield


def small_config(street_cache, **changes):
    return runs.small_config(street_cache, **{"mesh.data": 4, **changes})


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, street_cache):
    """Six uninterrupted steps: the config, the workdir and the last state on the host."""
    workdir = tmp_path_factory.mktemp("whole")
    state = distill(small_config(street_cache), workdir)
    return workdir, jax.device_get(state)


@pytest.mark.slow
def test_training_writes_what_the_design_says(whole_run):
    workdir, state = whole_run
    assert sorted(losses(workdir)) == [1, 2, 3, 4, 5, 6]
    last = lines(workdir)[-1]
    for key in (
        "train/loss_constant",
        "train/points_per_s",
        "train/point_fill",
        "train/scene_fill",
        "train/bad_frames",
    ):
        assert key in last
    assert 0 < last["train/point_fill"] <= 1
    assert json.loads((workdir / "config.json").read_text())["model"]["channels"] == 16
    assert int(state.step) == 6
    assert int(state.scenes_seen) == round(sum(line["train/scenes_per_step"] for line in lines(workdir)))
    names = {str(getattr(k, "key", k)) for path, _ in jax.tree_util.tree_leaves_with_path(state.params) for k in path}
    assert not names & {"blocks", "patch_embed", "cls"}  # the teacher is not in the state


@pytest.mark.slow
def test_the_same_run_twice_is_bit_identical(whole_run, tmp_path, street_cache):
    state = distill(small_config(street_cache), tmp_path)
    assert losses(tmp_path) == losses(whole_run[0])
    for a, b in zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(whole_run[1]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_resuming_is_bit_identical(whole_run, tmp_path, street_cache):
    """Stopped after step 3's checkpoint and step 4's log line, then run again with another number of workers."""
    config = small_config(street_cache)
    config.num_steps = 6

    class StopError(Exception):
        pass

    dataset = open_split(config, "train", cache=tmp_path)
    settings = read_settings(config)
    task = tasks.distillation(settings)
    from scalr_jax.train import loop as module

    original = module._Log.add

    def stopping(self, step, *args, **kwargs):
        original(self, step, *args, **kwargs)
        if step == 4:
            raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Log, "add", stopping)
        with pytest.raises(StopError), tasks.claimed(settings, tmp_path):
            train(settings.training, tmp_path, dataset, task)
    assert max(losses(tmp_path)) == 4
    state = distill(small_config(street_cache, **{"data.num_workers": 1}), tmp_path)
    assert {"event": "resume", "step": 3} in lines(tmp_path)
    assert losses(tmp_path) == losses(whole_run[0])
    for a, b in zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(whole_run[1]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_finished_run_trains_no_further_and_gets_its_settings(whole_run, street_cache):
    """As the workdir of an older version, which had no settings.json."""
    workdir, state = whole_run
    (workdir / "settings.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match=mentions("settings.json", "--workdir")):
        scalr_jax.load(workdir)
    before = losses(workdir)
    again = tasks.distill(read_settings(small_config(street_cache)), workdir)
    assert losses(workdir) == before
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), state)
    assert scalr_jax.load(workdir).config.channels == 16


@pytest.mark.slow
def test_a_workdir_of_another_config_is_refused(whole_run, street_cache):
    config = small_config(street_cache, **{"optimizer.learning_rate": 0.5, "model.channels": 8})
    with pytest.raises(InputError, match=r"model\.channels: 16 saved, 8 now; optimizer\.learning_rate"):
        distill(config, whole_run[0])


@pytest.mark.slow
def test_tables_that_were_too_small_are_raised_in_the_same_workdir(whole_run, tmp_path, street_cache):
    """The run stops with the scene and the key, and goes on when that is raised: the result is that of larger ones."""
    given = lambda halo: {"data.cells_per_shard": (3000,) * 3, "data.halo_per_shard": (halo,) * 3}  # noqa: E731
    with pytest.raises(InputError, match=mentions("data.halo_per_shard", (50, 50, 50))):
        distill(small_config(street_cache, **given(50)), tmp_path)
    state = distill(small_config(street_cache, **given(5000)), tmp_path)
    assert int(state.step) == 6
    same = [losses(path) for path in (tmp_path, whole_run[0])]
    np.testing.assert_allclose(list(same[0].values()), list(same[1].values()), atol=1e-5)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole_run, tmp_path, street_cache, caplog):
    import shutil

    workdir = tmp_path / "copy"
    shutil.copytree(whole_run[0], workdir)
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level("WARNING", logger="absl"):
        state = distill(small_config(street_cache), workdir)
    assert f"{workdir / 'checkpoints'} the checkpoint of step 6 (" in caplog.text
    assert "incompatible" not in caplog.text  # Orbax's guess; TensorStore knows
    assert {"event": "resume", "step": 3} in lines(workdir)
    for a, b in zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(whole_run[1]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def one_device(monkeypatch):
    on_one_device(monkeypatch)


@pytest.mark.slow
def test_probe_leaves_the_backbone_as_it_was(whole_run, tmp_path, street_cache, one_device):
    config = small_config(street_cache, **{"task": "probe", "checkpoint": str(whole_run[0]), "num_steps": 4})
    config.mesh.data, config.data.points_per_shard = 1, 16_384
    results = tasks.probe(read_settings(config), tmp_path)
    assert 0 <= results["miou"] <= 1
    assert json.loads((tmp_path / "results.json").read_text()) == results
    probed = load_variables(tmp_path / "checkpoints")
    for kind in ("params", "batch_stats"):
        for part, tree in (("embedding", whole_run[1]), ("backbone", whole_run[1])):
            before, after = getattr(tree, kind).get(part, {}), probed[kind].get(part, {})
            for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
                np.testing.assert_array_equal(a, b)
    assert np.abs(probed["params"]["head"]["kernel"]).max() > 0


@pytest.mark.slow
def test_finetuning_with_all_that_belongs_to_it(whole_run, tmp_path, street_cache, one_device):
    """Every parameter is trained, the first layers the least; what is evaluated and loaded is the average."""
    config = small_config(street_cache, **{"task": "finetune", "checkpoint": str(whole_run[0]), "num_steps": 3})
    config.mesh.data = 1
    config.data.update(points_per_shard=16_384, label_fraction=0.5, polarmix=("car",), augmentation="consistent")
    config.model.drop_path = 0.2
    config.optimizer.update(layer_decay=0.5, ema=0.5, weight_decay=0.0, schedule="constant", warmup_share=0.0)
    results = tasks.finetune(read_settings(config), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert 0 <= results["miou"] <= 1
    assert np.isfinite(list(losses(tmp_path).values())).all()
    tuned = load_variables(tmp_path / "checkpoints")["params"]
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).mean()), tuned, {**whole_run[1].params, "head": tuned["head"]}
    )
    assert np.abs(tuned["head"]["kernel"]).max() > 0
    first, last = moved["embedding"]["point"]["kernel"], moved["backbone"]
    assert 0 < 2 * first < max(jax.tree.leaves(last))


@pytest.mark.slow
def test_no_gather_or_scatter_crosses_a_device(street_cache, tmp_path):
    """In the compiled step of eight devices the only collectives are reductions, none as large as activations."""
    import re

    from scalr_jax.data.packing import choose_capacities
    from scalr_jax.data.pipeline import Pipeline
    from scalr_jax.train import optim, steps
    from scalr_jax.train.state import init_state

    config = small_config(street_cache)
    dataset = open_split(config, "train", cache=tmp_path)
    mesh = make_mesh(8, 1)
    pipeline = Pipeline(
        dataset,
        scene_settings(config, task="distill", train=True),
        num_shards=8,
        shards=sharding.local_shards(mesh),
    )
    sample = pipeline.sample(4)
    batch = sharding.put_batch(pipeline.empty_batch(choose_capacities(config.data, sample), sample[0]), mesh)
    settings = read_settings(config)
    task = tasks.distillation(settings)
    optimizer = optim.make_optimizer(settings.optimizer, task.student.backbone)
    state = jax.eval_shape(lambda b: init_state(task.student, b, optimizer, None, jax.random.key(0)), batch)
    place = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)), tree
    )
    step = jax.jit(task.make_step(optimizer, optim.make_schedule(settings.optimizer, 10.0)))
    text = step.lower(place(state), place(task.teachers), batch).compile().as_text() or ""
    assert steps  # the step under test
    assert "all-reduce" in text
    for name in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {name}(" not in text, name
    num_points = batch.feats.shape[1]
    for shape in re.findall(r"= (?:\()?f32\[([\d,]*)\][^=]*? all-reduce\(", text):
        sizes = [int(n) for n in shape.split(",") if n]
        assert num_points not in sizes, shape


@pytest.mark.slow
def test_resuming_on_another_number_of_devices_is_refused(whole_run, street_cache):
    """Scenes belong to shards by their number modulo D, so another D would be another run."""
    from scalr_jax.runtime.checkpoint import Checkpoints

    checkpoints = Checkpoints(whole_run[0] / "checkpoints", every=3, keep=2)
    positions = jax.ShapeDtypeStruct((2,), np.int32)
    with pytest.raises(InputError, match=mentions(4, "shards", 2)):
        checkpoints.restore({}, positions)
    checkpoints.close()


@pytest.mark.slow
def test_the_last_checkpoints_and_one_every_so_many_steps_are_kept(tmp_path, street_cache, one_device):
    config = small_config(street_cache, num_steps=5, checkpoint_every_steps=1, keep_checkpoints=1, keep_every_steps=3)
    config.mesh.data = 1
    distill(config, tmp_path)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 5]


@pytest.mark.slow
def test_the_average_of_the_weights(tmp_path, street_cache, one_device):
    """By its formula, batch statistics included; exact over a resume; what a checkpoint is loaded as."""
    from scalr_jax.train import loop as module
    from scalr_jax.train.state import variables_of

    decay, seen = 0.5, []
    config = small_config(street_cache, **{"optimizer.ema": decay, "num_steps": 3, "checkpoint_every_steps": 1})
    config.mesh.data = 1
    original = module.make_program

    def watched(*args):
        program = original(*args)
        fresh, step = program.fresh, program.step

        def recorded(state, teacher, batch):
            with jax.transfer_guard("allow"):
                if not seen:
                    seen.append(jax.device_get((state.params, state.batch_stats)))
                state, metrics = step(state, teacher, batch)
                seen.append(jax.device_get((state.params, state.batch_stats)))
            return state, metrics

        return program._replace(fresh=fresh, step=recorded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_program", watched)
        state = distill(config, tmp_path / "whole")
    expected = seen[0]
    for weights in seen[1:]:
        expected = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, expected, weights)
    found = jax.device_get(variables_of(state))
    for name, tree in zip(("params", "batch_stats"), expected, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[name], tree)
    assert len(seen) == 4
    kernel = ("embedding", "point", "kernel")
    raw, mean = (tree[kernel[0]][kernel[1]][kernel[2]] for tree in (seen[-1][0], found["params"]))
    assert np.abs(raw - mean).max() > 1e-4  # an average that follows at once would agree with anything
    loaded = load_variables(tmp_path / "whole" / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, loaded, found)

    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "3")
    again = jax.device_get(variables_of(distill(config, tmp_path / "resumed")))
    assert {"event": "resume", "step": 2} in lines(tmp_path / "resumed")
    jax.tree.map(np.testing.assert_array_equal, again, found)


@pytest.mark.parametrize("ema", [1.0, -0.1, float("nan")])
def test_an_average_that_cannot_be_meant(ema, tmp_path, street_cache):
    with pytest.raises(InputError, match=mentions("optimizer.ema", ema)):
        distill(small_config(street_cache, **{"optimizer.ema": ema}), tmp_path)
    assert not (tmp_path / "config.json").exists()  # so that the corrected command is not another run
