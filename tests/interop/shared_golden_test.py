"""The complete golden archives beside the project, where they are: what is too large for tests/golden."""

import jax
import numpy as np
import pytest

from scalr_jax.interop.vit import load_dinov2
from scalr_jax.models import vit
from scalr_jax.ops.bilinear import sample_tokens
from tests.support.paths import SHARED

GOLDEN = SHARED / "golden"
pytestmark = [
    pytest.mark.samples,
    pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden archives are not here"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("highest_precision")
@pytest.mark.parametrize("name", ["teacher_vit", "teacher_vit_swiglu"])
def test_teachers(name):
    """Both features from the published file, and the upsampled map read at every fifth pixel, to 1e-5 of scale."""
    config, params = load_dinov2(GOLDEN / f"{name}.pth", num_heads=3)
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        images = arrays["image"].transpose(0, 2, 3, 1)
        tokens = {}
        for which in vit.FEATURES:
            tokens[which] = jax.jit(vit.features, static_argnums=0, static_argnames="which")(
                config, params, images, which=which
            )
            expected = arrays[which]
            assert np.abs(tokens[which] - expected).max() < 1e-5 * np.abs(expected).max()
        expected = arrays["upsampled"].transpose(0, 2, 3, 1)
    height, width = images.shape[1:3]
    rows, columns = vit.patch_grid(config, (height, width))
    grid = vit.patch_tokens(tokens["x_pre_norm"], config).reshape(len(images), rows, columns, -1)
    pixels = np.stack(np.meshgrid(np.arange(0, height, 5), np.arange(0, width, 5), indexing="ij"), -1).reshape(-1, 2)
    for i in range(len(images)):
        sampled = sample_tokens(grid, np.full(len(pixels), i), pixels, (height, width))
        assert np.abs(sampled - expected[i].reshape(len(pixels), -1)).max() < 1e-5 * np.abs(expected).max()
