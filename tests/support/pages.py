"""The project's pages: their lines, links and shell blocks, as a reader meets them."""

import re
import shlex
from pathlib import Path

from tests.support.paths import ROOT

DOCS = ROOT / "docs"
GENERATED = (DOCS / "config.md", DOCS / "reference.md")
GUIDES = [ROOT / "README.md", *sorted({*DOCS.glob("*.md"), *DOCS.glob("internals/*.md")} - set(GENERATED))]
PAGES = [*GUIDES, *sorted(DOCS.glob("measurements/*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def prose(path: Path) -> str:
    """A page without its fenced blocks and code spans."""
    return re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def shell_commands(path: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, each as its words; `NAME=value` before a command is left out."""
    commands = []
    for block in blocks(path, "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    commands.append(words)
    return commands
