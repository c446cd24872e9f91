"""A fair comparison: the same training without contrast, with contrast in the batch, and with the bank, per seed.

The runs of a seed start from the same weights and see the same images, augmented alike, in the same order; they
differ in the loss alone. What a seed decides is common to them, so the difference within a seed is what to look
at, and its spread over the seeds says how far to trust it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from pixcontrast_ext.trainer.config import TrainConfig, flatten, load_config
from pixcontrast_ext.trainer.data import dataset_spec
from pixcontrast_ext.trainer.distributed import join_ranks
from pixcontrast_ext.trainer.evaluate import load_model
from pixcontrast_ext.trainer.files import write_json
from pixcontrast_ext.trainer.logs import read_rows
from pixcontrast_ext.trainer.pictures import draw_panels
from pixcontrast_ext.trainer.train import Result, train

Method = Literal["off", "batch", "bank"]

NAMES: dict[str, str] = {
    "off": "cross-entropy",
    "batch": "+ contrast in the batch",
    "bank": "+ contrast with the bank",
}
"""What to call a run, by its `--contrast`."""

_HARMLESS = ("out", "root", "checkpoint_every", "keep_checkpoints", "pictures")
"""Options that may change between a comparison and its resumption: where things are, and what is kept."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval by Student's t. Of one value there is no interval: both ends are NaN."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What came out, a run for each method and seed."""

    seeds: tuple[int, ...]
    results: dict[str, list[Result]]
    """By method, in the order of the seeds. The first method is what the others are compared with."""

    @property
    def baseline(self) -> str:
        return next(iter(self.results))

    def miou(self, method: str) -> np.ndarray:
        """The mIoU on val at the last step, for each seed."""
        return np.array([result.miou for result in self.results[method]])

    def difference(self, method: str) -> Interval:
        """The mIoU over that of the baseline, paired by seed."""
        return interval(self.miou(method) - self.miou(self.baseline))

    def seconds(self, method: str) -> float:
        """Median over the seeds of the seconds that a step takes."""
        return float(np.median([result.seconds_per_step for result in self.results[method]]))

    def memory_mib(self, method: str) -> float:
        """Most memory that training took in a run, NaN if it cannot be known."""
        return float(np.max([result.memory_mib for result in self.results[method]]))


@dataclass(frozen=True)
class CompareConfig:
    """What to compare."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Train each method once with each of these seeds."""
    methods: tuple[Method, ...] = ("off", "batch", "bank")
    """off: cross-entropy alone. batch: with contrast in the batch. bank: with the bank. Differences are to the
    first."""
    run: TrainConfig = field(default_factory=lambda: TrainConfig(out=Path("runs/compare")))

    def validate(self) -> None:
        """Raises ValueError that names the first option out of range and its value."""
        for name, values in (("seeds", self.seeds), ("methods", self.methods)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} is {values}, must be at least one and none twice")
        if min(self.seeds) < 0:
            raise ValueError(f"--seeds is {self.seeds}, must not be negative")

    def run_of(self, method: Method, seed: int) -> TrainConfig:
        """The training run of one method and seed, in a folder of its own."""
        return replace(
            self.run,
            out=self.run.out / f"{method}-seed{seed}",
            seed=seed,
            pictures=False,
            loss=replace(self.run.loss, contrast=method),
        )


def compare(config: CompareConfig, *, resume: bool = False) -> Comparison:
    """Train all runs, seed by seed, and compare them.

    Leaves compare.json, compare.png and panels.png in `config.run.out`, with the options that the runs have in common.
    Under torchrun, every rank calls this.

    Args:
        config: what to compare.
        resume: go on where an earlier comparison was cut off: runs that it finished are not repeated.

    Raises:
        ValueError: an option is out of range, or `resume` finds a run that was trained with other options.
        FileExistsError: the folder holds one of the runs already and `resume` is not set.
    """
    config.validate()
    runs = {(method, seed): config.run_of(method, seed) for seed in config.seeds for method in config.methods}
    for run in runs.values():
        run.validate()
        if (run.out / "config.json").exists():
            if not resume:
                raise FileExistsError(f"{run.out} holds a run already: --resume or choose another --out")
            _require_same_options(run)
    with join_ranks(config.run.device) as ranks:
        ranks.wait()  # all have looked at what is there
        if ranks.is_first:
            config.run.out.mkdir(parents=True, exist_ok=True)
            # To go on needs these too; they are no options of a training run, so they stand as comments.
            chosen = {"_seeds": config.seeds, "_methods": config.methods}
            write_json(config.run.out / "config.json", {**chosen, **flatten(config.run)})
        results: dict[str, list[Result]] = {method: [] for method in config.methods}
        for (method, _), run in runs.items():
            results[method].append(train(run, resume=resume and (run.out / "config.json").exists()))
        comparison = Comparison(config.seeds, results)
        if ranks.is_first:
            out = config.run.out
            write_json(out / "compare.json", record(comparison))
            draw_comparison(comparison, out / "compare.png")
            spec = dataset_spec(config.run.data.dataset)
            models = {
                NAMES[method]: load_model(of_seed[0].out, ranks.device)[0]
                for method, of_seed in results.items()
            }
            scenes = spec.build(config.run.data, "val")
            draw_panels(models, scenes, spec, out / "panels.png", ranks.device, amp=config.run.amp)
    return comparison


def _require_same_options(run: TrainConfig) -> None:
    """Raises ValueError if the run in the folder of `run` was trained with options that might change its result."""
    before, now = flatten(load_config(run.out / "config.json")), flatten(run)
    changed = [
        f"--{name.replace('_', '-')} {before[name]!r}, now {now[name]!r}"
        for name in now
        if name not in _HARMLESS and before[name] != now[name]
    ]
    if changed:
        raise ValueError(f"{run.out} was trained with {'; '.join(changed)}: choose another --out")


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of some values and its 95 % interval."""
    from scipy.stats import t  # here: it takes a second, --help should not

    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def record(comparison: Comparison) -> dict[str, object]:
    """A comparison as plain values."""
    methods = {}
    for method, results in comparison.results.items():
        difference = comparison.difference(method)
        methods[method] = {
            "miou": [result.miou for result in results],
            "class_iou": [result.class_iou for result in results],
            "difference": {"mean": difference.mean, "interval_95": [difference.low, difference.high]},
            "seconds_per_step": [result.seconds_per_step for result in results],
            "memory_mib": [result.memory_mib for result in results],
        }
    return {"seeds": list(comparison.seeds), "baseline": comparison.baseline, "methods": methods}


def table(comparison: Comparison) -> str:
    """A comparison as a table, a column per method."""
    methods = list(comparison.results)
    rows = [["mIoU on val", *(NAMES[method] for method in methods)]]
    for place, seed in enumerate(comparison.seeds):
        rows.append([f"  seed {seed}", *(f"{comparison.miou(method)[place]:.4f}" for method in methods)])
    rows.append(["  mean", *(f"{comparison.miou(method).mean():.4f}" for method in methods)])
    differences = [comparison.difference(method) for method in methods[1:]]
    rows.append(["paired difference", "", *(f"{each.mean:+.4f}" for each in differences)])
    if len(comparison.seeds) > 1:
        ends = [f"{each.low:+.4f} to {each.high:+.4f}" for each in differences]
        rows.append(["  95 % interval", "", *ends])
    base_seconds = comparison.seconds(comparison.baseline)
    base_memory = comparison.memory_mib(comparison.baseline)
    seconds = [comparison.seconds(method) for method in methods]
    memory = [comparison.memory_mib(method) for method in methods]
    rows.append(["ms per step", *(f"{each * 1e3:,.0f} ({each / base_seconds:.2f}x)" for each in seconds)])
    if not math.isnan(sum(memory)):
        rows.append(["peak memory, MiB", *(f"{each:,.0f} ({each - base_memory:+,.0f})" for each in memory)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    if len(comparison.seeds) == 1:
        lines.append("One seed: how far its difference is to be trusted cannot be told.")
    return "\n".join(lines)


def draw_comparison(comparison: Comparison, path: Path) -> Path:
    """Draw mIoU over the steps, and the paired differences at the end.

    Left, mIoU on val: each seed faint, the mean strong. Right, a dot for each seed, the mean and its 95 % interval.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, differences = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (method, results) in enumerate(comparison.results.items()):
        colour = f"C{number}"
        rows = [read_rows(result.out / "val.csv") for result in results]
        steps = [row["step"] for row in rows[0]]
        miou = np.array([[row["miou"] for row in of_seed] for of_seed in rows])
        for of_seed in miou:
            curves.plot(steps, of_seed, color=colour, alpha=0.3, linewidth=1)
        curves.plot(steps, miou.mean(0), "o-", color=colour, markersize=4, label=NAMES[method])
        if number == 0:
            continue
        points = comparison.miou(method) - comparison.miou(comparison.baseline)
        found = comparison.difference(method)
        differences.plot(np.full(len(points), number - 0.12), points, "o", color=colour, alpha=0.5)
        half = 0.0 if math.isnan(found.low) else found.high - found.mean
        differences.errorbar(number + 0.12, found.mean, half, fmt="s", color=colour, capsize=6)
    curves.set(title="Mean IoU, validation", xlabel="step", ylabel="mIoU", ylim=(0, None))
    curves.legend()
    methods = list(comparison.results)
    differences.axhline(0, color="black", linewidth=0.8)
    differences.set(
        title="Difference at the last step, paired by seed\n(dots: seeds; square: mean, 95 % interval)",
        ylabel=f"mIoU over {NAMES[methods[0]]}",
        xlim=(0.5, max(1, len(methods) - 1) + 0.5),
    )
    differences.set_xticks(range(1, len(methods)), [NAMES[method] for method in methods[1:]])
    for axes in (curves, differences):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return path
