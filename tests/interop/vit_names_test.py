"""The same weights under the names and in the shapes of another project are the same model."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

from scalr_jax.interop.vit import load_dinov2
from scalr_jax.models import vit
from scalr_jax.ops.positions import resample_matrix
from scalr_jax.runtime.errors import InputError
from tests.support import numpy_vit
from tests.support.checks import mentions

IMAGES = np.random.default_rng(0).random((1, 70, 70, 3), np.float32)  # 5 x 5 patches of 14: the table itself
features = jax.jit(vit.features, static_argnums=0, static_argnames="which")


def loaded(path, weights, **options):
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in weights.items()}, path)
    return load_dinov2(path, **options)


def test_radio_has_its_tokens_and_patches_in_other_shapes_and_no_last_norm(tmp_path):
    weights = numpy_vit.random_weights("dinov2_registers")
    weights = {name: x for name, x in weights.items() if not name.startswith(("norm.", "mask"))}
    weights["patch_embed.proj.bias"] *= 0
    weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
    table = weights["pos_embed"][:, 1:]
    plain = {"pos_embed": np.concatenate([0 * table[:, :1], table], axis=1)}
    plain |= {"norm.weight": np.ones(128), "norm.bias": np.zeros(128)}
    expected, _ = numpy_vit.forward(weights | plain, IMAGES, num_heads=2)
    radio = {name: x for name, x in weights.items() if name.startswith("blocks.")}
    radio["patch_generator.embedder.weight"] = weights["patch_embed.proj.weight"].reshape(128, -1)
    radio["patch_generator.pos_embed"] = table
    radio["patch_generator.cls_token.token"] = np.concatenate([weights["cls_token"], weights["register_tokens"]], 1)[0]
    inside = {f"radio_model.model.{name}": x for name, x in radio.items()}
    inside |= {"radio_model.summary_idxs": np.arange(2), "radio_model.adaptors.clip.head.weight": np.ones((2, 2))}
    config, params = loaded(tmp_path / "radio.safetensors", inside)
    assert (config.num_prefix, config.final_norm, config.position_interpolation) == (5, False, "radio")
    assert config.image_mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    imagenet = vit.ViTConfig()
    config = dataclasses.replace(config, image_mean=imagenet.image_mean, image_std=imagenet.image_std)
    for which in vit.FEATURES:
        found = np.asarray(features(config, params, IMAGES, which=which))
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    radio.pop("patch_generator.embedder.weight")
    with pytest.raises(InputError, match=mentions("broken.safetensors", "patch_generator.embedder.weight", "missing")):
        loaded(tmp_path / "broken.safetensors", radio)


def test_siglip_by_timms_names_and_by_transformers(tmp_path):
    weights = numpy_vit.random_weights("dino")
    weights = {name: x for name, x in weights.items() if name not in ("cls_token", "mask_token")}
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    head = {"attn_pool.latent": np.ones((1, 1, 128), np.float32)}
    timm, ours = loaded(tmp_path / "timm.safetensors", weights | head)
    names = {"patch_embed.proj": "embeddings.patch_embedding", "norm.": "post_layernorm.", "blocks": "encoder.layers"}
    names |= {".norm1": ".layer_norm1", ".norm2": ".layer_norm2", ".attn.proj": ".self_attn.out_proj"}
    theirs = {"embeddings.position_embedding.weight": weights.pop("pos_embed")[0]}
    for name, x in weights.items():
        if name.startswith("norm."):
            theirs[name.replace("norm.", "post_layernorm.")] = x
            continue
        for ours_name, other in names.items():
            name = name if ours_name == "norm." else name.replace(ours_name, other)
        for k, part in enumerate(("q_proj", "k_proj", "v_proj") if ".attn.qkv" in name else ()):
            theirs[name.replace("attn.qkv", f"self_attn.{part}")] = np.split(x, 3)[k]
        if ".attn.qkv" not in name:
            theirs[name] = x
    text = {"text_model.embeddings.token_embedding.weight": np.ones((2, 2), np.float32)}
    transformers, same = loaded(
        tmp_path / "siglip.safetensors", text | {f"vision_model.{n}": x for n, x in theirs.items()}
    )
    jax.tree.map(np.testing.assert_array_equal, same, ours)
    assert not timm.cls and timm.image_mean == (0.5,) * 3  # noqa: PT018
    assert (timm.ffn, timm.position_interpolation) == ("mlp", "antialias")
    expected = dataclasses.replace(timm, ffn="mlp_tanh", position_interpolation="size")
    assert transformers == expected
    assert features(timm, ours, IMAGES, which="x").shape == (1, 25, 128)
    flat = {
        **theirs,
        "embeddings.patch_embedding.weight": weights["patch_embed.proj.weight"].transpose(0, 2, 3, 1).reshape(128, -1),
    }
    naflex, same = loaded(tmp_path / "naflex.safetensors", flat)
    jax.tree.map(np.testing.assert_array_equal, same, ours)
    assert naflex == dataclasses.replace(expected, position_interpolation="naflex")


def test_heads_of_another_width_than_64_are_known_or_asked_for(tmp_path):
    weights = {
        name: x for name, x in numpy_vit.random_weights("dino", width=1152, depth=1).items() if name != "cls_token"
    }
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    assert loaded(tmp_path / "so400m.safetensors", weights)[0].num_heads == 16
    weights = {name: x for name, x in numpy_vit.random_weights("dino", width=72).items() if name != "cls_token"}
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    with pytest.raises(InputError, match=mentions("odd.safetensors", 72, "num_heads")):
        loaded(tmp_path / "odd.safetensors", weights)


@pytest.mark.parametrize("interpolation", ["radio", "naflex"])
def test_bilinear_tables_keep_a_plane_and_a_table_of_their_own_size(interpolation):
    for num_out in (3, 5, 8):
        matrix = resample_matrix(5, num_out, interpolation)
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
        middle = slice(1, -1)  # at the borders there is nothing to lean on
        centers = (np.arange(num_out) + 0.5) * 5 / num_out - 0.5
        np.testing.assert_allclose((matrix @ np.arange(5))[middle], centers[middle], atol=0.15 if num_out < 5 else 1e-5)
    np.testing.assert_allclose(resample_matrix(5, 5, interpolation), np.eye(5), atol=1e-7)
    if interpolation == "radio":
        np.testing.assert_array_equal(resample_matrix(5, 3, "radio", longest=8), resample_matrix(5, 8, "radio")[:3])
