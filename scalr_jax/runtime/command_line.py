"""Shared by the commands: parsing flags and config files, the flags that name a model, and how a command ends.

Exit codes: 0 done; 2 and one sentence on stderr when something outside of the program is wrong; 1 and a traceback for a
defect.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from scalr_jax.runtime.errors import BadFrameError, InputError, one_sentence

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SPACE = "free space on the disk and run the same command again"
ANOTHER_CONFIG = "correct it, or give another file, as in --config=configs/demo.py"
MODEL_FLAGS = """\
    --model          a workdir of distill, probe or finetune, an exported folder, or a published .pth or .safetensors;
                     or one of the last two on the Hugging Face Hub, hf://OWNER/NAME or hf://OWNER/NAME/FILE
    --sensor         whose intensity (and for a published file field of view and grids) apply: nuscenes,
                     semantic_kitti, pandar64 or pandargt; needed for published files and runs on several sensors
    --intensity      mean,deviation of the raw intensity, instead of the sensor's
    --field_of_view  x,y,z,x,y,z: the lowest and the highest corner in metres, instead of the sensor's or the run's
    --grids          rows,columns of the planes xy, xz and yz, likewise: 256,256,256,32,256,32
    --activation     relu or gelu, for published downstream files, which do not say it
    --cache          folder of compiled programs, so that the next process need not compile (default:
                     $XDG_CACHE_HOME/scalr_jax or ~/.cache/scalr_jax; delete it as you like); "none" for none"""


# --------------------------------------------------------------------------------------------------------------- flags


def parse_flags(values: flags.FlagValues, arguments: Sequence[str], text: str | None) -> None:
    """Fills `values`. For --help prints `text`, with the flags of a model in place of {model}, and exits.

    Raises:
      InputError: an unknown flag, a wrong value, a config that cannot be loaded, or an argument that is no flag.
    """
    if {"--help", "-h", "-help"} & set(arguments[1:]):
        print((text or "").replace("{model}", MODEL_FLAGS))
        sys.exit(0)
    values.unparse_flags()  # of an earlier call in this process
    for key in [name for name in values if "." in name]:  # of its config
        delattr(values, key)
    path = named_config(arguments) if "config" in values else None
    try:
        rest = values(arguments)
        if path is not None:
            check_config(path, values["config"].value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a config file may raise anything, also SystemExit
        raise InputError(config_sentence(error, path)) from error
    if rest[1:]:
        raise InputError(f"unexpected arguments: {' '.join(rest[1:])}; flags begin with --")


def require(values: flags.FlagValues, *names: str, example: str) -> None:
    """Raises InputError unless all of these flags were given."""
    if any(values[name].value is None or not str(values[name].value).strip() for name in names):
        *others, last = [f"--{name}" for name in names]
        raise InputError(f"{', '.join(others)} and {last} are required, as in {example}")


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


# -------------------------------------------------------------------------------------------------------- config files


def named_config(arguments: Sequence[str]) -> str | None:
    """The file that --config names, without the argument after a colon; None where the flag was not given."""
    for i, text in reversed(list(enumerate(arguments))):
        name, given, value = text.partition("=")
        if name in ("--config", "-config"):
            return (value if given else " ".join(arguments[i + 1 : i + 2])).split(":", 1)[0]
    return None


def check_config(path: str, made: Any) -> None:
    """Raises InputError unless `made`, which a config file returned, is a ConfigDict; and what its references raise."""
    if not callable(getattr(made, "copy_and_resolve_references", None)):
        raise InputError(
            f"{path}: get_config() returned {type(made).__name__}, expected a ConfigDict; start from "
            "scalr_jax.config.get_config(), and return what it gives"
        )
    made.copy_and_resolve_references()


def config_sentence(error: BaseException, path: str | None) -> str:
    """The sentence of an error of parsing flags, among them the config file `path`."""
    if isinstance(error, InputError):
        return one_sentence(error)
    if path == "" or (path is not None and not Path(path).exists() and not Path(path).is_symlink()):
        return f"--config={path} does not exist; give a config file, as in --config=configs/demo.py"
    raised = None if path is None else _raised_by(error, path)
    if isinstance(raised, InputError):
        return one_sentence(raised)
    if raised is None and (isinstance(error, flags.Error) and "Traceback (most recent call last)" not in str(error)):
        return one_sentence(error)
    found = raised or error
    try:
        text = one_sentence(found)[:300]
    except Exception:  # of an odd exception's own __str__
        text = ""
    kind = "" if isinstance(found, flags.Error) else f" raises {type(found).__name__}"  # ml_collections' own words
    return f"{path}{kind}{': ' if text else ''}{text}; {ANOTHER_CONFIG}"


def _raised_by(error: BaseException, path: str) -> BaseException | None:
    """The error that a config file raised, without ml_collections' wrappings; None when it is about something else."""
    found: BaseException | None = error
    while found is not None:
        code = [frame.f_code for frame, _ in traceback.walk_tb(found.__traceback__)]
        if any(each.co_filename == path or each.co_name == "_LoadConfigModule" for each in code):
            return found
        found = found.__cause__ or found.__context__
    return None


# --------------------------------------------------------------------------------------------------------------- model


def define_model(values: flags.FlagValues) -> None:
    """Defines the flags of `MODEL_FLAGS` in `values`."""
    flags.DEFINE_string("model", None, "Workdir, exported folder or published file.", flag_values=values)
    flags.DEFINE_string("sensor", None, "Whose settings apply.", flag_values=values)
    flags.DEFINE_list("intensity", None, "Mean, standard deviation.", flag_values=values)
    flags.DEFINE_list("field_of_view", None, "Lowest and highest corner.", flag_values=values)
    flags.DEFINE_list("grids", None, "Rows, columns of each plane.", flag_values=values)
    flags.DEFINE_enum("activation", None, ("relu", "gelu"), "Of published downstream files.", flag_values=values)
    flags.DEFINE_string("cache", None, "Folder of compiled programs.", flag_values=values)


def model_arguments(values: flags.FlagValues) -> dict:
    """The arguments for `scalr_jax.load`. Raises InputError."""
    counts = {"intensity": 2, "field_of_view": 6, "grids": 6}
    arrays = {name: numbers(values, name, count) for name, count in counts.items()}
    return {"path": values.model, "sensor": values.sensor, "activation": values.activation, **arrays}


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


# ---------------------------------------------------------------------------------------------------------- exit codes


@contextlib.contextmanager
def exit_codes(*, interrupted: str = "", full: str = SPACE) -> Iterator[None]:
    """Turns errors that are no defects into exit code 2 and one sentence.

    `interrupted` is added when the user stopped the command; `full` says what to do when the disk is full.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        sentence = sentence_of(error, interrupted=interrupted, full=full)
        if sentence is None:
            raise
        fail(sentence)


def sentence_of(error: BaseException, *, interrupted: str = "", full: str = SPACE) -> str | None:
    """The sentence for an error, with the arguments of `exit_codes`; None for a defect."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {interrupted}" if interrupted else "interrupted"
    if isinstance(error, InputError | BadFrameError):
        return one_sentence(error)
    if isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED"):  # NumPy's; XLA's
        return (
            f"not enough memory ({one_sentence(error)[:200] or 'none is left'}); ask for smaller sizes or less at once"
        )
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{one_sentence(error)}; {full}"
    if isinstance(error, OSError) and (error.filename is not None or error.errno is not None):
        return one_sentence(error)
    return None


def named(name: object, error: BaseException) -> str:
    """The sentence of an error, beginning with the file or frame that it is about."""
    text = one_sentence(error)
    return text if str(name) in text else f"{name}: {text}"


def say(message: str) -> None:
    print(f"scalr_jax: error: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Exits with code 2 and one sentence on stderr."""
    say(message)
    sys.exit(2)


def end(code: int, message: str) -> NoReturn:
    """`fail` beside other processes: out at once, for an orderly exit would wait for peers that may never come."""
    say(message)
    sys.stdout.flush()
    os._exit(code)
