"""mkdocs' hook: pages that are a file of the repository, and links to files outside of docs/.

A page whose front matter says `include: README.md` is that file. Every page links to files, and shows pictures, by
their paths in the repository, so it reads alike on a code host; what it refers to outside of docs/ becomes a part of
the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_INCLUDE = re.compile(r"\A---\n(?:.*\n)*?include: (\S+)\n(?:.*\n)*?---\n")
_LINK = re.compile(r"(\]\()([^()\s#:]+)(?=(?:#[^()\s]*)?\))")


def source_of(page: Path) -> Path:
    """The file that a page shows: the one that it includes, or itself."""
    found = _INCLUDE.match(page.read_text())
    return ROOT / found[1] if found else page


def place_of(path: Path, pages: dict[Path, str]) -> str:
    """Where the site keeps a file of the repository; `pages` says where those are that pages include."""
    if path in pages:
        return pages[path]
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def linked(source: Path) -> list[Path]:
    """The files of the repository that a page refers to."""
    targets = [(source.parent / target).resolve() for _, target in _LINK.findall(source.read_text())]
    return [target for target in targets if target.is_file() and target.is_relative_to(ROOT)]


def on_files(files: Any, *, config: Any) -> Any:
    """Add to the site what its pages refer to outside of docs/."""
    config.extra["included"] = {
        source_of(Path(page.abs_src_path)): page.src_uri for page in files.documentation_pages()
    }
    waiting = list(config.extra["included"])
    while waiting:
        for path in linked(waiting.pop()):
            uri = place_of(path, config.extra["included"])
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
                waiting += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """The text of the page, with links to where the site keeps what they lead to."""
    source = source_of(Path(page.file.abs_src_path))
    if "include" in page.meta:
        markdown = source.read_text()
    here = os.path.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[2]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return link[0]
        return link[1] + os.path.relpath(place_of(target, config.extra["included"]), here or ".")

    return _LINK.sub(moved, markdown)
