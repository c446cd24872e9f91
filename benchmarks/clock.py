"""Time and launches of a call. On a GPU between CUDA events, with the L2 cache overwritten before each call."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

L2_BYTES = 256 * 2**20  # more than any GPU's second-level cache
HEAD_START = 2_000_000  # GPU cycles, about a millisecond, in which the host enqueues the call

Lap = Callable[[], None]
Call = Callable[[Lap], object]
"""Does its work and calls the lap given at the end of every part of it."""


class HostWatch:
    def __init__(self) -> None:
        self.times: list[float] = []

    def start(self) -> None:
        self.times = [time.perf_counter()]

    def lap(self) -> None:
        self.times.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        return [1e3 * (stop - start) for start, stop in zip(self.times, self.times[1:], strict=False)]


class DeviceWatch:
    def __init__(self, flush: torch.Tensor) -> None:
        self.flush, self.events = flush, list[torch.cuda.Event]()

    def start(self) -> None:
        self.flush.zero_()
        torch.cuda._sleep(HEAD_START)
        self.lap()

    def lap(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def milliseconds(self) -> list[float]:
        self.events[-1].synchronize()
        return [start.elapsed_time(stop) for start, stop in zip(self.events, self.events[1:], strict=False)]


SLOW = 1.0  # seconds; a call that takes longer gets the fewest rounds
SLOWEST = 10.0  # seconds; one that takes longer gets a single one


def interleave(
    calls: Sequence[Call],
    device: str,
    seconds: float,
    rounds: tuple[int, int],
    after_round: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[list[float]]]:
    """Calls each in turn, round after round: milliseconds by call, round and part.

    As many rounds as fit into `seconds`, and of a call that is faster than the others as many as fit into its part of
    them, within the two limits of `rounds`. All are spread over the whole: other work comes and goes on a shared
    machine, and meets all calls alike. The first call of each is not counted: it may compile. Calls that are slow after
    it are counted as often as the lower limit says, the slowest once.
    """
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
    times: list[list[list[float]]] = [[] for _ in calls]

    def run(call: Call) -> list[float]:
        watch = HostWatch() if flush is None else DeviceWatch(flush)
        watch.start()
        call(watch.lap)
        return watch.milliseconds()

    least, most = rounds
    warm = [run(call) for call in calls]
    for at, call in enumerate(calls):
        if sum(warm[at]) > 1e3 * SLOW:
            warm[at] = run(call)
    slow = [sum(parts) > 1e3 * SLOW for parts in warm]
    for series, parts, is_slow in zip(times, warm, slow, strict=True):
        if is_slow:
            series.append(parts)

    fast = [1e-3 * sum(parts) for parts, is_slow in zip(warm, slow, strict=True) if not is_slow]

    def count(parts: list[float]) -> int:
        """How often a call that takes so long is timed."""
        once = 1e-3 * sum(parts)
        if once > SLOW or not once:
            return 1 if once > SLOWEST else least
        return max(least, min(most, int(seconds / min(sum(fast), len(fast) * once))))

    missing = [count(parts) - len(series) for parts, series in zip(warm, times, strict=True)]
    total = max(missing, default=0)
    gc.collect()
    gc.disable()
    try:
        for done in range(total):
            for call, series, rounds_of in zip(calls, times, missing, strict=True):
                if (done + 1) * rounds_of // total > done * rounds_of // total:
                    series.append(run(call))
            after_round(done + 1, total)
    finally:
        gc.enable()
    return times


# Launches

# Calls that make the host wait for the device: on a CPU, operators that would do so on a GPU; on a GPU, the runtime's.
READS_ON_HOST = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::masked_select",
}  # fmt: skip
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}


@dataclass(frozen=True)
class Launches:
    """Launches and syncs of a call, which mean something else on a GPU than on a CPU.

    On a GPU: kernels, copies and fills on the device, and how often the host waits for it. On a CPU: torch operators
    that call no further one, and reads of a tensor's value, which would be such waits on a GPU.
    """

    launches: int
    syncs: int


def count_launches(call: Callable[[], object], device: str) -> Launches:
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler talks
    if device == "cuda":
        total, nothing = _device_launches(call), _device_launches(lambda: None)  # the profiler waits as well
        return Launches(total.launches - nothing.launches, total.syncs - nothing.syncs)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    events = [event for event in recorded.events() if event.name.startswith(("aten::", "pixcontrast::"))]
    leaves = sum(not event.cpu_children for event in events)
    return Launches(leaves, sum(event.name in READS_ON_HOST for event in events))


def _device_launches(call: Callable[[], object]) -> Launches:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    events = recorded.events()
    on_device = sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in events)
    return Launches(on_device, sum(event.name in WAITS for event in events))
