"""The table of config keys: it makes the defaults, the checks and docs/config.md, and agrees with the code's tables."""

from pathlib import Path

import pytest

from scalr_jax import config as table
from scalr_jax.config import RunSettings, all_keys, get_config
from scalr_jax.data.readers.pandaset import SENSORS as PANDASET
from scalr_jax.data.streets.sensors import SENSORS as STREETS
from scalr_jax.evaluation import corruptions
from scalr_jax.models.build import BACKBONES
from scalr_jax.ops.positions import INTERPOLATIONS
from scalr_jax.runtime import keys
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings

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
        *("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "keep_every_steps", "profile", "wandb"),
        *(f"data.{name}" for name in ("num_workers", "prefetch", "buckets")),
        "executable",
        "teacher.cache",
        *(f"data.{name}_per_shard" for name in ("cells", "halo", "voxels", "pairs", "pillars")),
    }
    local = {"executable", "data.num_workers", "data.prefetch", "data.root", "teacher.cache"}
    assert {row.name for row in all_keys() if row.local} == local
