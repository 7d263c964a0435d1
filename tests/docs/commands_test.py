"""Every command of the shell blocks in the README and the guides.

Those that take seconds run, on tiny models and scans: `predict`, `export`, `prepare --inspect`, launchers with
--dry-run. Those that train, render, compile, measure or need a dataset get their flags parsed and their config built
and checked, as their own process does first.
"""

import argparse
import importlib
import importlib.machinery
import os
import re
import runpy
import subprocess
import sys
import tomllib
import types

import pytest

from scalr_jax import main
from scalr_jax.bench.run import NAMES
from scalr_jax.runtime.command_line import parse_flags
from scalr_jax.settings import read_settings
from tests.support import raw_datasets as raw
from tests.support.pages import GUIDES, PAGES, blocks, name_of, shell_commands
from tests.support.paths import ROOT
from tests.support.predict_runs import make_points, write_bin
from tests.support.tiny_student import write_workdir

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ml_collections, which loads config files

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
COMMANDS = [(page, words) for page in [*GUIDES, ROOT / "CONTRIBUTING.md"] for words in shell_commands(page)]
OTHERS = ("pip", "pytest", "python", "sbatch", "cd", "zip", "pre-commit", ".ci/run", "tail", "tensorboard")
RUN = ("runs/probe", "runs/demo/distill", "runs/demo/probe_distilled")  # models of which commands run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout with three tiny trained models, two scans and a folder of own scans."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "experiments", "launch", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs/demo").mkdir(parents=True)
    write_workdir(folder / "runs/probe", "probe", "segment", 12)
    write_workdir(folder / "runs/demo/probe_distilled", "probe", "segment", 12)
    write_workdir(folder / "runs/demo/distill", "distill", "distill", 6)
    write_bin(folder / "scan.bin", make_points())
    (folder / "SCANS").mkdir()
    for number in range(2):
        write_bin(folder / f"SCANS/{number}.bin", make_points(seed=number))
    raw.write_folder(folder / "DIR")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["JAX_COMPILATION_CACHE_DIR"])
    wandb = types.ModuleType("wandb")  # an extra that the config asks for
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sys.modules.pop("config_config", None)  # which ml_collections would fill again
    return folder


class ParsedError(Exception):
    """Ends a script after it has parsed its arguments."""


def script(path, arguments, monkeypatch):
    """Runs a script until its arguments are parsed."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser, given=None, namespace=None):
        parse(parser, given, namespace)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    with pytest.raises(ParsedError):
        if path == "bench":
            assert arguments[0] in NAMES
            importlib.import_module(f"scalr_jax.bench.{NAMES[arguments[0]]}").main(arguments[1:])
        else:
            runpy.run_path(path, run_name="__main__")


def module(name, arguments, monkeypatch, *, begin):
    """A command of the package; `begin`: it runs, and not only its flags are parsed."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])  # where ml_collections finds --config.KEY
    if name == "bench":
        script(name, arguments, monkeypatch)
    elif name == "main":
        main.parse([name, *arguments])
        read_settings(main.CONFIG.value)
    else:
        found = importlib.import_module(f"scalr_jax.{name}.run")
        if begin:
            found.run([name, *arguments])
        else:
            parse_flags(found.FLAGS, [name, *arguments], found.__doc__)
            if name == "compile":
                read_settings(found.FLAGS.config)


def test_every_kind_of_command_is_known():
    for page, words in COMMANDS:
        assert words[0] in OTHERS or words[0].startswith("launch/"), f"{name_of(page)}: {words}"
        if words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                assert set(extra.split(",")) <= set(EXTRAS), words
        if words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests")), words
        if words[0] == "sbatch":
            assert (ROOT / words[-1]).exists(), words


PYTHON = [pytest.param(words[1:], id=f"{name_of(page)}: {' '.join(words[1:])[:90]}") for page, words in COMMANDS
          if words[0] == "python"]  # fmt: skip


@pytest.mark.parametrize("words", PYTHON)
def test_a_command_takes_its_flags_and_config(words, here, monkeypatch):
    if words[0] == "-m":
        module(words[1].removeprefix("scalr_jax."), words[2:], monkeypatch, begin=False)
    else:
        script(words[0], words[1:], monkeypatch)


def runs_here(words):
    """Commands on what `folder` holds."""
    name, text = words[2].removeprefix("scalr_jax."), " ".join(words)
    if name == "prepare":
        return "--inspect" in words and "--dataset=folder" in words
    return name in ("predict", "export") and any(f"--model={run} " in f"{text} " for run in RUN)


SHORT = [pytest.param(words[2:], id=" ".join(words[2:])[:90]) for words in
         {" ".join(words): words for _, words in COMMANDS if words[:2] == ["python", "-m"]}.values()
         if runs_here(words)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("words", SHORT)
def test_a_short_command_runs(words, here, monkeypatch):
    (name, *arguments) = words
    module(name.removeprefix("scalr_jax."), [*arguments, *(["--cache=none"] * (name != "scalr_jax.prepare"))],
           monkeypatch, begin=True)  # fmt: skip
    (output,) = [word.partition("=")[2] for word in arguments if word.startswith("--output=")]
    path = here / output
    assert path.is_file() or any(path.iterdir())


def test_launchers_say_what_they_would_do(here):
    for _, words in COMMANDS:
        if words[0].startswith("launch/"):
            assert "--dry-run" in words, words
    page = ROOT / "docs/launch.md"
    (block,) = blocks(page, "sh")
    lines = [line for line in block.replace("\\\n", " ").splitlines() if "--dry-run" in line]
    assert len(lines) == 2
    for line in lines:
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "scalr_jax" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_are_python(page):
    for block in blocks(page, "python"):
        compile(block, name_of(page), "exec")
