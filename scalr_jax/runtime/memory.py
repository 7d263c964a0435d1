"""How much memory there is: sizes that none holds are refused by arithmetic, before anything is allocated."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from scalr_jax.runtime.errors import InputError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def host_bytes() -> int:
    """Main memory of this machine, or of the container that this process runs in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text()))
    return total


def check_room(needed: float, what: str, remedy: str) -> None:
    """Raises `InputError` when `what` needs more bytes than this machine has."""
    if needed > host_bytes():
        raise InputError(
            f"{what} needs {needed / 1e9:,.1f} GB, and this machine has {host_bytes() / 1e9:,.1f} GB; {remedy}"
        )
