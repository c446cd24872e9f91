"""The record of a run: `train.csv`, `val.csv` and `diagnostics.csv`, and TensorBoard beside them.

The CSV files are the record, TensorBoard is drawn from them. To resume at step s, rows after s are dropped
and TensorBoard is written anew from what is left, so that no step appears twice in either.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pixcontrast_ext.trainer.files import write_text

_FILES = ("train", "val", "diagnostics")


class RunLog:
    """Appends rows to the CSV files in `folder`, and to TensorBoard events in `folder`/tensorboard.

    Args:
        folder: of the run; made if needed.
        step: where the run starts or resumes. Rows of later steps, and a last row that was cut short, go.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.folder = folder
        board = folder / "tensorboard"
        board.mkdir(parents=True, exist_ok=True)
        for events in board.glob("events.out.tfevents.*"):
            events.unlink()
        self.board = SummaryWriter(board)
        for name in _FILES:
            path = folder / f"{name}.csv"
            kept = [row for row in read_rows(path) if row["step"] <= step]
            if not kept:
                path.unlink(missing_ok=True)
            elif (text := _lines([kept[0].keys(), *(row.values() for row in kept)])) != path.read_text():
                write_text(path, text)
            for row in kept:
                self._draw(name, row)

    def add(self, name: str, row: dict[str, float]) -> None:
        """Append a row, whose first key is "step", to `name`.csv and its values to TensorBoard.

        Raises ValueError if the file has other columns, as of a run that another version began.
        """
        path = self.folder / f"{name}.csv"
        header = _lines([row.keys()])
        begun = path.exists()
        if begun:
            with path.open() as file:
                found = file.readline()
            if found != header:
                raise ValueError(f"{path} has the columns {found.strip()}, this run writes {header.strip()}")
        text = _lines([row.values()] if begun else [row.keys(), row.values()])
        with path.open("a") as file:
            file.write(text)
        self._draw(name, row)

    def _draw(self, name: str, row: dict[str, float]) -> None:
        step = int(row["step"])
        for key, value in row.items():
            if key != "step":
                self.board.add_scalar(f"{name}/{key}", value, step)

    def sync(self) -> None:
        """Bring everything written so far to the disk: a checkpoint must not be newer than its record."""
        self.board.flush()
        for name in _FILES:
            path = self.folder / f"{name}.csv"
            if path.exists():
                with path.open("a") as file:
                    os.fsync(file.fileno())

    def close(self) -> None:
        self.board.close()


def _lines(rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV of this trainer, "step" as int and the rest as float. [] if there is no such file.

    A last line that was cut short (a kill while it was written) is left out.
    """
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [
        {key: int(value) if key == "step" else float(value) for key, value in row.items()}
        for row in csv.DictReader(lines)
    ]
