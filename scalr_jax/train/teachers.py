"""The targets of a distillation: a teacher's tokens, live or cached, at the points' pixels, normalised."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scalr_jax.data.packing import Capacities
from scalr_jax.data.scenes import Batch, SceneView
from scalr_jax.models import vit
from scalr_jax.ops.bilinear import sample_tokens
from scalr_jax.ops.tokens import decode
from scalr_jax.runtime import sharding
from scalr_jax.runtime.errors import InputError
from scalr_jax.train.normalization import (
    FILE,
    Moments,
    Normalization,
    batch_moments,
    read_normalizations,
    shapes,
    write_normalizations,
)

if TYPE_CHECKING:  # it needs Grain, which a machine without data has not
    from scalr_jax.data.pipeline import Pipeline

Array = jax.Array

STATISTICS_SCENES = 128  # of which a normalisation's statistics are taken: 1e5 to 1e6 points


class Source(NamedTuple):
    """Static settings of one teacher."""

    width: int  # C_teacher
    image_size: tuple[int, int]  # rows, columns: what the points' pixels count in
    vit: vit.ViTConfig | None = None  # None: the batch brings its tokens
    feature: str = "x_pre_norm"
    normalize: str = "none"  # see `normalization`
    weight: float = 1.0  # of its loss
    name: str = ""  # in logs
    cache: int = 0  # which of `Batch.tokens` are its own, without `vit`


class Teacher(NamedTuple):
    """The arrays of one teacher, a pytree: an argument of the step."""

    params: dict | None = None  # of the ViT
    normalization: Normalization | None = None


def token_grid(vit_config: vit.ViTConfig, params: dict, images: Array, *, which: str) -> Array:
    """The patch tokens of uint8 or float32 images [B, h, w, 3] in 0..255, where they are: float32 [B, th, tw, C]."""
    tokens = vit.features(vit_config, params, images.astype(jnp.float32) / 255.0, which=which)
    grid = vit.patch_grid(vit_config, (images.shape[1], images.shape[2]))
    return vit.patch_tokens(tokens, vit_config).reshape(len(images), *grid, -1)


def tokens_of_images(source: Source, teacher: Teacher, images: Array) -> Array:
    """`token_grid` of a live teacher, normalised."""
    assert source.vit is not None and teacher.params is not None  # noqa: PT018
    grid = token_grid(source.vit, teacher.params, images, which=source.feature)
    return grid if teacher.normalization is None else teacher.normalization(grid)


def targets(sources: Sequence[Source], teachers: Sequence[Teacher], batch: Batch[Array]) -> Array:
    """Targets of the student: the teachers' `features`, one after the other, [D, P, sum of their C]."""
    found = [features(source, teacher, batch) for source, teacher in zip(sources, teachers, strict=True)]
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)


def features(source: Source, teacher: Teacher, batch: Batch[Array]) -> Array:
    """The teacher's feature of each point's pixel, of several views that see it their mean: float32 [D, P, C_teacher],
    zero for padded points.

    Samples the token grid; the upsampled map of the published code is never made. A normalisation is affine, and a
    sample a mean of four tokens, so that it is the tokens that are normalised, of which there are fewer.
    """
    if source.vit is None:
        tokens = batch.tokens[source.cache]
        grid = decode(tokens.values, tokens.scale)
        grid = grid if teacher.normalization is None else teacher.normalization(grid)
    else:
        assert batch.images is not None
        grid = tokens_of_images(source, teacher, batch.images.reshape(-1, *batch.images.shape[-3:]))
        grid = grid.reshape(*batch.images.shape[:-3], *grid.shape[1:])
    sample = jax.vmap(lambda g, s, p: sample_tokens(g, s, p, source.image_size))
    if batch.views is None:
        return jax.lax.stop_gradient(sample(grid, batch.scene, batch.pixels))
    grid = grid.reshape(len(grid), -1, *grid.shape[-3:])  # [D, S * V, th, tw, C]
    assert batch.pixels is not None
    total = sum(sample(grid, batch.views[..., r], batch.pixels[..., r, :]) for r in range(batch.views.shape[-1]))
    number = jnp.sum(batch.views < grid.shape[1], axis=-1, keepdims=True)  # pairs of a point
    return jax.lax.stop_gradient(total / jnp.maximum(number, 1))


def unmeasured(source: Source, params: dict | None = None) -> Teacher:
    """A teacher with zeros in place of its statistics."""
    return Teacher(params, shapes(source.normalize, source.width))


def with_statistics(
    sources: Sequence[Source],
    teachers: Sequence[Teacher],
    workdir: Path,
    first: Iterator[Batch[Array]],
    mesh: Mesh,
    *,
    resumed: bool,
) -> tuple[Teacher, ...]:
    """The teachers on their devices, with their normalisations: measured on the `first` batches and kept in `workdir`,
    or, of a resumed run, read from there. Raises `InputError` for features that are not finite, and as
    `read_normalizations`."""
    teachers = jax.device_put(tuple(teachers), sharding.parameter_shardings(tuple(teachers), mesh))
    found = like = [teacher.normalization for teacher in teachers]
    if any(like) and resumed:
        found = read_normalizations(workdir / FILE, like)
    elif any(like):
        found = _measured(sources, teachers, first, mesh)
        if jax.process_index() == 0:
            write_normalizations(workdir / FILE, found)
    found = jax.device_put(found, sharding.replicated(mesh))
    return tuple(teacher._replace(normalization=new) for teacher, new in zip(teachers, found, strict=True))


def _measured(
    sources: Sequence[Source], teachers: Sequence[Teacher], batches: Iterator[Batch[Array]], mesh: Mesh
) -> list[Normalization | None]:
    """The normalisations of the sources that have one."""
    kinds = {k: source.normalize for k, source in enumerate(sources) if source.normalize != "none"}
    moments = {k: Moments(kind == "phi_s") for k, kind in kinds.items()}

    def measure(teachers: Sequence[Teacher], batch: Batch[Array]) -> list[tuple[Array, Array, Array]]:
        mask = batch.scene < batch.scene_points.shape[1]
        raw = {k: features(sources[k], Teacher(teachers[k].params), batch) for k in moments}
        return [batch_moments(raw[k], mask, full=each.full) for k, each in moments.items()]

    program = jax.jit(measure, out_shardings=sharding.replicated(mesh))
    for batch in batches:
        for each, parts in zip(moments.values(), jax.device_get(program(teachers, batch)), strict=True):
            each.add(*parts)
    for k, each in moments.items():
        if not np.isfinite(each.products).all():
            raise InputError(
                f"the features of teacher {k + 1} are not finite; its file is damaged, give another teacher.checkpoint "
                "or teacher.cache"
            )
    return [moments[k].normalization(kinds[k]) if k in kinds else None for k in range(len(sources))]


def first_batches(
    pipeline: Pipeline, capacities: Capacities, template: SceneView, expected: float, mesh: Mesh
) -> Iterator[Batch[Array]]:
    """The first batches of training, of at least `STATISTICS_SCENES` scenes where a step has `expected`."""
    number = max(1, math.ceil(STATISTICS_SCENES / expected))  # the same on every process
    if jax.process_index() == 0:
        print(f"statistics of the teacher's features, over {number} steps", flush=True)
    steps = pipeline.steps(capacities, template)
    for _ in range(number):
        yield sharding.put_batch(next(steps).batch, mesh)
