"""The teacher's feature of a pixel, without upsampling the token map.

    row' = row (th - 1)/(h - 1),  column' = column (tw - 1)/(w - 1)
    feature = bilinear mean of the four tokens around (row', column')

The published code upsamples the map to every pixel with aligned corners and reads a few: the same numbers, but the map
of one 224 x 448 image takes 411 MB with ViT-L in float32. Here four tokens are read a pair.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def _corners(pixel: Array, num_tokens: int, num_pixels: int) -> tuple[Array, Array, Array]:
    """One axis: the token before and after each pixel [P] int32, and the weight of the one after [P] float32.

    The weight comes from integers, so it is exact to rounding for images of any size a float32 can count.
    """
    if num_pixels == 1:
        zero = jnp.zeros_like(pixel)
        return zero, zero, zero.astype(jnp.float32)
    position = pixel * (num_tokens - 1)  # in units of 1 / (num_pixels - 1) tokens
    before = jnp.clip(position // (num_pixels - 1), 0, num_tokens - 1)
    after = jnp.minimum(before + 1, num_tokens - 1)
    return before, after, (position - before * (num_pixels - 1)).astype(jnp.float32) / (num_pixels - 1)


def sample_tokens(
    tokens: Array | np.ndarray, image_index: Array | np.ndarray, pixels: Array | np.ndarray, image_size: tuple[int, int]
) -> Array:
    """Bilinear samples of the token grid at pixels, with aligned corners: [P, C] in the tokens' dtype.

    Equals upsampling [B, th, tw, C] to `image_size` (`align_corners=True` in PyTorch) and reading the pixels.

    Args:
      tokens: [B, th, tw, C], the patch tokens of each image.
      image_index: [P] int, the image of each pair; pairs with B or more (padding) give zeros.
      pixels: [P, 2] int, row and column in an image of `image_size`; any value where padded.
      image_size: (h, w) in pixels.
    """
    batch, rows, columns, channels = tokens.shape
    valid = jnp.asarray(image_index) < batch
    pixels = jnp.where(valid[:, None], pixels, 0).astype(jnp.int32)
    top, bottom, down = _corners(pixels[:, 0], rows, image_size[0])
    left, right, along = _corners(pixels[:, 1], columns, image_size[1])
    table = jnp.asarray(tokens).reshape(batch * rows * columns, channels)
    image = jnp.where(valid, image_index, 0)
    out = jnp.zeros((len(pixels), channels), jnp.float32)
    for row, row_weight in ((top, 1 - down), (bottom, down)):
        for column, column_weight in ((left, 1 - along), (right, along)):
            out += (row_weight * column_weight)[:, None] * table[(image * rows + row) * columns + column]
    return jnp.where(valid[:, None], out, 0.0).astype(tokens.dtype)
