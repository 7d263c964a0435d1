"""Some rows in processes of their own, each command once: there nothing of a test catches what they say."""

import os
import subprocess
import sys

import pytest

from tests.support import damages, hostile
from tests.support.hostile import Outcome, Row, content
from tests.support.paths import ROOT


def leaving(folder):
    (folder / "bad.py").write_text("import sys\nsys.exit(0)\n")


PROCESSES = {
    "main": Row("", ("--config=bad.py", "--workdir=w"), ("bad.py raises SystemExit",), damage=leaving),
    "prepare": Row("", ("--dataset=folder", "--root=x", "--output=y"), ("x", "no such folder")),
    "predict": Row("", ("--model=none.pth", "--input=x.bin"), ("x.bin: no such file",)),
    "export": Row("", ("--model=none", "--format=torch", "--output=a"), ("none does not exist",)),
    "visualize": Row("", ("--model=none", "--output=a"), ("none does not exist",)),
    "compile": Row("", ("--config=none.py", "--topology=v5e:2x2"), ("none.py does not exist",)),
    "bench": Row("", ("student", "--batch=a.npz"), ("a.npz",), damage=damages.written("a.npz", b"")),
}


def marks(command):
    return () if command in ("main", "prepare", "predict") else pytest.mark.slow


@pytest.mark.parametrize("command", [pytest.param(command, marks=marks(command)) for command in PROCESSES])
def test_the_law(command, tmp_path):
    row = PROCESSES[command]
    if row.damage:
        row.damage(tmp_path)
    before = content(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["XDG_CACHE_HOME"] = str(tmp_path.parent / "cache")
    line = [sys.executable, "-m", f"scalr_jax.{command}", *row.arguments]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    after = content(tmp_path)
    changed = [name for name in {*before, *after} if before.get(name) != after.get(name)]
    hostile.check(row, Outcome(done.returncode, done.stderr.splitlines(), changed, [], done.stderr))
