"""Pages are short, fit a screen, and lead somewhere; the files that others read agree with pyproject.toml."""

import ast
import re
import tomllib

import pytest
import yaml

from tests.support.pages import DOCS, GENERATED, GUIDES, PAGES, anchors, name_of, prose
from tests.support.paths import ROOT

LONGEST = {"docs/design.md": 1800, "internals": 1200}  # words; 900 elsewhere
SOURCES = sorted(
    path for folder in ("scalr_jax", "configs", "experiments", "tests") for path in ROOT.glob(f"{folder}/**/*.py")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_a_guide_is_short(page):
    assert len(page.read_text().split()) <= LONGEST.get(name_of(page), LONGEST.get(page.parent.name, 900))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_fit_a_screen(page):
    """But for rows of tables, which Markdown cannot break."""
    long = [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long


@pytest.mark.parametrize("page", [*PAGES, *GENERATED], ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        file, _, anchor = target.partition("#")
        if not file.startswith("http"):
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


def test_pages_that_the_code_names_are_there():
    for source in SOURCES:
        for page in re.findall(r"docs/[\w/]+\.(?:md|jsonl)", source.read_text()):
            assert (ROOT / page).exists(), f"{name_of(source)} names {page}"


def test_every_picture_is_shown():
    shown = "".join(page.read_text() for page in PAGES)
    for picture in DOCS.glob("images/*"):
        assert f"images/{picture.name}" in shown, picture.name


def test_no_docstring_begins_with_what_or_of():
    found = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if re.match(r"(What|Of)\b", text):
                    found.append(f"{name_of(source)}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)


def test_hooks_and_workflow_run_what_ci_runs():
    run = (ROOT / ".ci/run").read_text()
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]:
        assert f"\n{hook['entry']}" in run, hook
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["run"]["steps"][-1] == {"run": ".ci/run"}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert f"## {PROJECT['version']} - " in (ROOT / "CHANGELOG.md").read_text()


def test_running_needs_no_test_tool():
    text = " ".join(PROJECT["dependencies"])
    assert not re.search("node|kubernetes|jupytext|ipykernel|pytest|ruff|pyright|datasets|onnx|plotly", text)
