"""The Python blocks of the guide's pages, one after another in one module, with the packages that a page names."""

from __future__ import annotations

import sys

import pytest

from tests.examples.test_examples import need, run
from tests.support.pages import PAGES, ROOT, blocks, name_of, needs

GUIDE = [page for page in PAGES if page.parent == ROOT / "docs" / "guide" and needs(page)]


@pytest.mark.parametrize("page", GUIDE, ids=name_of)
def test_the_blocks_of_a_page(page, tmp_path):
    need(*needs(page))
    code = [block.text for block in blocks(page, "python")]
    assert code
    program = tmp_path / f"{page.stem.replace('-', '_')}_page.py"
    program.write_text("\n".join(code))
    run(sys.executable, program, cwd=tmp_path)
