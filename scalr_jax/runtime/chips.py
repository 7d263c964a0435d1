"""Peaks of known chips, topologies to compile for, and the memory of this machine.

Memory of a TPU: what the TPU compiler grants a program of one device (it says so when one does not fit; libtpu 0.0.42,
2026-11-23). Peaks and the data-centre network (DCN): Google's Cloud TPU page of each chip. Links between chips (ICI):
Austin et al., "How to Scale Your Model" (2025), chapter 2, a tenth below Google's pages; TPU7x has v5p's on both. GPUs:
NVIDIA's data sheets of the SXM modules; links are NVLink's, the network one card of 400 Gb/s a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from scalr_jax.runtime.errors import InputError

# What libtpu needs on a machine without a TPU; set before JAX is imported.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GIB = 2**30
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


class Chip(NamedTuple):
    devices: int  # of JAX, a chip; the next two are of one device
    hbm_bytes: int
    bandwidth: float  # bytes a second of that memory
    flops: float  # bfloat16 a second, dense
    axes: int  # of the torus
    ring: int  # an axis is closed to a ring where the chips along it are a multiple of so many
    link_bytes: float  # a second, one way, of each of the two links along an axis
    dcn_bytes: float  # a second, out of a chip
    examples: str  # of topologies
    gpu: str = ""  # a GPU's name, as its driver has it
    clock: float = 0.0  # Hz of a TPU's cores, where it is known


CHIPS = {
    "v4": Chip(1, int(30.75 * GIB), 1.228e12, 275e12, 3, 4, 4.5e10, 6.25e9, "2x2x1, 2x2x2, 4x4x4, 4x4x8, 8x8x16"),
    "v5e": Chip(1, int(15.75 * GIB), 8.19e11, 197e12, 2, 16, 4.5e10, 3.125e9, "2x2, 4x4, 4x8, 8x8, 16x16", "", 1.5e9),
    "v5p": Chip(
        1, int(95.74 * GIB), 2.765e12, 459e12, 3, 4, 9e10, 6.25e9, "2x2x1, 2x2x2, 4x4x4, 8x8x8, 8x8x16", "", 1.75e9
    ),
    "v6e": Chip(1, int(31.25 * GIB), 1.64e12, 918e12, 2, 16, 9e10, 12.5e9, "2x2, 4x4, 4x8, 8x8, 16x16"),
    "tpu7x": Chip(2, int(94.75 * GIB), 3.69e12, 1153.5e12, 3, 4, 9e10, 12.5e9, "2x2x1, 2x2x2, 4x4x4, 8x8x8"),
    "h100": Chip(1, 84_942_979_072, 3.352e12, 989e12, 1, 1, 2.25e11, 5e10, "1, 8", "NVIDIA H100 80GB HBM3"),
    "h200": Chip(1, 151_397_597_184, 4.8e12, 989e12, 1, 1, 2.25e11, 5e10, "1, 8", "NVIDIA H200"),
}

# A Hopper GPU in XLA's terms, to compile without one: NVIDIA's figures of capability 9.0.
HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 }}
  memory_bandwidth: {bandwidth:.0f}  device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""

# Dense bfloat16 FLOP/s by `device_kind`; the first pattern that matches counts. From the makers' data sheets.
PEAKS: tuple[tuple[str, float], ...] = (
    (r"H100.*PCIe", 756e12),
    (r"H100 NVL|H200 NVL", 835e12),
    (r"H100|H200|GH200", 989e12),
    (r"B200", 2250e12),
    (r"A100|A800", 312e12),
    (r"L40S", 362e12),
    (r"TPU ?7x", 1153.5e12),  # a device, of which a chip has two
    (r"TPU v6", 918e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v4", 275e12),
    (r"TPU v3", 61.5e12),  # a core
)


class Topology(NamedTuple):
    """One slice."""

    name: str  # "v5p:8x8x16"
    kind: str  # a key of CHIPS
    dims: tuple[int, ...]  # chips along each axis

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def num_chips(self) -> int:
        return math.prod(self.dims)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a chip; None where it is not known."""
    return next((value for pattern, value in PEAKS if re.search(pattern, device_kind)), None)


def utilisation(num_flops: float, seconds: float, device_kind: str) -> float | None:
    """MFU: the share of the chip's peak that the model's own FLOPs take; None on CPU and unknown chips."""
    best = peak(device_kind)
    return None if best is None else num_flops / seconds / best


def parse_topology(name: str) -> Topology:
    """Raises `InputError` that lists the known chips."""
    kind, _, sizes = name.partition(":")
    known = "; ".join(f"{kind}: {chip.examples}" for kind, chip in CHIPS.items())
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", sizes):
        raise InputError(
            f"--topology={name} is not CHIP:AxBxC with a known chip and its chips along each axis ({known})"
        )
    dims = tuple(int(size) for size in sizes.split("x"))
    if len(dims) != CHIPS[kind].axes:
        raise InputError(
            f"--topology={name}: {kind} has chips along {CHIPS[kind].axes} axes, as in {CHIPS[kind].examples}"
        )
    return Topology(name, kind, dims)


def devices_of(name: str, num_slices: int = 1) -> list:
    """The devices of so many slices of a topology, to compile for; no TPU and no GPU is needed.

    Raises `InputError` without the chip's compiler, and for a topology that does not exist.
    """
    topology = parse_topology(name)
    if num_slices < 1:
        raise InputError(f"--slices={num_slices} must be 1 or more")
    if topology.chip.gpu and num_slices > 1:
        raise InputError(f"--slices={num_slices} is for TPUs; write {topology.kind}:{num_slices * topology.num_chips}")
    extra, module = ("cuda", "jax_plugins.xla_cuda13") if topology.chip.gpu else ("tpu", "libtpu")
    try:
        installed = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that would hold it
        installed = False
    if not installed:
        raise InputError(f"compiling for {name} needs its compiler (no chip): pip install 'scalr_jax[{extra}]'")
    return _described(topology, num_slices)


def _described(topology: Topology, num_slices: int) -> list:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    chip = topology.chip
    settings: dict = {}
    if chip.gpu:
        described = HOPPER.format(bandwidth=chip.bandwidth, memory=chip.hbm_bytes, name=chip.gpu)
        settings = {"target_config": described, "topology": f"1x1x{topology.num_chips}"}
    elif num_slices > 1:
        settings = {"num_slices": num_slices}
    if topology.kind == "v4":
        settings["chip_config_name"] = "megacore"  # its two cores as one device, as JAX runs it
    platform = "cuda" if chip.gpu else "tpu"
    try:
        return list(topologies.get_topology_desc(topology.name, platform, **settings).devices)
    except Exception as error:  # JAX raises several types for a topology that it does not know
        reason = str(error).splitlines()[0]
        raise InputError(f"--topology={topology.name}: {reason}; known are {chip.examples}") from error


def device_bytes() -> int | None:
    """The most memory that one of this process's devices has had in use; None where they do not say (CPU)."""
    from jax import local_devices

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def host_bytes() -> int:
    """Main memory of this machine, or of the container that this process runs in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text()))
    return total


def check_room(needed: float, what: str, remedy: str) -> None:
    """Raises `InputError` when `what` needs more bytes than this machine has."""
    if needed > host_bytes():
        raise InputError(
            f"{what} needs {needed / 1e9:,.1f} GB, and this machine has {host_bytes() / 1e9:,.1f} GB; {remedy}"
        )
