"""The demo's teacher: a small ViT that comes with the package, and how it was trained.

    features  = bilinear samples of the tokens before the last norm, at pixels: what the student will be given
    predicted = linear(features / |features|), one linear map a target, thrown away afterwards
    loss      = weighted sum over targets + decorrelation of the unit features

Targets are geometry, colour and object extent (`data/streets/views.py`); no semantic label. Continuous targets are
cut into bins and predicted by softmax: then the features separate what differs, by straight cuts. The decorrelation
(after Bardes et al., "VICReg") keeps the mean of the unit features at zero and their channels apart, so that the
cosine, which is all that distillation sees, is not spent on one constant direction.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scalr_jax.config import Settings
from scalr_jax.data.streets.views import Views, render_views
from scalr_jax.interop.teacher import ASSET, save_teacher
from scalr_jax.models import vit
from scalr_jax.ops.bilinear import sample_tokens
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import json_text
from scalr_jax.train.losses import normalize
from scalr_jax.train.optim import make_schedule

Array = jax.Array


# Targets that are cut into bins, with the bins' inner edges. Lengths in metres; sizes and depth in equal ratios.
SIZE_EDGES = np.geomspace(0.12, 20.0, 27)
EDGES = {
    **dict.fromkeys(("length", "width", "tallness"), SIZE_EDGES),
    "height": np.array([0.05, 0.1, 0.15, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 4.0, 5.0, 7.0, 10.0]),
    "depth": np.geomspace(2.0, 50.0, 15),
}
CONTINUOUS = {"normal": 3, "albedo": 3, "offset": 3}


def train_teacher(settings: Settings, workdir: Path) -> Path:
    """Renders the views into `data.root` (or `workdir/views`), trains, writes `workdir/demo_teacher.safetensors`, whose
    path it returns; `teacher.checkpoint` takes it.

    `settings` are those of `configs/demo_teacher.py`. To package the result, copy it to `scalr_jax/assets`.
    """
    run, data, adam, training = settings.run, settings.data, settings.optimizer, settings.teacher_training
    started = time.monotonic()
    image_size = data.image_size
    cache = Path(data.root) if data.root else workdir / "views"
    workdir.mkdir(parents=True, exist_ok=True)
    views = render_views(cache, data.num_scenes, image_size, training.num_pixels, run.seed)
    print(f"teacher: {len(views.images)} views after {time.monotonic() - started:.0f} s", flush=True)

    # Parameters: the ViT's and the heads' on its unit features.
    vit_config = vit.ViTConfig(**dataclasses.asdict(training.vit))
    key_vit, key_heads = jax.random.split(jax.random.key(run.seed))
    state = {"vit": vit.init(vit_config, key_vit, image_size), "heads": init_heads(vit_config.width, key_heads)}
    scales = {name: float(getattr(views, name).std()) for name in CONTINUOUS}

    # The step.
    schedule: Any = make_schedule(adam, run.num_steps)
    adamw = optax.adamw(schedule, adam.beta1, adam.beta2, weight_decay=adam.weight_decay)
    optimizer = optax.chain(optax.clip_by_global_norm(training.max_gradient), adamw)
    weights = dataclasses.asdict(training.weights)

    @jax.jit
    def step(state, moments, batch):
        gradient, metrics = jax.grad(loss, has_aux=True)(state, vit_config, batch, scales, weights)
        updates, moments = optimizer.update(gradient, moments, state)
        return optax.apply_updates(state, updates), moments, metrics

    # The loop.
    moments = optimizer.init(state)
    rng = np.random.default_rng(run.seed)
    with (workdir / "metrics.jsonl").open("w") as log:
        for n in range(1, run.num_steps + 1):
            batch = make_batch(views, adam.batch_size, rng)
            state, moments, metrics = step(state, moments, batch)
            if n % run.log_every_steps == 0 or n == run.num_steps:
                values = {name: round(float(value), 4) for name, value in metrics.items()}
                if not np.isfinite(values["loss"]):
                    raise InputError(f"the loss of step {n} is not finite; lower optimizer.learning_rate")
                log.write(json_text({"step": n, "seconds": time.monotonic() - started, **values}) + "\n")
                print(f"teacher: step {n}/{run.num_steps}, {time.monotonic() - started:.0f} s, {values}", flush=True)
    path = workdir / ASSET
    save_teacher(path, vit_config, state["vit"])
    return path


def make_batch(views: Views, number: int, rng: np.random.Generator) -> Views:
    """A random batch of views as a `Views` of `number` images in 0..1, mirrored half of the time, colours jittered."""
    chosen = rng.choice(len(views.images), number, replace=False)
    batch = Views(*(column[chosen] for column in views))
    mirror = rng.random(number) < 0.5
    images = np.where(mirror[:, None, None, None], batch.images[:, :, ::-1], batch.images).astype(np.float32) / 255
    column = np.where(mirror[:, None], images.shape[2] - 1 - batch.pixels[..., 1], batch.pixels[..., 1])
    sign = np.where(mirror[:, None, None], np.array([-1, 1, 1], np.float32), np.float32(1))  # what points right
    contrast, brightness = (rng.uniform(low, high, (number, 1, 1, 3)) for low, high in ((0.85, 1.15), (-0.06, 0.06)))
    images = np.clip(images * contrast + brightness, 0, 1).astype(np.float32)
    pixels = np.stack([batch.pixels[..., 0], column], axis=-1).astype(np.int32)
    return batch._replace(images=images, pixels=pixels, normal=batch.normal * sign, offset=batch.offset * sign)


def init_heads(width: int, key: Array) -> dict:
    """One linear map from unit features to each target's logits or values: {name: {kernel, bias}}."""
    outputs = {**{name: len(edges) + 1 for name, edges in EDGES.items()}, **CONTINUOUS}
    keys = jax.random.split(key, len(outputs))
    return {
        name: {"kernel": jax.random.normal(k, (width, size)), "bias": jnp.zeros(size)}
        for k, (name, size) in zip(keys, outputs.items(), strict=True)
    }


def loss(state: dict, vit_config: vit.ViTConfig, batch: Views, scales: dict, weights: dict) -> tuple[Array, dict]:
    """The scalar loss of a batch and its parts. `scales`: standard deviation of each continuous target."""
    image_size = batch.images.shape[1:3]
    number, num_pixels = batch.pixels.shape[:2]
    tokens = vit.features(vit_config, state["vit"], batch.images, which="x_pre_norm")
    grid = vit.patch_grid(vit_config, image_size)
    tokens = vit.patch_tokens(tokens, vit_config).reshape(number, *grid, vit_config.width)
    image_index = jnp.repeat(jnp.arange(number), num_pixels)
    sampled = sample_tokens(tokens, image_index, batch.pixels.reshape(-1, 2), image_size)  # [B * Q, C]
    unit = normalize(sampled, jnp.ones(len(sampled), bool))
    parts = target_losses(state["heads"], unit, batch, scales)
    parts["mean"], parts["correlation"] = decorrelation(unit)
    total = sum((weights[name] * value for name, value in parts.items()), jnp.zeros(()))
    return total, {"loss": total, **parts}


def target_losses(heads: dict, unit: Array, batch: Views, scales: dict) -> dict[str, Array]:
    """Cross-entropy of each binned target and Huber loss of each continuous one, on unit features [B * Q, C]."""
    predicted = {name: unit @ head["kernel"] + head["bias"] for name, head in heads.items()}
    sizes = batch.size.reshape(-1, 3)
    values = dict(zip(("length", "width", "tallness"), sizes.T, strict=True))
    values |= {"height": batch.height.reshape(-1), "depth": batch.depth.reshape(-1)}
    parts = {}
    for name, edges in EDGES.items():
        bins = jnp.searchsorted(jnp.asarray(edges, jnp.float32), values[name])
        parts[name] = optax.softmax_cross_entropy_with_integer_labels(predicted[name], bins).mean()
    for name in CONTINUOUS:
        target = getattr(batch, name).reshape(-1, 3) / scales[name]
        parts[name] = optax.huber_loss(predicted[name], target).mean()
    return parts


def decorrelation(unit: Array) -> tuple[Array, Array]:
    """Squared length of the mean unit feature, and of its correlations off the diagonal. unit [n, C]."""
    mean = unit.mean(axis=0)
    centered = unit - mean
    covariance = centered.T @ centered / len(unit)  # [C, C], trace below 1
    off_diagonal = jnp.square(covariance).sum() - jnp.square(jnp.diag(covariance)).sum()
    return jnp.square(mean).sum(), off_diagonal
