"""The experiments behind docs/measurements/results.md, shrunk: parts build on one another, the report counts them."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pandaset
import pytest
import report
import streets
from PIL import Image

from scalr_jax.runtime.errors import InputError
from tests.support.runs import on_one_device


def test_every_part_starts_from_an_earlier_one(tmp_path):
    known = set()
    for part in streets.parts(3, tmp_path):
        assert part.group in streets.GROUPS
        assert part.name not in known
        if not part.name.startswith(("gap_", "corrupted_")) or "probe" in part.name:
            config = part.make()
            several = [teacher["checkpoint"] for teacher in config.teachers]
            for path in (config.checkpoint, config.teacher.checkpoint, *several):
                if path.startswith(str(tmp_path)):
                    assert Path(path).relative_to(tmp_path).parts[0] in known, part.name
            assert config.seed == 3
        known.add(part.name)
    assert {"probe_random_1p", "supervised_100p_0.025", "finetuned_10p_0.004", "teacher64", "probe_by_both"} <= known


def test_pandaset_is_validated_on_later_frames_of_its_scene(tmp_path):
    made = {part.name: part.make() for part in pandaset.parts(1, tmp_path / "raw", tmp_path)}
    assert {"distill", "probe_random_100p", "probe_distilled_100p", "supervised_100p_0.01"} <= set(made)
    assert made["gap_supervised_100p_0.01_pandargt"].data.sensors == ("pandargt",)
    for name, config in made.items():
        assert config.seed == 1
        assert max(config.data.frames) == 42
        if config.task != "distill":
            assert min(config.data.validation_frames) == 48
        if config.checkpoint:
            assert Path(config.checkpoint).name in made
            assert name.startswith(("probe", "gap"))


def test_the_best_learning_rate_needs_all_of_them(tmp_path):
    values = dict(zip(streets.RATES, (0.3, 0.5, 0.4), strict=True))
    for rate, miou in values.items():
        with pytest.raises(InputError, match="run the group table first"):
            streets.best(tmp_path, "supervised")
        (tmp_path / f"supervised_100p_{rate:g}").mkdir()
        (tmp_path / f"supervised_100p_{rate:g}/results.json").write_text(json.dumps({"miou": miou}))
    assert streets.best(tmp_path, "supervised") == ("supervised_100p_0.01", 0.5)


@pytest.mark.slow
def test_a_student_is_distilled_and_probed(tmp_path, street_cache, monkeypatch):
    """Two parts, shrunk; the second call finds them done, and the figures are gathered."""

    def shrunk(name):
        config = runpy.run_path(str(streets.CONFIGS / name))["get_config"]()
        config.update(num_steps=2, checkpoint_every_steps=2, log_every_steps=1)
        config.data.update(num_workers=0, num_validation_scenes=2)
        config.model.update(depth=3, head_hidden=0)
        return config

    for name, value in {"_load": shrunk, "use_cache": str, "NUM_SCENES": 8, "WIDTHS": (16,), "PROBE_STEPS": 2}.items():
        monkeypatch.setattr(streets, name, value)
    on_one_device(monkeypatch)
    folder = tmp_path / "seed_0"
    folder.mkdir()
    (folder / "streets").symlink_to(street_cache)
    monkeypatch.setattr(sys, "argv", ["streets.py", f"--output={tmp_path}", "--group=width"])
    streets.main()
    found = json.loads((folder / "results.json").read_text())["parts"]
    assert list(found) == ["distill_width16", "probe_width16"]
    assert 0 <= found["probe_width16"]["miou"] <= 1
    assert all(part["seconds"] > 0 for part in found.values())
    streets.main()  # everything is done
    assert json.loads((folder / "results.json").read_text())["parts"] == found


def test_the_report_takes_the_best_rate_and_the_mean_over_seeds(tmp_path):
    def part(miou):
        return {"miou": miou, "iou": {"road": miou, "car": 0.1}, "seconds": 3600.0}

    for seed, shift in ((0, 0.0), (1, 0.1)):
        parts = {
            "probe_random_100p": part(0.2 + shift),
            "supervised_100p_0.01": part(0.5 + shift),
            "supervised_100p_0.025": part(0.4 + shift),
            "probe_distilled_100p": part(0.2 + shift / 10),
            "probe_depth3": part(0.1),
            "probe_depth12": part(0.3),
            "probe_width32": part(0.3 + shift),
            "gap_supervised_solid": part(0.1),
            "corrupted_probe_random_100p": {
                **part(0.2),
                "robustness": {
                    "clear_miou": 0.2,
                    "mce": 150.0 + 100 * shift,
                    "mrr": 80.0,
                    "corruptions": {"wet_ground": {"miou": {"light": 0.1, "heavy": 0.2}}},
                },
            },
            "probe_sensors_2_beams64": part(0.35),
        }
        (tmp_path / f"seed_{seed}").mkdir()
        (tmp_path / f"seed_{seed}/results.json").write_text(json.dumps({"seed": seed, "parts": parts}))
    text = report.report(report.read_seeds(tmp_path), tmp_path / "figures")
    assert "| supervised from random | - | - | 55.0 (50.0 to 60.0) |" in text
    assert "| linear probe, random | - | - | 25.0 (20.0 to 30.0) |" in text
    assert "| supervised from random | 55.0 (50.0 to 60.0) | - | 10.0 (10.0 to 10.0) |" in text
    assert "| road | 25.0 (20.0 to 30.0) | 20.5 (20.0 to 21.0) | - | 55.0 (50.0 to 60.0) |" in text
    assert "| 6 | 20.0 | 21.0 | 20.5 |" in text
    assert "| channels of the student | mean, mIoU % of a linear probe |" in text  # no seed has all of them
    assert "| 2 | - | 35.0 (35.0 to 35.0) | - |" in text
    assert "| wet ground | 15.0 (15.0 to 15.0) | - | - | - |" in text
    assert "| mCE %, of the supervised | 155.0 (150.0 to 160.0) | - | - | - |" in text
    assert "20 parts of 2 seeds, 20.0 hours" in text
    for name in ("labels", "pillars", "sensors"):
        picture = np.asarray(Image.open(tmp_path / "figures" / f"results_{name}.png").convert("RGB"))
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
