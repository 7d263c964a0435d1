"""Runs the notebooks top to bottom and writes them as .ipynb, with their outputs and small pictures.

    python notebooks/render.py                  # all, in their order
    python notebooks/render.py 1_features.py    # one

The sources are the .py files (jupytext, py:percent): edit those, then run this. Needs the extra "notebooks". They run
in a temporary folder, where the later ones find what the first one trained.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import PIL.Image
from nbclient import NotebookClient

import scalr_jax

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("[0-9]_*.py"))
SECONDS = 600  # that a cell may take, on a busy machine
PIXELS = 480_000  # of a picture that is kept, at most


def execute(source: Path, folder: Path, check: str = "") -> Any:
    """The notebook of a source with its outputs, run in `folder` on the CPU; `check` is a last cell of a test.

    Raises:
      CellExecutionError: a cell failed, the check included.
    """
    notebook = jupytext.read(source)
    if check:
        notebook.cells.append(nbformat.v4.new_code_cell(check))
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext draws them at random
    paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=place, coalesce_streams=True)
    client.execute(env=environment)
    return notebook


def addressed(source: str, name: str, repository: str) -> str:
    """The text of a source with the repository's address in its first cell and, on GitHub, a badge that opens it."""
    source = re.sub(r'(?m)^REPOSITORY = ".*"$', f'REPOSITORY = "{repository}"', source)
    source = re.sub(r"# \[!\[Open in Colab\].*\n#\n", "", source)
    place = repository.removeprefix("https://github.com/")
    if place == repository:
        return source
    colab = "https://colab.research.google.com"
    badge = f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{place}/blob/main/notebooks/{name})"
    return source.replace("# %% [markdown]\n", f"# %% [markdown]\n# {badge}\n#\n", 1)


def shrink(notebook: Any) -> None:
    """Pictures become JPEG files of `PIXELS` at most; times of cells are left out."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data = {"image/jpeg": _jpeg(output.data["image/png"]), "text/plain": output.data["text/plain"]}
                output.metadata = {}


def _jpeg(png: str) -> str:
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    scale = min(1.0, (PIXELS / (picture.width * picture.height)) ** 0.5)
    picture = picture.resize(
        (round(scale * picture.width), round(scale * picture.height)), PIL.Image.Resampling.LANCZOS
    )
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80, optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def main(names: list[str]) -> None:
    """Renders the sources of these names, or all."""
    with tempfile.TemporaryDirectory() as folder:
        for source in [HERE / Path(name).name for name in names] or SOURCES:
            started = time.monotonic()
            path = source.with_suffix(".ipynb")
            source.write_text(addressed(source.read_text(), path.name, scalr_jax.REPOSITORY))
            notebook = execute(source, Path(folder))
            shrink(notebook)
            nbformat.write(notebook, path)
            print(f"{path.name}: {time.monotonic() - started:.0f} s, {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
