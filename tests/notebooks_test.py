"""The notebooks run top to bottom on generated streets; what is kept of them is what their sources say, and small."""

import importlib.util
import itertools
import resource
import tempfile
from pathlib import Path

import pytest

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
assert mean["car"] > max(mean["road"], mean["building"], mean["vegetation"]) + 0.4, mean
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


@pytest.mark.parametrize("source", render.SOURCES, ids=lambda source: source.stem)
def test_a_sentence_stands_before_each_cell(source):
    cells = jupytext.read(source).cells
    for before, cell in itertools.pairwise(cells):
        assert cell.cell_type == "markdown" or before.cell_type == "markdown"
