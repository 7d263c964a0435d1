"""The flags that say which model, for the commands that use one, and the cache of compiled programs."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from absl import flags

from scalr_jax.runtime.errors import InputError

HELP = """\
    --model          a workdir of distill, probe or finetune, an exported folder, or a published .pth or .safetensors
    --sensor         whose intensity (and for a published file field of view and grids) apply: nuscenes,
                     semantic_kitti, pandar64 or pandargt; needed for published files and runs on several sensors
    --intensity      mean,deviation of the raw intensity, instead of the sensor's
    --field_of_view  x,y,z,x,y,z: the lowest and the highest corner in metres, instead of the sensor's or the run's
    --grids          rows,columns of the planes xy, xz and yz, likewise: 256,256,256,32,256,32
    --activation     relu or gelu, for published downstream files, which do not say it
    --cache          folder of compiled programs, so that the next process need not compile (default:
                     $XDG_CACHE_HOME/scalr_jax or ~/.cache/scalr_jax; delete it as you like); "none" for none"""


def define(values: flags.FlagValues) -> None:
    """Defines them in `values`."""
    flags.DEFINE_string("model", None, "Workdir, exported folder or published file.", flag_values=values)
    flags.DEFINE_string("sensor", None, "Whose settings apply.", flag_values=values)
    flags.DEFINE_list("intensity", None, "Mean, standard deviation.", flag_values=values)
    flags.DEFINE_list("field_of_view", None, "Lowest and highest corner.", flag_values=values)
    flags.DEFINE_list("grids", None, "Rows, columns of each plane.", flag_values=values)
    flags.DEFINE_enum("activation", None, ("relu", "gelu"), "Of published downstream files.", flag_values=values)
    flags.DEFINE_string("cache", None, "Folder of compiled programs.", flag_values=values)


def load_model(values: flags.FlagValues) -> Any:
    """The `scalr_jax.Model` of the flags. Raises InputError."""
    use_cache(values.cache)
    from scalr_jax.api import load

    intensity = numbers(values, "intensity", 2)
    return load(
        values.model,
        sensor=values.sensor,
        intensity=None if intensity is None else (intensity[0], intensity[1]),
        field_of_view=numbers(values, "field_of_view", 6),
        grids=numbers(values, "grids", 6),
        activation=values.activation,
    )


def numbers(values: flags.FlagValues, name: str, count: int) -> list[float] | None:
    """The numbers of a list flag; None when it was not given. Raises InputError when they are not `count` numbers."""
    given = values[name].value
    if given is None:
        return None
    try:
        found = [float(text) for text in given]
    except ValueError:
        found = []
    if len(found) != count or not all(math.isfinite(number) for number in found):
        raise InputError(f"--{name}={','.join(given)} must be {count} numbers with commas between them")
    return found


def use_cache(folder: str | Path | None = None) -> Path | None:
    """Keeps compiled programs in `folder` (None: the user's cache, "none": not at all). Returns it, or None.

    A folder that cannot be written costs only the time to compile: it is named, and no error. What is kept is found
    again by the same JAX on the same kind of device.
    """
    if folder == "none":
        return None
    path = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalr_jax"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "not writable")
    except (OSError, RuntimeError) as error:
        print(f"compiled programs are not kept: {path}: {getattr(error, 'strerror', None) or error}")
        return None
    import jax

    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
