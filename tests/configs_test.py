"""Every config of configs/: it builds its state, and has the published sizes and lengths."""

import inspect

import jax
import numpy as np
import pytest

from scalr_jax import config as defaults
from scalr_jax import recipes, tasks
from scalr_jax.compile import abstract
from scalr_jax.config import TeacherSettings
from scalr_jax.data.joined import every_nth
from scalr_jax.interop import published as interop
from scalr_jax.interop.model import empty_batch
from scalr_jax.interop.teacher import make_teacher
from scalr_jax.models.build import make_backbone, make_student
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings
from scalr_jax.train import optim
from scalr_jax.train.state import init_state
from tests.support.checks import present
from tests.support.datasets import Frames
from tests.support.paths import ROOT
from tests.support.runs import config_module, config_of, open_split, scene_settings
from tests.support.tiny_student import tiny_model

CONFIGS = ROOT / "configs"
CLASSES = {"nuscenes": 16, "semantic_kitti": 19, "pandaset": 17, "streets": 7}
TEACHER_WIDTH = 1024  # DINOv2 ViT-L
RECIPES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for folder in ("pretrain", "probe", "finetune")
    for path in CONFIGS.glob(f"{folder}/*.py")
)


def variants():
    """Every recipe, and the arguments it takes."""
    for name in RECIPES:
        takes_method = "method" in inspect.signature(config_module(name).get_config).parameters
        methods = [("scalr",), ("scalr_plus",)] if takes_method else [()]
        methods += [("vavit_b",)] if name in ("probe/pandargt", "finetune/nuscenes_10p") else []
        yield from ((name, method) for method in methods)


def abstract_state(config):
    """The train state's shapes; no array is made."""
    distill, settings = config.task == "distill", read_settings(config).optimizer
    student = make_student(
        config.model,
        platform="cpu",
        head="distill" if distill else config.model.segmentation_head,
        out_features=TEACHER_WIDTH if distill else CLASSES[config.data.dataset],
        frozen_backbone=config.task == "probe",
    )
    optimizer = optim.make_optimizer(settings, student.backbone)
    optim.make_schedule(settings, float(config.num_steps))
    trainable = ("head",) if config.task == "probe" else None
    key = jax.random.key(0)
    return jax.eval_shape(
        lambda batch: init_state(student, batch, optimizer, trainable, key), empty_batch(5, student.needs)
    )


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), list(variants()))
def test_every_config_builds_its_state(name, method):
    config = config_of(name, *method)
    state = abstract_state(config)
    assert count(state.params["backbone"]) > 6e6
    trained = state.params["head"] if config.task == "probe" else state.params
    assert count(state.opt_state) == 2 * count(trained) + 1  # two moments and Adam's count
    scene_settings(config, task="distill" if config.task == "distill" else "segment", train=True)
    if config.data.scenes_per_step:
        assert config.data.points_per_shard == config.data.scenes_per_shard * config.data.max_points


@pytest.mark.parametrize(("name", "method"), [pair for pair in variants() if "vavit" not in str(pair)])
def test_every_config_takes_a_minkunet(name, method):
    """Scenes, room of its tables (that of the largest scenes where a step holds so many) and the student; no array."""
    config = config_of(name, *method)
    config.model.name = "minkunet34"
    settings = scene_settings(config, task="distill" if config.task == "distill" else "segment", train=True)
    assert (settings.needs.voxel_size, settings.needs.grids) == (0.1, ())
    backbone = make_backbone(config.model)
    assert (backbone.depth, backbone.channels) == (23, 96)
    optim.make_optimizer(read_settings(config).optimizer, backbone)
    room = abstract.choose_capacities(read_settings(config).data, backbone.needs)
    scenes = config.data.scenes_per_step
    assert room.pairs[0] >= (scenes * recipes.SCENE_PAIRS[0] if scenes else recipes.PACK_PAIRS[0])


@pytest.mark.parametrize(("channels", "millions"), [(256, 6.84), (384, 15.1), (768, 59.4)])
def test_published_sizes(channels, millions):
    config = config_of(f"pretrain/scalr_wi48_{channels}")
    params = abstract_state(config).params
    assert (count(params) - count(params["head"])) / 1e6 == pytest.approx(millions, rel=0.002)


def test_published_vavit():
    """The public code's 85,751,322 parameters, and the settings of its two configs."""
    config, kitti = (config_of(f"finetune/{name}_vavit") for name in ("nuscenes", "semantic_kitti"))
    assert count(abstract_state(config).params) == 85_751_322
    assert (config.num_steps, config.checkpoint, config.optimizer.batch_size) == (45 * (28_130 // 8), "", 8)
    assert (config.data.augmentation, config.data.pillarmix, config.data.intensity) == ("vavit", 7.5, (0.0, 1.0))
    assert (config.model.drop_path, kitti.model.drop_path) == (0.3, 0.5)
    assert (len(kitti.data.cutmix), kitti.data.polarmix, config.data.cutmix) == (5, (), ())


@pytest.mark.parametrize("name", ["vavit_b", "vavit_l"])
def test_a_distilled_vavit_is_probed_and_fine_tuned_as_it_was_trained(name):
    """Downstream keeps what the weights depend on, whole views, and has room for pillars, not for cells."""
    config = config_of(f"pretrain/{name}")
    scalr_plus = config_of("pretrain/scalr_plus_wi48_768")
    assert config.optimizer.total_updates == scalr_plus.num_steps
    keys = make_backbone(config.model).weight_keys
    for other in (config_of("probe/pandargt", name), config_of("finetune/pandargt_100p", name)):
        for key in ("name", "field_of_view", *keys):
            first, _, rest = key.partition(".")
            ours, theirs = (getattr(c.model, first) for c in (config, other))
            assert ours == theirs if not rest else ours[rest] == theirs[rest], key
        assert (other.data.pillars_per_shard, other.data.cells_per_shard) == ((8 * recipes.TURN_PILLARS,), ())
    needs = scene_settings(config, task="distill", train=True).needs
    assert (needs.grids, needs.pillar_size, needs.field_of_view[0]) == ((), 0.5, (-1e4,) * 3)


def test_published_lengths():
    """Epochs as steps, warm-up and layer decay, one of each kind by hand."""
    config = config_of("pretrain/scalr_wi48_768")
    assert config.num_steps == 25 * 6887
    assert config.optimizer.warmup_share * config.num_steps == pytest.approx(3_500)
    config = config_of("pretrain/scalr_plus_wi48_768")
    assert (config.num_steps, config.model.head_hidden, config.model.drop_path) == (65 * 6887, 2048, 0.2)
    config = config_of("finetune/nuscenes_1p", "scalr")
    assert (config.num_steps, config.optimizer.layer_decay) == (45 * (282 // 8), 0.95)
    config = config_of("finetune/semantic_kitti_100p", "scalr")
    assert (config.num_steps, config.optimizer.warmup_share) == (10 * 2391, 0.1)
    config = config_of("finetune/pandargt_100p", "scalr_plus")
    assert (config.model.grids[0], config.optimizer.learning_rate) == ((384, 384), 1e-4)
    config = config_of("finetune/semantic_kitti_waffleiron")
    assert (config.num_steps, config.optimizer.batch_size) == (45 * (19_130 // 4), 4)


@pytest.mark.parametrize(
    ("argument", "activation", "fraction", "epochs"),
    [("5", "relu", 0.05, 45), ("scalr_plus,25", "gelu", 0.25, 45), ("scalr_plus", "gelu", 1.0, 25)],
)
def test_any_share_of_the_labels(argument, activation, fraction, epochs):
    config = config_of("finetune/nuscenes", argument)
    assert (config.model.activation, config.data.label_fraction) == (activation, fraction)
    assert config.num_steps == epochs * (int(np.ceil(28_130 * fraction)) // 8)


@pytest.mark.parametrize(("argument", "message"), [("7", "7 % of the labels"), ("0", "0 % of"), ("slidr,5", "'slidr'")])
def test_a_share_that_cannot_be_had(argument, message):
    with pytest.raises(InputError, match=message):
        config_of("finetune/semantic_kitti", argument)


def test_packed_steps_see_as_many_scenes_as_the_published():
    published, config = (config_of(f"pretrain/{name}_wi48_768") for name in ("scalr", "scalr_packed"))
    assert config.num_steps * 7.9 == pytest.approx(published.num_steps * 8, rel=1e-4)
    assert config.optimizer.total_updates == published.num_steps
    four = config_of("pretrain/scalr_packed_wi48_768", "4")
    assert four.num_steps * 4 * 7.9 == pytest.approx(published.num_steps * 8, rel=1e-4)


def test_docstrings_name_figure_and_command():
    for name in RECIPES:
        text = present(config_module(name).__doc__)
        assert f"--config=configs/{name}.py" in text, name
        assert "%" in text or "no figure" in text, name


def test_unknown_method():
    with pytest.raises(InputError, match="the method 'slidr' is none of scalr, scalr_plus"):
        config_of("probe/nuscenes", "slidr")


def small_config(**changes):
    config = defaults.get_config()
    config.task = "probe"
    config.model.update(channels=8, depth=1, **changes)
    return config


def test_a_published_file_to_start_from(tmp_path):
    """Its weights as they are; every setting in which it is another student is listed."""
    model, variables = tiny_model("distill", 6)
    interop.save_torch_checkpoint(tmp_path / "x.pth", model, variables)
    config = small_config()
    config.checkpoint = str(tmp_path / "x.pth")
    loaded = tasks.load_backbone(read_settings(config)).variables
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], variables["params"])
    other = small_config(activation="gelu", norm="batch")
    other.checkpoint = config.checkpoint
    with pytest.raises(InputError, match=r"norm is layer there, batch .*activation is relu there, gelu"):
        tasks.load_backbone(read_settings(other))
    for path in ("", "CHECKPOINT", str(tmp_path)):
        config.checkpoint = path
        with pytest.raises(InputError, match=r"neither the workdir of a run nor a published student.*docs/weights\.md"):
            tasks.load_backbone(read_settings(config))


class Numbers(Frames):
    """So many frames."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def intensity(self, index):
        return float(index), 1.0


def test_a_share_of_the_labels_is_every_nth_frame():
    share = every_nth(Numbers(19_130), 100)
    assert len(share) == 192
    assert [int(share.frame(i).points[0, 0]) for i in (0, 1, 191)] == [0, 100, 19_100]
    assert share.intensity(2) == (200.0, 1.0)


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ("distill", {"label_fraction": 0.1}, "label_fraction = 0.1 with task 'distill'"),
        ("probe", {"label_fraction": 0.0}, r"data\.label_fraction = 0\.0"),
        ("probe", {"dataset": "nuscenes+pandaset"}, "several datasets have several classes"),
        ("distill", {"dataset": "nuscenes+waymo", "root": "."}, "nuscenes is not a folder|'waymo' is none of"),
    ],
)
def test_data_that_cannot_be_meant(tmp_path, task, data, message):
    config = defaults.get_config()
    config.task = task
    config.data.update(data)
    with pytest.raises(InputError, match=message):
        open_split(config, "train", cache=tmp_path)


@pytest.mark.slow
def test_given_intensities_are_those_of_every_frame(street_cache):
    """Raw ones, as published MinkUNets take them, also of joined datasets and of some frames."""
    config = defaults.get_config()
    config.task = "probe"
    config.data.update(root=str(street_cache), num_scenes=8, image_size=(112, 224), label_fraction=0.5)
    for given in ((), (0, 1)):
        config.data.intensity = given
        dataset = open_split(config, "train", cache=street_cache)
        assert (dataset.intensity(1) == (0.0, 1.0)) == bool(given)
    for given in ((1.0,), (0.0, 0.0), "ab"):
        config.data.update(intensity=tuple(given))
        with pytest.raises(InputError, match=r"data\.intensity = "):
            open_split(config, "train", cache=street_cache)


def test_the_teachers_positions_by_name():
    config = defaults.get_config()
    config.teacher.checkpoint = "demo"
    config.data.image_size = (112, 224)
    config.teacher.position_interpolation = "dinov2"
    settings = read_settings(config)
    assert make_teacher(settings.teacher, (112, 224), "cpu")[0].position_interpolation == "dinov2"
    config.teacher.position_interpolation = "bicubic"
    config.teacher.checkpoint = "nothing.pth"
    with pytest.raises(InputError, match=r"fetch dinov2_vitl14_pretrain\.pth .*docs/weights\.md"):
        make_teacher(TeacherSettings(checkpoint="nothing.pth"), (112, 224), "cpu")
