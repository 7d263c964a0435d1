"""The features of a frozen student for every training scene, without augmentation: passed on, or kept in files.

A cache is a folder: `cache.json` says whose features it holds, `N.npy` [points, C] and `N.labels.npy` [points] uint8
are those of training scene N. Both are written whole or not at all, labels first, so a killed process resumes at the
first scene that has no features. `cache.json` has a checksum of the weights and every setting that the scenes depend
on; a folder of others is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scalr_jax.config import TrainSettings, all_keys
from scalr_jax.data.build import check_labels, scene_settings
from scalr_jax.data.packing import Capacities, choose_capacities
from scalr_jax.data.pipeline import Pipeline, prefetch
from scalr_jax.data.readers import files
from scalr_jax.data.scenes import Batch, Dataset, SceneNeeds, SceneView
from scalr_jax.interop.finite import narrowed
from scalr_jax.models.student import Student, Variables, without_head
from scalr_jax.runtime import distributed, sharding
from scalr_jax.runtime.errors import BadFrameError, InputError
from scalr_jax.runtime.logging import Progress
from scalr_jax.runtime.storage import differences, flatten, read_json, reason, write_json, written_whole

FLOAT32 = "give --config.probe.cache_dtype=float32"
AGAIN = "remove the folder, and the features are computed again"
# Settings that change neither scenes nor features.
FREE_DATA = ("num_workers", "prefetch", "split", "augmentation")
FREE_DATA += ("scenes_per_step", "buckets", *(f"{name}_per_shard" for name in Capacities._fields))
FREE_DATA += ("image_size", "antialias", "image_dtype", "scaled_decode")
FREE_MODEL = ("segmentation_head", "head_hidden", "drop_path", "remat", "num_classes")


def make_pipeline(settings: TrainSettings, needs: SceneNeeds, dataset: Dataset, mesh: Mesh) -> Pipeline:
    """Every scene of `dataset` once, as in every epoch of a probe on fixed scenes."""
    scenes = scene_settings(settings.data, needs, task="segment", train=True, fixed=True)
    shards: dict = {"num_shards": mesh.size, "shards": sharding.local_shards(mesh)}
    workers = settings.data.num_workers
    return Pipeline(dataset, scenes, seed=settings.run.seed, epochs=1, num_workers=workers, **shards)


def each_scene(
    settings: TrainSettings,
    student: Student,
    dataset: Dataset,
    variables: Variables,
    *,
    skip: Callable[[int], bool] = lambda scene: False,
) -> Iterator[tuple[SceneView, np.ndarray]]:
    """This process's scenes and the backbone's features [N, C] float32 of each.

    Each shard starts at its first scene `n` with `skip(n)` false.
    """
    mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp)
    pipeline = make_pipeline(settings, student.needs, dataset, mesh)
    sample = pipeline.sample()
    check_labels(sample, dataset.class_names, len(dataset.class_names))
    capacities = choose_capacities(settings.data, sample)
    backbone = student.clone(head="none")
    variables = jax.device_put(without_head(variables), sharding.replicated(mesh))

    def apply(variables: Variables, batch: Batch) -> tuple:
        rows: Any = backbone.apply(variables, batch, train=False)
        bad = (batch.scene < batch.scene_points.shape[1]) & ~jnp.isfinite(rows).all(axis=-1)
        return rows, jnp.stack([(batch.scene_points > 0).sum(), bad.sum()])

    compute = jax.jit(apply, out_shardings=(sharding.batch_sharding(mesh), sharding.replicated(mesh)))
    of_shard = (itertools.count(shard, mesh.size) for shard in pipeline.shards)
    positions = [next(n for n in numbers if n >= len(dataset) or not skip(n)) for numbers in of_shard]
    for item in prefetch(iter(pipeline.steps(capacities, sample[0], positions)), settings.data.prefetch):
        features, counts = compute(variables, sharding.put_batch(item.batch, mesh))
        num_scenes, num_bad = np.asarray(counts)
        if num_scenes == 0:  # no process has a scene left
            return
        check_outputs(num_bad, item.scenes)
        for scenes, rows in zip(item.scenes, sharding.local_rows(features), strict=True):
            yield from split_rows(scenes, rows)


def check_outputs(num_bad: int, scenes: Sequence[Sequence[SceneView]]) -> None:
    """Raises InputError when the model's output is not finite for some points of a step, on every process."""
    if num_bad:
        names = ", ".join(scene.name for packed in scenes for scene in packed)
        raise InputError(
            f"the model's output is not finite for {num_bad} points of {names}; its weights (config.checkpoint) are "
            "damaged, or training diverged"
        )


def split_rows(scenes: Sequence[SceneView], rows: np.ndarray) -> Iterator[tuple[SceneView, np.ndarray]]:
    """Each scene of a shard and its rows of the shard's [P, ...]."""
    ends = np.cumsum([len(scene.feats) for scene in scenes], dtype=int)
    return zip(scenes, np.split(rows, ends)[:-1], strict=True)


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
        except files.UNREADABLE_ARRAYS as error:
            raise BadFrameError(f"{path} cannot be read ({reason(error)}); remove it to compute it again") from error
        none = np.zeros((len(features), 0), np.int32)
        return SceneView(f"cached/{record}", position, features, none, (), None, None, labels)


def make_cache(
    settings: TrainSettings,
    student: Student,
    folder: Path,
    dataset: Dataset,
    variables: Variables,
    *,
    key: Mapping[str, Any],
    dtype: str,
) -> FeatureCache:
    """Computes what `folder` lacks of the features of `dataset`, and returns them as a dataset.

    `key`, from `cache_key`, is what they depend on; `dtype` of the files is "float32" or "float16".

    Raises:
        InputError: the folder holds features of another student or of other scenes, or the disk is too small.
    """
    cache = FeatureCache(folder, len(dataset), tuple(dataset.class_names))
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _check_key(folder / "cache.json", key)
        _check_space(settings, student, cache, dataset, dtype)
    distributed.barrier(f"features {folder}")
    if read_json(folder / "cache.json", AGAIN).get("scenes") == _count(cache):  # as many as a finished pass wrote
        return cache
    progress = Progress(active=jax.process_index() == 0)
    missing = each_scene(settings, student, dataset, variables, skip=lambda n: cache.path(n).exists())
    for scene, features in missing:
        number, path = scene.stream_index, cache.path(scene.stream_index)
        arrays = {path.with_suffix(".labels.npy"): np.asarray(scene.labels), path: narrowed(features, dtype, FLOAT32)}
        for target, array in arrays.items():
            with written_whole(target) as file:
                np.save(file, array, allow_pickle=False)
        progress.add(f"features: scene {number + 1} of {len(cache)}", (len(cache) - number) / jax.process_count())
    distributed.barrier(f"computed {folder}")
    if jax.process_index() == 0:
        write_json(folder / "cache.json", {**read_json(folder / "cache.json", AGAIN), "scenes": _count(cache)})
    distributed.barrier(f"complete {folder}")
    return cache


def cache_key(record: Mapping[str, Any], dataset: Dataset, variables: Variables) -> dict[str, Any]:
    """The key of cached features: settings of the `record` (config.json) by dotted name, frames, weights' checksum."""
    kept = {
        key: value
        for key, value in flatten(record).items()
        if (key.startswith("data.") and key[5:] not in FREE_DATA)
        or (key.startswith("model.") and key[6:] not in FREE_MODEL)
        or key in ("seed", "probe.cache_dtype")
    }
    frames = [len(dataset), dataset.name(0), dataset.name(len(dataset) - 1)]
    return {**kept, "frames": frames, "weights": checksum(variables)}


def checksum(variables: Any, *, head: bool = False) -> str:
    """Checksum of the backbone's parameters and statistics, and of the head's if `head`."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(variables if head else without_head(variables)).items()):
        digest.update(f"{path} {np.shape(leaf)}".encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:16]


def _check_key(path: Path, key: Mapping[str, Any]) -> None:
    """Writes the key, or compares it with the saved one. Settings younger than the cache count as their defaults."""
    if not path.exists():
        write_json(path, {"key": key})
        return
    saved = read_json(path, AGAIN).get("key", {})
    now = json.loads(json.dumps(key))
    saved = json.loads(json.dumps({row.name: row.default for row in all_keys() if row.name in now})) | saved
    if found := differences(saved, now):
        raise InputError(
            f"{path.parent} holds features of another student or of other scenes ({found}); remove it, or use another "
            "--workdir"
        )


def _check_space(settings: TrainSettings, student: Student, cache: FeatureCache, dataset: Dataset, dtype: str) -> None:
    """Prints how large the cache will be, and compares it with the free space."""
    mesh = sharding.make_mesh(settings.mesh.data, settings.mesh.fsdp)
    sample = make_pipeline(settings, student.needs, dataset, mesh).sample()
    points, channels = np.mean([len(scene.feats) for scene in sample]), student.backbone.channels
    size = points * len(cache) * (channels * np.dtype(dtype).itemsize + 1)
    print(
        f"features: {len(cache)} scenes x about {points:,.0f} points x {channels} channels in "
        f"{dtype}: about {size / 1e9:.2g} GB in {cache.folder}",
        flush=True,
    )
    there = sum(path.stat().st_size for path in cache.folder.glob("*.npy"))
    free = shutil.disk_usage(cache.folder).free
    if size - there > free:
        raise InputError(
            f"{cache.folder}: the features need about {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; use "
            "--config.probe.cache_dtype=float16, another --workdir, or --config.probe.features=fixed, which keeps none"
        )


def _count(cache: FeatureCache) -> int:
    """How many scenes have features now; bad frames have none."""
    return sum(not path.name.endswith(".labels.npy") for path in cache.folder.glob("*.npy"))
