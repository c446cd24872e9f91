"""What a comparison shows: paired differences, how sure they are, and what it could have shown at all.

The difference of the mIoU is the outcome; rare classes and pixel accuracy are secondary. A difference is only called
one if Student's t and the sign-flip test (the permutation test of pairs, which assumes no more than that pairs are
independent and, without an effect, of either sign alike) both say so, the latter after Holm's correction for the number
of questions asked. Of one question six pairs are the fewest for which that can be: of 2^6 choices of signs, two are as
extreme as all alike. Of more it takes more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

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

Question = tuple[str, str]
"""An arm, and the outcome in which it may differ from the baseline."""

LEVEL = 0.05
POWER = 0.8
PRIMARY, RARE, ACCURACY = "mIoU", "rare classes", "pixel accuracy"


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
    """Of the sign-flip test, two-sided; NaN for one pair."""
    pairs: int
    """How many there are. One with a NaN is none."""
    questions: int = 1
    """How many are asked at once."""
    p_holm: float = math.nan
    """`p` corrected for their number: by Holm from `answers`, by Bonferroni from `paired`, which knows no other p."""

    @property
    def is_shown(self) -> bool:
        """Whether it may be called a difference."""
        return (self.low > 0 or self.high < 0) and self.p_holm < LEVEL


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
    looks: tuple[int, ...] = ()
    """After how many seeds it has been looked at, this time among them."""

    @property
    def baseline(self) -> str:
        return next(iter(self.results))

    @property
    def outcomes(self) -> tuple[str, ...]:
        """The primary one and the secondary ones that there are."""
        return (PRIMARY, *([RARE] if self.rare else []), ACCURACY)

    def values(self, arm: str, outcome: str = PRIMARY) -> np.ndarray:
        """An outcome at the last step, for each seed."""
        if outcome == PRIMARY:
            return np.array([result.miou for result in self.results[arm]])
        if outcome == ACCURACY:
            return np.array([result.pixel_accuracy for result in self.results[arm]])
        rows = [[result.class_iou[name] for name in self.rare] for result in self.results[arm]]
        return np.array([mean_iou(row) for row in rows])

    @cached_property
    def answers(self) -> dict[Question, Paired]:
        """See `answers`."""
        arms = list(self.results)[1:]
        return answers(
            {
                (arm, outcome): self.values(arm, outcome) - self.values(self.baseline, outcome)
                for arm in arms
                for outcome in self.outcomes
            }
        )

    def difference(self, arm: str, outcome: str = PRIMARY) -> Paired:
        """An outcome over that of the baseline, paired by seed."""
        return self.answers[arm, outcome]

    def seconds(self, arm: str) -> float:
        """Median over the seeds of the seconds that a step takes."""
        return float(np.median([result.seconds_per_step for result in self.results[arm]]))

    def memory_mib(self, arm: str) -> float:
        """Most memory that training took in a run, NaN if it cannot be known."""
        return float(np.max([result.memory_mib for result in self.results[arm]]))


def mean_iou(of_classes: Sequence[float]) -> float:
    """Mean over the classes that were scored; one that the truth lacks is NaN, and so is the mean if it lacks all."""
    scored = [iou for iou in of_classes if not math.isnan(iou)]
    return float(np.mean(scored)) if scored else math.nan


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of some values and its 95 % interval."""
    from scipy.stats import t  # here: it takes a second, --help should not

    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(t.ppf(1 - LEVEL / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def fewest_pairs(questions: int) -> int:
    """The fewest pairs for which the sign-flip test can answer one of so many questions: if all have one sign."""
    return math.floor(math.log2(questions / LEVEL)) + 2


def answers(differences: Mapping[Question, np.ndarray]) -> dict[Question, Paired]:
    """What paired differences show, those of a question being corrected for the others of its family.

    There are four families: of all arms the primary outcome, and everything else, and the same of the A/A arm, which
    asks nothing of the contrast. A question of fewer than two pairs is not asked.
    """
    families: dict[tuple[bool, bool], list[Question]] = {}
    for arm, outcome in differences:
        families.setdefault((arm == "aa", outcome == PRIMARY), []).append((arm, outcome))
    found = {}
    for family in families.values():
        asked = sum(int((~np.isnan(differences[question])).sum() > 1) for question in family)
        pairs = [paired(differences[question], asked) for question in family]
        for question, pair, p in zip(family, pairs, holm([pair.p for pair in pairs]), strict=True):
            found[question] = replace(pair, p_holm=p)
    return {question: found[question] for question in differences}


def paired(differences: np.ndarray, questions: int = 1) -> Paired:
    """A mean of paired differences, and what these can show where so many questions are asked. NaNs are left out."""
    from scipy.stats import permutation_test

    differences = differences[~np.isnan(differences)]
    count = len(differences)
    if count == 0:
        return Paired(math.nan, math.nan, math.nan, math.nan, math.nan, 0, questions)
    found = interval(differences)
    if count < 2:
        return Paired(found.mean, found.low, found.high, math.nan, math.nan, count, questions)
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
    p = float(test.pvalue)
    return Paired(found.mean, found.low, found.high, detectable, p, count, questions, min(1.0, p * questions))


@lru_cache(maxsize=64)
def _detectable(pairs: int, questions: int) -> float:
    """The difference, in standard deviations of a pair, that `is_shown` finds with `POWER`, of normal differences.

    By trial, with the other questions of the family taken to have no answer.
    """
    from scipy.stats import t

    if pairs < fewest_pairs(questions):
        return math.nan
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1000, pairs))
    if pairs <= 13:
        signs = np.array([(1, *rest) for rest in itertools.product((1, -1), repeat=pairs - 1)])
    else:
        signs = np.concatenate([np.ones((1, pairs)), rng.choice((1.0, -1.0), (9999, pairs))])
    critical = t.ppf(1 - LEVEL / 2, pairs - 1) * np.std(noise, axis=1, ddof=1) * math.sqrt(pairs)
    trials = list(zip(np.split(noise, 20), np.split(critical, 20), strict=True))

    def power(effect: float) -> float:
        found = 0
        for differences, least in trials:  # a few at a time: all signs of all of them are 80 MB
            sums = np.abs((differences + effect) @ signs.T)  # column 0 is of the signs as they are
            p = (sums >= sums[:, :1] * (1 - 1e-12)).mean(1)
            found += int(np.count_nonzero((sums[:, 0] > least) & (p * questions < LEVEL)))
        return found / len(noise)

    low, high = 0.0, 20.0
    while high - low > 1e-3:
        effect = (low + high) / 2
        low, high = (low, effect) if power(effect) >= POWER else (effect, high)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979). NaN stays NaN and does not count."""
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        corrected[place] = highest
    return corrected


def text_of_p(p: float) -> str:
    """With three decimals, or below 0.001 four; the sign-flip test gives none below 0.0002."""
    return f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


def name_of(arm: str) -> str:
    return NAMES.get(arm, arm)


def record(comparison: Comparison) -> dict[str, object]:
    """A comparison as plain values."""
    arms = {}
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
                "p_holm": found.p_holm,
                "differs": found.is_shown,
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
        "looks": list(comparison.looks),
        "arms": arms,
    }


def table(comparison: Comparison) -> str:
    """A comparison as a table, a column per arm, and below it what it shows."""
    arms, several = list(comparison.results), len(comparison.seeds) > 1
    rows = [[f"mIoU on {comparison.split}", *map(name_of, arms)]]
    for place, seed in enumerate(comparison.seeds):
        rows.append([f"  seed {seed}", *(f"{comparison.values(arm)[place]:.4f}" for arm in arms)])
    found = [comparison.difference(arm) for arm in arms[1:]]
    rows.append(["  mean", *(f"{comparison.values(arm).mean():.4f}" for arm in arms)])
    rows.append(["paired difference", "", *(f"{each.mean:+.4f}" for each in found)])
    if several:
        rows.append(["  95 % interval", "", *(f"{each.low:+.4f} to {each.high:+.4f}" for each in found)])
        rows.append(["  detectable", "", *(f"{each.detectable:.4f}" for each in found)])
        rows.append(["  p by Holm", "", *(text_of_p(each.p_holm) for each in found)])
    for outcome in comparison.outcomes[1:]:
        title = f"{outcome} ({len(comparison.rare)})" if outcome == RARE else outcome
        rows.append([title, *(f"{np.mean(comparison.values(arm, outcome)):.4f}" for arm in arms)])
        found = [comparison.difference(arm, outcome) for arm in arms[1:]]
        rows.append(["  difference", "", *(f"{each.mean:+.4f}" for each in found)])
        if several:
            rows.append(["  95 % interval", "", *(f"{each.low:+.4f} to {each.high:+.4f}" for each in found)])
            rows.append(["  p by Holm", "", *(text_of_p(each.p_holm) for each in found)])
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
    answered = [str(each) for each in comparison.looks if each >= fewest_pairs(1)]
    if len(answered) > 1:
        lines.append(
            f"Looked at after {' and '.join(answered)} seeds: intervals and p hold for a number that was fixed before. "
            "Whoever adds seeds until a difference shows finds one where there is none."
        )
    asked: dict[str, int] = {}
    for (arm, outcome), found in comparison.answers.items():
        what = "the mIoU" if outcome == PRIMARY else "the secondary outcomes"
        asked[what + (" of the A/A arm" if arm == "aa" else "")] = found.questions
    for what, questions in asked.items():
        if questions and seeds < (fewest := fewest_pairs(questions)):
            lines.append(
                f"{seeds} seeds cannot show a difference in {what}, whatever the intervals say: for {questions} at "
                f"once the sign-flip test needs {fewest}. --resume with --seeds up to that number adds to this "
                "comparison."
            )
    for arm in arms:
        for outcome in comparison.outcomes:
            found = comparison.difference(arm, outcome)
            if found.is_shown:
                way = "higher" if found.mean > 0 else "lower"
                lines.append(f"{name_of(arm)}: {outcome} {way} than {base} by {abs(found.mean):.4f}.")
            elif outcome == PRIMARY and not math.isnan(found.detectable):
                lines.append(
                    f"{name_of(arm)}: no difference in {outcome} is shown; one of {found.detectable:.4f} would have "
                    "been found four times in five."
                )
    is_control = comparison.baseline == "off" and "aa" in arms
    if is_control and any(comparison.difference("aa", outcome).is_shown for outcome in comparison.outcomes):
        lines.append(
            "The A/A arm differs, which trains the same loss. Chance does that in at most one comparison of ten; "
            "otherwise the arms differ in something besides the loss, and nothing here is to be trusted."
        )
    return lines


def mark_of(found: Interval, bar: str = "yerr") -> dict[str, Any]:
    """How `errorbar` draws a mean: with its interval, or hollow where there is none."""
    if math.isnan(found.low):
        return {"fmt": "s", "markerfacecolor": "none"}
    return {"fmt": "s", bar: found.high - found.mean}


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
        differences.errorbar(number + 0.12, found.mean, **mark_of(found), color=colour, capsize=6)
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
