"""The notebooks run top to bottom on generated streets; what is kept of them is what their sources say, and small."""

import importlib.metadata
import importlib.util
import itertools
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import scalr_jax
from tests.support.checks import present

EXTRA = "needs the notebooks extra: pip install 'scalr_jax[notebooks]'"
jupytext = pytest.importorskip("jupytext", reason=EXTRA)
nbformat = pytest.importorskip("nbformat", reason=EXTRA)
for package in ("nbclient", "ipykernel", "onnxruntime"):
    pytest.importorskip(package, reason=EXTRA)

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SPEC = present(importlib.util.spec_from_file_location("render", NOTEBOOKS / "render.py"))
render = importlib.util.module_from_spec(SPEC)
present(SPEC.loader).exec_module(render)

# Run as a last cell: what a reader is told is true of the variables that he sees.
CHECKS = {
    "1_features": """
assert features.shape == (len(frame.points), 32) and distilled.shape == (len(frame.points), 128)
assert mean.pop("car") > max(mean.values()) + 0.2, mean
assert similarity[query] > 0.999
""",
    "2_linear_probe": """
assert miou["distilled"] > miou["random"] + 0.04 > miou["coordinates"] + 0.04, miou
assert len(truth) == sum(len(validation.frame(k).points) for k in range(6))
""",
    "3_your_own_lidar": """
for k in (0, 9):
    mine, street = Folder(root, split="all").frame(k), recordings.frame(k)
    np.testing.assert_array_equal(mine.visible, street.visible)
    np.testing.assert_allclose(mine.pixels[mine.visible], street.pixels[mine.visible], atol=1e-3)
results = json.loads((workdir / "results.json").read_text())
assert results["train/loss"] < 0.9 * results["train/loss_constant"], results
assert np.isfinite(features).all() and features.std(axis=0).min() > 0
""",
    "5_your_own_student": """
assert results["train/loss"] < 0.9 * results["train/loss_constant"], results
assert not json.loads((workdir / "config.json").read_text())["teacher"]["checkpoint"]
assert vectors.shape == (*store.grid, 128) and features.shape == (len(points), 128)
""",
    "4_export": """
for found in (onnx_features, stablehlo_features, again.embed(points)):
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
assert wanted.std(axis=0).min() > 0
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_folder):
    """One for all, as a user's folder is: the later notebooks find what the first one trained, and what it compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared_folder / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        yield tmp_path_factory.mktemp("notebooks")


@pytest.mark.slow
@pytest.mark.parametrize("source", render.SOURCES, ids=lambda source: source.stem)
def test_it_runs_top_to_bottom(source, folder):
    """In under three minutes of processor time: the wall clock of a machine that does other work too says nothing."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    render.execute(source, folder, CHECKS[source.stem])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 3 < spent < 180


@pytest.mark.parametrize("source", render.SOURCES, ids=lambda source: source.stem)
def test_what_is_kept_is_its_source_with_outputs(source):
    path = source.with_suffix(".ipynb")
    kept, paired = nbformat.read(path, as_version=4), jupytext.read(source)
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [
        (cell.cell_type, cell.source) for cell in paired.cells
    ], f"run python notebooks/render.py {source.name}"
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/jpeg" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 400_000
    for place in (Path.home(), Path(tempfile.gettempdir()), NOTEBOOKS.parent):
        assert f"{place}/" not in path.read_text(), "a path of the machine that rendered it"


def test_the_first_cell_of_all_installs_from_the_address_of_the_package():
    cells = {
        next(cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code")
        for source in render.SOURCES
    }
    (cell,) = cells
    assert f'REPOSITORY = "{scalr_jax.REPOSITORY}"' in cell


def test_another_address_and_its_badge_take_the_place_of_the_old_ones():
    source = render.SOURCES[0].read_text()
    text = source
    for number in (1, 2):
        text = render.addressed(text, "a.ipynb", f"https://github.com/some/one{number}")
        assert text.count("colab-badge") == 1
        assert f"/github/some/one{number}/blob/main/notebooks/a.ipynb" in text
        assert text.count(f'REPOSITORY = "https://github.com/some/one{number}"') == 1
    assert render.addressed(text, "a.ipynb", scalr_jax.REPOSITORY) == source


INSTALLS = """
import subprocess, sys
asked = []
class Done:
    returncode = 0
subprocess.run = lambda command: asked.append(command) or Done
import importlib.util
importlib.util.find_spec = lambda name: None
"""


@pytest.mark.parametrize("where", ["a clone", "Colab", "nowhere"])
def test_what_the_first_cell_installs(where, tmp_path):
    """The clone that it lies in, or the repository; what runs the accelerator keeps its version."""
    (cell, *_) = [cell.source for cell in jupytext.read(render.SOURCES[0]).cells if cell.cell_type == "code"]
    if where == "a clone":
        (tmp_path / "scalr_jax").mkdir()
        (tmp_path / "notebooks").mkdir()
    address = "https://example.org/scalr_jax" if where == "Colab" else ""
    code = INSTALLS + render.addressed(cell, "", address) + "\nprint(asked[0][-1])\n"
    folder = tmp_path / "notebooks" if where == "a clone" else tmp_path
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    if where == "nowhere":
        assert "address of the package's repository" in done.stderr
        assert "Traceback" not in done.stderr
        return
    expected = f"{tmp_path}[notebooks]" if where == "a clone" else f"scalr_jax[notebooks] @ git+{address}"
    assert done.stdout.splitlines() == [expected], done.stderr
    assert f"jax=={importlib.metadata.version('jax')}" in (folder / "constraints.txt").read_text().splitlines()


@pytest.mark.parametrize("source", render.SOURCES, ids=lambda source: source.stem)
def test_a_sentence_stands_before_each_cell(source):
    cells = jupytext.read(source).cells
    for before, cell in itertools.pairwise(cells):
        assert cell.cell_type == "markdown" or before.cell_type == "markdown"
