"""FLOPs of the student and the teacher, counted by hand.

Counted are matrix products of valid rows, 2 rows inner outer each, forward and (for the student) both products of
the backward pass. Not counted: norms, activations, the convolutions over cells, anything computed twice. So
flops / time / peak is the model's utilisation (Chowdhery et al., "PaLM", appendix B), not the hardware's.

    point        F -> C                       per point
    neighbours   F -> C and C -> C            per point and neighbour; offsets are data, so the first has one gradient
    final        2 C -> C                     per point
    layers       C -> C twice                 per point and layer
    head         C -> out, or C -> hidden -> out

Of a VaViT (`vavit_flops`) the products of its point layers, blocks and merge, and both products of attention for the
pairs of pillars of one scene.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from scalr_jax.data.scenes import Batch
from scalr_jax.models.backbone import CachedFeatures
from scalr_jax.models.student import Student
from scalr_jax.models.vavit import VaViTBackbone
from scalr_jax.models.vit import ViTConfig, num_tokens
from scalr_jax.models.waffleiron import WaffleIronBackbone


class Product(NamedTuple):
    """Rows [n, inner] @ [inner, outer], some number of times a point in each direction."""

    inner: int
    outer: int
    forward: int
    backward: int
    again: int = 0  # forward products that the backward pass computes again


class Sizes(NamedTuple):
    """Sizes that the student's FLOPs depend on."""

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
    """FLOPs of one point in a training step."""
    return embedding_products(sizes) + layer_products(sizes) * sizes.depth + head_products(sizes)


def flops(products: list[Product], num_points: int, *, backward: bool, again: bool = False) -> int:
    """FLOPs of `num_points` rows; `again` adds what is computed twice."""
    times = [p.forward + backward * p.backward + again * p.again for p in products]
    return num_points * sum(2 * p.inner * p.outer * n for p, n in zip(products, times, strict=True))


class Matrix(NamedTuple):
    """A product [rows, inner] @ [inner, outer] of a VaViT's pass, so many times; its gradient has two more."""

    rows: int
    inner: int
    outer: int
    times: int = 1


def vavit_matrices(backbone: VaViTBackbone, num_points: int, num_pillars: int, num_features: int) -> list[Matrix]:
    """All but those of attention and of the head."""
    size, found, inner = backbone, [], num_features
    for n in range(size.point_depth):
        outer = size.width if n == size.point_depth - 1 else size.point_hidden
        found += [Matrix(num_points, inner, size.point_hidden, 2)]
        found += [Matrix(num_points, size.point_hidden, size.point_hidden, size.needs.num_neighbors)]
        found += [Matrix(num_points, 2 * size.point_hidden, outer)]
        inner = outer
    found += [Matrix(num_pillars, size.width, size.width, 4 * size.depth)]
    found += [Matrix(num_pillars, size.width, size.hidden, 2 * size.depth)]  # the second has inner and outer exchanged
    found += [Matrix(rows, size.width, size.merge_hidden) for rows in (num_points, num_pillars)]
    found += [Matrix(num_points, 2 * size.merge_hidden, outer) for outer in (2 * size.merge_hidden, size.channels)]
    return found


def vavit_flops(
    backbone: VaViTBackbone,
    head: list[Product],
    num_points: int,
    counts: Sequence[int],
    num_features: int,
    *,
    backward: bool,
) -> int:
    """FLOPs of a pass over `num_points` points and scenes of `counts` pillars. head: `head_products`."""
    matrices = vavit_matrices(backbone, num_points, sum(counts), num_features)
    linear = sum(2 * m.rows * m.inner * m.outer * m.times for m in matrices)
    attention = backbone.depth * 4 * backbone.width * sum(count**2 for count in counts)
    return (3 if backward else 1) * (linear + attention) + flops(head, num_points, backward=backward)


def sizes_of(student: Student, batch: Batch) -> Sizes:
    """The sizes of a student on batches like this one."""
    neighbors, features, width = batch.neighbors.shape[-1], batch.feats.shape[-1], student.backbone.channels
    hidden = width if student.head == "mlp" else student.head_hidden
    return Sizes(width, student.backbone.depth, student.out_features, hidden, neighbors, features)


def step_flops(student: Student, batch: Batch) -> int | None:
    """FLOPs of the student in a training step on the valid points of a batch; a frozen backbone has no backward pass.
    None for a MinkUNet, whose products are not counted."""
    if not isinstance(student.backbone, WaffleIronBackbone | VaViTBackbone | CachedFeatures):
        return None
    sizes, num_points = sizes_of(student, batch), int(batch.scene_points.sum())
    head, backward = flops(head_products(sizes), num_points, backward=True), not student.frozen_backbone
    match student.backbone:
        case WaffleIronBackbone():
            products = embedding_products(sizes) + layer_products(sizes) * sizes.depth
            return head + flops(products, num_points, backward=backward)
        case VaViTBackbone() as backbone if batch.pillars is not None:
            counts = batch.pillars.counts.ravel().tolist()
            return head + vavit_flops(backbone, [], num_points, counts, sizes.num_features, backward=backward)
        case CachedFeatures():
            return head
    return None


def teacher_flops(config: ViTConfig, num_images: int, image_size: tuple[int, int]) -> int:
    """Forward pass of a ViT: patches, and a block's four products and two of attention."""
    tokens = num_tokens(config, image_size)
    patches = tokens - config.num_prefix
    c = config.width
    mlp = (2 if config.ffn == "mlp" else 3) * c * config.hidden
    block = 2 * tokens * (4 * c * c + mlp) + 4 * tokens * tokens * c
    return num_images * (2 * patches * config.patch_size**2 * 3 * c + config.depth * block)
