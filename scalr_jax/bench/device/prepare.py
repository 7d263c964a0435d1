"""The inputs of `bench device`: one packed batch, the goldens, and compiled steps where asked for."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import jax

from scalr_jax.bench import scenes as bench_scenes
from scalr_jax.bench.device import cases, goldens
from scalr_jax.bench.device.names import BATCH, EXECUTABLES, GOLDEN
from scalr_jax.bench.timing import Parser
from scalr_jax.runtime.errors import InputError
from scalr_jax.runtime.storage import check_writable
from scalr_jax.train import executables

LARGEST = 60_000_000  # bytes of the folder


def prepare(arguments: argparse.Namespace) -> dict:
    """Writes the folder and returns what it holds. Raises `InputError`."""
    folder: Path = arguments.prepare
    check_writable(folder, "--prepare")
    parser = Parser("-m scalr_jax.bench device", None)
    bench_scenes.add_arguments(parser)
    (folder / GOLDEN).mkdir(parents=True, exist_ok=True)
    given = [f"--save_batch={folder / BATCH}", f"--root={arguments.root}"]
    given += ["--num_scenes=1", "--max_points=300", "--image_size=28,42"] if arguments.tiny else []
    scenes = bench_scenes.get_scenes(parser.parse_args(given))
    found = [name for name in goldens.FILES if (arguments.goldens / name).is_file()]
    for name in found:
        shutil.copy(arguments.goldens / name, folder / GOLDEN / name)
    if not found:
        print(f"--goldens={arguments.goldens} holds no {goldens.FILES[0]}: nothing published is compared")
    compiled = compile_ahead(arguments, scenes, folder) if arguments.topology else {}
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {total / 1e6:.1f} MB")
    result = {"bytes": total, "scenes": scenes.num_scenes, "goldens": found, "executables": compiled}
    return {**result, "jax": jax.__version__}


def compile_ahead(arguments: argparse.Namespace, scenes: bench_scenes.Scenes, folder: Path) -> dict[str, int]:
    """Bytes of each step compiled for a topology and saved; those that would make the folder too large are left out."""
    from scalr_jax.compile.abstract import compiling_for
    from scalr_jax.runtime import sharding
    from scalr_jax.runtime.chips import devices_of, parse_topology

    topology, saved = parse_topology(arguments.topology), {}
    if topology.num_devices != 1:
        raise InputError(f"--topology={arguments.topology} has {topology.num_devices} devices, and one is measured")
    (folder / EXECUTABLES).mkdir(exist_ok=True)
    mesh = sharding.make_mesh(devices=devices_of(topology.name))
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for name in cases.STUDENTS:
        for case in cases.cases_of(name, scenes.grids, "bfloat16", tiny=arguments.tiny):
            file = folder / EXECUTABLES / case.file
            with compiling_for(topology.chip) as options:
                made = cases.lower(case, scenes, mesh)
                size = executables.save(file, made.lowered, made.lowered.compile(options), list(mesh.devices.flat))
            if used + size > LARGEST:
                file.unlink()
                print(f"{file.name}: left out, for its {size / 1e6:.1f} MB would make the folder too large", flush=True)
                continue
            used, saved[file.name] = used + size, size
            print(f"{file.name}: {size / 1e6:.1f} MB", flush=True)
    return saved
