"""How fast scenes are made: samples a second a core, packing included, beside the published steps written plainly.

    python -m scalr_jax.bench pipeline --dataset=nuscenes --root=RECORDS --reference=RAW
    python -m scalr_jax.bench pipeline --dataset=nuscenes --root=RECORDS --cache=TOKENS

Times are CPU seconds of one process with one thread each (`time.process_time`), so a busy machine does not change them
much; files come from the page cache after the first round. Ours and the reference take turns. `--soak=5000` runs the
real pipeline with its workers instead and prints the resident memory of each process as it goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by pykdtree when it is loaded: one core means one thread

import jax
import numpy as np
from PIL import Image
from scipy.spatial import KDTree

from scalr_jax.bench.timing import Parser, two_sizes
from scalr_jax.config import DATASETS, DataSettings, StudentSettings
from scalr_jax.data import packing, pipeline, transforms
from scalr_jax.data.build import make_dataset, scene_settings
from scalr_jax.data.joined import Derived
from scalr_jax.data.readers import files
from scalr_jax.data.readers.raw import RawDataset
from scalr_jax.data.scenes import PLANE_AXES, Dataset, Frame, SceneView
from scalr_jax.data.tokens.store import Rows, TokenStore
from scalr_jax.models.build import make_backbone
from scalr_jax.runtime.errors import InputError

BATCH_SIZE = 8  # of the published loader
STAGES = (
    "read",
    "decode",
    "voxelise",
    "project",
    "resize",
    "tokens",
    "augment",
    "neighbours",
    "cells",
    "pack",
    "other",
)


def main(argv: list[str]) -> dict:
    """Measures, prints a table and returns the object of the last line."""
    arguments = _parse(argv)
    data, settings = _settings(arguments)
    if arguments.soak:
        return _soak(data, settings, arguments)
    names = arguments.dataset.split("+")
    line: dict[str, Any] = {**_header(arguments.runs), "samples": arguments.samples}
    for name in names:
        result = _measure(name, data, settings, arguments)
        for key, value in result.items():
            line.setdefault(key, {})[name] = value
        _print_table(name, result)
    return line


def _header(runs: int) -> dict[str, Any]:
    """The first keys of every result; scenes are made on the CPU, whatever devices there are."""
    return {"device": "cpu", "jax": jax.__version__, "runs": runs}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("-m scalr_jax.bench pipeline", __doc__)
    parser.add_argument("--dataset", required=True, help="nuscenes, semantic_kitti, pandaset, folder; several with +")
    parser.add_argument("--root", required=True, help="raw dataset or prepared records; of several, a folder of them")
    parser.add_argument("--reference", default="", help="raw dataset for the published steps; none: no ratio")
    parser.add_argument("--cache", default="", help="a teacher's tokens: scenes are also made with these, in turns")
    parser.add_argument("--image_size", default="224,448", help="rows,columns that the teacher sees")
    parser.add_argument("--sensor", default="pandar64", help="of pandaset: pandar64 or pandargt")
    parser.add_argument("--samples", type=int, default=24, help="scenes a run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--full_decode", action="store_true", help="decode JPEG files at their full size")
    parser.add_argument("--soak", type=int, default=0, help="run so many samples through the workers, watch the memory")
    parser.add_argument("--num_workers", type=int, default=2, help="of the soak run")
    arguments = parser.parse_args(argv)
    if arguments.samples < 1 or arguments.runs < 1:
        raise InputError("--samples and --runs must be at least 1")
    if arguments.soak < 0 or not 0 <= arguments.num_workers <= 1024:
        raise InputError("--soak must be at least 0, and --num_workers from 0 to 1024")
    return arguments


def _settings(arguments: argparse.Namespace) -> tuple[DataSettings, transforms.SceneSettings]:
    """Settings of data and scenes of the default student."""
    try:
        image_size = two_sizes(arguments.image_size)
    except argparse.ArgumentTypeError as error:
        sentence = f"--image_size={arguments.image_size} is not two numbers, which must be positive, as in 224,448"
        raise InputError(sentence) from error
    if unknown := [name for name in arguments.dataset.split("+") if name not in DATASETS]:
        raise InputError(f"--dataset={arguments.dataset}: {unknown[0]!r} is none of {', '.join(DATASETS)}")
    data = DataSettings(
        dataset=arguments.dataset,
        root=arguments.root,
        split="all",
        image_size=image_size,
        scaled_decode=not arguments.full_decode,
        sensors=(arguments.sensor,),
    )
    return data, scene_settings(data, make_backbone(StudentSettings()).needs, task="distill", train=True)


def _dataset(data: DataSettings, name: str, root: str, *, several: bool, tokens: Sequence[TokenStore] = ()) -> Dataset:
    data = dataclasses.replace(data, dataset=name, root=str(Path(root) / name) if several else root)
    return make_dataset(data, "all", task="distill", seed=0, cache=Path(root), tokens=tokens)


def _measure(name: str, data: DataSettings, settings: transforms.SceneSettings, arguments: argparse.Namespace) -> dict:
    several = "+" in arguments.dataset
    ours = _dataset(data, name, arguments.root, several=several)
    plain = _dataset(data, name, arguments.reference, several=several) if arguments.reference else None
    make = pipeline.BuildScene(ours, settings, seed=0)
    records = [i % len(ours) for i in range(arguments.samples)]
    sample = [make(i, (0, record)) for i, record in enumerate(records)]
    if errors := [scene.error for scene in sample if scene.error]:
        raise InputError(f"{len(errors)} of {len(sample)} frames are bad; the first one: {errors[0]}")
    points, scenes = data.points_per_shard, data.scenes_per_shard
    capacities = packing.derive_capacities(sample, points=points, scenes=scenes)

    kinds = [(make, sample[0])]
    if arguments.cache:
        cached = _dataset(data, name, arguments.root, several=several, tokens=(TokenStore(arguments.cache),))
        make = pipeline.BuildScene(cached, settings, seed=0)
        kinds.append((make, make(0, (0, records[0]))))

    def run(make: pipeline.BuildScene, template: SceneView, stages: _Stages) -> None:
        made = (stages.call("other", make, i, (0, record)) for i, record in enumerate(records))
        for pack in packing.pack_stream(made, capacities):
            stages.call("pack", packing.pack_shard, pack.scenes, capacities, template, settings.needs.grids)

    def run_plain() -> None:
        assert plain is not None
        made = []
        for i in range(len(records)):
            rng = np.random.default_rng(i)
            record = i % len(plain)
            made.append(plain_scene(plain.frame(record, rng), plain.intensity(record), settings, rng))
            if len(made) == BATCH_SIZE or i == len(records) - 1:
                plain_batch(made)
                made = []

    plain_s, timed = [], [([], []) for _ in kinds]
    for _ in range(arguments.runs):
        for kind, (seconds, by_stage) in zip(kinds, timed, strict=True):
            stages = _Stages()
            with stages.watching(ours):
                seconds.append(_cpu_seconds(lambda: run(*kind, stages)))  # noqa: B023
            by_stage.append({stage: 1e3 * each / len(records) for stage, each in stages.seconds.items()})
        if plain is not None:
            plain_s.append(_cpu_seconds(run_plain))
    per_sample, *per_cached = (float(np.median(seconds)) / len(records) for seconds, _ in timed)
    per_plain = float(np.median(plain_s)) / len(records) if plain_s else None
    stages_ms, *cached_ms = (
        {stage: float(np.median([each[stage] for each in by_stage])) for stage in STAGES} for _, by_stage in timed
    )
    more: dict[str, object] = {}
    if per_cached:
        more = {"cached_samples_per_s_per_core": 1.0 / per_cached[0], "cached_ratio": per_sample / per_cached[0]}
        more["cached_stages_ms"] = cached_ms[0]
    return {
        **more,
        "samples_per_s_per_core": 1.0 / per_sample,
        "reference_samples_per_s_per_core": 1.0 / per_plain if per_plain else None,
        "ratio": per_plain / per_sample if per_plain else None,
        "stages_ms": stages_ms,
        "points": float(np.mean([len(scene.feats) for scene in sample])),
    }


def _cpu_seconds(function: Callable[[], None]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


class _Stages:
    """CPU seconds by stage. A stage's time excludes that of the stages it calls."""

    def __init__(self):
        self.seconds: dict[str, float] = {stage: 0.0 for stage in STAGES}  # noqa: C420
        self._inner = [0.0]

    def call(self, stage: str, function: Callable, *args, **kwargs):
        self._inner.append(0.0)
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            elapsed = time.process_time() - start
            self.seconds[stage] += elapsed - self._inner.pop()
            self._inner[-1] += elapsed

    def watching(self, dataset: Dataset) -> ExitStack:
        """A context in which the functions of the loader count as their stage."""
        stack = ExitStack()
        reader = type(dataset.datasets[0] if isinstance(dataset, Derived) else dataset)
        places = [(reader, "frame", "read"), (files, "read_image", "decode"), (files, "decode_image", "decode")]
        places += [(reader, "_pair", "project")] if issubclass(reader, RawDataset) else []
        places += [(transforms, "one_a_voxel", "voxelise"), (transforms, "resize_image", "resize")]
        places += [(transforms, name, "augment") for name in ("limit", "to_ego", "augment", "make_features")]
        places += [(transforms, "find_neighbors", "neighbours"), (Rows, "read", "tokens")]
        places += [(transforms, name, "cells") for name in ("in_view", "make_plane")]
        for owner, name, stage in places:
            stack.enter_context(mock.patch.object(owner, name, self._timed(stage, getattr(owner, name))))
        return stack

    def _timed(self, stage: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            return self.call(stage, function, *args, **kwargs)

        return timed


def plain_scene(
    frame: Frame, statistics: tuple[float, float], settings: transforms.SceneSettings, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """The published steps, written plainly: what the fast ones are compared with.

    Returns feats [N, F] float32, neighbours [N, K], cells [3, N], image [3, h, w] float32 in 0..1, pixels [N, 2].
    """
    assert frame.image is not None
    assert frame.pixels is not None
    assert frame.visible is not None
    order = rng.permutation(len(frame.points))
    xyz = frame.points[order, :3]
    voxels = np.floor((xyz - xyz.min(axis=0)) / settings.voxel_size).astype(np.int64)
    _, first = np.unique(voxels, axis=0, return_index=True)
    kept = order[first]
    kept = kept[frame.visible[kept]]
    if len(kept) > settings.max_points:
        center = frame.points[kept[rng.integers(len(kept))], :3]
        distance = np.square(frame.points[kept, :3] - center).sum(axis=1)
        kept = kept[np.argsort(distance)[: settings.max_points]]
    xyz = frame.points[kept, :3] @ frame.to_ego[:3, :3].T + frame.to_ego[:3, 3]
    if settings.augmentation != "none":
        xyz = transforms.augment(xyz, rng)
    low, high = np.array(settings.needs.field_of_view)
    inside = ((xyz > low + 1e-4) & (xyz < high - 1e-4)).all(axis=1)
    xyz, kept = xyz[inside].astype(np.float32), kept[inside]
    intensity = (frame.points[kept, 3:] - statistics[0]) / statistics[1]
    feats = np.concatenate([intensity, xyz, np.linalg.norm(xyz, axis=1, keepdims=True)], axis=1).astype(np.float32)
    neighbors = np.asarray(KDTree(xyz).query(xyz, k=settings.needs.num_neighbors + 1)[1])
    cells = []
    for axes, (rows, columns) in zip(PLANE_AXES, settings.needs.grids, strict=True):
        a, b = axes
        size = (high[[a, b]] - low[[a, b]]) / (rows, columns)
        i, j = np.floor((xyz[:, [a, b]] - low[[a, b]]) / size).astype(np.int64).T
        cells.append(i * columns + j)
    height, width = settings.image_size
    ratio = np.array([height, width]) / np.array(frame.image.shape[:2])
    pixels = np.floor(np.floor(frame.pixels[kept]) * ratio).astype(np.int64)
    image = (frame.image / 255.0).astype(np.float32).transpose(2, 0, 1)  # as published: floats before the resize
    resized = [np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BILINEAR)) for c in image]
    return feats, neighbors[:, 1:], np.stack(cells), np.stack(resized), pixels


def plain_batch(scenes: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """Scenes as published: points padded with zeros to the longest of the batch, then stacked."""
    longest = max(len(scene[0]) for scene in scenes)
    columns: list[list[np.ndarray]] = [[], [], [], [], []]
    for feats, neighbors, cells, image, pixels in scenes:
        padding = longest - len(feats)
        columns[0].append(np.pad(feats, ((0, padding), (0, 0))))
        columns[1].append(np.pad(neighbors, ((0, padding), (0, 0))))
        columns[2].append(np.pad(cells, ((0, 0), (0, padding))))
        columns[3].append(image)
        columns[4].append(np.pad(pixels, ((0, padding), (0, 0))))
    return [np.stack(column) for column in columns]


def _print_table(name: str, result: dict) -> None:
    print(f"{name}: {result['points']:.0f} points a sample, {result['samples_per_s_per_core']:.1f} samples/s a core")
    cached = result.get("cached_stages_ms", {})
    for stage, milliseconds in result["stages_ms"].items():
        print(f"  {stage:<11}{milliseconds:8.2f} ms" + (f"{cached[stage]:8.2f} ms with tokens" if cached else ""))
    if cached:
        rate = result["cached_samples_per_s_per_core"]
        print(f"  with tokens: {rate:.1f} samples/s a core, {result['cached_ratio']:.2f} times as many")
    if result["ratio"] is not None:
        reference = result["reference_samples_per_s_per_core"]
        print(f"  published steps, plainly: {reference:.1f} samples/s a core; ratio {result['ratio']:.2f}")


def _soak(data: DataSettings, settings: transforms.SceneSettings, arguments: argparse.Namespace) -> dict:
    """Runs the pipeline with its workers; the largest growth of any process after the first tenth, in MiB."""
    dataset = make_dataset(data, "all", task="distill", seed=0, cache=Path(arguments.root))
    loader = pipeline.Pipeline(dataset, settings, num_workers=arguments.num_workers)
    sample = loader.sample()
    capacities = packing.derive_capacities(sample, points=data.points_per_shard, scenes=data.scenes_per_shard)
    done, rows, start = 0, [], time.monotonic()
    for step in loader.steps(capacities, sample[0]):
        done += step.num_scenes
        if done >= (len(rows) + 1) * arguments.soak / 10:
            rows.append(_resident())
            shown = "  ".join(f"{name} {megabytes:.0f}" for name, megabytes in rows[-1].items())
            print(f"{done} samples, {time.monotonic() - start:.0f} s; MiB resident: {shown}", flush=True)
        if done >= arguments.soak:
            break
    growth = {name: rows[-1][name] - rows[0].get(name, 0.0) for name in rows[-1]}
    return {
        **_header(1),
        "samples": done,
        "seconds": time.monotonic() - start,
        "resident_mib": rows[-1],
        "growth_mib": growth,
    }


def _resident() -> dict[str, float]:
    """MiB of memory in use by this process and by each of its children, by what they are."""
    import multiprocessing

    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    processes = {"parent": os.getpid()}
    for k, child in enumerate(sorted(multiprocessing.active_children(), key=lambda child: child.pid or 0)):
        processes[f"worker {k}"] = child.pid or 0
    return {
        name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
        for name, pid in processes.items()
        if Path(f"/proc/{pid}/statm").exists()
    }
