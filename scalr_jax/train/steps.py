"""The pure steps: arrays in, arrays out. No config, file or writer in here.

distill:  step(state, teacher, batch) -> (state, metrics)
segment:  step(state, batch) -> (state, metrics)
predict:  step(variables, batch) -> logits or features [D, P, C]
classify: step(variables, batch) -> (classes [D, P], number of scenes)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scalr_jax.data.scenes import IGNORE, Batch
from scalr_jax.models import vit
from scalr_jax.models.student import Classifier, Student, Variables
from scalr_jax.ops.bilinear import sample_tokens
from scalr_jax.train import losses
from scalr_jax.train.state import AveragedState, TrainState, split

Array = jax.Array
Metrics = dict[str, Array]
Schedule = Callable[[Array], Array]  # progress, in scenes seen / batch size, -> learning rate


def compiler_options(platform: str) -> dict[str, bool]:
    """For `jax.jit` of a training step on devices of `platform`.

    XLA's order of work for many cores first begins whatever depends on nothing: on CPU the empty buffers of the whole
    backward pass. In the order of least memory a layer takes 240 MB instead of 343 (62,592 points x 256, 2026-11-23).
    """
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False} if platform == "cpu" else {}


def teacher_features(vit_config: vit.ViTConfig, params: dict, batch: Batch[Array], *, which: str) -> Array:
    """The teacher's feature of each point's pixel: [D, P, C_teacher], zero for padded points.

    Samples the token grid; the upsampled map of the published code is never made.
    """
    assert batch.images is not None
    num_shards, num_scenes, height, width = batch.images.shape[:4]
    images = batch.images.reshape(-1, height, width, 3).astype(jnp.float32) / 255.0
    tokens = vit.features(vit_config, params, images, which=which)
    tokens = vit.patch_tokens(tokens, vit_config)
    rows, columns = height // vit_config.patch_size, width // vit_config.patch_size
    grid = tokens.reshape(num_shards, num_scenes, rows, columns, -1)
    sample = jax.vmap(lambda g, s, p: sample_tokens(g, s, p, (height, width)))
    return jax.lax.stop_gradient(sample(grid, batch.scene, batch.pixels))


def _update(
    state: TrainState,
    batch: Batch[Array],
    optimizer: optax.GradientTransformation,
    learning_rate: Array,
    trainable: tuple[str, ...],
    loss_of: Callable[[dict], tuple[Array, tuple[dict, Metrics]]],
) -> tuple[TrainState, Metrics]:
    """One optimiser step on the trainable top-level parameters. `loss_of(params) -> (loss, (batch_stats, extra))`."""
    chosen, frozen = split(state.params, trainable)
    (loss, (batch_stats, extra)), gradients = jax.value_and_grad(
        lambda chosen: loss_of({**chosen, **frozen}), has_aux=True
    )(chosen)
    updates, opt_state = optimizer.update(gradients, state.opt_state, chosen)
    chosen = jax.tree.map(lambda p, u: p - learning_rate * u, chosen, updates)
    num_scenes = jnp.sum(batch.scene_points > 0, dtype=jnp.int32)
    metrics = {
        "loss": loss,
        "learning_rate": learning_rate,
        "gradient_norm": optax.tree.norm(gradients),
        "points": batch.scene_points.sum(),
        "scenes": num_scenes,
        **extra,
    }
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        scenes_seen=state.scenes_seen + num_scenes,
        params={k: chosen.get(k, frozen.get(k)) for k in state.params},
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return state, metrics


def averaged(step: Callable, decay: float) -> Callable:
    """The same step(state, teacher, batch) on an `AveragedState`: average += (1 - decay) * (weights - average)."""

    def new_step(state: AveragedState, teacher: dict, batch: Batch[Array]) -> tuple[AveragedState, Metrics]:
        state, metrics = step(state, teacher, batch)
        params = {name: state.params[name] for name in state.average["params"]}
        average = jax.tree.map(
            lambda mean, new: mean + (1.0 - decay) * (new - mean),
            state.average,
            {"params": params, "batch_stats": state.batch_stats},
        )
        return dataclasses.replace(state, average=average), metrics

    return new_step


def make_student_step(
    student: Student, optimizer: optax.GradientTransformation, schedule: Schedule, *, seed: int, batch_size: int
) -> Callable[[TrainState, Array, Batch[Array]], tuple[TrainState, Metrics]]:
    """What follows the teacher: step(state, target, batch), target [D, P, C_teacher]."""

    def step(state: TrainState, target: Array, batch: Batch[Array]) -> tuple[TrainState, Metrics]:
        mask = batch.scene < batch.scene_points.shape[1]  # [D, P]
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_of(params: dict) -> tuple[Array, tuple[Any, Metrics]]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            output, updated = student.apply(
                variables, batch, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
            )
            return losses.distillation(output, target, mask), (updated["batch_stats"], {})

        learning_rate = schedule(state.scenes_seen / batch_size)
        state, metrics = _update(state, batch, optimizer, learning_rate, tuple(state.params), loss_of)
        return state, {**metrics, "loss_constant": losses.best_constant(target, mask)}

    return step


def make_distill_step(
    student: Student,
    vit_config: vit.ViTConfig,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    seed: int,
    batch_size: int,
    which: str,
) -> Callable[[TrainState, dict, Batch[Array]], tuple[TrainState, Metrics]]:
    """The step of a distillation; `which` names the teacher's feature."""
    student_step = make_student_step(student, optimizer, schedule, seed=seed, batch_size=batch_size)

    def step(state: TrainState, teacher: dict, batch: Batch[Array]) -> tuple[TrainState, Metrics]:
        return student_step(state, teacher_features(vit_config, teacher, batch, which=which), batch)

    return step


def make_segment_step(
    student: Student,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    seed: int,
    batch_size: int,
    trainable: tuple[str, ...] | None,
) -> Callable[[TrainState, Batch[Array]], tuple[TrainState, Metrics]]:
    """Cross-entropy + Lovasz on the trainable top-level parameters (None: all)."""

    def step(state: TrainState, batch: Batch[Array]) -> tuple[TrainState, Metrics]:
        labels = batch.labels
        assert labels is not None
        mask = (batch.scene < batch.scene_points.shape[1]) & (labels != IGNORE)
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_of(params: dict) -> tuple[Array, tuple[Any, Metrics]]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = student.apply(
                variables, batch, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
            )
            entropy, lovasz = losses.segmentation(logits, labels, mask)
            accuracy = losses.masked_mean(logits.argmax(-1) == labels, mask)
            return entropy + lovasz, (updated["batch_stats"], {"cross_entropy": entropy, "accuracy": accuracy})

        learning_rate = schedule(state.scenes_seen / batch_size)
        names = tuple(state.params) if trainable is None else trainable
        return _update(state, batch, optimizer, learning_rate, names, loss_of)

    return step


def make_classify_step(student: Classifier) -> Callable[[Variables, Batch[Array]], tuple[Array, Array]]:
    """variables, batch -> each point's class [D, P] int32, and `_count` of the batch."""

    def classify(variables: Variables, batch: Batch[Array]) -> tuple[Array, Array]:
        logits = student.apply(variables, batch, train=False)
        return logits.argmax(-1).astype(jnp.int32), _count(logits, batch)

    return classify


def make_probability_step(student: Classifier) -> Callable[[Variables, Batch[Array]], tuple[Array, Array]]:
    """variables, batch -> each point's probabilities [D, P, classes] float32, and `_count` of the batch."""

    def classify(variables: Variables, batch: Batch[Array]) -> tuple[Array, Array]:
        logits = student.apply(variables, batch, train=False).astype(jnp.float32)
        return jax.nn.softmax(logits), _count(logits, batch)

    return classify


def _count(logits: Array, batch: Batch[Array]) -> Array:
    """[2] int32 over all shards: scenes, and points without a class (argmax of NaN would be the first)."""
    points = batch.scene < batch.scene_points.shape[1]
    without = points & ~jnp.isfinite(logits.max(-1))
    return jnp.stack([jnp.sum(batch.scene_points > 0, dtype=jnp.int32), jnp.sum(without, dtype=jnp.int32)])


def make_predict_step(student: Classifier) -> Callable[[Variables, Batch[Array]], Array]:
    """variables, batch -> the head's output [D, P, C] in float32, with running statistics."""
    return lambda variables, batch: student.apply(variables, batch, train=False)
