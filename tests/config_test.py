"""The table of config keys: it makes the defaults, the checks and docs/config.md, and agrees with the code's tables."""

from pathlib import Path

import pytest

from scalr_jax import config as table
from scalr_jax.config import RunSettings, all_keys, get_config, read_settings
from scalr_jax.data.readers.pandaset import SENSORS as PANDASET
from scalr_jax.data.streets.sensors import SENSORS as STREETS
from scalr_jax.evaluation import corruptions
from scalr_jax.models.build import BACKBONES
from scalr_jax.ops.positions import INTERPOLATIONS
from scalr_jax.runtime import keys
from scalr_jax.runtime.errors import InputError

DOCS = Path(__file__).parents[1] / "docs" / "config.md"


def set_key(config, name, value):
    *sections, last = name.split(".")
    for section in sections:
        config = config[section]
    with config.ignore_type():
        config[last] = value


def test_defaults_are_allowed_and_come_back():
    settings = read_settings(get_config())
    assert settings.run == RunSettings()
    assert settings.data.image_size == (224, 448)
    assert settings.model.minkunet.voxel_size == 0.1
    assert settings.model.num_classes is None


def test_the_documentation_is_the_table():
    assert DOCS.read_text() == keys.markdown({"": RunSettings, **table.SECTIONS})


def test_choices_are_those_of_the_code():
    assert (*STREETS, *PANDASET) == table.SENSORS
    assert tuple(BACKBONES) == table.BACKBONES
    assert (*corruptions.WEATHER, *corruptions.OTHERS) == table.CORRUPTIONS
    rows = {row.name: row for row in all_keys()}
    assert all(choice in rows["teacher.position_interpolation"].takes for choice in INTERPOLATIONS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", "train"),
        ("seed", -1),
        ("num_steps", 0),
        ("num_steps", True),
        ("num_steps", 10.5),
        ("log_every_steps", 0),
        ("keep_checkpoints", 0),
        ("data.augmentation", "nope"),
        ("data.dataset", "waymo"),
        ("data.dataset", "nuscenes+waymo"),
        ("data.voxel_size", 0.0),
        ("data.voxel_size", float("nan")),
        ("data.image_size", (112,)),
        ("data.image_size", (112, 10**6)),
        ("data.intensity", (1.0,)),
        ("data.intensity", (0.0, 0.0)),
        ("data.intensity", ("a", "b")),
        ("data.sensors", ("beams99",)),
        ("data.sensors", "beams32"),
        ("data.frames", ("first",)),
        ("data.label_fraction", 0.0),
        ("data.label_fraction", 0.1),
        ("data.cutmix", ("car",)),
        ("data.validation_frames", (1,)),
        ("data.num_workers", -1),
        ("model.name", "resnet"),
        ("model.depth", -1),
        ("model.drop_path", 1.5),
        ("model.grids", ((10**5, 10**5), (256, 32), (256, 32))),
        ("model.grids", ((256, 256), (256, 32))),
        ("model.field_of_view", ((1.0, -64.0, -8.0), (-1.0, 64.0, 8.0))),
        ("model.field_of_view", ((-64.0, -64.0), (64.0, 64.0))),
        ("model.minkunet.stem_convolutions", 3),
        ("model.num_classes", 0),
        ("teacher.feature", "y"),
        ("optimizer.learning_rate", float("inf")),
        ("optimizer.learning_rate", -1.0),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.ema", 1.0),
        ("optimizer.layer_decay", 0.0),
        ("optimizer.schedule", "linear"),
        ("probe.temperature", 0.0),
        ("evaluate.rings", (20.0, 10.0)),
        ("evaluate.votes", 0),
        ("evaluate.severities", ("mild",)),
        ("mesh.data", 0),
        ("mesh.fsdp", 0),
    ],
)
def test_a_wrong_value_is_named_with_its_key(name, value):
    config = get_config()
    set_key(config, name, value)
    with pytest.raises(InputError, match=rf"\b{name}\b") as caught:
        read_settings(config)
    assert "expected" in str(caught.value) or "(" in str(caught.value)


def test_all_wrong_keys_are_named_at_once():
    config = get_config()
    wrong = {"data.augmentation": "nope", "keep_checkpoints": 0, "model.depth": -1, "optimizer.beta2": 1.0}
    for name, value in wrong.items():
        set_key(config, name, value)
    with pytest.raises(InputError) as caught:
        read_settings(config)
    assert all(f"{name} = {value!r}" in str(caught.value) for name, value in wrong.items())


def test_missing_and_unknown_keys_are_named():
    config = get_config()
    with config.unlocked():
        del config.data.prefetch
        config.data.prefetching = 3
    with pytest.raises(InputError, match=r"data\.prefetching is not a key.*data\.prefetch is missing"):
        read_settings(config)


def test_only_sizes_and_schedules_of_files_may_change_on_resume():
    free = {row.name for row in all_keys() if row.resume}
    assert free == {
        *("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "keep_every_steps"),
        *(f"data.{name}" for name in ("num_workers", "prefetch")),
        *(f"data.{name}_per_shard" for name in ("cells", "halo", "voxels", "pairs")),
    }
    assert {row.name for row in all_keys() if row.local} == {"data.num_workers", "data.prefetch", "data.root"}
