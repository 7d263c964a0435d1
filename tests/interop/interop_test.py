"""Published students: golden logits, files in and out, and one sentence for every file that does not fit."""

import io
import pickle
import re
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

from scalr_jax.interop import published
from scalr_jax.interop import waffleiron as interop
from scalr_jax.interop.layout import apply_published_layout, published_batch
from scalr_jax.interop.model import student_of, unwrapped
from scalr_jax.interop.published import read_published
from scalr_jax.interop.torch_file import read_weights_file, write_torch_file
from scalr_jax.runtime.errors import InputError
from tests.support.checks import mentions
from tests.support.paths import GOLDEN

LAYOUT = ("feat", "cell_ind", "occupied_cells", "neighbors_emb", "grids")
ACTIVATION = {"probe_scalr": "relu", "probe_scalr_plus": "gelu"}
FILES = ("student_scalr", "student_scalr_plus", "student_batchnorm", *ACTIVATION)


def checkpoint(name):
    return GOLDEN / f"{name}_ckpt.pth"


def load(name):
    return published.load_torch_checkpoint(checkpoint(name), activation=ACTIVATION.get(name))


def state_dict(path):
    """The weights of a published file, which has one dict of them, and the key they stand under."""
    content = read_weights_file(path)
    key = next(key for key in content if key in interop.CONTAINERS)
    return content[key], key


def scale_error(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.slow
@pytest.mark.usefixtures("highest_precision")
@pytest.mark.parametrize("name", ACTIVATION)
def test_published_logits(golden, name):
    arrays = golden(name)
    model, variables = load(name)
    assert (model.head, model.out_features) == ("segment", 16)
    logits = apply_published_layout(model.to_dict(), variables, *(arrays[key] for key in LAYOUT))
    assert scale_error(logits, arrays["logits"]) < 1e-5


@pytest.mark.usefixtures("highest_precision")
def test_padding_as_released(golden):
    """ScaLR+ averages padded points into cell 0: named, it gives the released numbers, on padded points too."""
    arrays = golden("student_scalr_plus_padded")
    weights = {name.removeprefix("param/"): value for name, value in arrays.items() if name.startswith("param/")}
    model = interop.infer_model(weights, "scalr_plus")
    variables = interop.convert_weights(weights, student_of(model), "scalr_plus")
    layout = [arrays[key] for key in LAYOUT]
    out = apply_published_layout(model, variables, *layout, padding="published")
    assert scale_error(out[:, :, ::5], arrays["out_eval"]) < 1e-5
    with pytest.raises(InputError, match=mentions("both", "masked, published")):
        published_batch(*layout, padding="both")


@pytest.mark.parametrize("name", FILES)
def test_written_back_as_read(tmp_path, name):
    """Names, shapes, dtypes and values of the published file, and our own arrays when read again."""
    model, variables = load(name)
    published.save_torch_checkpoint(tmp_path / "again.pth", model.to_dict(), variables)
    (theirs, key), (ours, our_key) = state_dict(checkpoint(name)), state_dict(tmp_path / "again.pth")
    assert our_key == key
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    for weight in ours:
        if not weight.endswith("num_batches_tracked"):  # counts updates of a momentum that no one uses
            np.testing.assert_array_equal(ours[weight], theirs[weight])
    again, _ = published.load_torch_checkpoint(tmp_path / "again.pth", activation=ACTIVATION.get(name))
    assert again.to_dict() == model.to_dict()


@pytest.mark.torch
@pytest.mark.parametrize("name", FILES)
def test_pytorch_takes_them_strictly(tmp_path, name):
    torch = pytest.importorskip("torch")
    model, variables = load(name)
    published.save_torch_checkpoint(tmp_path / "x.pth", model.to_dict(), variables)
    ours = torch.load(tmp_path / "x.pth", weights_only=True)
    ours = ours.get("model_point") or ours["net"]
    torch_student(model).load_state_dict({k.removeprefix("module."): v for k, v in ours.items()}, strict=True)


def torch_student(model):
    """PyTorch modules of the published names."""
    nn = pytest.importorskip("torch").nn

    C, F, out = model.channels, model.num_features, model.out_features

    def named(**modules):
        module = nn.Module()
        for name, child in modules.items():
            module.add_module(name, child)
        return module

    def norm():
        return nn.BatchNorm1d(C) if model.norm == "batch" else nn.LayerNorm(C)

    def mix(name, layer, **settings):
        inner = nn.Sequential(layer(C, C, **settings), nn.ReLU(), layer(C, C, **settings))
        return named(norm=norm(), scale=nn.Conv1d(C, C, 1, bias=False, groups=C), **{name: inner})

    branch = (nn.BatchNorm2d(F), nn.Conv2d(F, C, 1, bias=False), nn.BatchNorm2d(C), nn.ReLU())
    neighborhood = nn.Sequential(*branch, nn.Conv2d(C, C, 1, bias=False))
    embed = named(norm=nn.BatchNorm1d(F), conv1=nn.Conv1d(F, C, 1), conv2=neighborhood, final=nn.Conv1d(2 * C, C, 1))
    spatial = [mix("ffn", nn.Conv2d, kernel_size=3, groups=C) for _ in range(model.depth)]
    channel = [mix("mlp", nn.Conv1d, kernel_size=1) for _ in range(model.depth)]
    head = nn.Conv1d(C, out, 1)
    if model.head == "segment":
        head = nn.Sequential(nn.BatchNorm1d(C), head)
    elif model.head_hidden:
        head = nn.Sequential(nn.Conv1d(C, model.head_hidden, 1), nn.ReLU(), nn.Conv1d(model.head_hidden, out, 1))
    waffleiron = named(spatial_mix=nn.ModuleList(spatial), channel_mix=nn.ModuleList(channel))
    return named(embed=embed, waffleiron=waffleiron, classif=head)


def test_the_container_says_what_a_plain_convolution_is(tmp_path):
    """`model_points` distils (older files); under `net` it is WaffleIron's own segmentation head."""
    weights, _ = state_dict(checkpoint("student_batchnorm"))
    for key, head in (("model_points", "distill"), ("model_point", "distill"), ("net", "linear")):
        write_torch_file(tmp_path / "x.pth", {key: weights, "epoch": 3})
        model, variables = published.load_torch_checkpoint(tmp_path / "x.pth")
        assert (model.head, model.norm, model.activation) == (head, "batch", "relu")
        bias = variables["params"]["head"]["out"]["bias"] if head == "distill" else variables["params"]["head"]["bias"]
        np.testing.assert_array_equal(bias, weights["module.classif.bias"])


@pytest.mark.parametrize(
    ("schedule", "training"),
    [
        ({"warmup_end": 3_500, "max_iter": 172_200, "factor_min": 0.005}, {"updates": 172_200, "gpus": "8"}),
        ({"max_iter": 172_175}, {"updates": 172_175, "gpus": "fewer than 8"}),
        ({"max_it": 447_720}, {"updates": 447_720, "gpus": "8"}),  # ScaLR+
        ({"max_iter": 70_320}, {"updates": 70_320}),
        ({"max_iter": "172200"}, {}),
        (None, {}),
    ],
)
def test_the_scheduler_says_how_many_gpus_it_was(tmp_path, schedule, training):
    content = read_weights_file(checkpoint("student_scalr"))
    scheduler = {"base_lrs": [0.002], "last_epoch": 9, "lr_lambdas": [schedule]}
    write_torch_file(tmp_path / "a.pth", {**content, "scheduler": scheduler})
    assert read_published(tmp_path / "a.pth").training == training


def test_safetensors(tmp_path):
    weights, _ = state_dict(checkpoint("student_scalr_plus"))
    arrays = {name.removeprefix("module."): np.ascontiguousarray(array) for name, array in weights.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    model, variables = published.load_torch_checkpoint(tmp_path / "x.safetensors")
    expected, same = load("student_scalr_plus")
    assert model.to_dict() == expected.to_dict()
    np.testing.assert_array_equal(variables["params"]["head"]["out"]["kernel"], same["params"]["head"]["out"]["kernel"])


def plain_weights():
    weights, _ = state_dict(checkpoint("student_scalr_plus"))
    return {name.removeprefix("module."): array for name, array in weights.items()}


@pytest.mark.parametrize(
    ("wrap", "container"),
    [
        (lambda name: f"module.module.{name}", "model_point"),
        (lambda name: f"_orig_mod.{name}", "model_point"),
        (lambda name: f"module._orig_mod.{name}", "model_point"),
        (lambda name: name.replace("embed.", "embed._orig_mod.").replace("mix.0.", "mix.0._orig_mod."), "model_point"),
        (lambda name: f"model.{name}", "state_dict"),
        (lambda name: f"model_point.module.{name}", "state_dict"),
        (lambda name: f"model._orig_mod.{name}", "state_dict"),
        (lambda name: name, "model_state_dict"),
    ],
)
def test_what_wraps_a_student_is_taken_off(wrap, container):
    """As Lightning, torch.compile and DistributedDataParallel (twice) leave it: the same student."""
    plain = plain_weights()
    content = {container: {wrap(name): array for name, array in plain.items()}, "epoch": 1}
    found, under = interop.published_weights(unwrapped(content, "x.pth"), "x.pth")
    assert found.keys() == plain.keys()
    assert all(found[name] is plain[name] for name in plain)
    assert under == ("model_point" if "model_point" in (container, wrap("").split(".")[0]) else "")


def test_what_lies_beside_a_wrapped_student(tmp_path, caplog):
    """Other models are told, two students are refused, and so is a weight with and without its wrapper."""
    wrapped = {f"model.{name}": array for name, array in plain_weights().items()}
    wrapped["criterion.weight"] = np.ones(2, np.float32)
    write_torch_file(tmp_path / "x.pth", {"state_dict": wrapped})
    model, variables = published.load_torch_checkpoint(tmp_path / "x.pth")
    expected, same = load("student_scalr_plus")
    assert model.to_dict() == expected.to_dict()
    jax.tree.map(np.testing.assert_array_equal, variables, same)
    assert "criterion" in caplog.text
    for more, parts in (
        ({f"ema.{name}": array for name, array in plain_weights().items()}, ("model.", "ema.")),
        ({name.replace("model.", "model.module."): array for name, array in wrapped.items()}, ("state_dict", "twice")),
    ):
        write_torch_file(tmp_path / "x.pth", {"state_dict": wrapped | more})
        with pytest.raises(InputError, match=mentions("x.pth", *parts)):
            published.load_torch_checkpoint(tmp_path / "x.pth")


class AttributeDict(dict):
    """As Lightning's."""


def test_lightnings_hyperparameters_are_read(tmp_path):
    pickled = pickle.dumps({"hyper_parameters": AttributeDict(lr=0.1)}, protocol=2)
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        pickled = pickled.replace(__name__.encode(), b"pytorch_lightning.utilities.parsing")
        archive.writestr("archive/data.pkl", pickled)
    assert read_weights_file(tmp_path / "x.pth") == {"hyper_parameters": {"lr": 0.1}}


def test_the_activation_is_asked_for():
    with pytest.raises(InputError, match=mentions("activation", "relu", "gelu")):
        published.load_torch_checkpoint(checkpoint("probe_scalr"))
    with pytest.raises(InputError, match=mentions("activation", "silu", "relu")):
        published.load_torch_checkpoint(checkpoint("probe_scalr"), activation="silu")


def test_every_weight_that_does_not_fit_is_listed(tmp_path):
    weights = dict(state_dict(checkpoint("student_scalr"))[0])
    del weights["module.waffleiron.channel_mix.1.mlp.0.bias"]
    weights["module.embed.final.weight"] = np.zeros((32, 65, 1), np.float32)
    weights["module.surprise"] = np.zeros((2, 3), np.float32)
    write_torch_file(tmp_path / "x.pth", {"model_point": weights})
    with pytest.raises(InputError) as error:
        published.load_torch_checkpoint(tmp_path / "x.pth")
    for problem in (
        mentions("waffleiron.channel_mix.1.mlp.0.bias", "missing", (32,)),
        mentions("embed.final.weight", (32, 65, 1), (32, 64, 1)),
        mentions("surprise", (2, 3)),
    ):
        assert re.search(problem, str(error.value))


class Hostile:
    def __reduce__(self):
        return print, ("this must not be printed",)


def hostile_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"net": Hostile()}, protocol=2))
    return file.getvalue()


def test_bad_files(tmp_path, capsys):
    path = tmp_path / "x.pth"
    cases = {
        "checkpoint": b"hello, this is not a checkpoint",
        "damaged": checkpoint("student_scalr").read_bytes()[:2000],
        "pickle": hostile_zip(),
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            published.load_torch_checkpoint(path)
    with pytest.raises(InputError, match=r"nothing\.pth"):
        published.load_torch_checkpoint(tmp_path / "nothing.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cls_token": (1, 1, 8), "pos_embed": (1, 5, 8)}, mentions("WaffleIron", "embed.conv1.weight")),
        ({"embed.conv1.weight": (8, 5, 1)}, r"no WaffleIron student \(no waffleiron.spatial_mix.N"),
        (
            {"embed.conv1.weight": (8, 5, 1), "waffleiron.spatial_mix.99999999.scale.weight": (8, 1, 1)},
            "WaffleIron",
        ),
        ({"embed.conv1.weight": ()}, "WaffleIron"),
        ({}, "weights"),
    ],
)
def test_files_of_other_models(tmp_path, weights, message):
    write_torch_file(tmp_path / "x.pth", {name: np.zeros(shape, np.float32) for name, shape in weights.items()})
    with pytest.raises(InputError, match=message):
        published.load_torch_checkpoint(tmp_path / "x.pth")
