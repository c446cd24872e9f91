"""Writes BENCHMARKS.md, a page for each device, the pictures and the README's figures: `python -m benchmarks.pages`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from . import load, plots
from .harness import Row
from .report import table
from .results import FOLDER, CaseKey, Environment, Figures, Record, by_case, read
from .summary import OPS, conclusions, loss_table, telling, verdict

ROOT = Path(__file__).resolve().parents[1]
PAGE, README, PLOTS = ROOT / "BENCHMARKS.md", ROOT / "README.md", ROOT / "benchmarks" / "plots"
DEVICES = ROOT / "docs" / "benchmarks"
INTRO = Path(__file__).with_name("intro.md")
BEGIN, END = "<!-- figures: python -m benchmarks.pages -->", "<!-- end of figures -->"


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (header, align, *lines)]


def case_tables(op: str, cases: dict[CaseKey, list[Row]]) -> Iterator[str]:
    for (of_op, name, shape, dtype), rows in cases.items():
        if of_op != op:
            continue
        figures = Figures(rows)
        yield f"**{name}**, {dtype}: {shape.replace('-', ' ')}"
        yield ""
        yield from markdown(*table(figures))
        for method, note in figures.absent.items():
            yield f"\n{method}: not run, {note}."
        yield ""


def notes(op: str) -> str:
    """The docstring of an op's module, and the work that it counts."""
    module = load(op)
    return f"{' '.join((module.__doc__ or '').split())} Counted: {module.COUNTED}."


def origin(records: list[Record], slug: str, results: str) -> str:
    """Of what the figures are; `results` is the path to their folder from the page."""
    newest = newest_of(records)
    commits = dict.fromkeys(record.environment.commit for record in records)
    return (
        f"{newest.threads} threads, Python {newest.python}, torch {newest.torch}, Triton {newest.triton or 'none'}; "
        f"{newest.date}, commit {', '.join(commits)}. Every figure: [{slug}.csv]({results}/{slug}.csv)."
    )


def newest_of(records: list[Record]) -> Environment:
    return max(records, key=lambda record: record.environment.date).environment


def newest_of_each_kind(devices: Iterable[list[Record]]) -> Iterator[list[Record]]:
    """Of the CPUs the one that was measured last, and of the GPUs."""
    newest: dict[bool, list[Record]] = {}
    for records in devices:
        is_cpu = any(record.row.method.startswith("ours (cpu)") for record in records)
        before = newest.get(is_cpu)
        if before is None or newest_of(before).date < newest_of(records).date:
            newest[is_cpu] = records
    yield from newest.values()


def pictures(records: list[Record], slug: str, draw: bool) -> Iterator[str]:
    """The names of the device's plots, drawn anew if told."""
    rows, device = [record.row for record in records], newest_of(records).device
    dtype = next((row.dtype for row in rows if row.name.startswith("sweep-")), "")
    drawings: dict[str, Callable[[Path], bool]] = {
        f"{slug}-scaling.svg": lambda path: plots.scaling(
            rows, dtype, f"Loss + gradient, {dtype}, {device}", path
        ),
        f"{slug}-ratios.svg": lambda path: plots.ratio_bars(rows, f"Cityscapes, {device}", path),
    }
    for name, drawing in drawings.items():
        if drawing(PLOTS / name) if draw else (PLOTS / name).exists():
            yield name


def device_summary(records: list[Record], slug: str, draw: bool) -> Iterator[str]:
    """What BENCHMARKS.md says of a device."""
    cases = by_case(record.row for record in records)
    yield f"## {newest_of(records).device}"
    yield ""
    for sentence in conclusions(cases):
        yield f"- {sentence}"
    yield ""
    for name in pictures(records, slug, draw):
        yield f"![{name.removesuffix('.svg').replace('-', ' ')}](benchmarks/plots/{name})"
        yield ""
    yield from markdown(*loss_table(cases))
    yield ""
    yield f"[Every op, shape, pass and method](docs/benchmarks/{slug}.md)."
    yield origin(records, slug, "benchmarks/results")
    yield ""


def device_page(records: list[Record], slug: str) -> Iterator[str]:
    """All the figures of a device."""
    cases = by_case(record.row for record in records)
    yield f"# {newest_of(records).device}"
    yield ""
    yield origin(records, slug, "../../benchmarks/results")
    yield "What the columns mean, and what is compared: [How it is measured](method.md)."
    yield ""
    for op, title in OPS.items():
        of_op = {key: rows for key, rows in cases.items() if key[0] == op}
        if not of_op:
            continue
        yield f"## {title}"
        yield ""
        yield notes(op)
        yield ""
        if said := verdict(of_op):
            yield f"**{said}**"
            yield ""
        yield from case_tables(op, of_op)


def pages(draw: bool) -> dict[Path, str]:
    """The text of BENCHMARKS.md, of the pages of the devices and of the README."""
    PLOTS.mkdir(exist_ok=True)
    files = {path.stem: read(path) for path in sorted(FOLDER.glob("*.csv"))}
    # What was measured last comes first.
    files = dict(sorted(files.items(), key=lambda item: newest_of(item[1]).date, reverse=True))
    lines = [INTRO.read_text()]
    for slug, records in files.items():
        lines += device_summary(records, slug, draw)
    figures = [line for records in newest_of_each_kind(files.values()) for line in telling(records)]
    block = "\n".join(markdown(["what", "on", "came out"], figures)).replace("---:", "---")
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    of_devices = {
        DEVICES / f"{slug}.md": "\n".join(device_page(records, slug)).rstrip() + "\n"
        for slug, records in files.items()
    }
    return {
        PAGE: "\n".join(lines).rstrip() + "\n",
        README: f"{before}{BEGIN}\n\n{block}\n\n{END}{after}",
        **of_devices,
    }


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__).parse_args()
    DEVICES.mkdir(exist_ok=True)
    for path, text in pages(draw=True).items():
        path.write_text(text)
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
