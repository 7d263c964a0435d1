"""Our ViT against transformers' and timm's own, at random weights, from the files that these write."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from scalr_jax.interop.vit import load_dinov2
from scalr_jax.models import vit

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the parity extra: pip install 'scalr_jax[parity]'")

SIZE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
IMAGES = np.random.default_rng(0).random((2, 56, 84, 3), np.float32)  # rows, columns: 4 x 6 patches of 14
features = jax.jit(vit.features, static_argnums=0, static_argnames="which")


def randomised(model):
    """All weights at random, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_file(state, path):
    safetensors.numpy.save_file({name: np.ascontiguousarray(x.numpy()) for name, x in state.items()}, path)


def check(path, expected, which, *, image=None, num_heads=None):
    config, params = load_dinov2(path, num_heads=num_heads)
    if image is not None:
        assert (config.image_mean, config.image_std) == image
    tokens = np.asarray(features(config, params, IMAGES, which=which))[:, config.num_prefix :]
    assert np.abs(tokens - expected).max() < 1e-5 * np.abs(expected).max()
    return config


def pixels(mean, std):
    return torch.from_numpy((IMAGES - np.float32(mean)) / np.float32(std)).permute(0, 3, 1, 2)


def test_siglip_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(**SIZE, intermediate_size=96, image_size=70, patch_size=14)
    model = randomised(transformers.SiglipVisionModel(config))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(pixel_values=pixels(0.5, 0.5), interpolate_pos_encoding=True).last_hidden_state.numpy()
    found = check(tmp_path / "model.safetensors", expected, "x", image=((0.5,) * 3, (0.5,) * 3))
    assert (found.cls, found.ffn, found.num_heads, found.position_interpolation) == (False, "mlp_tanh", 3, "size")


def test_siglip2_of_any_size(tmp_path):
    """NaFlex takes patches, padded to a common number, and their rows and columns."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Siglip2VisionConfig(**SIZE, intermediate_size=96, num_patches=25, patch_size=14)
    model = randomised(transformers.Siglip2VisionModel(config))
    model.save_pretrained(tmp_path)
    patches = pixels(0.5, 0.5).permute(0, 2, 3, 1).reshape(2, 4, 14, 6, 14, 3).permute(0, 1, 3, 2, 4, 5)
    patches, mask = patches.reshape(2, 24, -1), torch.ones(2, 24, dtype=torch.int32)
    with torch.no_grad():
        expected = model(patches, mask, torch.tensor([[4, 6]] * 2)).last_hidden_state.numpy()
    assert check(tmp_path / "model.safetensors", expected, "x").position_interpolation == "naflex"


@pytest.mark.parametrize("gated", [False, True])
def test_radio_of_transformers_and_in_its_own_names(tmp_path, gated):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "RadioModel"):
        pytest.skip("transformers has no C-RADIO")
    shape = {"patch_size": 14, "max_img_size": 112, "num_cls_tokens": 2, "num_registers": 3}
    config = transformers.RadioConfig(**SIZE, **shape, mlp_ratio=2.0, use_swiglu_ffn=gated)
    model = randomised(transformers.RadioModel(config))
    with torch.no_grad():
        expected = model(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)).features.numpy()
    model.save_pretrained(tmp_path)
    found = check(tmp_path / "model.safetensors", expected, "x")
    assert (found.num_prefix, found.final_norm, found.position_interpolation) == (5, False, "radio")
    save_file(model.state_dict(), tmp_path / "inside.safetensors")  # the names that transformers has in memory
    check(tmp_path / "inside.safetensors", expected, "x_pre_norm")


def test_siglip_of_timm(tmp_path):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    shape = {"img_size": 70, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = randomised(timm.create_model("vit_base_patch16_siglip_224", dynamic_img_size=True, **shape))
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    with torch.no_grad():
        expected = model.forward_features(pixels(0.5, 0.5)).numpy()
    found = check(tmp_path / "timm.safetensors", expected, "x", num_heads=3)
    assert (found.cls, found.ffn, found.position_interpolation) == (False, "mlp", "antialias")
