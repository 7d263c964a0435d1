"""`scalr_jax.load`: settings from where they are, one result for every point, one sentence for what is missing."""

import re
import shutil
import subprocess
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest

import scalr_jax
from scalr_jax.data import sensors
from scalr_jax.data.readers.files import read_label_map
from scalr_jax.data.scenes import IGNORE
from scalr_jax.data.whole_scan import as_array
from scalr_jax.interop import published as interop
from scalr_jax.interop.model import empty_batch
from scalr_jax.runtime.errors import InputError
from tests.support.checks import mentions
from tests.support.datasets import Frames
from tests.support.tiny_student import tiny_model, write_workdir

EXPLICIT = {
    "intensity": (10.0, 5.0),
    "field_of_view": ((-16.0, -16.0, -4.0), (16.0, 16.0, 4.0)),
    "grids": ((16, 16), (16, 8), (16, 8)),
}


def published(path, head="distill", out_features=6, **changes):
    interop.save_torch_checkpoint(path, *tiny_model(head, out_features, **changes))
    return path


def random_points(number, half_width=12.0, seed=0):
    """[number, 4], no two in one voxel, and none near its border: the first point's voxel decides where those are."""
    rng = np.random.default_rng(seed)
    side = np.arange(-half_width, half_width, 0.4)
    xyz = np.stack([rng.choice(side, number), rng.choice(side, number), np.arange(number) % 30 * 0.2 - 3], axis=1)
    _, first = np.unique(xyz[:, :2], axis=0, return_index=True)
    xyz = xyz[np.sort(first)]
    xyz = np.concatenate([np.full((1, 3), [-half_width - 0.35, -half_width - 0.35, -3.35]), xyz])
    return np.concatenate([xyz, rng.uniform(0, 20, (len(xyz), 1))], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    return scalr_jax.load(published(tmp_path_factory.mktemp("api") / "x.pth"), **EXPLICIT)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    path = published(tmp_path_factory.mktemp("api") / "x.pth", "segment", 7)
    return scalr_jax.load(path, activation="relu", **EXPLICIT)


def test_a_model_is_one_line_and_the_package_lists_its_names(distilled, probed):
    assert re.fullmatch(r"Model\(waffleiron, [\d,]+ parameters, head 'distill'\)", repr(distilled)), repr(distilled)
    assert repr(probed).endswith("head 'segment' of 7 classes)")
    assert dir(scalr_jax) == ["Model", "__version__", "load"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", scalr_jax.__version__)


@pytest.mark.slow
def test_every_point_gets_a_row(distilled, probed):
    points = random_points(500)
    assert distilled.embed(points).shape == (len(points), 8)
    assert distilled.distilled(points.astype(np.float64)).shape == (len(points), 6)
    classes = probed.segment(points)
    assert classes.shape == (len(points),)
    assert 0 <= classes.min() <= classes.max() < 7


def test_the_order_of_points_does_not_matter(distilled):
    points = random_points(400)
    order = np.random.default_rng(1).permutation(len(points))
    np.testing.assert_allclose(distilled.embed(points)[order], distilled.embed(points[order]), rtol=1e-4, atol=1e-4)


def test_points_outside_take_the_nearest_kept_point(distilled):
    """Beyond the field of view, in an occupied voxel, with an intensity that is no number, or absurdly far."""
    points = random_points(300)
    expected = distilled.embed(points)
    others = points[[3, 7, 11, 13]].copy()
    others[0, :3] += 0.01
    others[1, 3] = np.nan
    others[2, 0] = np.nan
    others[3, 0] = 1e30
    far = points[:, 0].argmax()
    outside = points[far].copy()
    outside[0] += 1000.0
    out = distilled.embed(np.concatenate([points, others, outside[None]]))
    np.testing.assert_allclose(out[: len(points)], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(out[len(points)], out[3])
    np.testing.assert_array_equal(out[len(points) + 1], out[7])
    assert (out[len(points) + 2] == 0).all()
    assert np.isfinite(out).all()


def test_a_point_without_place_has_no_class(probed):
    points = random_points(100)
    points[5, 1] = np.inf
    classes = probed.segment(points)
    assert classes[5] == IGNORE
    assert (np.delete(classes, 5) < 7).all()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((10, 3)), r"shape \(10, 3\)"),
        (np.zeros(4), r"shape \(4,\)"),
        (np.array([["a"] * 4]), "dtype"),
        (np.zeros((0, 4)), "the scan is empty"),
        (np.full((30, 4), np.nan), "30 of 30 points are NaN or infinite"),
        (random_points(300) + np.array([900, 0, 0, 0]), "0 points are left in the field of view"),
        (random_points(300) + np.array([5e5, 4.6e6, 0, 0]), "coordinates in a map's frame .*subtract"),
        (random_points(300)[:5], "5 points are left in the field of view, and 17 are needed"),
    ],
)
def test_points_that_are_none(distilled, points, message):
    with pytest.raises(ValueError, match=message):
        distilled.embed(points)


def test_several_scans_give_the_results_of_each(distilled, capsys):
    scans = [random_points(number, seed=number) for number in (100, 130)]
    found = distilled.embed(scans, progress=True)
    assert "2/2" in capsys.readouterr().err
    for rows, points in zip(found, scans, strict=True):
        np.testing.assert_array_equal(rows, distilled.embed(points))
    np.testing.assert_array_equal(distilled.embed(tuple(scans))[1], found[1])
    np.testing.assert_array_equal(distilled.embed(scans[0].tolist()), found[0])  # rows of numbers are one scan
    with pytest.raises(InputError, match=mentions("scan 1 of 2", "empty")):
        distilled.embed([scans[0], np.zeros((0, 4))])


class DataFrame:
    """The part of pandas' that is read."""

    def __init__(self, columns):
        self.columns = columns

    def keys(self):
        return self.columns.keys()

    def __getitem__(self, names):
        return np.column_stack([self.columns[name] for name in names])


def test_columns_of_a_table_are_found_by_their_names(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=DataFrame))
    points = random_points(50)
    columns = {"i": points[:, 3], "t": points[:, 0], **{name: points[:, k] for k, name in enumerate("xyz")}}
    np.testing.assert_array_equal(as_array(DataFrame(columns)), points)
    with pytest.raises(InputError, match=mentions("columns t, x, y, z", "intensity")):
        as_array(DataFrame({name: columns[name] for name in "txyz"}))


@pytest.mark.torch
def test_tensors_are_arrays():
    torch = pytest.importorskip("torch", reason="needs the torch extra: pip install 'scalr_jax[torch]'")
    points = random_points(50)
    np.testing.assert_array_equal(as_array(torch.from_numpy(points).requires_grad_()), points)
    assert as_array(torch.from_numpy(points).bfloat16()).dtype == np.float32


def test_one_compilation_a_size(distilled):
    distilled.distilled(random_points(200))
    number = distilled._head._cache_size()
    for count in (100, 300, 700):
        distilled.distilled(random_points(count, seed=count))
    assert distilled._head._cache_size() == number


def test_heads_say_what_they_cannot(distilled, probed):
    with pytest.raises(ValueError, match="no classes; load a probed"):
        distilled.segment(random_points(50))
    with pytest.raises(ValueError, match="no features in a teacher's space"):
        probed.distilled(random_points(50))


def test_the_pure_function_is_underneath(distilled):
    out = jax.eval_shape(distilled.apply, distilled.variables, empty_batch(5, distilled.student.needs))
    assert out.shape == (1, 2, 6)


def test_a_published_file_needs_its_sensor(tmp_path):
    path = published(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"give sensor= \(one of nuscenes.*or intensity=, field_of_view=, grids="):
        scalr_jax.load(path)
    with pytest.raises(ValueError, match="or grids="):
        scalr_jax.load(path, **{k: v for k, v in EXPLICIT.items() if k != "grids"})
    with pytest.raises(ValueError, match="sensor = 'velodyne' is none of nuscenes"):
        scalr_jax.load(path, sensor="velodyne")
    with pytest.raises(ValueError, match="field_of_view"):
        scalr_jax.load(path, sensor="nuscenes", field_of_view=((0, 0, 0), (0, 1, 1)))
    wrong: dict[str, Any] = {"intensity": 3}
    with pytest.raises(ValueError, match="intensity"):
        scalr_jax.load(path, sensor="nuscenes", **wrong)
    with pytest.raises(ValueError, match="does not exist"):
        scalr_jax.load(tmp_path / "nothing.pth", sensor="nuscenes")


def test_presets(tmp_path):
    """Sensor and kind of model decide; what is given explicitly wins."""
    distilled = published(tmp_path / "distilled.pth")
    probed = published(tmp_path / "probed.pth", "segment", 7)
    waffleiron = published(tmp_path / "waffleiron.pth", "linear", 7, norm="batch")
    config = scalr_jax.load(distilled, sensor="pandar64").config
    assert (config.intensity, config.grids[0]) == ((18.23640649, 25.86983417), (256, 256))
    config = scalr_jax.load(probed, sensor="pandargt", activation="gelu").config
    assert (config.field_of_view[1], config.grids) == ((128.0, 128.0, 8.0), ((512, 512), (512, 32), (512, 32)))
    config = scalr_jax.load(probed, sensor="pandargt", activation="gelu", grids=((384, 384), *[(384, 32)] * 2)).config
    assert (config.field_of_view[1][0], config.grids[0]) == (128.0, (384, 384))
    config = scalr_jax.load(waffleiron, sensor="semantic_kitti").config
    assert (config.field_of_view[0], config.grids[1]) == ((-50.0, -50.0, -3.0), (250, 12))
    with pytest.raises(ValueError, match="no WaffleIron was published for pandar64"):
        scalr_jax.load(waffleiron, sensor="pandar64")


def test_a_workdir_has_its_settings(tmp_path):
    path = write_workdir(tmp_path / "run", "distill", "distill", 6, dataset="semantic_kitti")
    model = scalr_jax.load(path)
    assert model.config.intensity == (0.28613698, 0.14090556)
    assert model.distilled(random_points(60)).shape[1] == 6
    probe = write_workdir(tmp_path / "probe", "probe", "segment", 7, dataset="streets", sensors=("solid",))
    model = scalr_jax.load(probe, grids=EXPLICIT["grids"])
    assert model.config.intensity == sensors.STREETS_INTENSITY["solid"]
    path = write_workdir(tmp_path / "raw", "distill", "distill", 6, dataset="nuscenes", intensity=(0.0, 1.0))
    assert scalr_jax.load(path).config.intensity == (0.0, 1.0)
    assert model.config.head_hidden == 0
    assert model.segment(random_points(60)).shape == (len(random_points(60)),)


def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    path = write_workdir(tmp_path / "run", "distill", "distill", 6, dataset="semantic_kitti")
    shutil.rmtree(path / "checkpoints" / "1" / "state")
    with pytest.raises(InputError, match=mentions("checkpoints", "step 1", "state/_METADATA is missing", "copy")):
        scalr_jax.load(path)


def test_names_of_classes(tmp_path):
    """A run has its own; a published file those of its sensor's dataset where there are as many, else numbers."""
    names = read_label_map("nuscenes").class_names
    path = published(tmp_path / "x.pth", "segment", len(names))
    assert scalr_jax.load(path, sensor="nuscenes", activation="relu").class_names == names
    assert scalr_jax.load(path, sensor="pandar64", activation="relu").class_names[:2] == ("class 0", "class 1")
    assert scalr_jax.load(published(tmp_path / "y.pth"), sensor="nuscenes").class_names == ()
    own = ("grass", "stone", "sand")
    path = write_workdir(tmp_path / "own", "finetune", "segment", 3, dataset="folder", class_names=own)
    assert scalr_jax.load(path).class_names == own


def test_what_does_not_fit_is_told(distilled):
    points = random_points(300)
    points[:, 2] = -1.7
    assert distilled.check(points) == {}
    assert list(distilled.check(points * np.array([3, 3, 1, 100]))) == ["intensity", "view"]


def test_a_workdir_of_several_sensors_asks_which(tmp_path):
    data = {"dataset": "nuscenes+pandaset", "sensors": ("pandar64", "pandargt")}
    path = write_workdir(tmp_path / "run", "distill", "distill", 6, **data)
    with pytest.raises(ValueError, match=r"several sensors \(nuscenes, pandar64, pandargt\); give sensor="):
        scalr_jax.load(path)
    assert scalr_jax.load(path, sensor="pandargt").config.intensity == sensors.INTENSITY["pandargt"]


def test_a_workdir_of_the_published_mixture_asks_for_its_sensor_and_one_of_own_scans_knows_it(tmp_path):
    path = write_workdir(tmp_path / "merged", "distill", "distill", 6, dataset="merged")
    with pytest.raises(ValueError, match=r"several sensors \(nuscenes, semantic_kitti, pandar64, pandargt\)"):
        scalr_jax.load(path)
    own = scalr_jax.load(write_workdir(tmp_path / "own", "distill", "distill", 6, dataset="folder"))
    assert own.config.intensity == Frames().intensity(0)
    assert scalr_jax.load(tmp_path / "own", intensity=(1.0, 2.0)).config.intensity == (1.0, 2.0)


def test_folders_that_are_no_workdir(tmp_path):
    with pytest.raises(ValueError, match="no workdir"):
        scalr_jax.load(tmp_path)
    (tmp_path / "distill" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="its folders distill"):
        scalr_jax.load(tmp_path)
    with pytest.raises(InputError, match=mentions("distill/settings.json", "is missing", "--workdir")):
        scalr_jax.load(tmp_path / "distill")


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "waffleiron"}', b"\xff"])
def test_a_damaged_settings_file_is_named(tmp_path, content):
    path = write_workdir(tmp_path / "run", "distill", "distill", 6, dataset="semantic_kitti")
    (path / "settings.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=mentions("run/settings.json", "copy the workdir again")):
        scalr_jax.load(path)


def test_data_workers_do_not_import_jax():
    code = "import sys, scalr_jax, scalr_jax.data.transforms, scalr_jax.data.joined; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
