"""What a comparison shows: paired differences, how sure they are, and what it could have shown at all.

The difference of the mIoU is the outcome; rare classes and pixel accuracy are secondary. A difference is only called
one if Student's t and a test of signs, which assumes nothing but that the signs of paired differences are as likely
either way, both say so, the latter after Holm's correction for the number of questions asked. Of one question six pairs
are the fewest for which that can be: of 2^6 signs, all alike have a chance of 2/64. Of more it takes more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pixcontrast_ext.trainer.logs import read_rows
from pixcontrast_ext.trainer.train import Result

NAMES: dict[str, str] = {
    "off": "cross-entropy",
    "batch": "+ contrast in the batch",
    "bank": "+ contrast with the bank",
    "aa": "A/A",
}
"""What to call the arms that `--methods` names; others have their own name."""

LEVEL = 0.05
POWER = 0.8
PRIMARY, SECONDARY = "mIoU", ("rare classes", "pixel accuracy")


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval by Student's t. Of one value there is no interval: both ends are NaN."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired(Interval):
    """A paired difference."""

    detectable: float
    """The smallest true difference that so many pairs of this spread find four times in five, among as many questions;
    NaN if so few cannot find any."""
    p: float
    """Of the test of signs, two-sided; NaN for one pair."""
    pairs: int
    """How many there are. One with a NaN is none."""


@dataclass(frozen=True)
class Comparison:
    """What came out, a run for each arm and seed."""

    seeds: tuple[int, ...]
    results: dict[str, list[Result]]
    """By arm, in the order of the seeds. The first arm is what the others are compared with."""
    split: str = "val"
    """What the scores are of."""
    rare: tuple[str, ...] = ()
    """The rare classes."""

    @property
    def baseline(self) -> str:
        return next(iter(self.results))

    @property
    def outcomes(self) -> tuple[str, ...]:
        """The primary one and the secondary ones that there are."""
        return (PRIMARY, *(name for name in SECONDARY if self.rare or name != "rare classes"))

    def values(self, arm: str, outcome: str = PRIMARY) -> np.ndarray:
        """An outcome at the last step, for each seed."""
        if outcome == PRIMARY:
            return np.array([result.miou for result in self.results[arm]])
        if outcome == "pixel accuracy":
            return np.array([result.pixel_accuracy for result in self.results[arm]])
        rows = [[result.class_iou[name] for name in self.rare] for result in self.results[arm]]
        return np.array([np.nanmean(row) if np.isfinite(row).any() else math.nan for row in rows])

    def families(self) -> list[list[tuple[str, str]]]:
        """See `families`."""
        return families(list(self.results)[1:], self.outcomes)

    def questions(self, arm: str, outcome: str = PRIMARY) -> int:
        """How many there are in the family of this one."""
        return next((len(family) for family in self.families() if (arm, outcome) in family), 1)

    def difference(self, arm: str, outcome: str = PRIMARY) -> Paired:
        """An outcome over that of the baseline, paired by seed."""
        differences = self.values(arm, outcome) - self.values(self.baseline, outcome)
        return paired(differences, self.questions(arm, outcome))

    def corrected(self) -> dict[tuple[str, str], float]:
        """P by (arm, outcome), by Holm over its family."""
        found: dict[tuple[str, str], float] = {}
        for family in self.families():
            found.update(zip(family, holm([self.difference(*key).p for key in family]), strict=True))
        return found

    def differs(self, arm: str, outcome: str = PRIMARY) -> bool:
        """Whether the comparison shows a difference to the baseline."""
        difference = self.difference(arm, outcome)
        return is_shown(difference, self.corrected()[arm, outcome])

    def seconds(self, arm: str) -> float:
        """Median over the seeds of the seconds that a step takes."""
        return float(np.median([result.seconds_per_step for result in self.results[arm]]))

    def memory_mib(self, arm: str) -> float:
        """Most memory that training took in a run, NaN if it cannot be known."""
        return float(np.max([result.memory_mib for result in self.results[arm]]))


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of some values and its 95 % interval."""
    from scipy.stats import t  # here: it takes a second, --help should not

    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(t.ppf(1 - LEVEL / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def is_shown(difference: Paired, corrected: float) -> bool:
    """Whether a difference may be called one, `corrected` being its p by Holm."""
    return (difference.low > 0 or difference.high < 0) and corrected < LEVEL


def fewest_pairs(questions: int) -> int:
    """The fewest pairs for which a test of signs, all of which are alike, can answer one of so many questions."""
    return math.floor(math.log2(questions / LEVEL)) + 2


def paired(differences: np.ndarray, questions: int = 1) -> Paired:
    """A mean of paired differences, and what these can show where so many questions are asked. NaNs are left out."""
    from scipy.stats import permutation_test

    differences = differences[~np.isnan(differences)]
    count = len(differences)
    if count == 0:
        return Paired(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    found = interval(differences)
    if count < 2:
        return Paired(found.mean, found.low, found.high, math.nan, math.nan, count)
    detectable = float(np.std(differences, ddof=1)) * _detectable(count, questions)
    # All 2^n choices of signs, or of more than 13 pairs some thousands of them, always the same.
    test = permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=9999,
        vectorized=True,
        random_state=0,
    )
    return Paired(found.mean, found.low, found.high, detectable, float(test.pvalue), count)


@lru_cache(maxsize=64)
def _detectable(pairs: int, questions: int) -> float:
    """The difference, in standard deviations of a pair, that `is_shown` finds with `POWER`, of normal differences.

    The other questions of the family are taken to have no answer. By trial for so few pairs that the test of signs is
    coarse; with more it finds what Student's t does.
    """
    from scipy.stats import t

    if pairs < fewest_pairs(questions):
        return math.nan
    if pairs > 13:
        half = t.ppf(1 - LEVEL / (2 * questions), pairs - 1)
        return float(half + t.ppf(POWER, pairs - 1)) / math.sqrt(pairs)
    noise = np.random.default_rng(0).standard_normal((1000, pairs))
    signs = np.array([(1, *rest) for rest in itertools.product((1, -1), repeat=pairs - 1)])
    sums, shifts = noise @ signs.T, signs.sum(1)
    critical = t.ppf(1 - LEVEL / 2, pairs - 1) * np.std(noise, axis=1, ddof=1) * math.sqrt(pairs)
    low, high = 0.0, 20.0
    while high - low > 1e-3:
        effect = (low + high) / 2
        shifted = np.abs(sums + effect * shifts)  # column 0 is of the signs as they are
        p = (shifted >= shifted[:, :1] * (1 - 1e-12)).mean(1)
        found = (shifted[:, 0] > critical) & (p * questions < LEVEL)
        low, high = (low, effect) if found.mean() >= POWER else (effect, high)
    return high


def families(arms: Sequence[str], outcomes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The questions (arm, outcome) that Holm's correction takes together; the first outcome is the primary one.

    All arms' primary outcomes, and all else. The A/A arm, which asks nothing of the contrast, is by itself.
    """
    groups = [[arm for arm in arms if arm != "aa"], [arm for arm in arms if arm == "aa"]]
    found = [
        [(arm, outcome) for arm in group for outcome in of_family]
        for group, of_family in itertools.product(groups, (outcomes[:1], outcomes[1:]))
    ]
    return [family for family in found if family]


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979). NaN stays NaN and does not count."""
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        corrected[place] = highest
    return corrected


def name_of(arm: str) -> str:
    return NAMES.get(arm, arm)


def record(comparison: Comparison) -> dict[str, object]:
    """A comparison as plain values."""
    corrected, arms = comparison.corrected(), {}
    for arm, results in comparison.results.items():
        differences: dict[str, object] = {}
        for outcome in comparison.outcomes if arm != comparison.baseline else ():
            found = comparison.difference(arm, outcome)
            differences[outcome] = {
                "mean": found.mean,
                "interval_95": [found.low, found.high],
                "pairs": found.pairs,
                "detectable": found.detectable,
                "p": found.p,
                "p_holm": corrected[arm, outcome],
                "differs": comparison.differs(arm, outcome),
            }
        arms[arm] = {
            "miou": [result.miou for result in results],
            "pixel_accuracy": [result.pixel_accuracy for result in results],
            "class_iou": [result.class_iou for result in results],
            "difference": differences,
            "seconds_per_step": [result.seconds_per_step for result in results],
            "memory_mib": [result.memory_mib for result in results],
        }
    return {
        "seeds": list(comparison.seeds),
        "split": comparison.split,
        "baseline": comparison.baseline,
        "rare_classes": list(comparison.rare),
        "arms": arms,
    }


def table(comparison: Comparison) -> str:
    """A comparison as a table, a column per arm, and below it what it shows."""
    arms, several = list(comparison.results), len(comparison.seeds) > 1
    corrected = comparison.corrected()
    rows = [[f"mIoU on {comparison.split}", *map(name_of, arms)]]
    for place, seed in enumerate(comparison.seeds):
        rows.append([f"  seed {seed}", *(f"{comparison.values(arm)[place]:.4f}" for arm in arms)])
    found = [comparison.difference(arm) for arm in arms[1:]]
    rows.append(["  mean", *(f"{comparison.values(arm).mean():.4f}" for arm in arms)])
    rows.append(["paired difference", "", *(f"{each.mean:+.4f}" for each in found)])
    if several:
        rows.append(["  95 % interval", "", *(f"{each.low:+.4f} to {each.high:+.4f}" for each in found)])
        rows.append(["  detectable", "", *(f"{each.detectable:.4f}" for each in found)])
        rows.append(["  p by Holm", "", *(f"{corrected[arm, PRIMARY]:.3f}" for arm in arms[1:])])
    for outcome in comparison.outcomes[1:]:
        title = f"{outcome} ({len(comparison.rare)})" if outcome == "rare classes" else outcome
        rows.append([title, *(f"{np.mean(comparison.values(arm, outcome)):.4f}" for arm in arms)])
        means = (f"{comparison.difference(arm, outcome).mean:+.4f}" for arm in arms[1:])
        rows.append(["  difference", "", *means])
        if several:
            rows.append(["  p by Holm", "", *(f"{corrected[arm, outcome]:.3f}" for arm in arms[1:])])
    base_seconds, base_memory = (
        of(comparison.baseline) for of in (comparison.seconds, comparison.memory_mib)
    )
    seconds, memory = [comparison.seconds(arm) for arm in arms], [comparison.memory_mib(arm) for arm in arms]
    rows.append(["ms per step", *(f"{each * 1e3:,.0f} ({each / base_seconds:.2f}x)" for each in seconds)])
    if not math.isnan(sum(memory)):
        rows.append(["peak memory, MiB", *(f"{each:,.0f} ({each - base_memory:+,.0f})" for each in memory)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([*lines, "", *findings(comparison)])


def findings(comparison: Comparison) -> list[str]:
    """What the comparison shows, and what it cannot, in sentences."""
    seeds, arms = len(comparison.seeds), list(comparison.results)[1:]
    if not arms:
        return []
    if seeds == 1:
        return ["One seed: how far its difference is to be trusted cannot be told."]
    lines, base = [], name_of(comparison.baseline)
    for family in comparison.families():
        if seeds < (fewest := fewest_pairs(len(family))) and family[0][0] != "aa":
            of = "the mIoU" if family[0][1] == PRIMARY else "the secondary outcomes"
            lines.append(
                f"{seeds} seeds cannot show a difference in {of}, whatever the intervals say: for {len(family)} at "
                f"once a test of signs needs {fewest}. --resume with more --seeds adds to this comparison."
            )
    for arm in arms:
        for outcome in comparison.outcomes:
            found = comparison.difference(arm, outcome)
            if comparison.differs(arm, outcome):
                way = "higher" if found.mean > 0 else "lower"
                lines.append(f"{name_of(arm)}: {outcome} {way} than {base} by {abs(found.mean):.4f}.")
            elif outcome == PRIMARY and not math.isnan(found.detectable):
                lines.append(
                    f"{name_of(arm)}: no difference in {outcome} is shown; one of {found.detectable:.4f} would have "
                    "been found four times in five."
                )
    is_control = comparison.baseline == "off" and "aa" in arms
    if is_control and any(comparison.differs("aa", outcome) for outcome in comparison.outcomes):
        lines.append("The A/A arm differs, which trains the same loss: nothing here is to be trusted.")
    return lines


def draw_comparison(comparison: Comparison, path: Path) -> Path:
    """Draw mIoU over the steps, and the paired differences at the end.

    Left, mIoU on val: each seed faint, the mean strong. Right, a dot for each seed, the mean and its 95 % interval.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, differences = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (arm, results) in enumerate(comparison.results.items()):
        colour = f"C{number}"
        rows = [read_rows(result.out / "val.csv") for result in results]
        steps = [row["step"] for row in rows[0]]
        miou = np.array([[row["miou"] for row in of_seed] for of_seed in rows])
        for of_seed in miou:
            curves.plot(steps, of_seed, color=colour, alpha=0.3, linewidth=1)
        curves.plot(steps, miou.mean(0), "o-", color=colour, markersize=4, label=name_of(arm))
        if number == 0:
            continue
        points = comparison.values(arm) - comparison.values(comparison.baseline)
        found = comparison.difference(arm)
        differences.plot(np.full(len(points), number - 0.12), points, "o", color=colour, alpha=0.5)
        half = 0.0 if math.isnan(found.low) else found.high - found.mean
        differences.errorbar(number + 0.12, found.mean, half, fmt="s", color=colour, capsize=6)
    curves.set(title="Mean IoU, validation", xlabel="step", ylabel="mIoU", ylim=(0, None))
    curves.legend()
    arms = list(comparison.results)
    differences.axhline(0, color="black", linewidth=0.8)
    differences.set(
        title=f"Difference on {comparison.split} at the last step\n(dots: seeds; square: mean, 95 % interval)",
        ylabel=f"mIoU over {name_of(arms[0])}",
        xlim=(0.5, max(1, len(arms) - 1) + 0.5),
    )
    differences.set_xticks(range(1, len(arms)), [name_of(arm) for arm in arms[1:]])
    for axes in (curves, differences):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return path
