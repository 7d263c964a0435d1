"""`bench device`: prepared, measured and reported at tiny sizes on a CPU."""

import json
import os
import subprocess
import sys
import tarfile
import time

import jax
import numpy as np
import pytest

from scalr_jax.bench import scenes
from scalr_jax.bench.device import cases, goldens, names, parts, profile, report
from scalr_jax.bench.run import main
from scalr_jax.compile.roofline import CONSTANTS, Kernel
from scalr_jax.runtime import sharding
from scalr_jax.runtime.chips import CHIPS
from scalr_jax.train import executables
from tests.support.checks import present
from tests.support.paths import GOLDEN, ROOT

BLOCKED = ["grain", "ml_collections", "tensorflow_datasets", "array_record", "pykdtree", "PIL", "matplotlib", "plyfile"]
BLOCK = f"""
import sys, importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}: raise ImportError(name)
sys.meta_path.insert(0, Block())
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The inputs, of one generated scene."""
    folder = tmp_path_factory.mktemp("device") / "inputs"
    main(["device", f"--prepare={folder}", "--tiny", f"--goldens={GOLDEN}"])
    return folder


def test_what_is_prepared_is_small_and_complete(prepared):
    assert sorted(path.name for path in (prepared / names.GOLDEN).iterdir()) == sorted(goldens.FILES)
    assert scenes.load(prepared / names.BATCH).num_scenes == 1


@pytest.mark.slow
def test_a_bare_machine_runs_the_command(prepared, tmp_path):
    """Parts in processes of their own, without data libraries; one clone is missing, one is none."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "scalr_jax.bench", "device", f"--prepared={prepared}", f"--output={tmp_path}/out"]
    command += ["--tiny", "--only=vavit_b,published_vavit,published_waffleiron", f"--waffleiron={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = {(row["part"], row["variant"]): row for row in names.results(tmp_path / "out")}
    assert not [row for row in rows.values() if "failed" in row and row["part"] == "vavit_b"]
    row = rows["vavit_b", cases.CACHED]
    assert min(row["step_ms"], row["scenes_per_s"], row["flops"], row["peak_bytes"]) > 0
    assert rows["vavit_b", "profile"]["busy_ms"] > 0
    assert "--vavit" in rows["published_vavit", ""]["skipped"]
    assert "holds no waffleiron/segmenter.py" in rows["published_waffleiron", ""]["failed"]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["device"], summary["lost"], len(summary["scenes_per_s"])) == ("cpu", 2, 1)
    with tarfile.open(tmp_path / "out" / "profile_vavit_b.tar.gz") as archive:
        assert any(name.endswith(".xplane.pb") for name in archive.getnames())
    assert "vavit_b, cached tokens" in (tmp_path / "out" / "report.md").read_text()


def test_goldens_agree_here(prepared):
    """In float32 to the digits that the published code has, in bfloat16 to its own; gradients are other tests'."""
    found = [golden for name in goldens.FILES for golden in goldens.read(prepared / names.GOLDEN / name)]
    assert len(found) == 4
    for golden, dtype, most in zip(found[1:3], ("bfloat16", "float32"), (0.05, 2e-5), strict=True):
        assert present(goldens.compare(golden._replace(target=None), dtype)["output"]) < most, golden.name


def test_a_prepared_step_is_taken_where_it_fits_and_else_compiled(prepared, tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    case = cases.cases_of("waffleiron", ((4, 4),) * 3, "float32", tiny=True)[0]
    lowered = jax.jit(lambda state: state + 1).lower(jax.ShapeDtypeStruct((2,), np.float32))
    made = cases.Made(case, lowered, lambda: pytest.fail("nothing runs"), 0)
    compiled, how = parts.compiled_or_loaded(made, mesh, tmp_path)
    executables.save(tmp_path / case.file, made.lowered, compiled, list(mesh.devices.flat))
    loaded, then = parts.compiled_or_loaded(made, mesh, tmp_path)
    assert (how, then) == ("compiled", "loaded")
    np.testing.assert_array_equal(loaded(np.zeros(2, np.float32)), np.ones(2))
    (tmp_path / case.file).write_bytes(b"")
    assert "is no compiled step" in parts.compiled_or_loaded(made, mesh, tmp_path)[1]


def test_a_part_that_fails_is_one_sentence_and_what_has_no_time_is_skipped(tmp_path, monkeypatch):
    scene = scenes.Scenes(None, ((4, 4),) * 3, "generated", ())  # type: ignore[arg-type]
    monkeypatch.setattr(scenes, "load", lambda path: scene)

    def measure(case, *_):
        if case.variant == cases.RESIDUAL:
            time.sleep(0.05)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.")
        return {"step_ms": 1.0}

    monkeypatch.setattr(parts, "measure", measure)
    for seconds, found in ((100.0, {"failed", "step_ms"}), (0.01, {"failed", "skipped"})):
        output = tmp_path / str(seconds)
        output.mkdir()
        parts.run("vavit_b_variants", parts.Place(tmp_path, output, time.monotonic() + seconds, True))
        rows = names.results(output)
        assert {key for row in rows for key in row} - {"part", "variant"} == found
        assert "Out of memory" in rows[0]["failed"]


def test_constants_are_found_again_from_times_that_obey_them():
    chip = CHIPS["h100"]
    true = {"bandwidth_share": 0.7, "peak_share": 0.5, "attention_forward_share": 0.2}
    true |= {"attention_backward_share": 0.15, "kernel_us": 3.0}
    rows = [("moves", "peak_share", 10**9, 0), ("product", "peak_share", 10**7, 10**12), ("start", "peak_share", 99, 0)]
    rows += [(f"attention_{way}", f"attention_{way}_share", 10**7, 10**11) for way in ("forward", "backward")]
    found = [Kernel(name, "other", share, 0.0, moved, work, 2) for name, share, moved, work in rows]

    def seconds(kernel):
        own = max(
            kernel.bytes / true["bandwidth_share"] / chip.bandwidth, kernel.flops / true[kernel.share] / chip.flops
        )
        return own + 1e-6 * true["kernel_us"]

    fitted = profile.fit(found, {kernel.name: seconds(kernel) for kernel in found}, chip)
    assert fitted == pytest.approx(true, rel=1e-3)
    assert profile.fit(found, {}, chip) == CONSTANTS  # nothing was timed


def test_a_profile_has_the_programs_kernels_and_a_report_shows_them(tmp_path):
    step = jax.jit(lambda x: (x @ x).sum() + jax.numpy.sin(x).max())
    x = jax.numpy.ones((256, 256))
    text = present(step.lower(x).compile().as_text())
    found = profile.trace(lambda: step(x), profile.instructions(text), tmp_path)
    assert found.seconds
    assert sum(found.seconds.values()) > 0
    row = {"part": "vavit_b", "variant": "profile", **profile.compare(text, found, CHIPS["h100"])}
    total = sum(kind["measured_ms"] for kind in row["categories"].values())
    assert total == pytest.approx(row["busy_ms"])
    lost = {"part": "vavit_l", "variant": "", "skipped": "3 s of --budget=540 were left"}
    shown, summary = report.report([row, lost])
    assert "| products | " in shown
    assert "- vavit_l: 3 s of" in shown
    assert summary["fitted"]["vavit_b"].keys() == CONSTANTS.keys()
