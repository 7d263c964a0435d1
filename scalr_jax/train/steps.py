"""The pure steps: arrays in, arrays out. No config, file or writer in here.

train:    step(state, teacher, batch) -> (state, metrics)
predict:  step(variables, batch) -> logits or features [D, P, C]
classify: step(variables, batch) -> (classes [D, P], counts)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scalr_jax.data.scenes import IGNORE, Batch
from scalr_jax.models.student import Classifier, Student, Variables
from scalr_jax.runtime import sharding
from scalr_jax.train import losses
from scalr_jax.train.groups import Groups, make_groups
from scalr_jax.train.state import AveragedState, TrainState, split
from scalr_jax.train.teachers import Source, targets

Array = jax.Array
Metrics = dict[str, Array]
Step = Callable[[TrainState, Any, Batch[Array]], tuple[TrainState, Metrics]]
Schedule = Callable[[Array], Array]  # progress, in scenes seen / batch size, -> learning rate


def compiler_options(platform: str, *, deterministic: bool = False) -> dict[str, bool]:
    """For `jax.jit` of a training step on devices of `platform`; `deterministic`: the key of that name.

    XLA's order of work for many cores first begins whatever depends on nothing: on CPU the empty buffers of the whole
    backward pass. In the order of least memory a layer takes 240 MB instead of 343 (62,592 points x 256, 2026-11-23).
    On a GPU it keeps float32 where the code says bfloat16, which costs bytes: 1 ms of VaViT-B's step (predicted).
    """
    if platform == "cpu":
        return {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    if platform not in sharding.GPU:
        return {}
    return {"xla_allow_excess_precision": False, **({"xla_gpu_deterministic_ops": True} if deterministic else {})}


def averaged(step: Callable, decay: float) -> Callable:
    """The same step(state, teacher, batch) on an `AveragedState`: average += (1 - decay) * (weights - average), and
    nothing in a step that was skipped."""

    def new_step(state: AveragedState, teacher: dict, batch: Batch[Array]) -> tuple[AveragedState, Metrics]:
        state, metrics = step(state, teacher, batch)
        share = jnp.where(metrics["skipped_steps"] > 0, 0.0, 1.0 - decay)
        params = {name: state.params[name] for name in state.average["params"]}
        now = {"params": params, "batch_stats": state.batch_stats}
        average = jax.tree.map(lambda mean, new: mean + share * (new - mean), state.average, now)
        return dataclasses.replace(state, average=average), metrics

    return new_step


def _make_step(
    student: Student,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    measure: Callable[[Array, Any, Batch[Array], Array], tuple[Array, Metrics]],
    *,
    seed: int,
    batch_size: int,
    trainable: tuple[str, ...] | None = None,
) -> Step:
    """One optimiser step on the trainable top-level parameters (None: all).

    measure(output [D, P, C], target, batch, key) -> (loss, more metrics), with what the step gets as `target`.

    Where the loss, the gradients or what the step makes of the weights is not finite, the weights, statistics and
    moments stay as they were, and the metric `skipped_steps` is 1 instead of 0.
    """

    def step(state: TrainState, target: Any, batch: Batch[Array]) -> tuple[TrainState, Metrics]:
        chosen, frozen = split(state.params, tuple(state.params) if trainable is None else trainable)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        learning_rate = schedule(state.scenes_seen / batch_size)

        def loss_of(chosen: dict) -> tuple[Array, tuple[Any, Metrics]]:
            variables = {"params": {**chosen, **frozen}, "batch_stats": state.batch_stats}
            output, updated = student.apply(
                variables, batch, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
            )
            loss, extra = measure(output, target, batch, key)
            return loss, (updated["batch_stats"], extra)

        (loss, (batch_stats, extra)), gradients = jax.value_and_grad(loss_of, has_aux=True)(chosen)
        updates, opt_state = optimizer.update(gradients, state.opt_state, chosen)
        moved = jax.tree.map(lambda p, u: p - learning_rate * u, chosen, updates)
        gradient_norm, weight_norm = optax.tree.norm(gradients), optax.tree.norm((moved, batch_stats))
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(weight_norm)
        before = (chosen, state.batch_stats, state.opt_state)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (moved, batch_stats, opt_state), before)
        chosen, batch_stats, opt_state = after
        params = {k: chosen.get(k, frozen.get(k)) for k in state.params}
        num_scenes = jnp.sum(batch.scene_points > 0, dtype=jnp.int32)
        metrics = {"loss": loss, "learning_rate": learning_rate, "gradient_norm": gradient_norm}
        metrics |= {"points": batch.scene_points.sum(), "scenes": num_scenes, **extra}
        metrics["skipped_steps"] = jnp.where(finite, 0, 1)
        state = dataclasses.replace(state, step=state.step + 1, scenes_seen=state.scenes_seen + num_scenes)
        return dataclasses.replace(state, params=params, batch_stats=batch_stats, opt_state=opt_state), metrics

    return step


def make_student_step(
    student: Student,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    seed: int,
    batch_size: int,
    scenes_per_group: int = 0,
    teacher_dropping: float = 0.0,
    sources: Sequence[Source] = (),
    lines: tuple[int, ...] = (1,),
) -> Step:
    """The step after the teachers: step(state, target, batch), target [D, P, sum of C_teacher].

    scenes_per_group, teacher_dropping: `config.loss`; sources: of several teachers. lines: after every so many steps,
    by any of these numbers, the metric `loss_constant` is computed; it is NaN after others. `teacher_norm` is not
    finite where a teacher is not.
    """
    weights = np.array([source.weight for source in sources] or [1.0], np.float32)
    ends = np.cumsum([source.width for source in sources])[:-1].tolist()

    def of_points(batch: Batch[Array]) -> tuple[Array, Groups | None]:
        mask = batch.scene < batch.scene_points.shape[1]  # [D, P]
        return mask, make_groups(batch.scene, batch.scene_points, mask, scenes_per_group)

    def measure(output: Array, target: Array, batch: Batch[Array], key: Array) -> tuple[Array, Metrics]:
        mask, groups = of_points(batch)
        pairs = list(zip(*(jnp.split(x, ends, axis=-1) for x in (output, target)), strict=True))
        each = jnp.stack([losses.distillation(ours, theirs, mask, groups) for ours, theirs in pairs])
        norms = jnp.stack([losses.masked_mean(losses.lengths(theirs, mask), mask) for _, theirs in pairs])
        metrics = {"loss": (weights * each).sum(), "teacher_norm": norms.mean(), **named("loss", each)}
        key = jax.random.fold_in(key, len(pairs))
        return losses.dropped(jnp.multiply(weights, each), teacher_dropping, key), metrics

    def named(metric: str, each: Array) -> Metrics:
        return {f"{metric}/{source.name}": each[k] for k, source in enumerate(sources) if len(sources) > 1}

    def constants(target: Array, batch: Batch[Array]) -> Array:
        parts = jnp.split(target, ends, axis=-1)
        return jnp.stack([losses.best_constant(theirs, *of_points(batch)) for theirs in parts])

    step = _make_step(student, optimizer, schedule, measure, seed=seed, batch_size=batch_size)

    def measured(state: TrainState, target: Array, batch: Batch[Array]) -> tuple[TrainState, Metrics]:
        due = jnp.stack([(state.step + 1) % number == 0 for number in lines]).any()
        with jax.named_scope("seldom"):  # for `compile.hlo`
            nothing = jnp.full(len(weights), jnp.nan)
            each = jax.lax.cond(due, lambda: constants(target, batch), lambda: nothing)
        state, metrics = step(state, target, batch)
        return state, {**metrics, "loss_constant": (weights * each).sum(), **named("loss_constant", each)}

    return measured


def make_distill_step(
    student: Student,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    sources: Sequence[Source],
    **options: Any,
) -> Step:
    """The step of a distillation from one `Teacher` a source; `options` are those of `make_student_step`."""
    step = make_student_step(student, optimizer, schedule, sources=sources, **options)
    return lambda state, teachers, batch: step(state, targets(sources, teachers, batch), batch)


def make_segment_step(
    student: Student,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    seed: int,
    batch_size: int,
    trainable: tuple[str, ...] | None,
    scenes_per_group: int = 0,
) -> Step:
    """Cross-entropy + Lovasz on the trainable top-level parameters (None: all); there is no teacher (None)."""

    def measure(logits: Array, _: None, batch: Batch[Array], key: Array) -> tuple[Array, Metrics]:
        labels = batch.labels
        assert labels is not None
        mask = (batch.scene < batch.scene_points.shape[1]) & (labels != IGNORE)
        groups = make_groups(batch.scene, batch.scene_points, mask, scenes_per_group)
        entropy, lovasz = losses.segmentation(logits, labels, mask, groups)
        accuracy = losses.masked_mean(logits.argmax(-1) == labels, mask)
        return entropy + lovasz, {"cross_entropy": entropy, "accuracy": accuracy}

    return _make_step(student, optimizer, schedule, measure, seed=seed, batch_size=batch_size, trainable=trainable)


def make_classify_step(student: Classifier, *, probabilities: bool = False) -> Callable[..., tuple[Array, Array]]:
    """variables, batch -> each point's class [D, P] int32, or its probabilities [D, P, classes] float32, and [2] int32
    over all shards: scenes, and points without a class (argmax of NaN would be the first)."""

    def classify(variables: Variables, batch: Batch[Array]) -> tuple[Array, Array]:
        logits = student.apply(variables, batch, train=False)
        points = batch.scene < batch.scene_points.shape[1]
        without = points & ~jnp.isfinite(logits.max(-1))
        counts = (jnp.sum(mask, dtype=jnp.int32) for mask in (batch.scene_points > 0, without))
        found = jax.nn.softmax(logits.astype(jnp.float32)) if probabilities else logits.argmax(-1).astype(jnp.int32)
        return found, jnp.stack([*counts])

    return classify


def make_predict_step(student: Classifier) -> Callable[[Variables, Batch[Array]], Array]:
    """variables, batch -> the head's output [D, P, C] in float32, with running statistics."""
    return lambda variables, batch: student.apply(variables, batch, train=False)
