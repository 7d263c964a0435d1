"""The demo, shrunk: every figure it promises, its pictures, and that running again repeats nothing."""

import json

import numpy as np
import pytest
from PIL import Image

from scalr_jax.demo import run as demo
from scalr_jax.settings import read_settings
from tests.support.runs import config_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory, street_cache):
    workdir = tmp_path_factory.mktemp("demo")
    config = config_of("demo")
    config.num_steps = 4
    config.checkpoint_every_steps = 4
    config.log_every_steps = 2
    config.data.update(root=str(street_cache), num_scenes=8, num_validation_scenes=2, num_workers=0)
    config.model.update(channels=16, depth=1, head_hidden=0)
    config.demo.update(probe_steps=2, supervised_learning_rates=(0.01, 0.02))
    config.mesh.data = 1
    with pytest.MonkeyPatch.context() as patch:  # one device, as on a laptop
        from scalr_jax.runtime import sharding

        make_mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda data, fsdp: make_mesh(data, fsdp, devices=_one_device()))
        demo.run_demo(read_settings(config), workdir)
        first = json.loads((workdir / "results.json").read_text())
        demo.run_demo(read_settings(config), workdir)
    return workdir, first


def _one_device():
    import jax

    return jax.devices()[:1]


@pytest.mark.slow
def test_results_have_every_figure(finished):
    workdir, first = finished
    for key in ("miou_random", "miou_distilled", "miou_supervised"):
        assert 0 < first[key] < 1
    assert first["supervised_learning_rate"] in (0.01, 0.02)
    expected = demo.gap_closed(first["miou_random"], first["miou_distilled"], first["miou_supervised"])
    assert first["gap_closed"] == pytest.approx(expected)
    assert first["seconds"] > 0
    assert first["points_per_s"] > 0
    supervised = [json.loads(p.read_text())["miou"] for p in sorted(workdir.glob("supervised_*/results.json"))]
    assert len(supervised) == 2
    assert max(supervised) == first["miou_supervised"]


@pytest.mark.slow
def test_running_again_gives_the_same_figures(finished):
    workdir, first = finished
    again = json.loads((workdir / "results.json").read_text())
    for key in ("miou_random", "miou_distilled", "miou_supervised", "iou_distilled"):
        assert again[key] == first[key]
    assert again["seconds"] > first["seconds"]  # of both starts


@pytest.mark.slow
def test_pictures_are_there_and_show_something(finished):
    workdir, _ = finished
    pictures = sorted((workdir / "figures").glob("*.png"))
    assert "loss.png" in {path.name for path in pictures}
    assert any(path.name.startswith("correlation") for path in pictures)
    for path in pictures:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.std() > 10
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_each_part_is_announced_in_its_turn(capsys):
    parts = demo._announced((0.01, 0.02))
    for number in range(1, 6):
        next(parts)
        assert f"part {number} of 5: " in capsys.readouterr().out


def test_gap_closed():
    assert demo.gap_closed(0.2, 0.5, 0.7) == pytest.approx(0.6)
    assert np.isnan(demo.gap_closed(0.2, 0.5, 0.2))
