"""Shared by the tests of `scalr_jax.predict`: two random models, scans, and the command, in process and as one."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest

import scalr_jax.api
from scalr_jax.interop import published as interop
from scalr_jax.predict import run as predict
from scalr_jax.runtime.command_line import model_arguments
from tests.support.tiny_student import tiny_model

EXPLICIT = (
    "--intensity=10,5",
    "--field_of_view=-16,-16,-4,16,16,4",
    "--grids=16,16,16,8,16,8",
    "--activation=relu",
    "--cache=none",
)


def write_models(folder):
    """A distilled and a probed model, random, as published files."""
    interop.save_torch_checkpoint(folder / "distilled.pth", *tiny_model("distill", 6))
    interop.save_torch_checkpoint(folder / "probed.pth", *tiny_model("segment", 7))
    return folder


@contextlib.contextmanager
def loaded_once():
    """One model, and so one compilation, for all tests that name the same file and flags."""
    loaded = {}
    original = scalr_jax.api.load

    def load_once(*arguments, **named):
        key = repr((arguments, named))
        if key not in loaded:
            loaded[key] = original(*arguments, **named)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scalr_jax.api, "load", load_once)
        yield


def load(path):
    """The model that the command loads."""
    flags = predict.FLAGS
    flags.unparse_flags()
    flags(["predict", f"--model={path}", *EXPLICIT])
    return scalr_jax.api.load(**model_arguments(flags))


def make_points(number=300, seed=0):
    """Points on a ground and above it, within 14 m."""
    rng = np.random.default_rng(seed)
    points = np.column_stack([rng.uniform(-14, 14, (number, 2)), np.full(number, -1.7), rng.normal(10, 5, number)])
    points[::4, 2] = rng.uniform(-1.7, 2, len(points[::4]))
    return points.astype(np.float32)


def write_bin(path, points):
    path.parent.mkdir(parents=True, exist_ok=True)
    points.astype("<f4").tofile(path)
    return path


def run(model, scan, *flags):
    predict.run(["predict", f"--model={model}", f"--input={scan}", *EXPLICIT, *map(str, flags)])


def sentence_of(capsys, *arguments):
    """The command's stderr when it ends with code 2."""
    with pytest.raises(SystemExit) as ended:
        predict.main(["predict", *map(str, arguments)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scalr_jax: error: ")]
    assert ended.value.code == 2
    assert len(lines) == 1
    return lines[0]


def command(*arguments, limit=None):
    """The command in a process of its own; `limit`: blocks of 512 bytes that a file may have."""
    line = [sys.executable, "-m", "scalr_jax.predict", *map(str, arguments)]
    if limit is not None:
        line = ["sh", "-c", f'trap "" XFSZ; ulimit -f {limit}; exec "$@"', "sh", *line]
    return subprocess.run(line, check=False, capture_output=True, text=True, env=dict(os.environ))
