"""Times the ops named (all of them unless told) and prints their ratios to the baselines beside the bars.

The exit code is 1 if a result is wrong, and with --check also if a ratio misses its bar.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
from importlib import import_module

import torch
from rich.console import Console
from rich.table import Table

from .harness import BARS, Incorrect, Section, Settings

OPS = ("infonce", "sampling", "gather", "enqueue", "training_step")


def verdict(name: str, value: float) -> tuple[str, bool]:
    """The bar as text, and whether the value is on its good side."""
    if name not in BARS:
        return "", True
    side, bar = BARS[name]
    return f"{side} {bar:g}", value >= bar if side == ">=" else value <= bar


def digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show(section: Section, console: Console) -> None:
    console.print(f"\n[bold]{section.title}[/bold]")
    for fact in section.facts:
        console.print(f"  {fact}", style="dim", highlight=False, soft_wrap=True)
    table = Table("method", *(("min ms", "median ms", section.unit)), box=None, padding=(0, 2))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, timing in section.timings.items():
        table.add_row(name, *map(digits, (timing.minimum_ms, timing.median_ms, timing.rate)))
    console.print(table)
    table = Table("ratio", "value", "bar", "", box=None, padding=(0, 2))
    table.columns[1].justify = "right"
    for name, value in section.ratios.items():
        bar, passed = verdict(name, value)
        table.add_row(name, f"{value:.2f}", bar, ("[green]ok" if passed else "[red]missed") if bar else "")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}")
    parser.add_argument("--rounds", type=int, default=Settings.rounds)
    parser.add_argument(
        "--num-keys", type=int, default=Settings.num_keys, help="K of infonce; 190000 needs 10 GB"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything there as well")
    parser.add_argument("--check", action="store_true", help="fail if a ratio misses its bar")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(OPS):
        parser.error(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    settings = Settings(rounds=arguments.rounds, num_keys=arguments.num_keys)

    console = Console()
    load_average = os.getloadavg()[0]  # beside other work, thread barriers wait for whole time slices
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, Python {platform.python_version()}; "
        f"{settings.rounds} interleaved rounds; load average {load_average:.1f} before",
        highlight=False,
        soft_wrap=True,
    )
    sections, failures = [], []
    for op in arguments.ops or OPS:
        try:
            section = import_module(f".{op}", __package__).run(settings)
        except Incorrect as error:
            console.print(f"[bold red]incorrect[/bold red] {error}", soft_wrap=True)
            failures.append(str(error))
            continue
        sections.append(section)
        show(section, console)

    missed = [
        f"{name} is {value:.2f}, its bar {verdict(name, value)[0]}"
        for section in sections
        for name, value in section.ratios.items()
        if not verdict(name, value)[1]
    ]
    for line in missed:
        console.print(f"[red]missed:[/red] {line}", highlight=False, soft_wrap=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            report = {
                "torch": torch.__version__,
                "load_average_before": load_average,
                "threads": torch.get_num_threads(),
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                "settings": dataclasses.asdict(settings),
                "sections": [dataclasses.asdict(section) for section in sections],
                "incorrect": failures,
                "missed": missed,
            }
            json.dump(report, file, indent=1)
    return 1 if failures or (arguments.check and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
