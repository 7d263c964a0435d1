"""No loader takes weights that are not finite, and no output that is not finite is handed out; each is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import scalr_jax
from scalr_jax.interop.model import student_of
from scalr_jax.interop.published import load_torch_checkpoint, published_state_dict, save_torch_checkpoint
from scalr_jax.interop.teacher import load_teacher, save_teacher
from scalr_jax.interop.torch_file import write_torch_file
from scalr_jax.interop.vit import load_dinov2
from scalr_jax.models import vit
from scalr_jax.predict import run as predict
from scalr_jax.runtime.checkpoint import Checkpoints
from scalr_jax.runtime.errors import InputError
from tests.support import numpy_vit
from tests.support.checks import assert_one_sentence, mentions
from tests.support.predict_runs import EXPLICIT, make_points, write_bin
from tests.support.tiny_student import tiny_model, write_workdir

VIT = vit.ViTConfig(patch_size=8, width=16, depth=1, num_heads=2, hidden=32, position_grid=(2, 2))


def spoiled(weights, name, value=np.nan):
    """The weights with one value of `name` spoiled."""
    array = np.array(weights[name], np.float32)
    array.flat[-1] = value
    return {**weights, name: array}


def published(tmp_path, ending, value):
    model, variables = tiny_model("segment", 4)
    weights = published_state_dict(student_of(model), variables)
    weights = spoiled(weights, "waffleiron.channel_mix.0.mlp.0.weight", value)
    path = tmp_path / f"scalr{ending}"
    write_torch_file(path, {"net": weights}) if ending == ".pth" else safetensors.numpy.save_file(weights, path)
    return path


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_published_files(tmp_path, ending, value):
    path = published(tmp_path, ending, value)
    with pytest.raises(InputError, match=mentions(path, "waffleiron.channel_mix.0.mlp.0.weight", 1)):
        scalr_jax.load(path, sensor="nuscenes", activation="relu")


def test_values_that_float32_does_not_hold(tmp_path):
    model, variables = tiny_model("segment", 4)
    weights = published_state_dict(student_of(model), variables)
    write_torch_file(tmp_path / "x.pth", {"net": {**weights, "classif.1.bias": np.full(4, 1e300)}})
    with pytest.raises(InputError, match=mentions("x.pth", "classif.1.bias", 4)):
        load_torch_checkpoint(tmp_path / "x.pth", activation="relu")


def test_a_workdir(tmp_path):
    path = write_workdir(tmp_path / "run", "probe", "segment", 4)
    _, variables = tiny_model("segment", 4)
    variables["batch_stats"]["embedding"]["norm"]["mean"][2] = np.nan
    checkpoints = Checkpoints(path / "checkpoints", every=1, keep=1)
    checkpoints.save(2, jax.device_put(variables), jnp.zeros(1), force=True)
    checkpoints.wait()
    checkpoints.close()
    with pytest.raises(InputError, match=mentions(path, "batch_stats/embedding/norm/mean")):
        scalr_jax.load(path, sensor="nuscenes")


def test_teachers(tmp_path):
    weights = spoiled(numpy_vit.random_weights("dinov2"), "blocks.1.mlp.fc1.weight")
    write_torch_file(tmp_path / "vit.pth", weights)
    with pytest.raises(InputError, match=mentions("vit.pth", "blocks.1.mlp.fc1.weight")):
        load_dinov2(tmp_path / "vit.pth")
    params = vit.init(VIT, jax.random.key(0), (16, 16))
    save_teacher(tmp_path / "own.safetensors", VIT, params)
    flat = safetensors.numpy.load_file(tmp_path / "own.safetensors")
    with safetensors.safe_open(tmp_path / "own.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    for changed, words, parts in (
        (spoiled(flat, "cls"), metadata, ("cls",)),
        ({name: array for name, array in flat.items() if name != "norm/layer/bias"}, metadata, ("norm/layer/bias",)),
        (flat, {"vit_config": '{"depth": "deep"}'}, ("config.task",)),
        (flat, {}, ("vit_config",)),
    ):
        safetensors.numpy.save_file(changed, tmp_path / "bad.safetensors", words)
        with pytest.raises(InputError, match=mentions("bad.safetensors", *parts)):
            load_teacher(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=mentions("again.safetensors", "cls")):
        save_teacher(tmp_path / "again.safetensors", VIT, {**params, "cls": jnp.full_like(params["cls"], jnp.nan)})
    assert not (tmp_path / "again.safetensors").exists()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two models: one whose outputs are finite, and one whose weights are, but not the outputs; and a scan."""
    root = tmp_path_factory.mktemp("files")
    model, variables = tiny_model("segment", 4)
    save_torch_checkpoint(root / "good.pth", model, variables)
    large = jax.tree_util.tree_map_with_path(lambda path, x: x if "variance" in str(path) else x * 1e30, variables)
    save_torch_checkpoint(root / "large.pth", model, large)
    write_bin(root / "scan.bin", make_points())
    return root


def test_classes_of_logits_that_are_not_finite_are_not_written(files, tmp_path, capsys):
    """argmax of NaN would be the first class."""
    with pytest.raises(SystemExit) as ended:
        flags = [f"--model={files / 'large.pth'}", f"--input={files / 'scan.bin'}", *EXPLICIT]
        predict.main(["predict", f"--output={tmp_path / 'out.npz'}", *flags])
    assert ended.value.code == 2
    assert_one_sentence(capsys.readouterr().err, "scan.bin", "logits", "not finite")
    assert list(tmp_path.iterdir()) == []


def test_features_that_float16_does_not_hold(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "predict", lambda model, points, *_, **__: np.full((len(points), 8), 1e6, np.float32))
    with pytest.raises(SystemExit) as ended:
        flags = [f"--model={files / 'good.pth'}", f"--input={files / 'scan.bin'}", "--what=features", *EXPLICIT]
        predict.main(["predict", f"--output={tmp_path / 'out.npz'}", "--dtype=float16", *flags])
    assert ended.value.code == 2
    assert_one_sentence(capsys.readouterr().err, "scan.bin", "float16", "1e+06", "--dtype=float32")
    assert list(tmp_path.iterdir()) == []
