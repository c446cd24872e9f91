"""The output of the benchmarks, by rich, or plain text where it is not installed, as on many GPU machines."""

from __future__ import annotations

import re
from collections.abc import Sequence

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    HAVE_RICH = True
except ImportError:
    HAVE_RICH = False


class Terminal:
    def __init__(self, width: int | None = None):
        self.console = Console(width=width) if HAVE_RICH else None

    def print(self, text: str, style: str = "") -> None:
        """A line, however long, in which [bold] ... [/bold] and the like are marks of style."""
        if self.console:
            self.console.print(text, style=style, highlight=False, soft_wrap=True)
        else:
            print(re.sub(r"\[/?(bold|dim|red|green|yellow| )+\]", "", text), flush=True)

    def table(self, header: Sequence[str], lines: Sequence[Sequence[str]], bold: Sequence[bool]) -> None:
        if self.console:
            grid = Table(*header, box=None, padding=(0, 1))
            for column in grid.columns[1:]:
                column.justify = "right"
            for line, strong in zip(lines, bold, strict=True):
                grid.add_row(*line, style="bold" if strong else "")
            self.console.print(grid)
            return
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        for line in (header, *lines):
            first, *rest = (
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            print("  ".join([first, *rest]).rstrip(), flush=True)

    def progress(self, total: int) -> _Progress:
        return _Progress(self.console, total)


class _Progress:
    """A bar over `total` cases, in a terminal that can draw one."""

    def __init__(self, console: Console | None, total: int):
        self.bar: Progress | None = None
        if console:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self.bar = Progress(*columns, console=console, transient=True)
            self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> _Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def describe(self, text: str) -> None:
        if self.bar:
            self.bar.update(self.task, description=text)

    def advance(self) -> None:
        if self.bar:
            self.bar.advance(self.task)
