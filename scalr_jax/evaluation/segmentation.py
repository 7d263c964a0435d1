"""Evaluation of segmentation: every original point takes the class of its nearest kept point."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from scalr_jax import build, distributed, metrics, sharding, steps
from scalr_jax.data.packing import derive_capacities
from scalr_jax.data.pipeline import Pipeline, prefetch
from scalr_jax.data.scenes import InputError


def evaluate(config: Any, dataset: Any, student: Any, variables: Any, num_classes: int) -> np.ndarray:
    """Confusion matrix [classes, classes] int64 over every labelled point of every scan of `dataset`, once each.

    Scans are packed, several a shard; a pack is at least as large as the largest scan of the first ones.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    pipeline = Pipeline(
        dataset,
        build.make_settings(config, task="segment", train=False),
        num_shards=mesh.size,
        shards=sharding.local_shards(mesh),
        epochs=1,
        num_workers=config.data.num_workers,
    )
    sample = pipeline.sample()
    points = max(config.data.points_per_shard, int(1.5 * max(len(scene.feats) for scene in sample)))
    capacities = derive_capacities(sample, points=points, scenes=config.data.scenes_per_shard)
    outputs = (sharding.batch_sharding(mesh), sharding.replicated(mesh))
    classify = jax.jit(steps.make_classify_step(student), out_shardings=outputs)
    variables = jax.device_put(variables, sharding.replicated(mesh))
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for item in prefetch(iter(pipeline.steps(capacities, sample[0])), config.data.prefetch):
        classes, num_scenes = classify(variables, sharding.put_batch(item.batch, mesh))
        if int(num_scenes) == 0:  # on no process is one left
            break
        classes = sharding.local_rows(classes)  # [D_local, P]
        for shard, scenes in enumerate(item.scenes):
            start = 0
            for scene in scenes:
                kept = classes[shard, start : start + len(scene.feats)]
                start += len(scene.feats)
                confusion += metrics.confusion_matrix(scene.raw_labels, kept[scene.upsample], num_classes)
    confusion = distributed.sum_over_processes(confusion)
    if confusion.sum() == 0:
        raise InputError("the evaluation set has no labelled point; check data.split and the labels' folder")
    return confusion
