"""Watches for steps that were skipped because of values that are not finite, and finds the cause."""

from __future__ import annotations

import functools
import operator
from collections import deque
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from scalr_jax.data.pipeline import Step
from scalr_jax.data.scenes import Batch
from scalr_jax.models.student import Student, Variables

Array = jax.Array

IN_A_ROW = 20  # skipped steps that stop a run
BEHIND = 4  # steps: the newest ones are not waited for, so that the device never waits for the host
HUGE = 1e6  # of a student's input: metres, or deviations of the intensity


class Made(NamedTuple):
    """One step of the loop."""

    number: int
    item: Step
    metrics: dict[str, Array]


class Watch:
    """Counts skipped steps. All processes see the same steps, so they stop after the same one."""

    def __init__(self):
        self._recent: deque[Made] = deque()
        self._skipped = 0  # in a row

    def add(self, made: Made, *, last: bool) -> Made | None:
        """Notes a step. Returns that with which `IN_A_ROW` in a row were skipped. `last`: no other step follows."""
        self._recent.append(made)
        while len(self._recent) > (0 if last else BEHIND):
            seen = self._recent.popleft()
            self._skipped = self._skipped + 1 if int(seen.metrics["skipped_steps"]) else 0
            if self._skipped == IN_A_ROW:
                return seen
        return None


def explain(made: Made, student: Student, variables: Variables, batch: Batch[Array]) -> str:
    """A sentence on a skipped step, whose batch `batch` is: its scenes, and what was not finite first."""
    names = ", ".join(scene.name for scenes in made.item.scenes for scene in scenes)
    return (
        f"{IN_A_ROW} steps in a row up to step {made.number} were skipped because of values that are not finite: "
        f"{'; '.join(_causes(made, student, variables, batch))} (the scenes of that step: {names}); lower "
        "optimizer.learning_rate in another --workdir, or look at these scenes; the checkpoints are from before"
    )


def _causes(made: Made, student: Student, variables: Variables, batch: Batch[Array]) -> list[str]:
    """Known causes of a skipped step, in the order of the computation."""
    scenes = [scene for scenes in made.item.scenes for scene in scenes]
    largest = [float(np.abs(scene.feats).max()) for scene in scenes]
    values = jax.device_get(made.metrics)
    causes = [
        f"the input of {scene.name} has a value of {value:.3g}"
        for scene, value in zip(scenes, largest, strict=True)
        if not value <= HUGE
    ]
    if not np.isfinite(values.get("teacher_norm", 0.0)):
        causes.append("the teacher's features are not finite (is teacher.checkpoint whole?)")
    layer = first_not_finite(student, variables, batch)
    if layer is not None:
        return [*causes, f"the first layer whose output is not finite is {layer}"]
    if not np.isfinite(values["loss"]):
        return [*causes, "the output of every layer is finite, and the loss is not"]
    if not np.isfinite(values["gradient_norm"]):
        return [*causes, f"the loss is {values['loss']:.4g}, and its gradient is not finite"]
    rate = f"a learning rate of {values['learning_rate']:.3g}"
    return [*causes, f"the loss is {values['loss']:.4g}, but {rate} makes weights that are not finite"]


def first_not_finite(student: Student, variables: Variables, batch: Batch[Array]) -> str | None:
    """The module whose output in training is the first that is not finite, with its group in a loop over layers; None
    where all are."""
    order: list[tuple[str, ...]] = []  # modules, as they end

    def note(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            parts = [jnp.isfinite(x).all() for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)]
            context.module.sow("intermediates", "finite", jnp.array(parts).all())
            order.append(context.module.path)
        return output

    def flags_of(variables: Variables, batch: Batch[Array]) -> list[Array]:
        """Flags of each module in `order`: [], for a looped one [groups]."""
        randomness = {"dropout": jax.random.key(0)}
        with nn.intercept_methods(note):
            result: Any = student.apply(
                variables, batch, train=True, rngs=randomness, mutable=["batch_stats", "intermediates"]
            )
        order[:] = dict.fromkeys(order)
        parts = (functools.reduce(operator.getitem, path, result[1]["intermediates"]) for path in order)
        return [jnp.stack(part["finite"]).all(axis=0) for part in parts]  # over all its calls

    where = batch.feats.sharding
    everywhere = NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else where
    flags = jax.device_get(jax.jit(flags_of, out_shardings=everywhere)(variables, batch))
    loop = next((place for place, finite in enumerate(flags) if finite.ndim), 0)
    found = []
    for place, (path, finite) in enumerate(zip(order, flags, strict=True)):
        for group in np.flatnonzero(~np.atleast_1d(finite)):
            name = "/".join(path) + (f" of group {group + 1}" if finite.ndim else "")
            found.append((loop if finite.ndim else place, group, place, name))
    return min(found)[-1] if found else None
