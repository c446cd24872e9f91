"""The core of the benchmarks: a case is one op at one shape, with the methods that do the same work.

Each method is verified before anything is timed. All are then called in turn, round after round, so that their ratios
hold where times do not. What comes out is long: one row for each figure.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .clock import Call, Lap, count_launches, interleave
from .memory import MIB, available_bytes, device_peak, host_peaks_apart
from .shapes import Sizes

ELEMENTS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SLOWEST_COUNTED = 5e3  # milliseconds; the launches of a call that takes longer are not worth another one

Errors = dict[str, tuple[float, float]]
"""By name of the quantity compared: the error, and the largest error that passes."""


class Incorrect(Exception):
    """A method's result is not what it should be, so its time means nothing."""


class Unavailable(Exception):
    """A method cannot run here; the message says why."""


@dataclass
class Method:
    """One way to do the work.

    `forward` is timed as the pass "fwd", without autograd. With `leaves`, the pass "fwd+bwd" calls it with autograd and
    differentiates what it returns; the differentiation, timed separately, is the pass "bwd". `both` stands in for
    "fwd+bwd" where the gradient does not come from autograd.
    """

    forward: Callable[[], object] | None = None
    leaves: Sequence[Tensor] = ()
    cotangent: Tensor | None = None
    both: Callable[[], object] | None = None
    verify: Callable[[], Errors] = dict

    def train(self, lap: Lap = lambda: None) -> object:
        if self.both is not None:
            outputs = self.both()
            lap()
            return outputs
        assert self.forward is not None
        output = self.forward()
        lap()
        assert isinstance(output, Tensor)
        gradients = torch.autograd.grad(output, self.leaves, self.cotangent)
        lap()
        return output.detach(), *gradients

    def infer(self, lap: Lap = lambda: None) -> object:
        assert self.forward is not None
        with torch.no_grad():
            outputs = self.forward()
        lap()
        return outputs

    def passes(self) -> dict[str, Call]:
        calls: dict[str, Call] = {}
        if self.forward is not None:
            calls["fwd"] = self.infer
        if self.leaves or self.both is not None:
            calls["fwd+bwd"] = self.train
        return calls

    @property
    def part(self) -> str:
        """The pass that says most: memory and launches are measured for it."""
        return "fwd+bwd" if self.leaves or self.both is not None else "fwd"

    def longest(self) -> Callable[[], object]:
        return self.train if self.part == "fwd+bwd" else self.infer


@dataclass(frozen=True)
class Candidate:
    """A method before it is built: its peak memory, roughly, and a note for the reader."""

    build: Callable[[], Method]
    needs_bytes: int = 0
    note: str = ""


@dataclass(frozen=True)
class Work:
    """The least that a pass has to do, whatever a method really does."""

    flop: float = 0.0
    bytes: float = 0.0


@dataclass
class Case:
    op: str
    name: str
    shape: Sizes
    dtype: str
    device: str
    candidates: dict[str, Candidate]
    work: dict[str, Work]
    counted: str  # what `work` counts, in words
    floor: str | None = None  # the candidate that does the least that has to be done, and nothing else
    base: str | None = None  # the candidate without that which the others add to it
    facts: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.op} {self.name} ({self.shape}) {self.dtype} {self.device}"


@dataclass(frozen=True)
class Row:
    """One figure. `method` may be empty where a figure is of the case."""

    op: str
    name: str
    shape: str
    dtype: str
    method: str
    part: str  # fwd, bwd or fwd+bwd
    metric: str
    value: float
    note: str = ""


@dataclass(frozen=True)
class Settings:
    seconds: float = 10.0  # of a case's rounds, without what takes seconds a call
    rounds: tuple[int, int] = (2, 20)  # at least, of a call that takes seconds; at most, of any
    memory: bool = True


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Sets how torch multiplies fp32 rows: "tf32" allows TF32, all else keeps fp32's accuracy."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Relative error in the L2 norm, in fp64."""
    truth = truth.double()
    return float((value.double() - truth).norm() / truth.norm())


def differing(value: Tensor, truth: Tensor) -> int:
    return int((value != truth).sum())


Progress = Callable[[str], None]


def measure(case: Case, settings: Settings, progress: Progress = lambda text: None) -> list[Row]:
    """All figures of a case.

    A method that is off, fails or does not fit into memory has a row that says so, and no times. What fails of ours is
    "incorrect", whatever the reason: the others may be absent.
    """
    notes = _Notes(case)
    with precision(case.dtype):
        methods = _verified(case, notes, progress)
        fastest = _time(case, methods, settings, notes, progress)
        progress("launches")
        for name, method in methods.items():
            if fastest[name, method.part] > SLOWEST_COUNTED:
                continue
            launches = count_launches(method.longest(), case.device)
            notes.add(name, method.part, "launches", launches.launches)
            notes.add(name, method.part, "syncs", launches.syncs)
        if settings.memory:
            progress("memory")
            if case.device == "cuda":
                peaks = {name: device_peak(method.longest()) for name, method in methods.items()}
            else:
                peaks = host_peaks_apart(case.op, str(case.shape), case.dtype, list(methods), progress)
            for name, peak in peaks.items():
                notes.add(name, methods[name].part, "extra MiB", max(0, peak) / MIB)
                if case.base in peaks and name != case.base:
                    notes.add(name, methods[name].part, "MiB added", (peak - peaks[case.base]) / MIB)
    return notes.rows


class _Notes:
    """The rows of a case as they come."""

    def __init__(self, case: Case):
        self.case, self.rows = case, list[Row]()

    def add(self, method: str, part: str, metric: str, value: float, text: str = "") -> None:
        case = self.case
        self.rows.append(
            Row(case.op, case.name, str(case.shape), case.dtype, method, part, metric, value, text)
        )


def _verified(case: Case, notes: _Notes, progress: Progress) -> dict[str, Method]:
    """The methods that run here and whose results are right."""
    methods: dict[str, Method] = {}
    for name, candidate in case.candidates.items():
        progress(f"verify {name}")
        ours = name.startswith("ours")
        try:
            free = available_bytes(case.device)
            if candidate.needs_bytes > 0.85 * free:
                raise Unavailable(
                    f"needs about {candidate.needs_bytes / 2**30:,.0f} GiB, {free / 2**30:,.0f} GiB are free"
                )
            method = candidate.build()
            for what, (error, limit) in method.verify().items():
                notes.add(name, "", f"error of {what}", error)
                if not error <= limit:  # NaN fails as well
                    raise Incorrect(f"{case.title}: {name}: {what} is off by {error:.3g}, over {limit:.3g}")
            if case.device == "cuda" and not ours:
                method.longest()()  # memory that it lacks for the whole shape is seen here
            methods[name] = method
        except Unavailable as reason:
            notes.add(name, "", "absent", math.nan, str(reason))
        except Incorrect as reason:
            notes.add(name, "", "incorrect", math.nan, str(reason))
        except Exception as error:
            # Any code may fail at a shape or on a device; the times of the others are wanted all the same.
            first_line = next(iter(str(error).splitlines()), "")
            told = f"{type(error).__name__}: {first_line[:200]}"
            if ours:
                notes.add(name, "", "incorrect", math.nan, f"{case.title}: {name}: {told}")
            else:
                notes.add(name, "", "absent", math.nan, told)
    return methods


def _time(
    case: Case, methods: dict[str, Method], settings: Settings, notes: _Notes, progress: Progress
) -> dict[tuple[str, str], float]:
    """The fastest round in milliseconds, by method and pass."""
    calls = [(name, part, call) for name, method in methods.items() for part, call in method.passes().items()]
    times = interleave(
        [call for _, _, call in calls],
        case.device,
        settings.seconds,
        settings.rounds,
        lambda done, total: progress(f"round {done}/{total}"),
    )
    fastest: dict[tuple[str, str], float] = {}
    for (name, part, _), rounds in zip(calls, times, strict=True):
        series = {part: [sum(laps) for laps in rounds]}
        if len(rounds[0]) > 1:
            series["bwd"] = [laps[-1] for laps in rounds]
        for each, milliseconds in series.items():
            fastest[name, each] = min(milliseconds)
            seen = milliseconds if len(milliseconds) > 1 else 2 * milliseconds
            percentiles = statistics.quantiles(seen, n=100, method="inclusive")
            notes.add(name, each, "min ms", min(milliseconds))
            for at in (20, 50, 80):
                notes.add(name, each, f"p{at} ms", percentiles[at - 1])
            notes.add(name, each, "rounds", len(milliseconds))
            work = case.work.get(each, Work())
            if work.flop:
                notes.add(name, each, "TFLOP/s", 1e-9 * work.flop / min(milliseconds))
            if work.bytes:
                notes.add(name, each, "GB/s", 1e-6 * work.bytes / min(milliseconds))
    for (name, part), milliseconds_of in fastest.items():
        if case.floor is not None and (case.floor, part) in fastest:
            notes.add(name, part, "share of the floor", fastest[case.floor, part] / milliseconds_of)
        if case.base is not None and name != case.base and (case.base, part) in fastest:
            notes.add(name, part, "time added", milliseconds_of / fastest[case.base, part] - 1)
    return fastest
