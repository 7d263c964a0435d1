"""A recording for Rerun holds every frame that could be read, and says so when its package is missing."""

import re
import subprocess
import sys

import numpy as np
import pytest

from scalr_jax.data.scenes import Frame
from scalr_jax.data.streets.layout import CLASSES
from scalr_jax.runtime.errors import InputError
from scalr_jax.visualize.recording import Seen, check_rerun, write_recording


def frames(number=3, points=20):
    rng = np.random.default_rng(0)
    for k in range(number):
        xyz = rng.normal(size=(points, 4)).astype(np.float32)
        image, pixels = np.zeros((8, 12, 3), np.uint8), rng.uniform(0, 8, (points, 2))
        frame = Frame(f"scan {k}", xyz, np.eye(4), image=image, pixels=pixels, visible=np.arange(points) < 5)
        yield Seen(xyz, frame, rng.normal(size=(points, 6)), rng.integers(0, 12, points), np.full(points, 255))


def test_every_frame_is_recorded_with_what_is_known(tmp_path):
    pytest.importorskip("rerun", reason="needs the rerun extra: pip install 'scalr_jax[rerun]'")
    path = tmp_path / "frames.rrd"
    assert write_recording(path, frames(), CLASSES, CLASSES) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["frames.rrd"]
    done = subprocess.run([sys.executable, "-m", "rerun", "rrd", "print", str(path)], capture_output=True, text=True)
    for entity in ("scan/features", "scan/predictions", "scan/labels", "camera", "camera/points"):
        rows = re.findall(rf"with (\d+) rows .* - /{entity} -", done.stdout)
        assert sum(map(int, rows)) == 3, (entity, done.stdout[-2000:], done.stderr[-500:])


def test_without_the_package_it_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(InputError, match=r"pip install 'scalr_jax\[rerun\]'"):
        check_rerun()
