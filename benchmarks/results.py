"""Figures on disk: a CSV with one row for each figure, and on each row the machine, versions and commit it is of."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pixcontrast_ext.backends import native

from .harness import Row

FOLDER = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Environment:
    device: str
    threads: int
    python: str
    torch: str
    triton: str
    pixcontrast_ext: str
    commit: str
    date: str


def processor() -> str:
    with open("/proc/cpuinfo") as info:
        names = {line.partition(":")[2].strip() for line in info if line.startswith("model name")}
    return f"{', '.join(sorted(names)) or platform.machine()} ({instruction_set()})"


def instruction_set() -> str:
    """That of the package's CPU kernels, or of torch's where ours are not built."""
    return torch.backends.cpu.get_cpu_capability() if native.unavailable else native._C.instruction_set()


def environment(device: str) -> Environment:
    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(FOLDER), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    code = ("csrc", "pixcontrast_ext", "benchmarks/*.py", "benchmarks/baselines")
    changed = git("status", "--porcelain", "--", *(f":/{path}" for path in code))
    return Environment(
        device=processor() if device == "cpu" else torch.cuda.get_device_name(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=installed("triton"),
        pixcontrast_ext=installed("pixcontrast-ext"),
        commit=(git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else ""),
        date=datetime.date.today().isoformat(),
    )


@dataclass(frozen=True)
class Record:
    row: Row
    environment: Environment


def path_of(environment: Environment) -> Path:
    """One file for each machine."""
    threads = f"-{environment.threads}-threads" if "(" in environment.device else ""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", environment.device.lower()).strip("-") + threads + ".csv")


ROW_FIELDS = [field.name for field in fields(Row)]
ENVIRONMENT_FIELDS = [field.name for field in fields(Environment)]


def read(path: Path) -> list[Record]:
    with open(path, newline="") as file:
        return [
            Record(
                Row(
                    value=float(line["value"]), **{name: line[name] for name in ROW_FIELDS if name != "value"}
                ),
                Environment(
                    threads=int(line["threads"]),
                    **{name: line[name] for name in ENVIRONMENT_FIELDS if name != "threads"},
                ),
            )
            for line in csv.DictReader(file)
        ]


def write(path: Path, records: Iterable[Record]) -> None:
    """Adds records to the file; the figures of a case that was measured again replace the older ones."""
    records = list(records)
    measured = {case_of(record.row) for record in records}
    kept = [record for record in read(path) if case_of(record.row) not in measured] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ROW_FIELDS + ENVIRONMENT_FIELDS, lineterminator="\n")
        writer.writeheader()
        for record in kept + records:
            line = asdict(record.row) | asdict(record.environment)
            writer.writerow(line | {"value": f"{record.row.value:.6g}"})


# Reading records

CaseKey = tuple[str, str, str, str]


def case_of(row: Row) -> CaseKey:
    return row.op, row.name, row.shape, row.dtype


def by_case(rows: Iterable[Row]) -> dict[CaseKey, list[Row]]:
    cases: dict[CaseKey, list[Row]] = {}
    for row in rows:
        cases.setdefault(case_of(row), []).append(row)
    return cases


class Figures:
    """The rows of one case, by method, pass and metric."""

    def __init__(self, rows: list[Row]):
        self.op = rows[0].op if rows else ""
        self.values = {(row.method, row.part, row.metric): row.value for row in rows}
        self.absent = {row.method: row.note for row in rows if row.metric in ("absent", "incorrect")}
        self.methods = list(dict.fromkeys(row.method for row in rows if row.method not in self.absent))
        order = ("fwd", "bwd", "fwd+bwd")
        self.parts = [part for part in order if any(row.part == part for row in rows)]

    def get(self, method: str, part: str, metric: str) -> float | None:
        return self.values.get((method, part, metric))

    def whole(self) -> str:
        """The pass that says most."""
        return self.parts[-1]


def is_ours(method: str) -> bool:
    return method.startswith("ours")


def ours_like(method: str, methods: list[str]) -> list[str]:
    """Those of ours that do what a method does: of its strategy of mining; with the same op beside it, else all."""
    ours = list(filter(is_ours, methods))
    if mined := re.search(r", (random|semi-hard|hardest)$", method):
        return [each for each in ours if each.endswith(mined[0])]
    found = re.search(r"(?:, (?!torch\.compile)| \+ )[^,+]*$", method)
    return [each for each in ours if found and each.endswith(found[0])] or ours


WORTH_SAVING = 16.0  # MiB; of less, a ratio says nothing


@dataclass(frozen=True)
class Ratio:
    """How many times another method's time or memory ours is; 1 over that for what is a floor."""

    op: str
    name: str
    dtype: str
    method: str
    against: str
    part: str
    quantity: str  # time or memory
    value: float


def ratios(rows: Iterable[Row]) -> Iterator[Ratio]:
    """Other / ours of every other method and pass: fastest round by fastest round, and peak by peak."""
    for (op, name, _, dtype), of_case in by_case(rows).items():
        figures = Figures(of_case)
        for ours in filter(is_ours, figures.methods):
            for other in figures.methods:
                if is_ours(other) and other.partition(")")[2] != ours.partition(")")[2]:
                    continue  # with and without the gather, all and used
                if other == ours:
                    continue
                for part in figures.parts:
                    for quantity, metric in {"time": "min ms", "memory": "extra MiB"}.items():
                        above, below = figures.get(other, part, metric), figures.get(ours, part, metric)
                        if above is None or below is None:
                            continue
                        if quantity == "memory":
                            below = max(below, 1.0)  # the pages of a process are not counted one by one
                        if quantity == "time" or above >= WORTH_SAVING:
                            yield Ratio(op, name, dtype, ours, other, part, quantity, above / below)
