"""The published PyTorch student and ours: the same scenes, the same weights, one run.

    python -m scalr_jax.bench published --clone=WAFFLEIRON --batch=mix.npz --channels=768 --depth=48
    python -m scalr_jax.bench published --clone=VAVIT --batch=mix.npz --name=vavit_b

WAFFLEIRON is a clone of valeoai/WaffleIron, which ScaLR's student is imported from, VAVIT one of valeoai/VaViT; nothing
of them is part of this project. PyTorch runs first and gives its memory back, then JAX. Medians of --runs calls after a
warm-up, seconds of one call:

    published_forward_s, published_step_s    with torch.autocast and GradScaler as in the published training (on CPU
                                             float32), every scene padded to the longest, as its loader does; the step
                                             is forward, loss for random targets, backward, AdamW
    forward_s, step_s                        ours, packed, by the code that trains
    speedup, forward_speedup                 how many times as many scenes a second
    published_peak_bytes                     the most that PyTorch allocated; on CPU what the process's memory grew
    peak_bytes, memory_ratio                 ours by XLA's plan; published_peak_bytes / peak_bytes
    difference                               of both outputs in float32, relative to the largest; above 0.01 an error
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scalr_jax.bench import programs as bench_programs
from scalr_jax.bench import scenes as bench_scenes
from scalr_jax.bench.student import add_student_arguments, described, student_of
from scalr_jax.bench.timing import Parser, interleave, positive, rounded, show_times
from scalr_jax.data.scenes import Batch
from scalr_jax.interop.published import published_state_dict
from scalr_jax.models.student import Student
from scalr_jax.models.vavit import VaViTBackbone
from scalr_jax.runtime.errors import InputError

TOLERANCE = 1e-2  # of float32 outputs; GPUs multiply in TensorFloat-32


class Padded(NamedTuple):
    """Scenes as the published student takes them: one row of the batch each, padded at the end to the longest."""

    feat: np.ndarray  # [B, F, N] float32
    cell_ind: np.ndarray  # [B, 3, N] int64: i * W + j
    occupied_cells: np.ndarray  # [B, N] float32: 1 for points, 0 for padding
    neighbors_emb: np.ndarray  # [B, K + 1, N] int64: the point itself first


def padded(batch: Batch, grids: Any) -> Padded:
    """A packed shard (D = 1) as padded scenes."""
    counts = [int(n) for n in batch.scene_points[0] if n]
    B, N, (K, F) = len(counts), max(counts), (batch.neighbors.shape[-1], batch.feats.shape[-1])
    out = Padded(
        np.zeros((B, F, N), np.float32),
        np.zeros((B, len(grids), N), np.int64),
        np.zeros((B, N), np.float32),
        np.full((B, K + 1, N), N - 1, np.int64),
    )
    start = 0
    for b, count in enumerate(counts):
        rows = slice(start, start + count)
        out.feat[b, :, :count] = batch.feats[0, rows].T
        out.occupied_cells[b, :count] = 1
        out.neighbors_emb[b, 0, :count] = np.arange(count)
        out.neighbors_emb[b, 1:, :count] = batch.neighbors[0, rows].T - start
        for k, (plane, (height, width)) in enumerate(zip(batch.planes, grids, strict=True)):
            out.cell_ind[b, k, :count] = plane.grid_index[0][plane.cell[0, rows]] % (height * width)
        start += count
    return out


def main(argv: list[str]) -> dict[str, Any]:
    """Measures, prints a table and returns the object of the last line."""
    parser = Parser("-m scalr_jax.bench published", __doc__)
    parser.add_argument("--clone", required=True, help="a clone of valeoai/WaffleIron, or of valeoai/VaViT")
    bench_scenes.add_arguments(parser)
    add_student_arguments(parser)
    parser.add_argument("--out_features", type=positive, default=1024, help="of the head: the teacher's width")
    arguments = parser.parse_args(argv)
    if arguments.head != "linear" or arguments.activation != "relu":
        raise InputError("the clone's student has a linear head and ReLU: leave --head and --activation out")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX would take the GPU's memory at its start
    torch, package = _import(Path(arguments.clone), "waffleiron" if arguments.name == "waffleiron" else "vavit")
    return measure(bench_scenes.get_scenes(arguments), arguments, torch, package)


def _most_resident() -> int:
    """The most bytes of memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _import(clone: Path, package: str) -> tuple[types.ModuleType, types.ModuleType]:
    """PyTorch and the clone's package."""
    if not (clone / package / "segmenter.py").is_file():
        project = {"waffleiron": "valeoai/WaffleIron", "vavit": "valeoai/VaViT"}[package]
        raise InputError(f"{clone} holds no {package}/segmenter.py; --clone names a clone of {project}")
    sys.path.insert(0, str(clone))
    try:
        return importlib.import_module("torch"), importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"the published student needs PyTorch: pip install torch ({error})") from error


def measure(scenes: bench_scenes.Scenes, arguments: argparse.Namespace, torch: Any, package: Any) -> dict[str, Any]:
    """All figures of both on one batch."""
    student, runs = student_of(arguments, scenes.grids), arguments.runs
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # so that PyTorch has the GPU to itself
        batch = jax.device_put(scenes.batch._replace(images=None, pixels=None, labels=None))
        variables = jax.tree.map(np.asarray, jax.jit(lambda b: student.init(jax.random.key(0), b, train=False))(batch))
    theirs = _Published(torch, package, student, published_state_dict(student, variables), scenes)
    wanted = theirs.outputs()
    published = interleave({"published_forward_s": theirs.forward, "published_step_s": theirs.step}, runs=runs)
    published_bytes = theirs.peak_bytes()
    device_name = theirs.device_name()
    del theirs
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    batch = jax.device_put(jax.tree.map(np.asarray, batch))
    precise = student.clone(dtype=jnp.float32)
    found = np.asarray(jax.jit(lambda v, b: precise.apply(v, b, train=False))(variables, batch))
    found = found.reshape(-1, found.shape[-1])[: len(wanted)]
    difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not difference <= TOLERANCE:
        raise AssertionError(f"the two students' outputs differ by {difference:.3g} of the largest")
    step, plan_bytes = bench_programs.training_step(student, batch)
    programs = {"step_s": step, "forward_s": bench_programs.forward_pass(student, batch)}
    times = published | interleave(programs, runs=runs)
    show_times({name: (value, "") for name, value in times.items()})
    medians = {name: value.median for name, value in times.items()}
    result = {
        **described(scenes, student, runs),
        "torch": torch.__version__,
        "torch_device": device_name,
        **medians,
        "scenes_per_s": scenes.num_scenes / medians["step_s"],
        "published_scenes_per_s": scenes.num_scenes / medians["published_step_s"],
        "speedup": medians["published_step_s"] / medians["step_s"],
        "forward_speedup": medians["published_forward_s"] / medians["forward_s"],
        "published_peak_bytes": published_bytes,
        "peak_bytes": plan_bytes,
        "memory_ratio": published_bytes / plan_bytes if published_bytes and plan_bytes else None,
        "difference": difference,
    }
    print(f"{result['speedup']:.2f} times as many scenes a second in training, {result['forward_speedup']:.2f} forward")
    return rounded(result)


class _Network(NamedTuple):
    """A published network, its inputs, and from its output to the rows of all points in the packed order."""

    network: Any
    inputs: tuple
    rows: Callable


def _waffleiron(
    torch: types.ModuleType, package: types.ModuleType, student: Student, scenes: bench_scenes.Scenes
) -> _Network:
    backbone: Any = student.backbone
    network = package.Segmenter(
        input_channels=scenes.batch.feats.shape[-1],
        feat_channels=backbone.channels,
        nb_class=student.out_features,
        depth=backbone.depth,
        grid_shape=[list(grid) for grid in scenes.grids],
        layer_norm=backbone.norm == "layer",
    )
    inputs = tuple(map(torch.from_numpy, padded(scenes.batch, scenes.grids)))
    mask = inputs[2] > 0  # [B, N]
    return _Network(network, inputs, lambda out: out.transpose(1, 2)[mask.to(out.device)])


def _vavit(
    torch: types.ModuleType, package: types.ModuleType, student: Student, scenes: bench_scenes.Scenes
) -> _Network:
    """Pillars as its loader fills them up: each scene to the longest, with padding tokens."""
    size, batch = student.backbone, scenes.batch
    assert isinstance(size, VaViTBackbone) and batch.pillars is not None  # noqa: PT018
    widths = (batch.feats.shape[-1], size.point_hidden, size.point_depth, size.width, size.depth, size.num_heads)
    widths += (size.hidden / size.width, size.merge_hidden, size.channels, student.out_features)
    counts, num_points = batch.pillars.counts[0].astype(np.int64), int(batch.scene_points.sum())
    longest, scene = int(counts.max()), batch.scene[0, :num_points]
    place = batch.pillars.cell[0, :num_points] - (np.cumsum(counts) - counts)[scene] + scene * longest
    rows = np.arange(len(counts) * longest).reshape(-1, longest)
    occupied = np.arange(longest) < counts[:, None]
    coordinates = batch.pillars.coordinates[0, : counts.sum()]
    arrays = (batch.feats[0, :num_points], batch.neighbors[0, :num_points], coordinates, place.astype(np.int64))
    arrays += (rows[occupied], rows[~occupied], np.full(len(counts), longest))
    return _Network(package.Segmenter(*widths), tuple(map(torch.from_numpy, arrays)), lambda out: out)


class _Published:
    """The published student on its device, with the given weights."""

    def __init__(self, torch: Any, package: Any, student: Student, state: dict, scenes: bench_scenes.Scenes):
        self.torch, self.cuda = torch, torch.cuda.is_available()
        self.device, self.resident = torch.device("cuda" if self.cuda else "cpu"), _most_resident()
        make = _waffleiron if student.needs.pillar_size is None else _vavit
        network, inputs, self.rows = make(torch, package, student, scenes)
        network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
        self.network = network.to(self.device)
        self.inputs = tuple(array.to(self.device) for array in inputs)
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(scenes.num_points, student.out_features, generator=generator)
        self.target = torch.nn.functional.normalize(target, dim=1).to(self.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3, weight_decay=0.03)
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.cuda)

    def outputs(self) -> np.ndarray:
        """[P, out_features] float32 of the points that count, in the packed order."""
        with self.torch.no_grad():
            out = self.network.eval()(*self.inputs)
        return self.rows(out).float().cpu().numpy()

    def forward(self) -> None:
        self.network.eval()
        with self.torch.no_grad(), self.torch.autocast("cuda", enabled=self.cuda):
            self.network(*self.inputs)
        self._wait()

    def step(self) -> None:
        torch = self.torch
        self.network.train()
        with torch.autocast("cuda", enabled=self.cuda):
            out = self.rows(self.network(*self.inputs))
            loss = (torch.nn.functional.normalize(out, dim=1) - self.target).norm(dim=1).mean()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._wait()

    def _wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        return int(self.torch.cuda.max_memory_allocated()) if self.cuda else _most_resident() - self.resident

    def device_name(self) -> str:
        return self.torch.cuda.get_device_name() if self.cuda else "cpu"
