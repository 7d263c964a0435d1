"""CE, RR and their means against published rows; a robustness run on released sets, resumed, and what it refuses."""

import json
import runpy
import shutil
import unittest.mock
from pathlib import Path

import jax
import numpy as np
import pytest

from scalr_jax import tasks
from scalr_jax.config import CORRUPTIONS, SEVERITIES, get_config
from scalr_jax.data.readers.nuscenes import NuScenes
from scalr_jax.data.readers.released import open_released
from scalr_jax.data.readers.semantic_kitti import SemanticKITTI
from scalr_jax.data.streets.layout import CLASSES
from scalr_jax.data.streets.streets import Streets
from scalr_jax.evaluation import robustness
from scalr_jax.evaluation.segmentation import Evaluator
from scalr_jax.figures.charts import draw_robustness
from scalr_jax.runtime import sharding
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings, record_of
from tests.support.checks import mentions, present
from tests.support.raw_datasets import write_nuscenes, write_semantic_kitti
from tests.support.runs import config_of
from tests.support.tiny_student import write_workdir

# Rows of the public benchmark table on nuScenes-C: clear mIoU, mIoU by corruption (means over severities), mCE, mRR.
WAFFLEIRON = (76.07, (56.07, 73.93, 49.59, 59.46, 65.19, 33.12, 61.51, 44.01), 106.73, 72.78)
MINKUNET_34 = (74.66, (62.96, 70.65, 55.48, 51.71, 62.01, 31.56, 59.64, 39.41), 112.20, 72.57)
MINKUNET_18 = (75.76, (53.64, 73.91, 40.35, 73.39, 68.54, 26.58, 63.83, 50.95), 100.0, None)


@pytest.mark.parametrize("row", [WAFFLEIRON, MINKUNET_34, MINKUNET_18])
def test_published_rows(row):
    clear, means, mce, mrr = row
    miou: dict[str, dict[str, float]] = {
        name: dict(zip(SEVERITIES, np.array([1.1, 1.0, 0.9]) * mean / 100, strict=True))  # any with this mean
        for name, mean in zip(CORRUPTIONS, means, strict=True)
    }
    found = robustness.summarize(miou, clear / 100, robustness.PUBLISHED["nuscenes_c"])
    assert found["mce"] == pytest.approx(mce, abs=0.005)
    if mrr is not None:
        assert found["mrr"] == pytest.approx(mrr, abs=0.005)


def test_a_model_that_knows_nothing_has_no_resilience():
    found = robustness.summarize({"fog": dict.fromkeys(SEVERITIES, 0.0)}, 0.0, None)
    assert (found["mce"], found["mrr"], found["corruptions"]["fog"]["rr"]) == (None, None, None)


def test_semantic_kitti_has_its_own_baseline():
    assert robustness.PUBLISHED["semantic_kitti_c"].miou["motion_blur"] == 0.3292
    assert robustness.PUBLISHED["nuscenes_c"].miou["motion_blur"] == 0.7339


class FakeEvaluator:
    """Predicts class 0 everywhere, and counts the calls."""

    def __init__(self):
        self.calls = self.num_scans = 0

    def reserve(self, datasets):
        assert [name.split("(")[-1] for name in (d.name(0) for d in datasets)][1:] == [
            "fog, heavy)",
            "incomplete_echo, heavy)",
        ]

    def confusion(self, dataset, rings=()):
        self.calls += 1
        number, self.num_scans = len(dataset.class_names), 0
        confusion = np.zeros((len(rings) + 1, number, number), np.int64)
        for index in range(len(dataset)):
            if "fog, heavy" in dataset.name(index) and index == 0:  # a scan that cannot be read
                continue
            frame = dataset.frame(index, np.random.default_rng(0))
            ring = np.searchsorted(rings, np.linalg.norm(frame.points[:, :3], axis=1), side="right")
            good = frame.labels < number
            np.add.at(confusion, (ring[good], frame.labels[good].astype(int), 0), 1)
            self.num_scans += 1
        return confusion


def measure(config, workdir, evaluator, dataset, weights="weights"):
    settings = read_settings(config)
    key = robustness.part_key(record_of(settings), weights, ())
    return robustness.measure(settings.evaluate, settings.data, workdir, evaluator, dataset, key)


def find_baseline(config, corrupted_by):
    settings = read_settings(config)
    return robustness.find_baseline(settings.evaluate, settings.data, corrupted_by)


def make_config(**changes):
    config = get_config()
    config.task, config.data.split, config.data.num_validation_scenes = "robustness", "validation", 2
    config.evaluate.update(corruptions=("fog", "incomplete_echo"), **changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, street_cache):
    """A finished run on two streets: its workdir and results."""
    workdir = tmp_path_factory.mktemp("robust")
    streets = Streets(street_cache, split="validation", num_scenes=2)
    results = measure(make_config(), workdir, FakeEvaluator(), streets, "weights")
    robustness.write_json(workdir / "results.json", results)
    return workdir, results, streets


def test_a_run_on_streets_resumes_part_by_part(finished, tmp_path):
    workdir, results, streets = finished
    found = results["robustness"]
    assert (found["mce"], found["baseline"], found["dataset"]) == (None, None, "streets beams32 validation")
    assert list(found["corruptions"]) == ["fog", "incomplete_echo"]
    echo = found["corruptions"]["incomplete_echo"]["miou"]
    assert found["corruptions"]["incomplete_echo"]["rr"] == pytest.approx(
        100 * np.mean(list(echo.values())) / results["miou"]
    )
    assert results["iou"]["car"] == 0  # never predicted
    assert (results["scans"], results["bad_scans"], results["votes"]) == (2, 0, 1)
    assert (len(results["by_range"]), list(results["by_range"])[-1]) == (6, "beyond 50 m")
    assert sum(ring["support"]["road"] for ring in results["by_range"].values()) == results["support"]["road"]
    fog = found["corruptions"]["fog"]
    assert fog["bad_scans"] == {"light": 0, "moderate": 0, "heavy": 1}
    assert fog["scans"] == {"light": 2, "moderate": 2, "heavy": 1}
    shutil.copytree(workdir / "robustness", tmp_path / "robustness")
    (tmp_path / "robustness" / "fog_heavy.json").write_text("{")  # cut short
    evaluator = FakeEvaluator()
    assert measure(make_config(), tmp_path, evaluator, streets, "weights") == results
    assert evaluator.calls == 1
    other = FakeEvaluator()
    measure(make_config(), tmp_path, other, streets, "other weights")
    assert other.calls == 7
    config = make_config()
    config.data.voxel_size = 0.2
    measure(config, tmp_path, other, streets, "other weights")
    assert other.calls == 14
    assert "not" not in robustness.table(results).splitlines()[0]
    assert robustness.table(results).splitlines()[2].startswith("fog ")
    draw_robustness(tmp_path / "robustness.png", results, "streets")
    assert (tmp_path / "robustness.png").read_bytes().startswith(b"\x89PNG")


def test_another_run_as_baseline(finished, tmp_path):
    workdir, results, streets = finished
    config = make_config(baseline=str(workdir))
    again = measure(config, workdir, FakeEvaluator(), streets, "weights")["robustness"]
    assert again["mce"] == pytest.approx(100.0)
    assert again["baseline"] == str(workdir)
    config.evaluate.severities = ("light",)
    with pytest.raises(InputError, match="baseline"):
        find_baseline(config, robustness.OWN)
    with pytest.raises(InputError, match=mentions("cylinder3d", "auto, nuscenes_c, semantic_kitti_c")):
        find_baseline(make_config(baseline="cylinder3d"), robustness.OWN)
    (tmp_path / "results.json").write_text(json.dumps({"miou": 0.5}))
    with pytest.raises(InputError, match=mentions(tmp_path, "robustness")):
        find_baseline(make_config(baseline=str(tmp_path)), robustness.OWN)
    assert results["robustness"]["corrupted_by"] == robustness.OWN
    fewer = json.loads((workdir / "results.json").read_text())
    fewer["support"]["road"] -= 1
    (tmp_path / "results.json").write_text(json.dumps(fewer))
    with pytest.raises(InputError, match=mentions("baseline", "same scans")):
        measure(make_config(baseline=str(tmp_path)), workdir, FakeEvaluator(), streets, "weights")


def test_published_baselines_are_of_released_sets():
    """Not of one's own generators unless they are asked for, nor of other datasets or fewer severities."""
    config = make_config()
    config.data.dataset = "nuscenes"
    assert find_baseline(config, robustness.OWN) is None
    assert find_baseline(config, "nuScenes-C") == robustness.PUBLISHED["nuscenes_c"]
    config.evaluate.baseline = "nuscenes_c"
    assert find_baseline(config, robustness.OWN) == robustness.PUBLISHED["nuscenes_c"]
    config.evaluate.baseline = "semantic_kitti_c"
    with pytest.raises(InputError, match=mentions("moderate, heavy on semantic_kitti", "on nuscenes")):
        find_baseline(config, "nuScenes-C")
    config.evaluate.update(baseline="nuscenes_c", severities=("heavy",))
    with pytest.raises(InputError, match=" heavy on nuscenes"):
        find_baseline(config, "nuScenes-C")
    config.evaluate.baseline = "auto"
    assert find_baseline(config, "nuScenes-C") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"severities": ("light", "huge")}, r"evaluate\.severities.*one of light"),
        ({"severities": ()}, r"evaluate\.severities.*at least one"),
        ({"rings": (20.0, 10.0)}, r"evaluate\.rings.*ascending"),
        ({"corrupted_root": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_is_refused(finished, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        measure(make_config(**changes), tmp_path, FakeEvaluator(), finished[2], "weights")


def test_an_unknown_corruption_is_refused_before_anything_is_evaluated(finished, tmp_path):
    config, evaluator = make_config(), FakeEvaluator()
    config.evaluate.corruptions = ("fog", "hail")
    with pytest.raises(InputError, match=r"evaluate\.corruptions.*hail.*one of fog"):
        measure(config, tmp_path, evaluator, finished[2], "weights")
    assert evaluator.calls == 0


@pytest.mark.slow
def test_the_task_writes_its_files_and_goes_on(street_cache, tmp_path, capsys):
    """A whole run of a random student on eight devices, and the same on one: the same parts, byte for byte."""
    probed = write_workdir(tmp_path / "probed", "probe", "segment", 12, dataset="streets", class_names=CLASSES)
    config = config_of("smoke")
    config.task, config.checkpoint = "robustness", str(probed)
    config.data.update(root=str(street_cache), split="train", num_scenes=3, points_per_shard=1_024, num_workers=0)
    config.model.update(channels=8, depth=1, grids=((256, 256), (256, 32), (256, 32)))
    config.evaluate.update(corruptions=("cross_sensor",), severities=("moderate", "heavy"))
    results = tasks.robustness(read_settings(config), tmp_path / "eight")
    written = json.loads((tmp_path / "eight" / "results.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert written == json.loads(json.dumps(results))
    assert written["support"]["road"] > 0
    assert list(written["robustness"]["corruptions"]["cross_sensor"]["miou"]) == ["moderate", "heavy"]
    assert (tmp_path / "eight" / "figures" / "robustness.png").is_file()
    assert "compare models with one another" in capsys.readouterr().out
    parts = {path.name: json.loads(path.read_text()) for path in (tmp_path / "eight" / "robustness").iterdir()}
    assert sorted(parts) == ["clear.json", "cross_sensor_heavy.json", "cross_sensor_moderate.json"]
    with unittest.mock.patch.object(Evaluator, "confusion", side_effect=AssertionError("nothing is left to do")):
        assert tasks.robustness(read_settings(config), tmp_path / "eight") == results
    one = sharding.make_mesh(1, 1, jax.devices()[:1])
    with unittest.mock.patch.object(sharding, "make_mesh", return_value=one):
        tasks.robustness(read_settings(config), tmp_path / "one")
    for name, part in parts.items():
        assert json.loads((tmp_path / "one" / "robustness" / name).read_text())["confusion"] == part["confusion"], name


# ---- the released sets' layouts


def test_semantic_kitti_c(tmp_path):
    write_semantic_kitti(tmp_path / "clear", "08", num_scans=3)
    source = tmp_path / "clear" / "dataset" / "sequences" / "08"
    for kind in ("velodyne", "labels"):
        shutil.copytree(source / kind, tmp_path / "c" / "fog" / "light" / kind)
    scan = tmp_path / "c" / "fog" / "light" / "velodyne" / "000001.bin"
    scan.write_bytes(scan.read_bytes()[:-16])  # one point fewer, as fog leaves
    labels = tmp_path / "c" / "fog" / "light" / "labels" / "000001.label"
    labels.write_bytes(labels.read_bytes()[:-4])
    clear = SemanticKITTI(tmp_path / "clear", split="validation", labels=True)
    foggy = open_released(clear, tmp_path / "c", "fog", "light")
    assert (len(foggy), foggy.name(1), foggy.class_names) == (3, "fog/light/000001", clear.class_names)
    expected, found = clear.frame(1), foggy.frame(1)
    np.testing.assert_array_equal(found.points, expected.points[:-1])
    np.testing.assert_array_equal(present(found.labels), present(expected.labels)[:-1])
    with pytest.raises(InputError, match="snow/light/velodyne"):
        open_released(clear, tmp_path / "c", "snow", "light")
    labels.unlink()
    with pytest.raises(InputError, match=mentions("1 of 3 scans", "label")):
        open_released(clear, tmp_path / "c", "fog", "light")
    scan.unlink()
    with pytest.raises(InputError, match=mentions("fog/light", 1, 3, "08/000001")):
        open_released(clear, tmp_path / "c", "fog", "light")
    (source / "labels" / "000001.label").unlink()
    (source / "labels" / "000002.label").unlink()
    fewer = SemanticKITTI(tmp_path / "clear", split="validation", labels=True)
    with pytest.raises(InputError, match=mentions(1, 2, "08/000002", "clear")):
        open_released(fewer, tmp_path / "c", "fog", "light")


def test_nuscenes_c(tmp_path):
    write_nuscenes(tmp_path / "clear")
    clear = NuScenes(tmp_path / "clear", split="all", labels=True)
    for folder in ("samples", "lidarseg"):
        shutil.copytree(tmp_path / "clear" / folder, tmp_path / "c" / "snow" / "heavy" / folder)
    scan = tmp_path / "c" / "snow" / "heavy" / clear.scan_file(0)
    points = np.fromfile(scan, np.float32)
    (points + 1).tofile(scan)
    snowy = open_released(clear, tmp_path / "c", "snow", "heavy")
    np.testing.assert_array_equal(snowy.frame(0).points, clear.frame(0).points + 1)
    np.testing.assert_array_equal(snowy.frame(0).labels, clear.frame(0).labels)
    assert len(snowy) == len(clear)
    with pytest.raises(InputError, match="fog/light/samples/LIDAR_TOP"):
        open_released(clear, tmp_path / "c", "fog", "light")
    scan.unlink()
    with pytest.raises(InputError, match=mentions("snow/heavy", 1, 2)):
        open_released(clear, tmp_path / "c", "snow", "heavy")


# ---- configs/evaluate.py


def test_the_config_of_a_finished_run(tmp_path):
    written = get_config()
    written.seed = 3
    written.data.update(dataset="streets", label_fraction=0.1, max_points=1500, sensors=("beams64", "solid"))
    written.model.update(channels=24, depth=1, grids=((64, 64), (64, 8), (64, 8)))
    (tmp_path / "config.json").write_text(written.to_json_best_effort())
    script = Path(__file__).parents[2] / "configs" / "evaluate.py"
    config = runpy.run_path(str(script))["get_config"](str(tmp_path))
    assert (config.task, config.checkpoint, config.data.split) == ("evaluate", str(tmp_path), "validation")
    assert (config.seed, config.data.label_fraction, config.data.max_points) == (3, 1.0, 1500)
    assert config.model.to_dict() == written.model.to_dict()
    assert config.data.sensors == ("beams64", "solid")
    assert config.data.root == str(tmp_path / "streets")
    for content in ("[]", "{", '{"data": 3}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"config\.json"):
            runpy.run_path(str(script))["get_config"](str(tmp_path))
