"""Configs of `configs/`, and short runs of them."""

import importlib.util
import json

import jax

from scalr_jax import tasks
from scalr_jax.data import build
from scalr_jax.models.build import make_backbone
from scalr_jax.runtime import sharding
from scalr_jax.runtime.sharding import make_mesh
from scalr_jax.settings import read_settings
from scalr_jax.train.loop import train
from tests.support.paths import ROOT


def config_module(name):
    """configs/<name>.py, imported."""
    spec = importlib.util.spec_from_file_location(f"config_{name.replace('/', '_')}", ROOT / "configs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(name, *arguments):
    return config_module(name).get_config(*arguments)


def small_config(street_cache, **changes):
    """configs/smoke.py, shrunk, on eight devices."""
    config = config_of("smoke")
    config.num_steps = 6
    config.checkpoint_every_steps = 3
    config.data.update(root=str(street_cache), num_scenes=8, num_validation_scenes=2, points_per_shard=3072)
    config.data.update(scenes_per_shard=2, max_points=1500)
    config.model.update(channels=16, depth=1)
    config.mesh.data = 8
    config.update_from_flattened_dict(changes)
    return config


def open_split(config, split, *, cache):
    """The dataset of a split, as the config's task opens it."""
    settings = read_settings(config)
    return build.make_dataset(settings.data, split, task=settings.run.task, seed=settings.run.seed, cache=cache)


def scene_settings(config, *, task, train, fixed=False):
    """The scene settings of a config's student."""
    settings = read_settings(config)
    needs = make_backbone(settings.model).needs
    return build.scene_settings(settings.data, needs, task=task, train=train, fixed=fixed)


def on_devices(monkeypatch, number):
    """Makes meshes of the first `number` devices from here on."""
    monkeypatch.setattr(sharding, "make_mesh", lambda data, fsdp: make_mesh(data, fsdp, jax.devices()[:number]))


def on_one_device(monkeypatch):
    """Makes meshes of one device from here on, for which programs compile and run faster."""
    on_devices(monkeypatch, 1)


def evaluator_of(config, classifier, variables, num_classes, **more):
    """The evaluator of a classifier, as the config's task makes it."""
    return tasks.make_evaluator(read_settings(config), classifier, variables, num_classes, **more)


def distill(config, workdir):
    """A distillation of the training split, without the results that the task writes."""
    settings = read_settings(config)
    dataset, task = open_split(config, "train", cache=workdir), tasks.distillation(settings)
    with tasks.claimed(settings, workdir):
        tasks.save_settings(settings, workdir, task, dataset)
        return train(settings.training, workdir, dataset, task)


def lines(workdir):
    return [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {line["step"]: line["train/loss"] for line in lines(workdir) if "train/loss" in line}
