"""Time the ops named (all of them unless told) beside every alternative that runs here.

Every result is checked before anything is timed; the exit code is 1 if one is wrong, and with --check also if a ratio
has fallen.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pixcontrast_ext import available_backends

from . import OPS, guard, load
from .harness import ELEMENTS, Case, Row, Settings, measure
from .report import show
from .results import Record, environment, is_ours, path_of, ratios, write
from .shapes import Sizes, select
from .terminal import Terminal


@dataclass(frozen=True)
class Planned:
    op: str
    name: str
    shape: Sizes
    dtype: str


def plan(ops: Iterable[str], device: str, patterns: list[str], dtypes: list[str]) -> list[Planned]:
    """The cases to measure. Raises ValueError if a name is that of no op's shape."""
    planned: dict[tuple[str, Sizes, str], Planned] = {}
    found = set()
    for op in ops:
        module = load(op)
        known = module.plan(device)
        shapes = {name: shape for name, (shape, _) in known.items()}
        usual = next(iter(known.values()))[1]
        chosen = {} if patterns else shapes
        for pattern in patterns:
            selected = select(shapes, module.SHAPE, pattern)
            chosen |= selected
            found |= {pattern} if selected else set()
        for name, shape in chosen.items():
            for dtype in dtypes or (known[name][1] if name in known else usual):
                if dtype not in module.DTYPES[device]:
                    continue
                # A sweep's centre may have a name already.
                planned.setdefault((op, shape, dtype), Planned(op, name, shape, dtype))
    if unknown := set(patterns) - found:
        names = dict.fromkeys(name for op in ops for name in load(op).plan(device))
        raise ValueError(f"no shape is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return list(planned.values())


def backends_of(op: str, device: str, named: list[str]) -> list[str]:
    """Those named, or all that are ready but the reference, which stores what the others save."""
    served = load(op).BACKENDS[device]
    if named:
        return [name for name in served if name in named]
    ready = available_backends()
    return [name for name in served if name != "reference" and ready[name] is None]


def measure_all(
    planned: list[Planned],
    device: str,
    named: list[str],
    settings: Settings,
    terminal: Terminal,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> tuple[list[Row], list[str]]:
    """The rows of all, and what was incorrect. `keep` gets the rows of each case as soon as they are there."""
    rows: list[Row] = []
    failures: list[str] = []
    with terminal.progress(len(planned)) as bar:

        def describe(title: str, text: str) -> None:
            bar.describe(f"{title}: {text}")

        for each in planned:
            backends = backends_of(each.op, device, named)
            case: Case = load(each.op).case(each.shape, each.dtype, device, backends, each.name)
            title = f"{each.op} {each.name} {each.dtype}"
            try:
                of_case = measure(case, settings, partial(describe, title))
                if any(is_ours(row.method) and row.metric == "min ms" for row in of_case):
                    show(case, of_case, terminal)
                    keep(of_case)  # else what was recorded before stays
                    rows += of_case
                failures += [row.note for row in of_case if row.metric == "incorrect"]
            except Exception as error:  # the other cases are still worth having
                text = f"{title}: {type(error).__name__}: {error}"
                terminal.print(f"[bold red]failed[/bold red] {text}")
                failures.append(text)
            del case
            bar.advance()
    return rows, failures


def check(
    device: str, settings: Settings, named: list[str], terminal: Terminal, ops: Iterable[str] = OPS
) -> int:
    kind = guard.device_kind(device)
    methods = tuple(f"ours ({name})" for name in named) or ("ours",)
    committed = [
        row
        for row in guard.read()
        if row.device == kind and row.ratio.op in ops and row.ratio.method.startswith(methods)
    ]
    if not committed:
        terminal.print(
            f"no ratios are committed for {kind} that these would show; --save-ratios measures them"
        )
        return 2
    values: dict[guard.Key, float] = {}
    pending = committed
    for _ in range(2):  # what fell is measured once more
        cases = {(row.ratio.op, row.ratio.name, row.ratio.dtype) for row in pending}
        planned = [
            Planned(op, name, load(op).plan(device)[name][0], dtype) for op, name, dtype in sorted(cases)
        ]
        rows, failures = measure_all(planned, device, named, settings, terminal)
        if failures:
            return 1
        for ratio in ratios(rows):
            key = guard.key_of(ratio)
            values[key] = max(values.get(key, 0.0), ratio.value)
        pending = [row for row in committed if row.fell(values.get(row.key, float("nan")))]
        if not pending:
            break
    for row in committed:
        value = values.get(row.key, float("nan"))
        mark = "[red]fell[/red]" if row.fell(value) else "[green]holds[/green]"
        if row.bar is not None and value < row.bar:
            mark += f" [yellow]below its bar {row.bar:g}[/yellow]"
        terminal.print(
            f"{mark} {guard.describe(row.ratio)}: {value:.3g}, was {row.ratio.value:.3g}",
        )
    terminal.print(f"{len(pending)} of {len(committed)} ratios fell by more than {guard.SLACK:.0%}")
    return int(bool(pending))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU if torch finds one, unless told")
    parser.add_argument(
        "--backends", nargs="+", default=[], help="of the package; all that are ready unless told"
    )
    parser.add_argument(
        "--shapes", nargs="+", default=[], help="names or patterns (city*), or sizes (A1024-K19000-D256-C19)"
    )
    parser.add_argument("--dtypes", nargs="+", default=[], choices=tuple(ELEMENTS))
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="of the rounds of one case")
    parser.add_argument("--rounds", type=int, nargs=2, default=Settings.rounds, metavar=("LEAST", "MOST"))
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument(
        "--csv", type=Path, help="add the rows there; `auto` for the machine's file in results/"
    )
    parser.add_argument("--list", action="store_true", help="say what would be measured")
    parser.add_argument("--check", action="store_true", help="compare ratios with the committed table")
    parser.add_argument("--save-ratios", action="store_true", help="put this run's ratios into the table")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(OPS):
        parser.error(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    if unknown := set(arguments.backends) - set(available_backends()):
        parser.error(
            f"no such backend: {', '.join(sorted(unknown))}; there are {', '.join(available_backends())}"
        )
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    least, most = arguments.rounds
    if not 2 <= least <= most:
        parser.error(f"--rounds {least} {most}: expected 2 <= LEAST <= MOST")
    settings = Settings(arguments.seconds, (least, most), not arguments.no_memory)

    terminal = Terminal(width=None if sys.stdout.isatty() else 160)
    about = environment(device)
    # Beside other work the barriers between threads wait for whole time slices.
    terminal.print(
        f"{about.device}, {about.threads} threads, torch {about.torch}, Triton {about.triton or 'none'}, Python "
        f"{about.python}, commit {about.commit}; load average {os.getloadavg()[0]:.1f} before",
    )
    if arguments.check:
        if arguments.shapes or arguments.dtypes:
            parser.error("--check measures the shapes and dtypes of the committed table")
        return check(device, settings, arguments.backends, terminal, arguments.ops or OPS)
    try:
        planned = plan(arguments.ops or OPS, device, arguments.shapes, arguments.dtypes)
    except ValueError as error:
        parser.error(str(error))
    if arguments.list:
        for each in planned:
            terminal.print(f"{each.op} {each.name} {each.dtype}: {each.shape}")
        return 0
    path = path_of(about) if str(arguments.csv) == "auto" else arguments.csv

    def keep(rows: list[Row]) -> None:
        if path is not None:
            write(path, [Record(row, about) for row in rows])

    rows, failures = measure_all(planned, device, arguments.backends, settings, terminal, keep)
    if path is not None:
        terminal.print(f"{len(rows)} figures written to {path}")
    if arguments.save_ratios:
        guard.save(guard.device_kind(device), ratios(rows))
        terminal.print(f"ratios written to {guard.TABLE}")
    for failure in failures:
        terminal.print(f"[bold red]failed[/bold red] {failure}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
