"""The features of a frozen student for every training scene, without augmentation: passed on, or kept in files.

A cache is a folder: `cache.json` says whose features it holds, `N.npy` [points, C] and `N.labels.npy` [points] uint8
are those of training scene N. Both are written whole or not at all, labels first, so a killed process resumes at the
first scene that has no features. `cache.json` has a checksum of the weights and every setting that the scenes depend
on; a folder of others is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scalr_jax.config import get_config
from scalr_jax.data.build import check_labels, make_settings
from scalr_jax.data.packing import choose_capacities
from scalr_jax.data.pipeline import Pipeline, prefetch
from scalr_jax.data.readers import files
from scalr_jax.data.scenes import SceneView
from scalr_jax.models.build import make_backbone, make_student
from scalr_jax.models.student import without_head
from scalr_jax.runtime import distributed, sharding
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.runtime.logging import PROGRESS_SECONDS, format_seconds
from scalr_jax.runtime.storage import flatten, write_json

DTYPES = ("float32", "float16")
# Settings that change neither scenes nor features.
FREE_DATA = ("num_workers", "prefetch", "split", "augmentation", "points_per_shard", "scenes_per_shard")
FREE_DATA += ("scenes_per_step", "cells_per_shard", "halo_per_shard", "voxels_per_shard", "pairs_per_shard")
FREE_DATA += ("image_size", "antialias", "scaled_decode")
FREE_MODEL = ("segmentation_head", "head_hidden", "drop_path", "remat", "num_classes")


def make_pipeline(config: Any, dataset: Any, mesh: Any) -> Pipeline:
    """Every scene of `dataset` once, as in every epoch of a probe on fixed scenes."""
    settings = make_settings(config, make_backbone(config.model).needs, task="segment", train=True)
    return Pipeline(
        dataset,
        dataclasses.replace(settings, augmentation="none", fixed=True),
        seed=config.seed,
        num_shards=mesh.size,
        shards=sharding.local_shards(mesh),
        epochs=1,
        num_workers=config.data.num_workers,
    )


def each_scene(
    config: Any, dataset: Any, variables: Any, *, skip: Callable[[int], bool] | None = None
) -> Iterator[tuple[SceneView, np.ndarray]]:
    """This process's scenes and the backbone's features [N, C] float32 of each.

    `variables`: params and batch_stats. Each shard starts at its first scene `n` with `skip(n)` false.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    pipeline = make_pipeline(config, dataset, mesh)
    sample = pipeline.sample()
    check_labels(sample, dataset.class_names, len(dataset.class_names))
    capacities = choose_capacities(config, sample)
    student = make_student(config.model, head="none", out_features=0, platform=sharding.platform())
    variables = jax.device_put(without_head(variables), sharding.replicated(mesh))

    def apply(variables, batch):
        return student.apply(variables, batch, train=False), (batch.scene_points > 0).sum()

    compute = jax.jit(apply, out_shardings=(sharding.batch_sharding(mesh), sharding.replicated(mesh)))
    positions = [_first(shard, mesh.size, len(dataset), skip) for shard in pipeline.shards]
    for item in prefetch(iter(pipeline.steps(capacities, sample[0], positions)), config.data.prefetch):
        features, num_scenes = compute(variables, sharding.put_batch(item.batch, mesh))
        if int(num_scenes) == 0:  # on no process is one left
            return
        features = sharding.local_rows(features)  # [D_local, P, C]
        for shard, scenes in enumerate(item.scenes):
            start = 0
            for scene in scenes:
                yield scene, features[shard, start : start + len(scene.feats)]
                start += len(scene.feats)


def _first(shard: int, num_shards: int, length: int, skip: Callable[[int], bool] | None) -> int:
    """The first position of a shard that is not to be skipped."""
    position = shard
    while skip is not None and position < length and skip(position):
        position += num_shards
    return position


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """Cached scenes as a dataset of finished scenes: `scene(record, position)`."""

    folder: Path
    length: int
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return self.length

    def path(self, record: int) -> Path:
        return self.folder / f"{record:06d}.npy"

    def scene(self, record: int, position: int) -> SceneView:
        """A scene whose `feats` are its features [N, C] float32. Raises `BadFrameError`."""
        path = self.path(record)
        try:
            with files.NUMPY_LOAD:
                mapped = np.load(path, mmap_mode="r")
                labels = np.load(path.with_suffix(".labels.npy"))
            features = np.array(mapped, np.float32)
        except FileNotFoundError:
            raise BadFrameError(f"{path} is missing: the frame was bad when the features were computed") from None
        except (ValueError, EOFError, OSError) as error:
            raise BadFrameError(f"{path} cannot be read ({error}); remove it, and it is computed again") from error
        none = np.zeros((len(features), 0), np.int32)
        return SceneView(f"cached/{record}", position, features, none, (), None, None, labels)


def make_cache(config: Any, folder: Path, dataset: Any, variables: Any) -> FeatureCache:
    """Computes what `folder` lacks of the features of `dataset`, and returns them as a dataset.

    Raises:
        InputError: the folder holds features of another student or of other scenes, or the space does not suffice.
    """
    cache = FeatureCache(folder, len(dataset), tuple(dataset.class_names))
    if config.probe.cache_dtype not in DTYPES:
        raise InputError(f"probe.cache_dtype = {config.probe.cache_dtype!r} is none of {', '.join(DTYPES)}")
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _check_key(folder / "cache.json", cache_key(config, dataset, variables))
        _check_space(config, cache, dataset)
    distributed.barrier(f"features {folder}")
    if _is_complete(cache):
        return cache
    started = said = time.monotonic()
    missing = each_scene(config, dataset, variables, skip=lambda n: cache.path(n).exists())
    for done, (scene, features) in enumerate(missing, 1):
        path = cache.path(scene.stream_index)
        _save(path.with_suffix(".labels.npy"), scene.labels)
        _save(path, features.astype(config.probe.cache_dtype))
        now = time.monotonic()
        if done == 1:
            started = now  # the first one waited for the compiler
        elif now - said > PROGRESS_SECONDS and jax.process_index() == 0:
            left = (now - started) / (done - 1) * (len(cache) - scene.stream_index) / jax.process_count()
            print(f"features: scene {scene.stream_index + 1} of {len(cache)}  {format_seconds(left)} left", flush=True)
            said = now
    distributed.barrier(f"computed {folder}")
    if jax.process_index() == 0:
        content = json.loads((folder / "cache.json").read_text())
        write_json(folder / "cache.json", {**content, "scenes": _count(cache)})
    distributed.barrier(f"complete {folder}")
    return cache


def cache_key(config: Any, dataset: Any, variables: Any) -> dict:
    """What the features depend on: settings by dotted name, the frames, and a checksum of the weights."""
    settings = flatten(json.loads(config.to_json_best_effort()))
    kept = {
        key: value
        for key, value in settings.items()
        if (key.startswith("data.") and key[5:] not in FREE_DATA)
        or (key.startswith("model.") and key[6:] not in FREE_MODEL)
        or key in ("seed", "probe.cache_dtype")
    }
    frames = [len(dataset)]
    if hasattr(dataset, "name"):
        frames += [dataset.name(0), dataset.name(len(dataset) - 1)]
    return {**kept, "frames": frames, "weights": checksum(variables)}


def checksum(variables: Any, *, head: bool = False) -> str:
    """Of the backbone's parameters and statistics, and of the head's if `head`."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(variables if head else without_head(variables)).items()):
        digest.update(f"{path} {np.shape(leaf)}".encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:16]


def _check_key(path: Path, key: dict) -> None:
    """Writes the key, or compares it with the one there."""
    if not path.exists():
        write_json(path, {"key": key})
        return
    try:
        there = json.loads(path.read_text())["key"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} cannot be read; remove the folder, and the features are computed again") from None
    now = json.loads(json.dumps(key))
    defaults = flatten(json.loads(get_config().to_json_best_effort()))  # of settings younger than the cache
    there = {**{k: defaults[k] for k in now if k in defaults}, **there}
    wrong = [f"{k}: {there.get(k)} there, {now.get(k)} now" for k in sorted(there | now) if there.get(k) != now.get(k)]
    if wrong:
        raise InputError(
            f"{path.parent} holds features of another student or of other scenes ({'; '.join(wrong)}); remove it, or "
            "use another --workdir"
        )


def _check_space(config: Any, cache: FeatureCache, dataset: Any) -> None:
    """Prints what the cache will take, and compares it with what the disk has."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    points = np.mean([len(scene.feats) for scene in make_pipeline(config, dataset, mesh).sample()])
    channels = make_backbone(config.model).channels
    size = points * len(cache) * (channels * np.dtype(config.probe.cache_dtype).itemsize + 1)
    print(
        f"features: {len(cache)} scenes x about {points:,.0f} points x {channels} channels in "
        f"{config.probe.cache_dtype}: about {size / 1e9:.2g} GB in {cache.folder}",
        flush=True,
    )
    there = sum(path.stat().st_size for path in cache.folder.glob("*.npy"))
    free = shutil.disk_usage(cache.folder).free
    if size - there > free:
        raise InputError(
            f"{cache.folder}: the features need about {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; use "
            "--config.probe.cache_dtype=float16, another --workdir, or --config.probe.features=fixed, which keeps none"
        )


def _is_complete(cache: FeatureCache) -> bool:
    """Whether a finished pass wrote as many scenes as are there now (bad frames have none)."""
    return json.loads((cache.folder / "cache.json").read_text()).get("scenes") == _count(cache)


def _count(cache: FeatureCache) -> int:
    return sum(not path.name.endswith(".labels.npy") for path in cache.folder.glob("*.npy"))


def _save(path: Path, array: Any) -> None:
    """`path` is either absent or whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(temporary, path)
