"""Multi-head attention within images or within scenes of any size, in the form that suits where a program runs.

    y_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j,    j over the tokens of i's image or scene

`dense` is for images of one size, `packed` for scenes one after another in a table of static size, with padding behind
them. `reference` is the plain form of `packed`. On a GPU both are cuDNN's fused kernels, where these take the dtype;
elsewhere `packed` visits tiles of queries and keys of the same scenes alone (Dao et al., "FlashAttention": logits are
never kept, and are computed again for the gradient).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from scalr_jax.runtime.sharding import by_shard, device_kind_of, on_gpu, platform_of

Array = jax.Array

CPU_TILE, TILE = 128, 512  # the most queries, and keys, of a tile: on a CPU for its cache, else for fewer bytes
NONE = -1e30  # a logit that counts for nothing
Sums = tuple[Array, Array, Array]
HALF = (jnp.bfloat16, jnp.float16)  # what cuDNN takes
RAGGED = r"H100|H200|GH200|B[123]00|RTX PRO"  # devices whose cuDNN takes scenes one after another


def dense(q: Array, k: Array, v: Array) -> Array:
    """Attention within each of B images: [B, n, heads, d] each, the result too, in the dtype of `q`."""
    if _fused(q, q):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return jax.nn.dot_product_attention(q, k, v)


def _fused(q: Array, of_batch: Array) -> bool:
    """Whether cuDNN's kernels take `q` where a program that reads `of_batch` will run."""
    return on_gpu(of_batch) and q.dtype in HALF


def packed(q: Array, k: Array, v: Array, counts: Array) -> Array:
    """Attention within each scene of each shard. Rows of padding get zero.

    q, k, v [D, T, heads, d]: the tokens of a shard's first scene, then those of its second, ..., then padding.
    counts [D, S] int32: tokens of each scene. Returns [D, T, heads, d] in the dtype of `q`.
    """
    if _fused(q, counts) and re.search(RAGGED, device_kind_of(counts)):
        return by_shard(_cudnn, (q, k, v, counts))
    if not isinstance(q.shape[1], int):  # a symbol, in an exported program: one head's logits at a time
        scene = scene_of(counts, q.shape[1])
        heads = tuple(jnp.moveaxis(x, 2, 0)[:, :, :, None] for x in (q, k, v))
        return jnp.moveaxis(jax.lax.map(lambda head: reference(*head, scene=scene)[:, :, 0], heads), 0, 2)
    most = CPU_TILE if platform_of(counts) == "cpu" else TILE
    return by_shard(functools.partial(_tiled, most), (q, k, v, counts))


def scene_of(counts: Array, num_rows: int) -> Array:
    """The scene of each row, S for padding: [D, S] tokens of each scene -> [D, T] int32."""
    ends, rows = jnp.cumsum(counts, axis=-1), jnp.arange(num_rows)
    return (ends[:, None] <= rows[:, None]).sum(-1, dtype=jnp.int32)


def reference(q: Array, k: Array, v: Array, scene: Array, copies: Array | None = None) -> Array:
    """`packed` with all T x T logits: a token sees those of its own scene, [D, T], also among padding.

    copies [D, T]: how often each token counts as a key; 0 leaves it out.
    """
    logits = jnp.einsum("zqhd,zkhd->zhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    seen = scene[:, None, :, None] == scene[:, None, None, :]
    if copies is not None:
        seen &= copies[:, None, None, :] > 0
        logits += jnp.log(jnp.maximum(copies, 1.0))[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(seen, logits, NONE), axis=-1)
    return jnp.einsum("zhqk,zkhd->zqhd", weights.astype(v.dtype), v)


def _cudnn(q: Array, k: Array, v: Array, counts: Array) -> Array:
    """cuDNN's kernel for sequences one after another in one table (Hopper and later), of one shard.

    No public function of JAX has this layout. Compiled for an H100, and never run on one (2026-11-29).
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    ends = jnp.cumsum(counts)
    empty = counts == 0  # which cuDNN takes for the end: no scene stands behind one
    lengths = jnp.where(empty, -1, counts)[None]
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.where(empty, -1, ends)])[None]
    rows = (lengths, lengths, offsets, offsets)
    padding = {"scale": q.shape[-1] ** -0.5, "mask_type": MaskType.PADDING}
    y = jnp.asarray(dot_product_attention(q[None], k[None], v[None], None, None, *rows, **padding))
    return jnp.where((jnp.arange(len(q)) < ends[-1])[:, None, None], y[0], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(most: int, q: Array, k: Array, v: Array, counts: Array) -> Array:
    """`packed` of one shard, a tile of at most `most` queries and keys at a time: [T, heads, d] each."""
    out: Array = _forward(most, q, k, v, counts)[0]
    return out


class _Tiles(NamedTuple):
    """For each block of queries its first row, and the rows of the keys that it may see [b]; the scene of each row."""

    first: Array
    begin: Array
    end: Array
    scene: Array  # [T]
    num_scenes: int
    most: int  # rows of a tile

    @property
    def queries(self) -> int:
        return len(self.scene) // len(self.first)

    def visit(self, begin: Array, end: Array, function: Callable[..., Sums], start: Sums) -> Sums:
        """`function(sums, first, scene)` of one tile of keys after another: where it begins, and of which scenes its
        rows are (-1: of none that counts)."""
        size = min(self.most, len(self.scene))

        def step(n: Array, sums: Sums) -> Sums:
            wanted = begin + n * size
            first = jnp.minimum(wanted, len(self.scene) - size)
            scene = jax.lax.dynamic_slice_in_dim(self.scene, first, size)
            # A tile that would reach beyond the table begins earlier, and leaves out what it has seen.
            return function(sums, first, jnp.where(jnp.arange(size) < wanted - first, -1, scene))

        mean = -(-len(self.scene) // self.num_scenes) + self.queries  # a block may see two scenes
        with jax.named_scope(f"about_{-(-min(mean, len(self.scene)) // size)}_trips"):  # for `compile.hlo`
            return jax.lax.fori_loop(0, -((begin - end) // size), step, start)


def _tiles(most: int, num_rows: int, counts: Array) -> _Tiles:
    size = next((size for size in (most, most // 2, most // 4) if num_rows % size == 0), num_rows)
    ends = jnp.cumsum(counts)
    scene, first = scene_of(counts[None], num_rows)[0], jnp.arange(0, num_rows, size)
    last = jnp.clip(first + size, 1, jnp.maximum(ends[-1], 1)) - 1  # that is no padding
    used, of = first < ends[-1], lambda rows: jnp.minimum(scene[rows], len(counts) - 1)
    begin, end = (ends - counts)[of(first)], ends[of(last)]
    return _Tiles(first, jnp.where(used, begin, 0), jnp.where(used, end, 0), scene, len(counts), most)


def _rows(x: Array, first: Array, size: int) -> Array:
    """[heads, T, ...] -> [heads, size, ...]"""
    return jax.lax.dynamic_slice_in_dim(x, first, size, 1)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _forward(most: int, q: Array, k: Array, v: Array, counts: Array) -> tuple[Array, tuple]:
    """The result, and what the gradient needs: inputs, result and the logarithm of each query's sum."""
    tiles, heads, width = _tiles(most, len(q), counts), *q.shape[1:]
    q, k, v = (x.transpose(1, 0, 2) for x in (q, k, v))

    def block(of_block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        first, begin, end = of_block
        queries = _rows(q, first, tiles.queries)
        scene = jax.lax.dynamic_slice_in_dim(tiles.scene, first, tiles.queries)

        def add(sums: Sums, at: Array, of_keys: Array) -> Sums:
            largest, total, y = sums
            logits = _product("hqd,hkd->hqk", queries, _rows(k, at, len(of_keys))) * width**-0.5
            logits = jnp.where(scene[:, None] == of_keys, logits, NONE)
            new = jnp.maximum(largest, logits.max(-1))
            shrink, weights = jnp.exp(largest - new), jnp.exp(logits - new[..., None])
            y = y * shrink[..., None] + _product("hqk,hkd->hqd", weights.astype(v.dtype), _rows(v, at, len(of_keys)))
            return new, total * shrink + weights.sum(-1), y

        shape = (heads, tiles.queries)
        start = jnp.full(shape, NONE), jnp.zeros(shape), jnp.zeros((*shape, width))
        largest, total, y = tiles.visit(begin, end, add, start)
        total = jnp.maximum(total, 1e-30)  # a block of padding has seen no key
        y = jnp.where((scene < tiles.num_scenes)[:, None], y / total[..., None], 0.0)
        return y.astype(v.dtype), largest + jnp.log(total)

    y, log_sum = jax.lax.map(block, (tiles.first, tiles.begin, tiles.end))  # [b, heads, rows, d], [b, heads, rows]
    return y.transpose(0, 2, 1, 3).reshape(-1, heads, width), (q, k, v, counts, y, log_sum)


def _backward(most: int, saved: tuple, gradient: Array) -> tuple:
    q, k, v, counts, y, log_sum = saved
    heads, num_rows, width = q.shape
    tiles = _tiles(most, num_rows, counts)
    gradient = gradient.reshape(-1, tiles.queries, heads, width).transpose(0, 2, 1, 3)  # [b, heads, rows, d]
    slope = (gradient.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1)  # [b, heads, rows]

    def block(carry: tuple[Array, Array], of_block: tuple) -> tuple[tuple[Array, Array], Array]:
        first, begin, end, g, log_sum, slope = of_block
        queries = _rows(q, first, tiles.queries)
        scene = jax.lax.dynamic_slice_in_dim(tiles.scene, first, tiles.queries)

        def add(sums: Sums, at: Array, of_keys: Array) -> Sums:
            of_k, of_v, of_q = sums
            keys, values = _rows(k, at, len(of_keys)), _rows(v, at, len(of_keys))
            logits = _product("hqd,hkd->hqk", queries, keys) * width**-0.5
            seen = (scene[:, None] == of_keys) & (scene < tiles.num_scenes)[:, None]
            weights = jnp.where(seen, jnp.exp(logits - log_sum[..., None]), 0.0)
            inner = weights * (_product("hqd,hkd->hqk", g, values) - slope[..., None]) * width**-0.5
            inner, weights = inner.astype(q.dtype), weights.astype(g.dtype)
            of_k = _add_rows(of_k, at, _product("hqk,hqd->hkd", inner, queries))
            of_v = _add_rows(of_v, at, _product("hqk,hqd->hkd", weights, g))
            return of_k, of_v, of_q + _product("hqk,hkd->hqd", inner, keys)

        of_k, of_v, of_q = tiles.visit(begin, end, add, (*carry, jnp.zeros(queries.shape, jnp.float32)))
        return (of_k, of_v), of_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    inputs = (tiles.first, tiles.begin, tiles.end, gradient, log_sum, slope)
    (of_k, of_v), of_q = jax.lax.scan(block, (zeros, zeros), inputs)
    of_q = of_q.transpose(0, 2, 1, 3).reshape(num_rows, heads, width)
    return of_q, of_k.transpose(1, 0, 2).astype(k.dtype), of_v.transpose(1, 0, 2).astype(v.dtype), None


def _add_rows(x: Array, first: Array, rows: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _rows(x, first, rows.shape[1]) + rows, first, 1)


_tiled.defvjp(_forward, _backward)
