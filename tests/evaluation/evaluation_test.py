"""Evaluation: the same confusion matrix on any number of devices, in any packs, with votes; results, submissions."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from scalr_jax import load, tasks
from scalr_jax.data.pipeline import BuildScene
from scalr_jax.data.readers import semantic_kitti
from scalr_jax.data.readers.nuscenes import NuScenes
from scalr_jax.data.readers.semantic_kitti import SemanticKITTI
from scalr_jax.data.scenes import IGNORE, Frame, SceneNeeds
from scalr_jax.data.streets.layout import CLASSES
from scalr_jax.data.transforms import make_scene, to_ego
from scalr_jax.evaluation import report
from scalr_jax.evaluation.segmentation import Evaluator, ScanClasses
from scalr_jax.evaluation.submission import Submission
from scalr_jax.interop.saved import Saved
from scalr_jax.runtime import sharding
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.settings import read_settings
from tests.support.checks import mentions, present
from tests.support.datasets import Frames
from tests.support.raw_datasets import write_nuscenes, write_semantic_kitti
from tests.support.runs import config_of, evaluator_of, open_split, scene_settings
from tests.support.tiny_student import write_workdir

RINGS = (8.0, 16.0)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """The workdir of a probe of 8 channels on streets, with random weights."""
    return write_workdir(
        tmp_path_factory.mktemp("probed") / "run", "probe", "segment", 12, dataset="streets", class_names=CLASSES
    )


def evaluation_config(street_cache, probed="", /, **changes):
    config = config_of("smoke")
    config.task, config.checkpoint = "evaluate", str(probed)
    config.data.update(root=str(street_cache), split="train", num_scenes=5, points_per_shard=1_024, num_workers=0)
    config.model.update(channels=8, depth=1, grids=((256, 256), (256, 32), (256, 32)))
    config.evaluate.rings = RINGS
    config.update_from_flattened_dict(changes)
    return config


class ByHeight:
    """A model without a network: logits of three classes from the features."""

    WEIGHTS = np.array([[0.02, 0.3, -0.2, 0.1, -0.1], [0.1, -0.2, 0.3, -0.4, 0.0], [0.0, 0.1, 0.1, 0.5, 0.05]])

    needs = SceneNeeds(((-64.0, -64.0, -8.0), (64.0, 64.0, 8.0)), 16, ((256, 256), (256, 32), (256, 32)))

    def apply(self, variables, batch, *, train):
        return batch.feats @ jax.numpy.asarray(self.WEIGHTS.T, batch.feats.dtype)


class Labelled(Frames):
    """Frames of a dataset whose labels are `labels(frame)`."""

    def __init__(self, dataset, labels):
        self.dataset, self.labels, self.class_names = dataset, labels, dataset.class_names

    def __len__(self):
        return len(self.dataset)

    def intensity(self, index):
        return 20.0, 20.0

    def frame(self, index, rng=None, *, camera=None):
        frame = self.dataset.frame(index, rng)
        return frame._replace(labels=self.labels(frame))


# ---- exactness


@pytest.mark.slow
def test_any_devices_packing_and_votes_give_the_same_confusion_matrix(street_cache, probed, tmp_path):
    """One scan or several a pack; eight devices, three of them without a scan, or one; no point is lost or doubled."""
    config = evaluation_config(street_cache, probed)
    many = evaluation_config(street_cache, probed, **{"data.points_per_shard": 40_000, "data.scenes_per_shard": 3})
    one = sharding.make_mesh(1, 1, jax.devices()[:1])
    data = read_settings(many).data
    dataset = open_split(config, "train", cache=tmp_path)
    student, (_, variables) = tasks.load_segmenter(read_settings(config))
    found = {}
    for votes in (1, 3):
        apart = evaluator_of(config, student, variables, 12, votes=votes).confusion(dataset, rings=RINGS)
        together = Evaluator(data, one, student, variables, 12, votes=votes).confusion(dataset, rings=RINGS)
        np.testing.assert_array_equal(apart, together)
        found[votes] = apart
    assert not np.array_equal(found[1], found[3])
    for i, (low, high) in enumerate(((0, 8), (8, 16), (16, np.inf))):
        frames = [dataset.frame(index) for index in range(5)]
        ranges = [np.linalg.norm(frame.points[:, :3], axis=1) for frame in frames]
        labels = [present(f.labels)[(r >= low) & (r < high)] for f, r in zip(frames, ranges, strict=True)]
        counts = np.bincount(np.concatenate(labels), minlength=256)[:12]
        for votes in (1, 3):
            np.testing.assert_array_equal(found[votes][i].sum(axis=1), counts)


@pytest.mark.parametrize("augmentation", ["published", "consistent"])
def test_votes_are_the_mean_of_the_copies_probabilities(street_cache, tmp_path, augmentation):
    config = evaluation_config(street_cache, **{"data.augmentation": augmentation, "data.num_scenes": 3})
    dataset = open_split(config, "train", cache=tmp_path)
    evaluator = evaluator_of(config, ByHeight(), {}, 3, votes=4)
    scans = {scan.frame_index: scan for scan in evaluator.scans(dataset)}
    assert sorted(scans) == [0, 1, 2]
    make = BuildScene(dataset, dataclasses.replace(scene_settings(config, task="segment", train=False), votes=True), 0)
    for index, scan in scans.items():
        total = np.zeros((1, 3), np.float32)
        for vote in range(4):
            scene = make(index, (vote, index))
            logits = scene.feats @ ByHeight.WEIGHTS.T.astype(np.float32)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            total = total + (weights / weights.sum(axis=1, keepdims=True))[scene.upsample]
        assert (scan.classes == total.argmax(axis=1)).mean() > 0.9999
        np.testing.assert_array_equal(scan.labels, dataset.frame(index).labels)


def test_what_a_vote_turns_and_scales():
    """Intensities tell which point is which; distances and labels stay those of the scan as it is."""
    rng = np.random.default_rng(3)
    points = np.column_stack([rng.uniform(-20, 20, (400, 2)), rng.uniform(-2, 2, 400), np.arange(400)])
    frame = Frame("f", points.astype(np.float32), np.eye(4), labels=np.arange(400, dtype=np.uint8) % 7)
    radius = np.linalg.norm(frame.points[:, :3], axis=1)
    config = config_of("smoke")
    for augmentation in ("published", "consistent"):
        config.data.augmentation = augmentation
        settings = dataclasses.replace(scene_settings(config, task="segment", train=False), votes=True)
        scene = make_scene(frame, 0, (0.0, 1.0), settings, np.random.default_rng(5))
        kept = np.rint(scene.feats[:, 0]).astype(int)
        np.testing.assert_array_equal(scene.labels, present(frame.labels)[kept])
        np.testing.assert_array_equal(scene.raw_labels, frame.labels)
        np.testing.assert_allclose(present(scene.raw_ranges), radius, rtol=1e-6)
        assert (present(scene.upsample)[kept] == np.arange(len(kept))).all()
        scale = scene.feats[:, 4] / radius[kept]
        level = np.hypot(scene.feats[:, 1], scene.feats[:, 2]) / np.hypot(*frame.points[kept, :2].T)
        np.testing.assert_allclose(scale, scale[0], rtol=1e-5)
        np.testing.assert_allclose(level, scale[0], rtol=1e-5)
        assert (abs(scale[0] - 1) < 1e-5) == (augmentation == "published")
        assert 0.9 <= scale[0] <= 1.1
        assert np.abs(scene.feats[:, 1] - frame.points[kept, 0]).max() > 1


# ---- results


def test_a_run_leaves_results_confusion_matrix_and_picture(street_cache, probed, tmp_path, capsys):
    results = tasks.evaluate(read_settings(evaluation_config(street_cache, probed)), tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == results
    assert "NaN" not in text
    content = json.loads((tmp_path / "confusion.json").read_text())
    counts = np.array(content["counts"])
    by_range = np.array(list(content["by_range"].values()))
    np.testing.assert_array_equal(by_range.sum(axis=0), counts)
    correct = np.diag(counts)
    union = counts.sum(axis=0) + counts.sum(axis=1) - correct
    assert results["miou"] == pytest.approx(np.mean(correct[union > 0] / union[union > 0]))
    assert results["accuracy"] == pytest.approx(correct.sum() / counts.sum())
    near = by_range[0]
    assert results["by_range"]["0 to 8 m"]["accuracy"] == pytest.approx(np.diag(near).sum() / near.sum())
    assert results["support"] == dict(zip(content["classes"], counts.sum(axis=1).tolist(), strict=True))
    assert (tmp_path / "figures" / "confusion.png").stat().st_size > 20_000
    printed = capsys.readouterr().out
    assert "label / prediction %" in printed
    assert "0-8    8-16     >16" in printed


def test_a_run_keeps_its_workdir(street_cache, probed, tmp_path):
    """Neither another evaluation nor that of the probe's own workdir replaces results; the config lies beside them."""
    config = evaluation_config(street_cache, probed, **{"data.num_scenes": 1})
    results = tasks.evaluate(read_settings(config), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["data"]["num_scenes"] == 1
    assert (results["scans"], results["bad_scans"]) == (1, 0)
    with pytest.raises(InputError, match=r"another config \(data\.num_scenes: 1 saved, 2 now\)"):
        tasks.evaluate(read_settings(evaluation_config(street_cache, probed, **{"data.num_scenes": 2})), tmp_path)
    with pytest.raises(InputError, match=mentions("config", "task")):
        tasks.evaluate(read_settings(config), probed)
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_a_scan_that_cannot_be_read_is_counted_apart(street_cache, tmp_path, capsys):
    config = evaluation_config(street_cache, **{"data.num_scenes": 3})
    dataset = Labelled(open_split(config, "train", cache=tmp_path), lambda frame: frame.labels % 3)
    good = evaluator_of(config, ByHeight(), {}, 3)
    good.confusion(dataset)
    assert good.num_scans == 3
    assert "of 3 scans" not in capsys.readouterr().out

    class Damaged(Labelled):
        def frame(self, index, rng=None, *, camera=None):
            if index == 1:
                raise BadFrameError("streets/1: damaged")
            return super().frame(index, rng)

    dataset = Damaged(dataset.dataset, dataset.labels)
    bad = evaluator_of(config, ByHeight(), {}, 3)
    bad.confusion(dataset)
    assert bad.num_scans == 2
    assert "1 of 3 scans" in capsys.readouterr().out


@pytest.mark.parametrize("votes", [1, 2])
def test_an_output_that_is_not_finite_is_no_class(street_cache, tmp_path, votes):
    config = evaluation_config(street_cache, **{"data.num_scenes": 1})
    dataset = open_split(config, "train", cache=tmp_path)

    class Diverged(ByHeight):
        WEIGHTS = ByHeight.WEIGHTS * np.nan

    with pytest.raises(InputError, match=mentions("finite", "streets/train/0", "weights")):
        evaluator_of(config, Diverged(), {}, 3, votes=votes).confusion(dataset)


def test_tables_hold_what_comes_late_and_may_be_given(street_cache, tmp_path):
    """The sample is from all over the set; `data.cells_per_shard` raises what is derived from it."""
    config = evaluation_config(street_cache, **{"data.cells_per_shard": (50_000, 9, 9)})
    evaluator = evaluator_of(config, ByHeight(), {}, 3)
    dataset = open_split(config, "train", cache=tmp_path)
    sample = evaluator._pipeline(dataset).sample(3)
    assert [scene.stream_index for scene in sample] == [0, 2, 4]
    cells = evaluator._choose_capacities(sample).cells
    assert cells[0] == 50_000
    assert cells[1] > 9


@pytest.mark.slow
def test_a_probe_of_one_sensor_on_another(street_cache, probed, tmp_path):
    """By configs/evaluate.py, with the other sensor's intensity: each scan has the classes that `load` gives it."""
    script = Path(__file__).parents[2] / "configs" / "evaluate.py"
    config = runpy.run_path(str(script))["get_config"](str(probed))
    config.data.update(root=str(street_cache), num_validation_scenes=2, image_size=(112, 224), num_workers=0)
    expected = {}
    for sensor in ("beams32", "solid"):
        config.data.sensors = (sensor,)
        dataset = open_split(config, "validation", cache=tmp_path)
        model, expected[sensor] = load(probed, intensity=dataset.intensity(0)), np.zeros((12, 12), np.int64)
        for index in range(2):
            frame = dataset.frame(index)
            points = np.concatenate([to_ego(frame.points, frame.to_ego), frame.points[:, 3:]], axis=1)
            expected[sensor] += report.confusion_matrix(present(frame.labels), model.segment(points), 12)
        tasks.evaluate(read_settings(config), tmp_path / sensor)
        found = json.loads((tmp_path / sensor / "confusion.json").read_text())
        np.testing.assert_array_equal(found["counts"], expected[sensor])
    assert expected["beams32"].sum() != expected["solid"].sum()


def test_an_empty_class_is_named_and_not_in_the_mean():
    confusion = np.array([[3, 1, 0, 0], [0, 0, 0, 0], [2, 0, 4, 0], [0, 0, 0, 0]])
    results = report.results_of(confusion, ["road", "car", "tree", "bus"])
    assert results["iou"] == {"road": 0.5, "car": 0.0, "tree": round(4 / 6, 4), "bus": None}
    assert results["miou"] == pytest.approx((3 / 6 + 0 + 4 / 6) / 3)
    assert results["empty_classes"] == ["bus"]
    table = report.class_table(results)
    assert "not in the mean: bus" in table
    assert "nan" not in table


def test_classes_are_matched_by_name(street_cache, probed, tmp_path):
    """A dataset with the model's classes in another order; another number, or other names, are refused."""
    settings = read_settings(evaluation_config(street_cache, probed))
    saved = tasks.load_backbone(settings)

    shuffled = tuple(saved.settings["class_names"])[::-1]
    np.testing.assert_array_equal(tasks.class_order(settings, shuffled, saved, 12), np.arange(12)[::-1])
    shuffled = ("tram", *shuffled[1:])
    with pytest.raises(InputError, match=r"12 classes \(road, .*\), and streets has 12 \(tram, "):
        tasks.class_order(settings, shuffled, saved, 12)
    saved = Saved({}, {})  # a published file says nothing of its classes
    np.testing.assert_array_equal(tasks.class_order(settings, shuffled, saved, 12), np.arange(12))
    with pytest.raises(InputError, match="has 5 classes, and streets has 12"):
        tasks.class_order(settings, shuffled, saved, 5)


def test_the_order_of_the_classes_reaches_the_matrix(street_cache, tmp_path):
    config = evaluation_config(street_cache, **{"data.num_scenes": 2})
    dataset = open_split(config, "train", cache=tmp_path)
    dataset = Labelled(dataset, lambda frame: (frame.labels % 3).astype(np.uint8))
    order = np.array([2, 0, 1])
    plain = evaluator_of(config, ByHeight(), {}, 3).confusion(dataset)[0]
    ordered = evaluator_of(config, ByHeight(), {}, 3, order=order).confusion(dataset)[0]
    np.testing.assert_array_equal(ordered[:, order], plain)


# ---- submissions


def submitted(dataset, folder, num_classes):
    """Classes 0, 1, ... in turn for every scan, in the place of a model's."""
    classes = {}
    with Submission(dataset, folder) as submission:
        for index in range(len(dataset)):
            frame = dataset.frame(index)
            classes[index] = (np.arange(len(frame.points)) * 7 % num_classes).astype(np.uint8)
            nothing = np.full(len(frame.points), IGNORE, np.uint8)
            submission.add(ScanClasses(index, classes[index], nothing, nothing.astype(np.float32)))
        submission.finish()
    return classes


@pytest.fixture
def two_scans(monkeypatch):
    """SemanticKITTI as if sequence 11 were its test set, and each sequence had two scans."""
    monkeypatch.setitem(semantic_kitti.SPLITS, "test", ("11",))
    for sequence in semantic_kitti.NUM_SCANS:
        monkeypatch.setitem(semantic_kitti.NUM_SCANS, sequence, 2)


@pytest.mark.usefixtures("two_scans")
def test_semantic_kitti_submission(tmp_path, capsys):
    """The benchmark's inverse map; read as labels the files give the classes again; a test sequence has no labels."""
    write_semantic_kitti(tmp_path / "kitti", "11", num_scans=2)
    for path in (tmp_path / "kitti").glob("dataset/sequences/11/*/*"):
        if path.suffix in (".label", ".png"):
            path.unlink()
    config = evaluation_config(tmp_path / "kitti", **{"data.dataset": "semantic_kitti"})
    dataset = open_split(config, "test", cache=tmp_path)
    classes = submitted(dataset, tmp_path / "run" / "submission", 19)
    inverse = np.array([10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81])
    for index in range(2):
        path = tmp_path / "run" / "submission" / "sequences" / "11" / "predictions" / f"00000{index}.label"
        np.testing.assert_array_equal(np.fromfile(path, "<u4"), inverse[classes[index]])
        labels = tmp_path / "kitti" / "dataset" / "sequences" / "11" / "labels" / path.name
        labels.parent.mkdir(exist_ok=True)
        labels.write_bytes(path.read_bytes())
    again = SemanticKITTI(tmp_path / "kitti", split="test", labels=True)
    np.testing.assert_array_equal(again.frame(1).labels, classes[1])
    assert "2 prediction files" in capsys.readouterr().out
    with pytest.raises(InputError, match="submission"):
        Submission(dataset, tmp_path / "run" / "submission")


def test_nuscenes_submission(tmp_path):
    write_nuscenes(tmp_path / "nuscenes")
    dataset = NuScenes(tmp_path / "nuscenes", split="validation", labels=True)
    classes = submitted(dataset, tmp_path / "out", 16)
    meta = json.loads((tmp_path / "out" / "mini_val" / "submission.json").read_text())["meta"]
    assert meta == {f"use_{k}": k == "lidar" for k in ("camera", "lidar", "radar", "map", "external")}
    files = sorted((tmp_path / "out" / "lidarseg" / "mini_val").iterdir())
    assert [file.name for file in files] == [f"{dataset.scan_token(0)}_lidarseg.bin"]
    found = np.fromfile(files[0], np.uint8)
    assert len(found) == 50
    np.testing.assert_array_equal(found, classes[0] + 1)
    with pytest.raises(InputError, match=mentions("submission_uses", "sonar", "camera, lidar")):
        Submission(dataset, tmp_path / "other", ("lidar", "sonar"))
    with Submission(dataset, tmp_path / "other", ("lidar", "external")) as submission:
        submission.add(ScanClasses(0, classes[0], classes[0], classes[0].astype(np.float32)))
        submission.finish()
    meta = json.loads((tmp_path / "other" / "mini_val" / "submission.json").read_text())["meta"]
    assert [name for name, used in meta.items() if used] == ["use_lidar", "use_external"]


def test_a_set_is_what_the_benchmark_says(tmp_path, monkeypatch):
    """Not what is on disk: a gap in the numbers, a sequence or a keyframe's scan missing, a scan too many."""
    assert sum(semantic_kitti.NUM_SCANS[name] for name in semantic_kitti.SPLITS["test"]) == 20_351
    assert sum(semantic_kitti.NUM_SCANS.values()) == 43_552

    def refused(dataset, *parts):
        with pytest.raises(InputError, match=mentions(dataset.root, *parts)):
            Submission(dataset, tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))

    write_semantic_kitti(tmp_path / "kitti", "08", num_scans=3)
    kitti = SemanticKITTI(tmp_path / "kitti", split="validation", labels=True)
    refused(kitti, 4071, 4068, "08/predictions/000003.label")
    monkeypatch.setitem(semantic_kitti.NUM_SCANS, "08", 2)
    refused(kitti, 1, "08/predictions/000002.label", "not in the benchmark")
    monkeypatch.setitem(semantic_kitti.NUM_SCANS, "08", 3)
    Submission(kitti, tmp_path / "out")
    (tmp_path / "kitti/dataset/sequences/08/velodyne/000001.bin").unlink()
    refused(SemanticKITTI(tmp_path / "kitti", split="validation", labels=True), 3, 1, "08/predictions/000001.label")
    refused(SemanticKITTI(tmp_path / "kitti", split="all", labels=True), "00/predictions/000000.label")
    write_nuscenes(tmp_path / "nuscenes", scenes=("scene-0103", "scene-0916"))  # both are mini's validation scenes
    Submission(NuScenes(tmp_path / "nuscenes", split="validation", labels=True), tmp_path / "out")
    (tmp_path / "nuscenes/samples/LIDAR_TOP/scene-0916.pcd.bin").unlink()
    refused(NuScenes(tmp_path / "nuscenes", split="validation", labels=True), 2, 1, "scene-0916", "mini_val")


@pytest.mark.usefixtures("two_scans")
def test_half_a_submission_is_none(tmp_path):
    """A scan that was skipped as bad, points that are not finite, a file that changes on disk: nothing is left."""
    write_semantic_kitti(tmp_path, "08", num_scans=2)
    dataset, folder = SemanticKITTI(tmp_path, split="validation", labels=True), tmp_path / "out"
    scan = ScanClasses(0, np.zeros(50, np.uint8), np.zeros(50, np.uint8), np.zeros(50, np.float32))
    missing = mentions(2, 1, "08/predictions/000001.label")
    with pytest.raises(InputError, match=missing), Submission(dataset, folder) as submission:
        submission.add(scan)
        submission.finish()
    with pytest.raises(InputError, match="2 of 50 points"), Submission(dataset, folder) as submission:
        submission.add(scan._replace(classes=np.zeros(48, np.uint8)))
    with pytest.raises(InputError, match="1 files"), Submission(dataset, folder) as submission:
        submission.add(scan)
        submission.add(scan._replace(frame_index=1))
        next(iter(folder.parent.glob(".out.partial/*/*/*/000001.label"))).write_bytes(bytes(40))
        submission.finish()
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(InputError, match="downloaded"):
        Submission(Labelled(dataset, None), folder)


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate.votes": 0}, r"evaluate\.votes = 0"),
        ({"evaluate.votes": 2, "data.augmentation": "none"}, mentions("votes", "published", "consistent")),
        ({"evaluate.rings": (20.0, 10.0)}, mentions("evaluate.rings", (20.0, 10.0))),
        ({"model.channels": 16}, mentions("channels", 8, 16, "model")),
        ({"evaluate.submission": True}, mentions("nuScenes", "SemanticKITTI")),
        ({"checkpoint": "nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_evaluation_is_one_sentence(changes, words, street_cache, probed, tmp_path):
    with pytest.raises(InputError, match=words):
        tasks.evaluate(read_settings(evaluation_config(street_cache, probed, **changes)), tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_an_evaluation_set_without_labels(street_cache, tmp_path):
    config = evaluation_config(street_cache, **{"data.num_scenes": 2})
    dataset = open_split(config, "train", cache=tmp_path)
    unlabelled = Labelled(dataset, lambda frame: np.full(len(frame.points), IGNORE, np.uint8))
    confusion = evaluator_of(config, ByHeight(), {}, 3).confusion(unlabelled)
    with pytest.raises(InputError, match="labelled point"):
        tasks._labelled(confusion)


def test_labels_outside_the_map_are_named(tmp_path):
    """Two of two scans are bad: the run stops with the file and the labels."""
    write_semantic_kitti(tmp_path, "08", num_scans=2)
    for path in (tmp_path / "dataset" / "sequences" / "08" / "labels").iterdir():
        path.write_bytes(np.full(50, 77, "<u4").tobytes())
    config = evaluation_config(tmp_path, **{"data.dataset": "semantic_kitti"})
    with pytest.raises(InputError, match=r"00000\d\.label.*\[77\]"):
        evaluator_of(config, ByHeight(), {}, 19).confusion(open_split(config, "validation", cache=tmp_path))
