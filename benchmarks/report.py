"""The figures of a case as a table, for the terminal and for the page."""

from __future__ import annotations

from .harness import Case, Row
from .results import Figures, is_ours, ours_like
from .terminal import Terminal

UNRATED = ("mining",)
"""Ops whose methods make products of their own choice, so that a rate, or a share of a floor, would say nothing."""
PART_NAMES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "both"}


def digits(value: float | None) -> str:
    """Three significant ones, none of them after a decimal point that says nothing."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return "0" if text in ("-0", "0") else text


def table(figures: Figures) -> tuple[list[str], list[list[str]]]:
    """Header and one line for each method: milliseconds of each pass, and the rest of the last.

    Where methods add to a base, what they add stands in place of their share of the floor.
    """
    whole = figures.whole()
    adds = any(metric == "time added" for _, _, metric in figures.values)
    rates = () if figures.op in UNRATED else ("TFLOP/s", "GB/s")
    rate = next((name for name in rates if any(key[2] == name for key in figures.values)), None)
    header = ["method"]
    header += [f"{PART_NAMES[part]} ms" for part in figures.parts[:-1]]
    header += [f"{PART_NAMES[whole]} ms", "p20 - p80", "rounds", "x ours"]
    header += [rate] if rate else []
    header += ["time added", "MiB added"] if adds else ["of the floor"] if rates else []
    header += ["extra MiB", "launches", "syncs"]
    lines = []
    for method in figures.methods:

        def value(metric: str, part: str = whole, method: str = method) -> float | None:
            return figures.get(method, part, metric)

        ours = next(iter(ours_like(method, figures.methods)), None)
        own, base = value("min ms"), figures.get(ours, whole, "min ms") if ours else None
        share, added = value("share of the floor"), value("time added")
        p20, rounds = value("p20 ms"), value("rounds") or 0
        line = [method]
        line += [digits(value("p50 ms", part)) for part in figures.parts[:-1]]
        line += [
            digits(value("p50 ms")),
            f"{digits(p20)} - {digits(value('p80 ms'))}" if p20 is not None and rounds >= 5 else "",
            digits(value("rounds")),
            digits(own / base) if own is not None and base is not None else "",
        ]
        line += [digits(value(rate))] if rate else []
        if adds:
            line += [f"{added:.1%}" if added is not None else "", digits(value("MiB added"))]
        elif rates:
            line += [f"{share:.0%}" if share is not None else ""]
        line += [
            digits(value("extra MiB")),
            digits(value("launches")),
            digits(value("syncs")),
        ]
        lines.append(line)
    return header, lines


def show(case: Case, rows: list[Row], terminal: Terminal) -> None:
    terminal.print(f"\n[bold]{case.title}[/bold]")
    terminal.print(f"  counted: {case.counted}", style="dim")
    figures = Figures(rows)
    header, lines = table(figures)
    terminal.table(header, lines, [is_ours(line[0]) for line in lines])
    for name, candidate in case.candidates.items():
        if name in figures.absent:
            terminal.print(f"  {name}: not run, {figures.absent[name]}", style="dim")
        elif candidate.note:
            terminal.print(f"  {name}: {candidate.note}", style="dim")
