"""The Python blocks of the guide's pages, one after another in one module, with the packages that a page names.

A page's front matter says `needs: [lightning]`; the names are those that are imported.
"""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest

from tests.examples.test_examples import ROOT, run

PAGES = sorted((ROOT / "docs" / "guide").glob("*.md"))
NEEDS = re.compile(r"\A---\n(?:.*\n)*?needs: \[(.*)\]\n(?:.*\n)*?---\n")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def needs(text: str) -> list[str]:
    found = NEEDS.match(text)
    return found[1].replace(",", " ").split() if found else []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if needs(page.read_text())], ids=lambda page: page.stem
)
def test_the_blocks_of_a_page(page, tmp_path):
    text = page.read_text()
    missing = [package for package in needs(text) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed: make test-examples")
    blocks = BLOCK.findall(text)
    assert blocks
    program = tmp_path / f"{page.stem.replace('-', '_')}_page.py"
    program.write_text("\n".join(blocks))
    run(sys.executable, program, cwd=tmp_path)
