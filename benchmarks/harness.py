"""What every benchmark shares: interleaved timing, peak memory, realistic inputs and the bars.

A number says little by itself on a shared machine, so every round runs each method once and the ratios are
taken between the fastest rounds of one process. Results are checked before anything is timed.
"""

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

# ratio -> (which side of the bar is good, the bar)
BARS: dict[str, tuple[str, float]] = {
    "infonce fp32 fwd+bwd: dense fp32 / ours": (">=", 5.0),
    "infonce fp32 fwd+bwd: ours / bare fp32": ("<=", 1.25),
    "infonce bf16 fwd+bwd: dense fp32 / ours": (">=", 5.0),
    "infonce bf16 fwd+bwd: ours / bare fp32": ("<=", 1.35),
    "infonce fp32 extra MiB, K 19000": ("<=", 16.0),
    "infonce fp32 extra MiB, K 190000": ("<=", 16.0),
    "infonce bf16 extra MiB, K 19000": ("<=", 16.0),
    "infonce bf16 extra MiB, K 190000": ("<=", 16.0),
    "sampling + gather: loops / ours": (">=", 20.0),
    "enqueue: loops / ours": (">=", 12.0),
    "enqueue: ours / one read of the map": ("<=", 6.0),
}


class Incorrect(Exception):
    """A method's result is not what it should be, so its time means nothing."""


@dataclass(frozen=True)
class Settings:
    rounds: int = 10
    num_keys: int = 19000


@dataclass(frozen=True)
class Method:
    name: str
    call: Callable[[], object]
    work: float  # operations or bytes, in the unit of its section


@dataclass(frozen=True)
class Timing:
    minimum_ms: float
    median_ms: float
    rate: float  # 1e9 units of work a second, at the minimum


@dataclass
class Section:
    """One table of results."""

    title: str
    unit: str  # of Timing.rate
    facts: list[str] = field(default_factory=list)  # shapes, and what was counted as work
    errors: dict[str, float] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    def check(self, name: str, error: float, limit: float) -> None:
        self.errors[name] = error
        if not error <= limit:  # NaN fails as well
            raise Incorrect(f"{self.title}: {name}: error {error:.3g} is above {limit:.3g}")

    def time(self, methods: list[Method], rounds: int) -> None:
        self.timings.update(interleave(methods, rounds))

    def ratio(self, name: str, above: str, below: str) -> None:
        self.ratios[name] = self.timings[above].minimum_ms / self.timings[below].minimum_ms


def interleave(methods: list[Method], rounds: int) -> dict[str, Timing]:
    for method in methods:
        method.call()
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for method in methods:
                start = time.perf_counter()
                method.call()
                seconds[method.name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return {
        method.name: Timing(
            minimum_ms=1e3 * min(seconds[method.name]),
            median_ms=1e3 * statistics.median(seconds[method.name]),
            rate=1e-9 * method.work / min(seconds[method.name]),
        )
        for method in methods
    }


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Relative error in the L2 norm, in fp64."""
    truth = truth.double()
    return ((value.double() - truth).norm() / truth.norm()).item()


# ------------------------------------------------------------------------------------------------- memory


def resident_bytes(name: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def peak_growth(call: Callable[[], list[Tensor]]) -> int:
    """How far the process's resident memory rises above where it was, beyond the tensors `call` returns."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")  # resets VmHWM
    before = resident_bytes("VmRSS")
    outputs = call()
    peak = resident_bytes("VmHWM")
    return peak - before - sum(output.nbytes for output in outputs)


def in_subprocess(module: str, *arguments: object) -> str:
    """Runs a benchmark module by itself, with allocators that give back what they are done with.

    Otherwise what the warm-up had freed would be reused unseen, and pools would count as the op's memory.
    """
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MKL_DISABLE_FAST_MM": "1",
    }
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


# ------------------------------------------------------------------------------------------------- inputs


def contrast_inputs(
    num_anchors: int, num_keys: int, dim: int, dtype: torch.dtype, num_classes: int = 19
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit anchors sorted by class, as the sampler yields them, and unit keys in the bank's layout.

    Embeddings scatter around a direction per class, so that positives are nearer than negatives.
    Returns anchors [A, D], anchor_labels [A], keys [K, D], key_labels [K].
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_classes, dim, generator=generator)

    def scatter(labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), dim, generator=generator)
        return F.normalize(centres[labels] + noise, dim=1).to(dtype)

    anchor_labels = torch.randint(num_classes, (num_anchors,), generator=generator).sort().values
    key_labels = torch.arange(num_keys) * num_classes // num_keys
    anchors, keys = scatter(anchor_labels), scatter(key_labels)
    return anchors, anchor_labels.int(), keys, key_labels.int()


def scenes(
    batch: int, height: int, width: int, num_classes: int = 19, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Labels and predictions [B, H, W] int64: blobs of frequent and rare classes, some void, ~20 % errors."""
    generator = torch.Generator().manual_seed(1)
    size = (height, width)

    def smooth(channels: int, scale: int) -> Tensor:
        coarse = torch.randn(
            batch, channels, max(1, height // scale), max(1, width // scale), generator=generator
        )
        return F.interpolate(coarse, size, mode="bilinear")

    frequency = torch.randn(batch, num_classes, 1, 1, generator=generator)
    truth = (smooth(num_classes, 8) + 0.5 * frequency).argmax(1)
    wrong = torch.rand(batch, height, width, generator=generator) < 0.2
    guess = torch.randint(num_classes, (batch, height, width), generator=generator)
    predictions = torch.where(wrong, guess, truth)
    labels = truth.masked_fill(smooth(1, 16)[:, 0] > 1.0, ignore_index)
    return labels, predictions


def embedding_map(batch: int, dim: int, height: int, width: int) -> Tensor:
    """Unit pixel embeddings [B, D, H, W], as the authors' head delivers them."""
    generator = torch.Generator().manual_seed(2)
    return F.normalize(torch.randn(batch, dim, height, width, generator=generator), dim=1)


def draw_priority(labels: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2**31 - 1, labels.shape, generator=generator, dtype=torch.int32)
