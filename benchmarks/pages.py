"""Writes BENCHMARKS.md, its pictures and the README's figures from the CSVs: `python -m benchmarks.pages`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from . import load, plots
from .harness import Row
from .report import digits, table
from .results import FOLDER, CaseKey, Environment, Figures, Record, by_case, is_ours, read
from .shapes import Images

ROOT = Path(__file__).resolve().parents[1]
PAGE, README, PLOTS = ROOT / "BENCHMARKS.md", ROOT / "README.md", ROOT / "benchmarks" / "plots"
INTRO = Path(__file__).with_name("intro.md")
BEGIN, END = "<!-- figures: python -m benchmarks.pages -->", "<!-- end of figures -->"

OPS = {
    "infonce": "The loss and its gradient",
    "mining": "The loss of mined pairs",
    "training_step": "The criterion in a training step",
    "network_step": "A network's training step",
    "sampling": "Sampling",
    "gather": "Gather",
    "enqueue": "Enqueue",
}

RIVALS = ("dense", "chunked loop", "loops", "pytorch-metric-learning")
"""How the names of methods begin that do all of the work."""


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(header) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (header, align, *lines)]


def overview(cases: dict[CaseKey, list[Row]]) -> Iterator[str]:
    """One line for each shape of the loss: ours, and how many times as long the others take."""
    shapes = {key: Figures(rows) for key, rows in cases.items() if key[0] == "infonce"}
    named = {key: figures for key, figures in shapes.items() if not key[1].startswith("sweep-")}
    others = list(
        dict.fromkeys(
            method
            for figures in named.values()
            for method in [*figures.methods, *figures.absent]
            if not is_ours(method) and not method.endswith(", fp32")
        )
    )
    header = ["shape", "dtype", "method", "ms", "TFLOP/s", "extra MiB", "dense MiB", *others]
    lines = []
    for (_, name, shape, dtype), figures in named.items():
        for ours in filter(is_ours, figures.methods):
            own = figures.get(ours, "fwd+bwd", "min ms")
            assert own is not None
            times = {other: figures.get(other, "fwd+bwd", "min ms") for other in others}
            lines.append(
                [
                    f"{name}: {shape.replace('-', ' ')}",
                    dtype,
                    ours,
                    *(
                        digits(figures.get(ours, "fwd+bwd", metric))
                        for metric in ("p50 ms", "TFLOP/s", "extra MiB")
                    ),
                    digits(figures.get("dense", "fwd+bwd", "extra MiB")),
                    *("-" if time is None else f"{digits(time / own)}x" for time in times.values()),
                ]
            )
    yield from markdown(header, lines)
    yield ""
    yield "Times of loss and gradient; the columns of the others say how many times as long as ours they take."
    for method in others:
        lacking = {
            name: figures.absent[method]
            for (_, name, _, _), figures in named.items()
            if method in figures.absent
        }
        if lacking:
            yield f"\n{method} was not run at {', '.join(lacking)} ({min(lacking)}: {lacking[min(lacking)]})."


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


def verdict(op: str, cases: dict[CaseKey, list[Row]]) -> str:
    """Where ours is ahead of what does the same work, and where it is not; empty if nothing else does it."""
    least: dict[str, tuple[float, str]] = {}  # by case, the rival that comes nearest
    for (of_op, name, _, dtype), rows in cases.items():
        if of_op != op:
            continue
        figures = Figures(rows)
        times = {method: figures.get(method, figures.whole(), "min ms") for method in figures.methods}
        for rival in filter(lambda method: method.startswith(RIVALS), figures.methods):
            of_kind = rival.partition(", ")[
                2
            ]  # a strategy of mining, that ours of the same name is held against
            ours = [method for method in figures.methods if is_ours(method)]
            ours = [method for method in ours if of_kind and method.endswith(f", {of_kind}")] or ours
            fastest = min((time for method in ours if (time := times[method])), default=None)
            if fastest is not None and (time := times[rival]):
                nearest = least.get(f"{name} {dtype}", (float("inf"), ""))
                least[f"{name} {dtype}"] = min(nearest, (time / fastest, rival))
    if not least:
        return ""
    behind = {case: found for case, found in least.items() if found[0] < 1}
    ahead = [ratio for ratio, _ in least.values() if ratio >= 1]
    text = f"Ours is ahead of all that do the same work in {len(ahead)} of {len(least)} cases"
    if ahead:
        text += f": the nearest takes {min(ahead):.2f} to {max(ahead):.2f} times as long"
    listed = ", ".join(f"{case} ({rival} takes {ratio:.2f})" for case, (ratio, rival) in behind.items())
    return f"{text}. {f'Behind at {listed}.' if behind else 'It is behind in none.'}"


def notes(op: str) -> str:
    """The docstring of an op's module, and the work that it counts."""
    module = load(op)
    return f"{' '.join((module.__doc__ or '').split())} Counted: {module.COUNTED}."


def device_section(records: list[Record], slug: str, draw: bool) -> Iterator[str]:
    rows = [record.row for record in records]
    cases = by_case(rows)
    newest: Environment = max(records, key=lambda record: record.environment.date).environment
    commits = dict.fromkeys(record.environment.commit for record in records)
    yield f"## {newest.device}"
    yield ""
    yield (
        f"{newest.threads} threads, Python {newest.python}, torch {newest.torch}, Triton {newest.triton or 'none'}; "
        f"{newest.date}, commit {', '.join(commits)}. CSV: `benchmarks/results/{slug}.csv`."
    )
    yield ""
    dtype = next((key[3] for key in cases if key[1].startswith("sweep-")), "")
    pictures: dict[str, Callable[[Path], bool]] = {
        f"{slug}-scaling.svg": lambda path: plots.scaling(
            rows, dtype, f"Loss + gradient, {dtype}, {newest.device}", path
        ),
        f"{slug}-ratios.svg": lambda path: plots.ratio_bars(rows, f"Cityscapes, {newest.device}", path),
    }
    for name, picture in pictures.items():
        if picture(PLOTS / name) if draw else (PLOTS / name).exists():
            yield f"![{name.removesuffix('.svg').replace('-', ' ')}](benchmarks/plots/{name})"
            yield ""
    for op, title in OPS.items():
        if not any(key[0] == op for key in cases):
            continue
        yield f"### {title}"
        yield ""
        yield notes(op)
        yield ""
        if said := verdict(op, cases):
            yield f"**{said}**"
            yield ""
        if op == "infonce":
            yield from overview(cases)
            yield ""
            yield "<details><summary>Every shape, pass and method</summary>"
            yield ""
            yield from case_tables(op, cases)
            yield "</details>"
            yield ""
        else:
            yield from case_tables(op, cases)


def telling(records: list[Record]) -> Iterator[list[str]]:
    """The figures of one device that a user would ask for first."""
    by_name = {
        (key[0], key[1], key[3]): Figures(rows) for key, rows in by_case(r.row for r in records).items()
    }
    device = records[0].environment.device

    def first(op: str, name: str, *dtypes: str) -> tuple[str, Figures] | None:
        return next(
            ((dtype, by_name[op, name, dtype]) for dtype in dtypes if (op, name, dtype) in by_name), None
        )

    if found := first("infonce", "cityscapes", "tf32", "fp32"):
        dtype, figures = found
        ours = next(filter(is_ours, figures.methods))
        own = figures.get(ours, "fwd+bwd", "min ms")
        dense, compiled = (
            figures.get(method, "fwd+bwd", "min ms") for method in ("dense", "dense, torch.compile")
        )
        memory, of_dense = (figures.get(method, "fwd+bwd", "extra MiB") for method in (ours, "dense"))
        if own and dense and compiled and memory and of_dense:
            yield [
                f"loss + gradient, 1024 anchors x 190,000 keys, D 256, {dtype}",
                device,
                f"{dense / own:.1f}x as fast as the dense PyTorch loss, {compiled / own:.1f}x as torch.compile of "
                f"it; {digits(memory)} MiB extra memory instead of {digits(of_dense)}",
            ]
    if found := first("training_step", "cityscapes", "fp32"):
        figures = found[1]
        ours = next(filter(is_ours, figures.methods))
        own, loops = (figures.get(method, "fwd+bwd", "min ms") for method in (ours, "loops + dense"))
        if own and loops:
            yield [
                "the criterion in a step: sample, gather, loss, backward, enqueue; 8x256x128x256, 190,000 keys",
                device,
                f"{loops / own:.1f}x as fast as loops and the dense loss ({digits(own)} ms instead of {digits(loops)})",
            ]
    for (op, _, sizes, _), rows in by_case(record.row for record in records).items():
        if op == "network_step":
            figures = Figures(rows)
            ours = next(filter(is_ours, figures.methods))
            used = ours.replace(", all", ", used")
            off, own, of_used, loops = (
                figures.get(method, "fwd+bwd", "min ms")
                for method in ("contrast off", ours, used, "loops + dense")
            )
            shape = Images.parse(sizes)
            network = load(op).network_of(shape, "cpu" if "cpu" in ours else "cuda")
            if off and own and of_used and loops:
                of_all = "" if used == ours else f", {own / off - 1:.0%} if it projects every pixel"
                yield [
                    f"training step of the {network}: {shape.B} images of {shape.H}x{shape.W}, {shape.A} anchors",
                    device,
                    f"the contrast adds {of_used / off - 1:.0%} to a step without it{of_all}; by loops and the dense "
                    f"loss it adds {loops / off - 1:.0%}",
                ]
                return  # BENCHMARKS.md has the others


def pages(draw: bool) -> dict[Path, str]:
    """The text of BENCHMARKS.md and of the README."""
    PLOTS.mkdir(exist_ok=True)
    files = {path.stem: read(path) for path in sorted(FOLDER.glob("*.csv"))}
    lines = [INTRO.read_text()]
    for slug, records in files.items():
        lines += device_section(records, slug, draw)
    figures = [line for records in files.values() for line in telling(records)]
    block = "\n".join(markdown(["what", "on", "came out"], figures)).replace("---:", "---")
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return {
        PAGE: "\n".join(lines).rstrip() + "\n",
        README: f"{before}{BEGIN}\n\n{block}\n\n{END}{after}",
    }


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__).parse_args()
    for path, text in pages(draw=True).items():
        path.write_text(text)
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
