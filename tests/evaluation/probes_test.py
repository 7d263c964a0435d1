"""Probes: cached features equal fixed ones, a cache resumes and is refused when stale, nearest neighbours and image
prototypes against plain references, on one device and on eight."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scalr_jax import tasks
from scalr_jax.data.scenes import IGNORE, SceneView
from scalr_jax.evaluation import features, nearest_neighbors, zero_shot
from scalr_jax.interop.teacher import make_teacher
from scalr_jax.runtime.checkpoint import load_variables
from scalr_jax.runtime.errors import InputError
from scalr_jax.settings import read_settings, record_of
from scalr_jax.train.loop import train
from scalr_jax.train.state import variables_of
from scalr_jax.train.teachers import Source, Teacher
from tests.support.checks import mentions, present
from tests.support.datasets import Frames
from tests.support.runs import config_of, on_one_device, open_split
from tests.support.tiny_student import write_workdir

TEACHER_WIDTH = 128  # the packaged one's


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The workdir of a distilled student of 8 channels, with random weights."""
    return write_workdir(tmp_path_factory.mktemp("backbone") / "run", "distill", "distill", TEACHER_WIDTH)


def probe_config(street_cache, backbone, **changes):
    config = config_of("smoke")
    config.task, config.checkpoint = "probe", str(backbone)
    config.num_steps = config.checkpoint_every_steps = 3
    config.data.update(root=str(street_cache), num_scenes=8, num_validation_scenes=2, points_per_shard=2_048)
    config.data.update(scenes_per_shard=1, max_points=1500, scenes_per_step=8)
    config.model.update(channels=8, depth=1, grids=((256, 256), (256, 32), (256, 32)))
    config.optimizer.update(learning_rate=0.05, schedule="constant")
    config.update_from_flattened_dict(changes)
    return config


def make_cache(config, folder, dataset, variables):
    settings = read_settings(config)
    student = tasks.student_of(settings, "none", 0)
    key = features.cache_key(record_of(settings), dataset, variables)
    return features.make_cache(settings.training, student, folder, dataset, variables, key=key, dtype="float32")


def losses(workdir):
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.slow
def test_a_probe_on_cached_features_equals_one_on_the_same_scenes(tmp_path, street_cache, backbone):
    """Every loss, the trained head and the whole checkpoint's layout; with a hidden layer, which starts at random."""
    config = probe_config(street_cache, backbone, **{"probe.features": "fixed", "probe.head": "mlp"})
    dataset = open_split(config, "train", cache=tmp_path)
    settings = read_settings(config)
    initial = tasks.load_backbone(settings).variables
    task = tasks.segmentation(settings, 12, label="probe", initial=initial, frozen=True)
    with tasks.claimed(settings, tmp_path / "fixed"):
        state = train(settings.training, tmp_path / "fixed", dataset, task)
    fixed = jax.device_get(variables_of(state))
    config = probe_config(street_cache, backbone, **{"probe.features": "cached", "probe.head": "mlp"})
    results = tasks.probe(read_settings(config), tmp_path / "cached")
    cached = load_variables(tmp_path / "cached" / "checkpoints")
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "fixed"), rtol=1e-5)
    assert jax.tree.structure(fixed) == jax.tree.structure(cached)
    for name in ("embedding", "backbone"):
        jax.tree.map(np.testing.assert_array_equal, fixed["params"][name], cached["params"][name])
    heads = fixed["params"]["head"], cached["params"]["head"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), *heads)
    assert np.abs(heads[1]["kernel"]).max() > 0.05
    assert heads[1]["hidden"]["kernel"].shape == (8, 8)
    assert 0 <= results["miou"] <= 1
    assert losses(tmp_path / "cached")[-1] < losses(tmp_path / "cached")[0]


@pytest.mark.slow
def test_a_cache_resumes_and_is_refused_for_another_student(tmp_path, street_cache, backbone, capsys):
    config = probe_config(street_cache, backbone)
    variables = load_variables(backbone / "checkpoints")
    dataset = open_split(config, "train", cache=tmp_path)
    folder = tmp_path / "features"
    cache = make_cache(config, folder, dataset, variables)
    assert "8 scenes x about 1,500 points x 8 channels in float32" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 17
    scene = cache.scene(3, 11)
    assert scene.stream_index == 11
    assert (scene.feats.shape, scene.feats.dtype) == ((len(present(scene.labels)), 8), np.float32)
    for kept in folder.glob("00000[1-7].npy"):  # as if it was killed after the first scene
        kept.unlink()
    (folder / "cache.json").write_text(json.dumps({"key": json.loads(before["cache.json"])["key"]}))
    make_cache(config, folder, dataset, variables)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "cache.json").write_text(json.dumps({"key": json.loads(before["cache.json"])["key"]}))  # after the last
    make_cache(config, folder, dataset, variables)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    other = jax.tree.map(lambda x: x + 1, variables)
    with pytest.raises(InputError, match=r"of other scenes \(weights: .* saved, .* now\); remove it"):
        make_cache(config, folder, dataset, other)
    config.data.max_points = 1000
    with pytest.raises(InputError, match=r"data\.max_points: 1500 saved, 1000 now"):
        make_cache(config, folder, dataset, variables)
    head = {kind: {**tree, "head": {"bias": np.ones(3)}} for kind, tree in variables.items()}
    assert features.checksum(head) == features.checksum(variables)  # the head is not what features depend on


def test_a_cache_that_does_not_fit_is_not_begun(tmp_path, street_cache, backbone, monkeypatch):
    config = probe_config(street_cache, backbone)
    dataset = open_split(config, "train", cache=tmp_path)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(InputError, match=mentions("0.0 GB", "free", "probe.cache_dtype")):
        make_cache(config, tmp_path / "features", dataset, load_variables(backbone / "checkpoints"))
    assert not list((tmp_path / "features").glob("*.npy"))


# ---- nearest neighbours


def reference_votes(rows, bank, labels, num_classes, k, temperature):
    out = np.zeros((len(rows), num_classes))
    for i, row in enumerate(rows):
        cosine = bank @ (row / np.linalg.norm(row))
        for j in np.argsort(-cosine)[:k]:
            out[i, labels[j]] += np.exp(cosine[j] / temperature)
    return out / np.exp(1 / temperature)


def test_votes_equal_their_reference_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    rows, bank = rng.normal(size=(2, 23, 5)), rng.normal(size=(40, 5))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    labels = rng.integers(0, 4, 40).astype(np.int32)
    settings = {"num_classes": 4, "num_neighbors": 7, "temperature": 0.1}
    monkeypatch.setattr(nearest_neighbors, "ROW_BYTES", 4 * 40 * 5)  # five rows a block, and the last not full
    found = nearest_neighbors.votes(*(jnp.asarray(x) for x in (rows, bank, labels)), **settings)
    for d in range(2):
        np.testing.assert_allclose(found[d], reference_votes(rows[d], bank, labels, 4, 7, 0.1), rtol=1e-4, atol=1e-6)


def scene_of(index, labels):
    return SceneView("", index, np.zeros((0, 0)), np.zeros((0, 0)), (), None, None, np.asarray(labels, np.uint8))


def test_the_bank_is_balanced_and_does_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    scenes = []
    for index in range(6):
        labels = rng.choice([0, 1, 2, 255], 50, p=[0.8, 0.1, 0.02, 0.08])
        rows = rng.normal(size=(50, 3)).astype(np.float32)
        rows[:, 0] = labels  # so that a row knows its class
        scenes.append((scene_of(index, labels), rows))
    bank, labels = nearest_neighbors.make_bank(scenes, 4, 10, seed=5)
    rare = sum((scene.labels == 2).sum() for scene, _ in scenes)
    np.testing.assert_array_equal(np.bincount(labels, minlength=4), [10, 10, rare, 0])
    assert 0 < rare < 10
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1.0, rtol=1e-6)
    again, other = (nearest_neighbors.make_bank(scenes[::-1], 4, 10, seed=seed)[0] for seed in (5, 6))
    np.testing.assert_array_equal(np.sort(bank, axis=0), np.sort(again, axis=0))
    assert not np.array_equal(bank, other)
    with pytest.raises(InputError, match="labelled point"):
        nearest_neighbors.make_bank([(scene_of(0, [255]), np.ones((1, 3), np.float32))], 2, 10, seed=0)


@pytest.mark.slow
def test_the_knn_probe_is_the_same_on_one_device_and_on_eight(tmp_path, street_cache, backbone, monkeypatch):
    changes = {"probe.method": "knn", "probe.bank_per_class": 40, "probe.num_neighbors": 5}
    eight = tasks.probe(read_settings(probe_config(street_cache, backbone, **changes)), tmp_path / "eight")
    on_one_device(monkeypatch)
    changes["mesh.data"] = 1
    one = tasks.probe(read_settings(probe_config(street_cache, backbone, **changes)), tmp_path / "one")
    assert one["miou"] == pytest.approx(eight["miou"], abs=1e-4)
    assert json.loads((tmp_path / "eight/results.json").read_text()) == eight
    assert (tmp_path / "eight/config.json").exists()


# ---- image prototypes


def test_logistic_regression_as_scikit_learn_has_it(golden):
    """Against scikit-learn 1.5.2: LogisticRegression(class_weight="balanced", solver="liblinear", C=1 and 10)."""
    arrays = golden("logistic_regression")
    for strength in (1, 10):
        weights, bias = zero_shot.fit_logistic(arrays["features"], arrays["labels"], 4, float(strength))
        np.testing.assert_allclose(weights, arrays[f"weights_{strength}"], atol=1e-6)
        np.testing.assert_allclose(bias, arrays[f"bias_{strength}"], atol=1e-6)
    weights, bias = zero_shot.fit_logistic(arrays["features"], arrays["labels"], 6, 1.0)
    np.testing.assert_array_equal(np.isfinite(bias), [True] * 4 + [False] * 2)  # a class without a sample
    np.testing.assert_allclose(weights[:4], arrays["weights_1"], atol=1e-6)


def test_the_mean_unit_feature_is_that_of_the_upsampled_map():
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4, 5)), jnp.float32)
    h, w = 7, 9
    total = np.zeros(5)
    for r in range(h):
        for c in range(w):
            y, x = r * 2 / (h - 1), c * 3 / (w - 1)
            i, j = min(int(y), 1), min(int(x), 2)
            a, b = y - i, x - j
            value = (1 - a) * ((1 - b) * tokens[0, i, j] + b * tokens[0, i, j + 1])
            value += a * ((1 - b) * tokens[0, i + 1, j] + b * tokens[0, i + 1, j + 1])
            total += value / np.linalg.norm(value)
    np.testing.assert_allclose(zero_shot.mean_unit_feature(tokens, (h, w)), total / (h * w), rtol=1e-4, atol=1e-6)


def test_prototype_images_are_found_by_the_classes_names(tmp_path):
    for name in ("0_barrier", "3_Construction-Vehicle", "car"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
    (tmp_path / "car" / "notes.txt").touch()
    names = ("barrier", "car", "construction_vehicle", "bus")
    found = zero_shot.find_images(tmp_path, names)
    assert sorted((path.parent.name, label) for path, label in found) == [
        ("0_barrier", 0),
        ("3_Construction-Vehicle", 2),
        ("car", 1),
    ]
    (tmp_path / "7_zebra").mkdir()
    with pytest.raises(InputError, match=mentions("7_zebra", "barrier, car")):
        zero_shot.find_images(tmp_path, names)
    with pytest.raises(InputError, match="is not a folder"):
        zero_shot.find_images(tmp_path / "none", names)


@pytest.mark.slow
def test_zero_shot_from_image_regions_and_from_a_folder(tmp_path, street_cache, backbone, capsys):
    from PIL import Image

    changes = {"probe.method": "zero_shot"}
    results = tasks.probe(read_settings(probe_config(street_cache, backbone, **changes)), tmp_path / "regions")
    assert 0 <= results["miou"] <= 1
    assert "zero_shot: " in capsys.readouterr().out
    for name in ("car", "2_road"):
        (tmp_path / "images" / name).mkdir(parents=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, (90, 160, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name / "0.png")
    changes["probe.prototypes"] = str(tmp_path / "images")
    results = tasks.probe(read_settings(probe_config(street_cache, backbone, **changes)), tmp_path / "folder")
    assert "2 prototypes of 2 classes" in capsys.readouterr().out
    assert all(np.isnan(value) or value == 0 for name, value in results["iou"].items() if name not in ("car", "road"))


def test_zero_shot_without_a_labelled_point_in_any_image(tmp_path, street_cache, backbone):
    config = probe_config(street_cache, backbone, **{"data.num_scenes": 3})
    dataset = open_split(config, "train", cache=tmp_path)

    class Unlabelled(Frames):
        class_names = dataset.class_names

        def __len__(self):
            return len(dataset)

        def frame(self, index, rng=None, *, camera=None):
            frame = dataset.frame(index, rng)
            return frame._replace(labels=np.where(present(frame.visible), IGNORE, present(frame.labels)))

    settings = read_settings(config)
    vit_config, params = make_teacher(settings.teacher, settings.data.image_size, "cpu")
    teacher = Source(vit_config.width, settings.data.image_size, vit_config), Teacher(params)
    images = zero_shot.Images(settings.data.image_size, antialias=True, seed=0)
    with pytest.raises(InputError, match=mentions("3 training images", "labelled point")):
        zero_shot.gather_prototypes("", Unlabelled(), teacher, images)


def test_a_folder_without_settings_is_refused(tmp_path, street_cache, backbone):
    """Weights alone do not say which student they are of."""
    shutil.copytree(backbone / "checkpoints", tmp_path / "copy" / "checkpoints")
    with pytest.raises(InputError, match=mentions("copy/settings.json", "--workdir")):
        tasks.load_backbone(read_settings(probe_config(street_cache, tmp_path / "copy")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe.method": "svm"}, mentions("probe.method", "svm", "head, knn, zero_shot")),
        ({"probe.features": "cache"}, mentions("probe.features", "cache", "augmented, fixed, cached")),
        ({"model.channels": 16}, mentions("channels", 8, 16, "model")),
        ({"model.num_classes": 3}, mentions("model.num_classes", 3, "streets", 12)),
        ({"data.label_fraction": 0.0}, r"label_fraction = 0\.0"),
        ({"data.label_fraction": 0.05}, mentions("label_fraction", 0.05, "8 frames")),
        ({"data.label_fraction": 0.4}, mentions("label_fraction", 0.4, "1/n")),
        ({"probe.method": "knn", "probe.temperature": 0.0}, mentions("probe.temperature", 0.0)),
        ({"probe.method": "zero_shot", "teacher.checkpoint": "x.pth"}, "x.pth"),
        (
            {"probe.method": "zero_shot", "teacher.feature": "x"},
            mentions("teacher", "feature", "x_pre_norm"),
        ),
        ({"probe.features": "cached", "probe.cache_dtype": "int8"}, mentions("int8", "float32, float16")),
    ],
)
def test_what_cannot_be_probed_is_one_sentence(changes, message, tmp_path, street_cache, backbone):
    with pytest.raises(InputError, match=message):
        tasks.probe(read_settings(probe_config(street_cache, backbone, **changes)), tmp_path)


def test_labels_are_checked_before_training(capsys):
    from scalr_jax.data.build import check_labels

    check_labels([scene_of(0, [0, 255]), scene_of(1, [2])], ("road", "bus", "car"), 3)
    assert "bus in the first 2 training scenes" in capsys.readouterr().out
    with pytest.raises(InputError, match=mentions("2 training scenes", "labelled point")):
        check_labels([scene_of(0, [255]), scene_of(1, [255])], ("road",), 1)
    with pytest.raises(InputError, match=mentions("labels", 4, 2)):
        check_labels([scene_of(0, [0, 4])], ("road", "bus", "car"), 3)
