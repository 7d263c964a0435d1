"""AdamW, LAMB for large batches, layer-wise learning-rate decay, and the two published learning-rate schedules.

Schedules are functions of progress, counted in updates of the published batch: scenes seen / `optimizer.batch_size`.
So a run whose packs hold a varying number of scenes follows the same curve in scenes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scalr_jax.config import OptimizerSettings
from scalr_jax.models.backbone import Backbone

Array = jax.Array


def warmup_cosine(t: Array, *, warmup: float, total: float, final: float) -> Array:
    """Factor of the learning rate: linear to 1 at `warmup`, cosine to `final` at `total` (ScaLR), constant after."""
    fraction = jnp.clip((t - warmup) / max(total - warmup, 1), 0.0, 1.0)
    cosine = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * fraction))
    return jnp.where(t < warmup, t / max(warmup, 1), cosine)


def warmup_rsqrt_cooldown(t: Array, *, warmup: float, cooldown: float, timescale: float, total: float) -> Array:
    """Linear warm-up, 1/sqrt(1 + (t - warmup)/timescale), linear cool-down after step `cooldown` (ScaLR+).

    As released: step `cooldown` itself is still the inverse root's, and the cool-down starts from
    1/sqrt(1 + cooldown/timescale), counted from step 0.
    """
    steps = total - cooldown
    inverse_root = jax.lax.rsqrt(1 + jnp.maximum(t - warmup, 0.0) / timescale)
    last = (1 + cooldown / timescale) ** -0.5
    linear = last * jnp.maximum(steps - (t - cooldown) - 1, 0.0) / max(steps - 1, 1)
    return jnp.where(t < warmup, t / max(warmup, 1), jnp.where(t <= cooldown, inverse_root, linear))


def make_schedule(settings: OptimizerSettings, total: float) -> Callable[[Array], Array]:
    """progress (updates of the published batch, float32) -> learning rate, for `total` updates."""
    peak, warmup = settings.learning_rate, settings.warmup_share * total
    if settings.schedule == "cosine":
        final = settings.final_learning_rate / peak
        return lambda t: peak * warmup_cosine(t, warmup=warmup, total=total, final=final)
    if settings.schedule == "rsqrt":
        cooldown, timescale = settings.cooldown_start_share * total, settings.timescale_share * total
        limits = {"warmup": warmup, "cooldown": cooldown, "timescale": timescale, "total": total}
        return lambda t: peak * warmup_rsqrt_cooldown(t, **limits)
    return lambda t: peak * jnp.ones_like(t)


def make_optimizer(settings: OptimizerSettings, backbone: Backbone) -> optax.GradientTransformation:
    """AdamW or LAMB without the learning rate, by which the step multiplies; decay on all parameters, as published.

    `layer_decay` counts the layers of `backbone`.
    """
    adam = optax.scale_by_adam(b1=settings.beta1, b2=settings.beta2, eps=1e-8)
    parts = [adam, optax.add_decayed_weights(settings.weight_decay)]
    if settings.name == "lamb":
        parts.append(scale_by_weights())
    if settings.layer_decay != 1.0:
        parts.append(scale_by_layer(backbone, settings.layer_decay))
    return optax.chain(*parts)


def scale_by_weights() -> optax.GradientTransformation:
    """LAMB (You et al., 2020, algorithm 2): the update of each matrix gets the norm of the matrix itself.

    Of each layer's matrix, where scanned layers are stacked. Vectors (biases, scales) keep Adam's update, and so does a
    matrix while it or its update is zero.
    """

    def scale(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        def one(path: tuple, update: Array, param: Array) -> Array:
            stacked = any(key.key == "groups" for key in path)
            if param.ndim - stacked < 2:
                return update
            axes = tuple(range(int(stacked), param.ndim))
            weight, step = (jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) for x in (param, update))
            alive = (weight > 0) & (step > 0)
            return update * jnp.where(alive, weight / jnp.where(alive, step, 1.0), 1.0)

        return jax.tree_util.tree_map_with_path(one, updates, params)

    return optax.stateless(scale)


def scale_by_layer(backbone: Backbone, decay: float) -> optax.GradientTransformation:
    """Multiplies every update of a student by decay^(depth + 1 - layer), which is its learning rate's share.

    Layers are as the backbone numbers them; the head's is depth + 1.
    """

    def scale(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        def one(path: tuple, update: Array) -> Array:
            names = tuple(key.key for key in path)
            layers = backbone.depth + 1 if names[0] == "head" else backbone.layer_numbers(names)
            factor = decay ** (backbone.depth + 1 - np.asarray(layers, np.float64))
            return update * factor.astype(np.float32).reshape(factor.shape + (1,) * (update.ndim - factor.ndim))

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.stateless(scale)
