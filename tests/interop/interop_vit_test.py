"""Published ViTs give the published numbers, whatever project's names their weights have."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from scalr_jax.interop import torch_file
from scalr_jax.interop.vit import load_dinov2
from scalr_jax.models import vit
from scalr_jax.runtime.errors import InputError
from tests.support import numpy_vit
from tests.support.checks import mentions

features = jax.jit(vit.features, static_argnums=0, static_argnames="which")

# Names in the other projects, by their conversion scripts: (Meta's, theirs), tried in order.
TIMM = (
    ("register_tokens", "reg_token"),
    ("storage_tokens", "reg_token"),
    (".mlp.w12", ".mlp.fc1"),
    (".mlp.w1", ".mlp.fc1_g"),
    (".mlp.w2", ".mlp.fc1_x"),
    (".mlp.w3", ".mlp.fc2"),
)
TIMM_DINOV3 = (*TIMM, (".ls1.gamma", ".gamma_1"), (".ls2.gamma", ".gamma_2"))
TRANSFORMERS = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("register_tokens", "embeddings.register_tokens"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks.", "encoder.layer."),
    (".attn.proj", ".attention.output.dense"),
    (".attn.", ".attention.attention."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    (".mlp.w12", ".mlp.weights_in"),
    (".mlp.w3", ".mlp.weights_out"),
    ("norm.", "layernorm."),
)
TRANSFORMERS_DINOV3 = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("storage_tokens", "embeddings.register_tokens"),
    ("patch_embed.proj", "embeddings.patch_embeddings"),
    ("blocks.", "layer."),
    (".attn.proj", ".attention.o_proj"),
    (".attn.", ".attention."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    (".mlp.w1", ".mlp.gate_proj"),
    (".mlp.w2", ".mlp.up_proj"),
    (".mlp.w3", ".mlp.down_proj"),
    (".mlp.fc1", ".mlp.up_proj"),
    (".mlp.fc2", ".mlp.down_proj"),
)


def rename(weights, table):
    out = {}
    for name, value in weights.items():
        for meta, theirs in table:
            if name.startswith(meta) if not meta.startswith(".") else meta in name:
                name = name.replace(meta, theirs, 1)
        out[name] = np.ascontiguousarray(value)
    return out


def split(weights, names, *, drop=()):
    """qkv as three weights, without those in `drop` and without the masks."""
    out = {name: value for name, value in weights.items() if "qkv" not in name}
    for name, value in weights.items():
        if "qkv" in name and not name.endswith("_mask"):
            for part, third in zip(names, np.split(value, 3), strict=True):
                out[name.replace("qkv", part)] = third
    return {name: value for name, value in out.items() if not name.endswith(drop)} if drop else out


def to_timm(weights, kind):
    """timm drops what only training needs; with registers it adds the CLS token's position to the token."""
    drop = ("mask_token", "rope_embed.periods", "_mask", "local_cls_norm.weight", "local_cls_norm.bias")
    weights = {name: value for name, value in weights.items() if not name.endswith(drop)}
    if kind == "dinov2_registers":
        cls = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights |= {"cls_token": cls, "pos_embed": weights["pos_embed"][:, 1:]}
    if not kind.startswith("dinov3"):
        return rename(weights, TIMM)
    for name in [name for name in weights if name.endswith("qkv.bias")]:
        query, _, value = np.split(weights.pop(name), 3)
        weights |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
    return rename(weights, TIMM_DINOV3)


def to_transformers(weights, kind):
    if not kind.startswith("dinov3"):
        return rename(split(weights, ("query", "key", "value")), TRANSFORMERS)
    drop = ("rope_embed.periods", "k_proj.bias", "local_cls_norm.weight", "local_cls_norm.bias")
    return rename(split(weights, ("q_proj", "k_proj", "v_proj"), drop=drop), TRANSFORMERS_DINOV3)


def scale_error(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def make_images(kind):
    size = (32, 48) if kind.startswith("dinov3") else (28, 56)
    return np.random.default_rng(7).random((2, *size, 3), np.float32)


@pytest.fixture(scope="module", autouse=True)
def highest():
    with jax.default_matmul_precision("highest"):
        yield


def test_published_features(golden, tmp_path):
    arrays = golden("teacher_vit")
    weights = {name.removeprefix("param/"): value for name, value in arrays.items() if name.startswith("param/")}
    torch_file.write_torch_file(tmp_path / "teacher.pth", weights)
    config, params = load_dinov2(tmp_path / "teacher.pth", num_heads=3)
    assert config == vit.ViTConfig(width=48, depth=4, num_heads=3, hidden=192, position_grid=(9, 9))
    images = arrays["image"].transpose(0, 2, 3, 1)
    for which in vit.FEATURES:
        assert scale_error(features(config, params, images, which=which), arrays[which]) < 1e-5
    reference = numpy_vit.forward(weights, images, num_heads=3)  # the reference of the tests below is right, too
    assert scale_error(reference[0], arrays["x_pre_norm"]) < 1e-6


CASES = {  # kind: (heads, how Meta, timm, transformers interpolate)
    "dino": (2, ("dinov2", "antialias", None)),
    "dinov2": (2, ("dinov2", "antialias", "size")),
    "dinov2_registers": (2, ("antialias", "antialias", "antialias")),
    "dinov2_giant": (2, ("dinov2", "antialias", "size")),
    "dinov3": (2, (None, None, None)),
    "dinov3_plus": (2, (None, None, None)),
    "dinov3_7b": (1, (None, None, None)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_every_kind_from_every_project(kind, tmp_path):
    """Three files of one model: the same parameters, and the features of a ViT in plain NumPy."""
    num_heads, interpolations = CASES[kind]
    weights = numpy_vit.random_weights(kind)
    torch_file.write_torch_file(tmp_path / "meta.pth", weights)
    safetensors.numpy.save_file(to_timm(weights, kind), tmp_path / "timm.safetensors")
    names = ["meta.pth", "timm.safetensors"]
    if kind != "dino":
        safetensors.numpy.save_file(to_transformers(weights, kind), tmp_path / "transformers.safetensors")
        names.append("transformers.safetensors")
    loaded = [load_dinov2(tmp_path / name, num_heads=num_heads) for name in names]
    config, params = loaded[0]
    images = make_images(kind)
    expected = numpy_vit.forward(weights, images, num_heads=num_heads, interpolation=interpolations[0])
    for which, array in zip(vit.FEATURES, expected, strict=True):
        assert scale_error(features(config, params, images, which=which), array) < 1e-5
    for (other, same), interpolation in zip(loaded, interpolations, strict=False):
        jax.tree.map(np.testing.assert_array_equal, same, params)
        kept = {"position_interpolation": config.position_interpolation, "rotary_periods": config.rotary_periods}
        assert dataclasses.replace(other, **kept) == config
        assert interpolation is None or other.position_interpolation == interpolation


@pytest.mark.parametrize("interpolation", ["size", "antialias"])
def test_other_interpolations(interpolation, tmp_path):
    weights = numpy_vit.random_weights("dinov2")
    torch_file.write_torch_file(tmp_path / "meta.pth", weights)
    config, params = load_dinov2(tmp_path / "meta.pth")
    config = dataclasses.replace(config, position_interpolation=interpolation)
    expected, _ = numpy_vit.forward(weights, make_images("dinov2"), num_heads=2, interpolation=interpolation)
    assert scale_error(features(config, params, make_images("dinov2")), expected) < 1e-5


def test_what_transformers_writes_beside_the_weights_holds(tmp_path):
    """A gated DINOv3 with GELU, whose weights look like those with SiLU."""
    weights, images, path = numpy_vit.random_weights("dinov3_plus"), make_images("dinov3"), tmp_path / "m.safetensors"
    safetensors.numpy.save_file(to_transformers(weights, "dinov3_plus"), path)
    plain, params = load_dinov2(path)
    assert (plain.ffn, plain.num_heads) == ("swiglu", 2)
    said = {"model_type": "dinov3_vit", "hidden_act": "gelu", "num_attention_heads": 1, "layer_norm_eps": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps({**said, "rope_theta": 50.0}))
    config, _ = load_dinov2(path)
    assert config == dataclasses.replace(plain, ffn="geglu", num_heads=1, norm_eps=1e-3, rotary_base=50.0)
    (tmp_path / "config.json").write_text(json.dumps({**said, "model_type": "dinov2"}))
    assert load_dinov2(path)[0].ffn == "swiglu"  # transformers' DINOv2 does not ask for it where the MLP is gated
    computed = weights | {"rope_embed.periods": 100.0 ** (np.arange(16) / 16)}
    expected, _ = numpy_vit.forward(computed, images, num_heads=2, gate="gelu")
    assert scale_error(features(dataclasses.replace(plain, ffn="geglu"), params, images), expected) < 1e-5


@pytest.mark.parametrize("said", [{"hidden_act": "relu"}, {"hidden_act": ["silu"]}, {"layer_norm_eps": "small"}, None])
def test_a_config_that_is_not_understood_is_refused(said, tmp_path):
    safetensors.numpy.save_file(
        to_transformers(numpy_vit.random_weights("dinov3"), "dinov3"), tmp_path / "m.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(said and {"model_type": "dinov3_vit", **said}))
    with pytest.raises(InputError, match=r"config\.json"):
        load_dinov2(tmp_path / "m.safetensors")


def test_periods_are_the_files_or_computed(tmp_path):
    weights = numpy_vit.random_weights("dinov3")
    torch_file.write_torch_file(tmp_path / "meta.pth", weights)
    config, _ = load_dinov2(tmp_path / "meta.pth")
    assert config.num_heads == 2
    np.testing.assert_array_equal(np.array(config.rotary_periods, np.float32), weights["rope_embed.periods"])
    safetensors.numpy.save_file(to_timm(weights, "dinov3"), tmp_path / "timm.safetensors")
    assert load_dinov2(tmp_path / "timm.safetensors")[0].rotary_periods == ()


def test_inside_larger_files(tmp_path):
    """A training checkpoint with a prefix, chunks of blocks and heads; half precision."""
    weights = numpy_vit.random_weights("dinov2")
    torch_file.write_torch_file(tmp_path / "plain.pth", weights)
    inside = {f"module.backbone.{name.replace('blocks.', 'blocks.0.')}": value for name, value in weights.items()}
    teacher = {**inside, "module.dino_head.mlp.0.weight": np.zeros((3, 3), np.float32)}
    torch_file.write_torch_file(tmp_path / "training.pth", {"teacher": teacher, "epoch": 3})
    config, params = load_dinov2(tmp_path / "plain.pth")
    other, same = load_dinov2(tmp_path / "training.pth")
    assert other == config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    torch_file.write_torch_file(
        tmp_path / "half.pth", {name: value.astype(np.float16) for name, value in weights.items()}
    )
    _, rounded = load_dinov2(tmp_path / "half.pth")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float16)), rounded["blocks"], params["blocks"]
    )


def refusal(path, weights, **options):
    torch_file.write_torch_file(path, weights)
    with pytest.raises(InputError) as error:
        load_dinov2(path, **options)
    text = str(error.value)
    assert text.startswith(str(path))
    return text.removeprefix(str(path))


def test_every_difference_is_listed(tmp_path):
    weights = numpy_vit.random_weights("dinov2")
    del weights["blocks.1.norm1.bias"], weights["norm.weight"]
    weights["blocks.0.attn.proj.weight"] = np.zeros((128, 127), np.float32)
    weights["blocks.1.mlp.fc3.weight"] = np.zeros((4, 4), np.float32)
    assert refusal(tmp_path / "a.pth", weights) == (
        " does not fit a ViT of 2 blocks, 128 wide:\n"
        "  blocks.0.attn.proj.weight: has (128, 127), needs (128, 128)\n"
        "  blocks.1.mlp.fc3.weight: unknown, has (4, 4)\n"
        "  blocks.1.norm1.bias: missing, needs (128,)\n"
        "  norm.weight: missing, needs (128,)"
    )


def test_a_missing_bias_is_zero_only_where_the_published_model_has_none(tmp_path):
    weights = numpy_vit.random_weights("dinov2")
    without = {name: value for name, value in weights.items() if not name.endswith("qkv.bias")}
    assert "blocks.1.attn.qkv.bias: missing, needs (384,)" in refusal(tmp_path / "a.pth", without)
    del weights["pos_embed"]
    assert "pos_embed missing or of another kind" in refusal(tmp_path / "b.pth", weights)


def test_a_block_left_out(tmp_path):
    weights = numpy_vit.random_weights("dinov2", depth=3)
    gap = {name: value for name, value in weights.items() if not name.startswith("blocks.1.")}
    text = refusal(tmp_path / "a.pth", gap)
    assert "blocks.1.attn.qkv.weight: missing" in text
    assert "blocks.2.attn.qkv.weight: unknown" in text
    far = {name.replace("blocks.2.", "blocks.999999999."): value for name, value in weights.items()}
    assert "blocks.2.attn.qkv.weight: missing" in refusal(tmp_path / "b.pth", far)


@pytest.mark.parametrize(
    ("change", "options", "problem"),
    [
        ({}, {"num_heads": 3}, "128 wide, which num_heads = 3 does not divide"),
        ({}, {"num_heads": 0}, "num_heads = 0 does not divide"),
        ({"pos_embed": np.zeros((1, 24, 128), np.float32)}, {}, "24 positions, which is no square grid"),
        ({"pos_embed": np.zeros((1, 26, 120), np.float32)}, {}, "has (1, 26, 120), needs (1, 25, 128)"),
        ({"cls_token": np.zeros((1, 128), np.float32)}, {}, "cls_token: has (1, 128), needs (1, 1, 128)"),
        ({"patch_embed.proj.weight": np.zeros((128, 588), np.float32)}, {}, "patch_embed.proj.weight missing or of"),
        ({"patch_embed.proj.weight": np.zeros((128, 1, 14, 14), np.float32)}, {}, "needs (128, 3, 14, 14)"),
    ],
)
def test_bad_files(tmp_path, change, options, problem):
    assert problem in refusal(tmp_path / "a.pth", {**numpy_vit.random_weights("dinov2"), **change}, **options)


def test_heads_are_asked_for(tmp_path):
    narrow = numpy_vit.random_weights("dinov2", width=48)
    assert refusal(tmp_path / "a.pth", narrow) == " is 48 wide and does not say in how many heads: give num_heads"
    rotary = numpy_vit.random_weights("dinov3")
    text = refusal(tmp_path / "b.pth", rotary, num_heads=4)
    assert re.search(mentions("2 heads", "num_heads", 4), text)


def test_not_a_vit(tmp_path):
    student = {"net": {"embed.norm.weight": np.zeros(5, np.float32)}}
    assert re.search(mentions("ViT", 0, "cls_token"), refusal(tmp_path / "a.pth", student))
    with pytest.raises(InputError, match=r"missing\.pth"):
        load_dinov2(tmp_path / "missing.pth")
