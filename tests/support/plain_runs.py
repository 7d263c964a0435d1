"""Whole runs of a student of one linear layer, which take a second."""

from functools import partial
from typing import Any

import flax.linen as nn

from scalr_jax import tasks
from scalr_jax.data.scenes import SceneNeeds
from scalr_jax.settings import read_settings
from scalr_jax.train import steps
from scalr_jax.train.loop import Task, train
from tests.support.runs import config_of


class Plain(nn.Module):
    """A student that is one linear layer, so that a whole run takes a second."""

    needs = SceneNeeds(((-8.0, -8.0, -2.0), (8.0, 8.0, 2.0)), 0, ((8, 8),))
    backbone = None

    @nn.compact
    def __call__(self, batch, *, train):
        return nn.Dense(2, name="head")(batch.feats)


def finetune(dataset, workdir, *, metrics="", **changes):
    """`metrics`: what a run that was killed before it saved has left in metrics.jsonl."""
    config = config_of("smoke")
    config.update(task="finetune", num_steps=40, log_every_steps=5, checkpoint_every_steps=10)
    config.data.update(points_per_shard=128, scenes_per_shard=2, scenes_per_step=2, num_workers=0, max_points=60)
    config.update_from_flattened_dict(changes)
    settings = read_settings(config)
    student: Any = Plain()
    step = partial(steps.make_segment_step, student, seed=0, batch_size=2, trainable=None)
    with tasks.claimed(settings, workdir):
        if metrics:
            (workdir / "metrics.jsonl").write_text(metrics)
        return train(settings.training, workdir, dataset, Task("tiny", "segment", student, None, step, num_classes=2))
