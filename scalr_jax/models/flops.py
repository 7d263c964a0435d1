"""FLOPs of the student and the teacher, counted by hand.

Counted are matrix products of valid rows, 2 rows inner outer each, forward and (for the student) both products of
the backward pass. Not counted: norms, activations, the convolutions over cells, anything computed twice. So
flops / time / peak is the model's utilisation (Chowdhery et al., "PaLM", appendix B), not the hardware's.

    point        F -> C                       per point
    neighbours   F -> C and C -> C            per point and neighbour; offsets are data, so the first has one gradient
    final        2 C -> C                     per point
    layers       C -> C twice                 per point and layer
    head         C -> out, or C -> hidden -> out
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from scalr_jax.models.vit import ViTConfig, num_tokens


class Product(NamedTuple):
    """Rows [n, inner] @ [inner, outer], some number of times a point in each direction."""

    inner: int
    outer: int
    forward: int
    backward: int
    again: int = 0  # forward products that the backward pass computes again


class Sizes(NamedTuple):
    """What the student's FLOPs depend on."""

    channels: int
    depth: int
    out_features: int
    head_hidden: int = 0
    num_neighbors: int = 16
    num_features: int = 5


def embedding_products(sizes: Sizes) -> list[Product]:
    c, k, f = sizes.channels, sizes.num_neighbors, sizes.num_features
    return [Product(f, c, 1, 2), Product(f, c, k, k, k), Product(c, c, k, 2 * k), Product(2 * c, c, 1, 2)]


def layer_products(sizes: Sizes) -> list[Product]:
    return [Product(sizes.channels, sizes.channels, 2, 4)]


def head_products(sizes: Sizes) -> list[Product]:
    widths = [sizes.channels, *([sizes.head_hidden] if sizes.head_hidden else []), sizes.out_features]
    return [Product(a, b, 1, 2) for a, b in itertools.pairwise(widths)]


def student_products(sizes: Sizes) -> list[Product]:
    """Of one point in a training step."""
    return embedding_products(sizes) + layer_products(sizes) * sizes.depth + head_products(sizes)


def flops(products: list[Product], num_points: int, *, backward: bool, again: bool = False) -> int:
    """Of `num_points` rows; `again` adds what is computed twice."""
    times = [p.forward + backward * p.backward + again * p.again for p in products]
    return num_points * sum(2 * p.inner * p.outer * n for p, n in zip(products, times, strict=True))


def teacher_flops(config: ViTConfig, num_images: int, image_size: tuple[int, int]) -> int:
    """Forward pass of a ViT: patches, and a block's four products and two of attention."""
    tokens = num_tokens(config, image_size)
    patches = tokens - 1 - config.num_registers
    c = config.width
    mlp = (2 if config.ffn == "mlp" else 3) * c * config.hidden
    block = 2 * tokens * (4 * c * c + mlp) + 4 * tokens * tokens * c
    return num_images * (2 * patches * config.patch_size**2 * 3 * c + config.depth * block)
