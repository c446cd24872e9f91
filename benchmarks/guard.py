"""Ratios that must not fall: `python -m benchmarks --check` measures the cases of `ratios.csv` again.

Ratios to other methods of the same run, never times. One is said to have fallen if it is below the committed one by
more than SLACK in two measurements; its bar, where it has one, is what the project set out to reach.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .results import Ratio, instruction_set, is_ours

TABLE = Path(__file__).with_name("ratios.csv")
SLACK = 0.25
COLUMNS = ("device", "op", "name", "dtype", "method", "against", "part", "quantity", "ratio", "bar")

Key = tuple[str, ...]


@dataclass(frozen=True)
class Committed:
    device: str
    ratio: Ratio
    bar: float | None

    @property
    def key(self) -> Key:
        return key_of(self.ratio)

    def fell(self, value: float) -> bool:
        return not value >= self.ratio.value * (1 - SLACK)


def key_of(ratio: Ratio) -> Key:
    return (
        ratio.op,
        ratio.name,
        ratio.dtype,
        ratio.method,
        ratio.against,
        ratio.part,
        ratio.quantity,
    )


def describe(ratio: Ratio) -> str:
    part = "" if ratio.part == "fwd" else f" {ratio.part}"
    return f"{ratio.op} {ratio.name} {ratio.dtype}{part}: {ratio.quantity} of {ratio.against!r} / {ratio.method!r}"


def device_kind(device: str) -> str:
    """Ratios of one kind of device say nothing about another."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu {instruction_set()}, {torch.get_num_threads()} threads"


def read(path: Path = TABLE) -> list[Committed]:
    with open(path, newline="") as file:
        return [
            Committed(
                line["device"],
                Ratio(**{name: line[name] for name in COLUMNS[1:8]}, value=float(line["ratio"])),
                float(line["bar"]) if line["bar"] else None,
            )
            for line in csv.DictReader(file)
        ]


def save(device: str, measured: Iterable[Ratio], path: Path = TABLE) -> None:
    """Puts what was measured in the place of what the table has of the same device; bars stay.

    Not the backward alone: where the forward has finished the gradient it is microseconds.
    """
    committed = read(path) if path.exists() else []
    bars = {(row.device, row.key): row.bar for row in committed}
    values = {
        key_of(ratio): ratio for ratio in measured if ratio.part != "bwd" and not is_ours(ratio.against)
    }
    kept = [
        replace(row, ratio=values.pop(row.key)) if row.device == device and row.key in values else row
        for row in committed
    ]
    added = [Committed(device, ratio, bars.get((device, key))) for key, ratio in values.items()]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in kept + added:
            bar = "" if row.bar is None else f"{row.bar:g}"
            writer.writerow((row.device, *row.key, f"{row.ratio.value:.3g}", bar))
