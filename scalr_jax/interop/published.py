"""Published files of every backbone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scalr_jax.interop import minkunet, waffleiron
from scalr_jax.interop.model import Published, unwrapped
from scalr_jax.interop.torch_file import read_weights_file

# By the updates of ScaLR's 25 and ScaLR+'s 65 epochs, 55,100 frames each in batches of 8: with eight GPUs the last
# batch is filled up, with one, two or four it is left out.
GPUS = {epochs * batches: gpus for epochs in (25, 65) for batches, gpus in ((6_888, "8"), (6_887, "fewer than 8"))}


def read_published(path: str | Path) -> Published:
    """The student in a published file, `.pth`, `.pt` or `.safetensors`. Raises `InputError`."""
    return read_content(read_weights_file(path), str(path))


def read_content(content: Mapping, name: str) -> Published:
    """`read_published` of a file's content. One of neither backbone is told what it lacks to be a WaffleIron."""
    content = unwrapped(content, name)
    found = (minkunet if minkunet.recognises(content) else waffleiron).read(content, name)
    return found._replace(training=read_training(content))


def read_training(content: Mapping) -> dict[str, int | str]:
    """What a file's scheduler says of its training: `updates`, and of a published pretraining `gpus`; or {}."""
    try:
        schedule = content["scheduler"]["lr_lambdas"][0]
        updates = schedule.get("max_iter", schedule.get("max_it"))  # ScaLR's name and ScaLR+'s
    except (KeyError, IndexError, TypeError, AttributeError):
        return {}
    if type(updates) is not int:
        return {}
    return {"updates": updates} | ({"gpus": GPUS[updates]} if updates in GPUS else {})
