"""Serving one whole scan: end to end, by stage, and beside the exported model in onnxruntime.

    python -m scalr_jax.bench predict --root=SAMPLES
    python -m scalr_jax.bench predict --root=SAMPLES --dataset=pandaset --channels=128 --depth=12

SAMPLES holds semantic_kitti/ and pandaset/; without --root a street is generated. The model has random weights: time
does not depend on them. Milliseconds, the median of --runs turns in which everything runs one after the other:

    total_ms         a file in, the backbone's features of every point out: reading it and `Model.embed`
    stages_ms        read; voxelise (with the cut to the field of view and the features); neighbours; tables (of cells,
                     and packing); network (with its way to the device and back); upsample
    onnxruntime_ms   the network alone: the same formulation, exported with --fold, on the same scan without padding, in
                     onnxruntime with as many threads
    ratio            network / onnxruntime
    onnxruntime_total_ms   onnxruntime's network and the other stages

Both networks run on the CPU; where JAX has an accelerator, onnxruntime is left out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pykdtree.kdtree import KDTree

from scalr_jax.api import Model
from scalr_jax.bench.scenes import scan_street
from scalr_jax.bench.timing import Parser, header, interleave, positive, ranges, rounded, show_times
from scalr_jax.config import get_config
from scalr_jax.data import transforms
from scalr_jax.data.grids import make_plane, voxelize
from scalr_jax.data.packing import pack_shard, static_capacities
from scalr_jax.data.readers import scan_inputs
from scalr_jax.data.scenes import FEATURES, PLANE_AXES, SceneView
from scalr_jax.data.sensors import INTENSITY, PRETRAINING
from scalr_jax.data.whole_scan import whole_scan
from scalr_jax.export.fold import fold
from scalr_jax.export.inputs import scene_inputs
from scalr_jax.interop.model import empty_batch, student_of
from scalr_jax.runtime.errors import InputError

SCANS = {
    "semantic_kitti": ("semantic_kitti/dataset/sequences/*/velodyne/*.bin", "semantic_kitti"),
    "pandaset": ("pandaset/*/lidar/*.pkl.gz", "pandar64"),
}
STAGES = ("read", "voxelise", "neighbours", "tables", "network", "upsample")
WHAT = {"total": "file to features of every point", "onnxruntime": "the same network"}


def main(argv: list[str]) -> dict[str, Any]:
    """Measures, prints a table and returns the object of the last line."""
    parser = Parser("-m scalr_jax.bench predict", __doc__)
    parser.add_argument("--root", default="", help="folder that holds semantic_kitti, pandaset; none: generated")
    parser.add_argument("--dataset", choices=tuple(SCANS), default="semantic_kitti", help="whose first scan is taken")
    parser.add_argument("--channels", type=positive, default=256)
    parser.add_argument("--depth", type=positive, default=48)
    parser.add_argument("--runs", type=positive, default=5, help="turns, of which the median counts")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path, sensor = _find_scan(arguments, Path(folder))
        model = random_model(arguments.channels, arguments.depth, INTENSITY[sensor])
        return measure(model, path, sensor, arguments)


def random_model(channels: int, depth: int, intensity: tuple[float, float]) -> Model:
    """A student without head, with random weights and the published field of view."""
    config = get_config().model
    config.unlock()
    config.update(channels=channels, depth=depth, num_features=len(FEATURES), head="none", out_features=0)
    config.update(intensity=intensity, voxel_size=get_config().data.voxel_size, grids=PRETRAINING.grids)
    student = student_of(config)
    init = jax.jit(lambda batch: student.init(jax.random.key(0), batch, train=False))
    return Model(config, init(empty_batch(config.num_features, student.needs)))


def _find_scan(arguments: argparse.Namespace, folder: Path) -> tuple[Path, str]:
    """A scan's file and its sensor. A generated one is written into `folder`."""
    pattern, sensor = SCANS[arguments.dataset]
    if not arguments.root:
        print("no --root: the scan is generated, of about the size of a real one")
        points, *_ = scan_street(0, np.random.default_rng(0), (-24.8, 2.0), 360.0, 64, 2_000, 80.0)  # a whole turn
        points.astype("<f4").tofile(folder / "scan.bin")
        return folder / "scan.bin", "semantic_kitti"
    found = sorted(Path(arguments.root).glob(pattern))
    if not found:
        raise InputError(f"{arguments.root} has no {pattern}; give the folder that holds {arguments.dataset}")
    return found[0], sensor


def measure(model: Model, path: Path, sensor: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model on one scan."""

    def read() -> np.ndarray:
        return scan_inputs.student_points(scan_inputs.read_frame(path, sensor=sensor))

    points = read()
    needs = model.student.needs
    scene, nearest = whole_scan(points, needs, model.config.intensity, model.config.voxel_size)
    grids = needs.grids
    capacities = static_capacities(scene, grids)
    stages = {"read": read, **_stages(model, points, scene, nearest, grids)}
    print(f"{path.name}: {len(points)} points, {len(scene.feats)} in voxels, in room for {capacities.points}")
    functions: dict[str, Callable] = {"total": lambda: model.embed(read()), **stages}
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        functions["onnxruntime"] = _onnxruntime(model, scene, stages["network"])
    times = interleave(functions, runs=arguments.runs)
    show_times({name: (value, WHAT.get(name, "")) for name, value in times.items()})
    milliseconds = {name: 1e3 * value.median for name, value in times.items()}
    theirs = milliseconds.get("onnxruntime")
    others = sum(milliseconds[name] for name in STAGES if name != "network")
    result = {
        **header(arguments.runs),
        "threads": _threads(),
        "scan": path.name if arguments.root else "generated",
        "points": len(points),
        "voxels": len(scene.feats),
        "rows": capacities.points,
        "channels": arguments.channels,
        "depth": arguments.depth,
        "total_ms": milliseconds["total"],
        "stages_ms": rounded({name: milliseconds[name] for name in STAGES}),
        "onnxruntime_ms": theirs,
        "onnxruntime_total_ms": others + theirs if theirs else None,
        "ratio": milliseconds["network"] / theirs if theirs else None,
        "ranges_ms": ranges(times, 1e3),
    }
    if result["ratio"]:
        print(f"network: {result['ratio']:.2f} times onnxruntime's")
    return rounded(result)


def _stages(
    model: Model, points: np.ndarray, scene: SceneView, nearest: np.ndarray, grids: Sequence
) -> dict[str, Callable[[], Any]]:
    """The stages of `whole_scan` and `Model.embed`, each applied to the result of the one before."""
    config = model.config
    xyz = np.ascontiguousarray(scene.feats[:, 1:4])
    capacities = static_capacities(scene, grids)
    student = student_of(config)
    network = jax.jit(lambda variables, batch: student.apply(variables, batch, train=False))

    def voxelise() -> Any:
        kept = voxelize(points, config.voxel_size)
        cut = transforms.in_view(points[kept, :3], model.student.needs)
        return transforms.make_features(points[kept[cut], :3], points[kept[cut], 3], config.intensity)

    def tables() -> Any:
        planes = [
            make_plane(xyz, axes, grid, config.field_of_view) for axes, grid in zip(PLANE_AXES, grids, strict=True)
        ]
        return planes, pack_shard([scene], capacities, scene, grids)

    shard = tables()[1]

    def run_network() -> np.ndarray:
        batch = jax.tree.map(lambda x: jax.numpy.asarray(x)[None], shard)
        return np.asarray(network(model.variables, batch))[0]

    rows = run_network()

    def upsample() -> Any:
        KDTree(xyz).query(points[:, :3], k=1)
        return rows[nearest]

    return {
        "voxelise": voxelise,
        "neighbours": lambda: transforms.find_neighbors(xyz, config.num_neighbors),
        "tables": tables,
        "network": run_network,
        "upsample": upsample,
    }


def _onnxruntime(model: Model, scene: SceneView, network: Callable[[], np.ndarray]) -> Callable[[], Any]:
    """A function that runs the exported network on the same scene. Raises InputError when its result differs."""
    try:
        from scalr_jax.export.onnx import open_session, serialize
    except ImportError as error:
        raise InputError(f'the comparison needs onnxruntime: pip install "scalr_jax[export]" ({error})') from error
    variables = fold(jax.tree.map(np.asarray, model.variables))
    session = open_session(serialize(model.student, variables, model.config.to_dict()), threads=_threads())
    inputs = scene_inputs(scene, model.student.needs, "onnx")
    ours, theirs = network()[: len(scene.feats)], session.run(None, inputs)[0]
    difference = float(np.abs(ours - theirs).max() / max(1.0, np.abs(ours).max()))
    if not difference <= 1e-4:
        raise InputError(f"the exported network differs by {difference:.2g} of the largest value")
    return lambda: session.run(None, inputs)


def _threads() -> int:
    """Cores that this process may use: as many threads as XLA takes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
