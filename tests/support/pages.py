"""The pages of the documentation: their blocks of code, and what they need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], key=lambda path: path.relative_to(ROOT).as_posix()
)
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)
_NEEDS = re.compile(r"\A---\n(?:.*\n)*?needs: \[(.*)\]\n(?:.*\n)*?---\n")


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code
    language: str
    text: str

    def run(self, names: dict[str, Any]) -> None:
        """Executes it; a traceback says which line of the page failed."""
        exec(compile("\n" * (self.line - 1) + self.text, self.page, "exec"), names)


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages, in their order."""
    text, found = page.read_text(), []
    for fence in _FENCE.finditer(text):
        indent, code = len(fence["indent"]), fence["text"].splitlines()
        if fence["language"] in languages:
            line = text.count("\n", 0, fence.start("text")) + 1
            found.append(Block(page, line, fence["language"], "".join(f"{row[indent:]}\n" for row in code)))
    return found


def needs(page: Path) -> list[str]:
    """The modules that a page's front matter says its blocks import beyond those of `make test`."""
    found = _NEEDS.match(page.read_text())
    return re.findall(r"[\w.]+", found[1]) if found else []


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
