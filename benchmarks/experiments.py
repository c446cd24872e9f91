"""The tables and pictures of docs/experiments.md, from the runs: `python -m benchmarks.experiments`.

benchmarks/results/NAME/ has an experiment's runs.csv, a row for each run, and experiment.json, which says what its arms
are called and what was asked. `add NAME FOLDER` takes the finished runs of a comparison into it, and probes their
features; what is there already stays, so that a long experiment is recorded as it goes. settings.json, which it writes,
has the settings of each arm, and a run of others is refused. If the plan says after how many seeds it looks at an arm,
experiment.json has that as "looks", and before them tables and pictures have its means alone.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import io
import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import ttest_1samp

from pixcontrast_ext.trainer.comparison import (
    ACCURACY,
    PRIMARY,
    RARE,
    Paired,
    Question,
    answers,
    mark_of,
    mean_iou,
    text_of_p,
)
from pixcontrast_ext.trainer.files import write_json, write_text

from .pages import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PLOTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "plots", ROOT / "docs"
PAGES = (DOCS / "experiments.md",)
SHOWN_ON = (*PAGES, ROOT / "README.md")
BEGIN, END = "<!-- table: {} -->", "<!-- end of table -->"

PROBED = {
    "features/recall_at_1": "features: R@1",
    "features/map_at_r": "features: mAP@R",
    "features/knn": "features: 20-NN",
    "features/linear": "features: linear probe",
}
"""Columns of the probe's scores that are outcomes, and what to call them."""


@dataclass(frozen=True)
class Experiment:
    """The runs of an experiment, by arm and seed."""

    name: str
    arms: dict[str, str]
    """What each arm is called. The first is what the others are compared with."""
    split: str
    """What the scores are of."""
    runs: dict[tuple[str, int], dict[str, float]]
    """The columns of each run."""
    rare: tuple[str, ...] = field(default=())
    """Classes whose mean IoU is an outcome."""
    timed: bool = True
    """Whether the times of the arms' steps may be compared: whatever else the machine did, it did beside all alike."""
    looks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """After how many seeds the plan looks at an arm, and how large |t| of its primary outcome has to be then to end the
    experiment; the last look ends it anyway. Without a plan arms are looked at whenever they are shown."""

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for _, seed in self.runs})

    @property
    def outcomes(self) -> list[str]:
        """The primary one, then the secondary ones. Raises ValueError for one that only some of the runs have."""
        return [
            PRIMARY,
            *([RARE] if self.rare else []),
            *([ACCURACY] if self.has("pixel_accuracy") else []),
            *filter(self.has, PROBED),
        ]

    def has(self, column: str) -> bool:
        """Whether all runs have it or none. Raises ValueError for one that only some of them have."""
        lacking = [f"{arm}-seed{seed}" for (arm, seed), run in self.runs.items() if column not in run]
        if lacking and len(lacking) < len(self.runs):
            raise ValueError(f"{self.name}: {', '.join(lacking)} lacks {column}, which other runs have")
        return not lacking

    def value(self, arm: str, seed: int, outcome: str) -> float:
        run = self.runs[arm, seed]
        if outcome == RARE:
            return mean_iou([run[f"iou/{name}"] for name in self.rare])
        return run[{PRIMARY: "miou", ACCURACY: "pixel_accuracy"}.get(outcome, outcome)]

    def seeds_of(self, arm: str) -> list[int]:
        """The seeds that an arm and the baseline have."""
        return [seed for seed in self.seeds if {(arm, seed), (self.baseline, seed)} <= self.runs.keys()]

    def values(self, arm: str, outcome: str) -> np.ndarray:
        return np.array([self.value(arm, seed, outcome) for seed in self.seeds_of(arm)])

    def differences(self, arm: str, outcome: str) -> np.ndarray:
        """To the baseline, paired by seed."""
        seeds = self.seeds_of(arm)
        return np.array([self.value(arm, s, outcome) - self.value(self.baseline, s, outcome) for s in seeds])

    def next_look(self, arm: str) -> int | None:
        """After how many seeds an arm is to be looked at; None if it may be now."""
        looks = {int(seeds): least for seeds, least in self.looks.get(arm, {}).items()}
        differences = self.differences(arm, PRIMARY)
        for seeds, least in sorted(looks.items()):
            if len(differences) < seeds:
                return seeds
            if abs(ttest_1samp(differences[:seeds], 0).statistic) > least:
                return None
        return None

    @functools.cached_property
    def answers(self) -> dict[Question, Paired]:
        """What each arm that has runs shows in each outcome, primary ones first; before its look the means alone."""
        arms = [arm for arm in self.arms if arm != self.baseline and self.seeds_of(arm)]
        asked = [(arm, PRIMARY) for arm in arms] + [(arm, each) for arm in arms for each in self.outcomes[1:]]
        found = answers({question: self.differences(*question) for question in asked})
        hidden: dict[str, Any] = dict.fromkeys(("low", "high", "detectable", "p", "p_holm"), math.nan)
        early = [arm for arm in arms if self.next_look(arm) is not None]
        return {
            (arm, outcome): replace(pair, **hidden) if arm in early else pair
            for (arm, outcome), pair in found.items()
        }


def read(name: str) -> Experiment:
    """An experiment from its folder in benchmarks/results."""
    told = json.loads((RESULTS / name / "experiment.json").read_text())
    runs = {
        key: {column: float(text) for column, text in row.items() if column not in ("arm", "seed") and text}
        for key, row in read_rows(RESULTS / name / "runs.csv").items()
    }
    rare, timed, looks = tuple(told.get("rare", ())), told.get("timed", True), told.get("looks", {})
    compared = set(list(told["arms"])[1:])
    if looks and (set(looks) != compared or len(compared - {"aa"}) != 1):
        raise ValueError(
            f"{name} has looks for {', '.join(looks)} and the arms {', '.join(sorted(compared))}: each needs its own, "
            "and a planned experiment has one besides aa, since the questions of another would count among its own"
        )
    return Experiment(name, told["arms"], told["split"], runs, rare, timed, looks)


# Tables


def span(pair: Paired) -> str:
    """A difference with its interval."""
    return f"{pair.mean:+.4f}" + ("" if math.isnan(pair.low) else f" ({pair.low:+.4f} to {pair.high:+.4f})")


def verdict(pair: Paired) -> str:
    """What a difference may be called."""
    if pair.is_shown:
        return f"**{'higher' if pair.mean > 0 else 'lower'}** ({pair.pairs} seeds)"
    if math.isnan(pair.detectable):
        return "one seed is too few" if pair.pairs == 1 else f"{pair.pairs} seeds are too few"
    return f"no difference shown ({pair.pairs} seeds)"


def tables(experiment: Experiment) -> Iterator[str]:
    """Each seed, the primary outcome of each arm, and the secondary outcomes."""
    arms, baseline = experiment.arms, experiment.baseline
    yield from markdown(
        [f"mIoU on {experiment.split}", *arms.values()],
        [
            [
                f"seed {seed}",
                *(
                    f"{experiment.value(arm, seed, PRIMARY):.4f}" if (arm, seed) in experiment.runs else ""
                    for arm in arms
                ),
            ]
            for seed in experiment.seeds
        ],
    )
    yield ""
    header = [
        f"compared with {arms[baseline]}",
        "means of both",
        "difference, 95 % interval",
        "detectable",
        "p",
        "",
    ]
    lines = []
    for (arm, outcome), pair in experiment.answers.items():
        base = [experiment.value(baseline, seed, outcome) for seed in experiment.seeds_of(arm)]
        means = f"{np.mean(base):.4f}, {experiment.values(arm, outcome).mean():.4f}"
        detectable = "" if math.isnan(pair.detectable) else f"{pair.detectable:.4f}"
        p = "" if math.isnan(pair.p_holm) else text_of_p(pair.p_holm)
        due = experiment.next_look(arm)
        told = verdict(pair) if due is None else f"not asked before {due} seeds"
        title = f"{arms[arm]}: {PROBED.get(outcome, outcome)}"
        lines.append([title, means, span(pair), detectable, p, told])
    yield from markdown(header, lines)
    costs = list(cost_lines(experiment))
    if costs:
        yield ""
        yield from markdown(["", *arms.values()], costs)


def cost_lines(experiment: Experiment) -> Iterator[list[str]]:
    """What a step takes, and the memory: medians over the seeds that an arm and the baseline have, and their ratio."""
    time, memory = ("seconds_per_step", "ms a step", 1e3), ("memory_mib", "peak memory, MiB", 1.0)
    for column, title, scale in (time, memory) if experiment.timed else (memory,):
        if not experiment.has(column):
            continue
        cells = []
        for arm in experiment.arms:
            own, base = (
                [experiment.runs[of, seed][column] * scale for seed in experiment.seeds_of(arm)]
                for of in (arm, experiment.baseline)
            )
            cells.append(f"{np.median(own):,.0f} ({np.median(own) / np.median(base):.2f}x)" if own else "")
        yield [title, *cells]


def draw(experiment: Experiment) -> Figure:
    """Left, the mIoU of each seed's runs joined by a line; right, the differences of all outcomes, with intervals."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    runs, differences = figure.subplots(1, 2, width_ratios=(2, 3))
    arms = list(experiment.arms)
    for seed in experiment.seeds:
        places = [place for place, arm in enumerate(arms) if (arm, seed) in experiment.runs]
        values = [experiment.value(arms[place], seed, PRIMARY) for place in places]
        runs.plot(places, values, "o-", color="0.6", markersize=4, linewidth=1)
    barred = [arm for arm in arms if arm != "aa"]  # the control's seeds may be fewer
    have_all = [seed for seed in experiment.seeds if all((arm, seed) in experiment.runs for arm in barred)]
    for arm in barred if len(have_all) > 1 else []:
        place = arms.index(arm)
        mean = np.mean([experiment.value(arm, seed, PRIMARY) for seed in have_all])
        runs.plot([place - 0.15, place + 0.15], [mean] * 2, color="C3", linewidth=3)
    runs.set_xticks(range(len(arms)), [textwrap.fill(title, 14) for title in experiment.arms.values()])
    title = f"mIoU on {experiment.split}: a line a seed"
    if len(have_all) > 1:
        title += ", bars the means" + (
            f" of {len(have_all)}" if len(have_all) < len(experiment.seeds) else ""
        )
    runs.set_title(title, fontsize="medium")
    runs.set_xlim(-0.4, len(arms) - 0.6)
    for number, arm in enumerate(arms[1:]):
        pairs = [pair for (of, _), pair in experiment.answers.items() if of == arm]
        for place, pair in enumerate(pairs):
            height = -place - 0.25 * number
            label = experiment.arms[arm] if place == 0 else None
            differences.errorbar(
                pair.mean, height, **mark_of(pair, "xerr"), color=f"C{number}", capsize=5, label=label
            )
    names = [PROBED.get(outcome, outcome) for outcome in experiment.outcomes]
    differences.set_yticks([-place for place in range(len(names))], names)
    differences.set_ylim(-len(names) - 0.25 * len(arms[2:]), 0.5)
    differences.axvline(0, color="black", linewidth=0.8)
    differences.set_title(
        f"difference to {experiment.arms[arms[0]]}, mean and 95 % interval", fontsize="medium"
    )
    differences.legend(loc="lower right")
    for axes in (runs, differences):
        axes.grid(alpha=0.3)
    return figure


def fingerprint(experiment: Experiment) -> str:
    """Of the names and numbers that a picture of the experiment shows; it is kept in the file."""
    scores = {key: f"{experiment.value(*key, PRIMARY):.6f}" for key in experiment.runs}
    answered = {
        question: f"{pair.mean:.6f} {pair.low:.6f} {pair.high:.6f}"
        for question, pair in experiment.answers.items()
    }
    return hashlib.sha256(repr((experiment.arms, experiment.split, scores, answered)).encode()).hexdigest()


def pictures(experiments: list[Experiment], pages: str) -> dict[Path, Experiment]:
    """The pictures that some text shows."""
    paths = {PLOTS / f"{experiment.name}.png": experiment for experiment in experiments}
    return {path: experiment for path, experiment in paths.items() if f"plots/{path.name}" in pages}


# Recording

OF_A_RUN = frozenset(
    [
        "out",
        "seed",
        "data_seed",
        "root",
        "branch_from",
        "workers",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "pictures",
    ]
)
"""Settings in which the runs of an arm may differ: they are the run's own, or change none of its numbers."""


def settings_of(run: Path) -> dict[str, Any]:
    """What the runs of an arm have in common; `shared_steps` are those of the beginning that it shares with others.

    Raises ValueError if that beginning is no longer there.
    """
    told, shared = json.loads((run / "config.json").read_text()), 0
    if told["branch_from"] is not None:
        start = run.parent / Path(told["branch_from"]).name  # beside it, wherever the comparison was moved
        if not (start / "config.json").is_file():
            raise ValueError(
                f"{run} goes on from {start}, which is not there: nobody knows how many steps it shares"
            )
        shared = json.loads((start / "config.json").read_text())["stop_after"]
    return {name: value for name, value in told.items() if name not in OF_A_RUN} | {"shared_steps": shared}


def run_columns(run: Path, split: str) -> dict[str, float] | None:
    """The scores of a run's folder; None if it is not finished, or not yet scored on the split."""
    from pixcontrast_ext.trainer.compare import read_finished
    from pixcontrast_ext.trainer.config import load_config
    from pixcontrast_ext.trainer.data import dataset_spec
    from pixcontrast_ext.trainer.probe import ProbeConfig, probe

    config = replace(load_config(run / "config.json"), out=run)
    result = read_finished(config, split)
    if result is None:
        return None
    columns = {"steps": float(config.last_step), "miou": result.miou, "pixel_accuracy": result.pixel_accuracy}
    columns |= {f"iou/{name}": result.class_iou[name] for name in dataset_spec(config.data.dataset).classes}
    columns |= {"seconds_per_step": result.seconds_per_step, "memory_mib": result.memory_mib}
    (scores,) = probe([run], ProbeConfig(split=split)).values()
    for kind, found in scores.scores.items():
        columns |= {
            f"{kind}/{measure}": value for measure, value in vars(found).items() if isinstance(value, float)
        }
    return columns


def add(name: str, folder: Path, split: str, arms: dict[str, str]) -> list[str]:
    """Take the finished runs of a comparison into an experiment, if it does not have them; returns which were new.

    Raises FileNotFoundError if the folder holds no run of these arms, ValueError if one was trained with other settings
    than those of its arm that are recorded, on other generated scenes than one of its seed beside it, or if runs
    are recorded whose settings are not.
    """
    target, described = RESULTS / name / "runs.csv", RESULTS / name / "settings.json"
    rows = read_rows(target)
    runs = {
        (arm, int(run.name.removeprefix(f"{arm}-seed"))): run
        for arm in arms
        for run in sorted(folder.glob(f"{arm}-seed*/"))
    }
    if not runs:
        raise FileNotFoundError(f"{folder} has no run of the arms {', '.join(arms)}")
    if rows and not described.exists():
        raise ValueError(f"{name} has runs and no {described.name}: nobody knows whether these are like them")
    settings_with(runs, described)  # all of them before any is probed, which takes a while
    data_seeds: dict[int, int] = {}
    for (_, seed), run in runs.items():
        data_seed = json.loads((run / "config.json").read_text())["data_seed"]
        if (of_others := data_seeds.setdefault(seed, data_seed)) != data_seed:
            raise ValueError(
                f"{run.name} is of --data-seed {data_seed}, another arm of its seed of {of_others}"
            )
    added: dict[tuple[str, int], dict[str, str]] = {}
    for (arm, seed), run in runs.items():
        if (arm, seed) in rows or (found := run_columns(run, split)) is None:
            continue
        scores = {key: f"{value:.6g}" for key, value in found.items()}
        added[arm, seed] = {"arm": arm, "seed": str(seed), **scores}
    # Read again: others may have been recorded meanwhile.
    rows, settings = {**read_rows(target), **added}, settings_with(runs, described)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_rows(target, [rows[key] for key in sorted(rows)])
    write_json(described, {arm: settings[arm] for arm in settings if any(arm == each for each, _ in rows)})
    return [runs[key].name for key in added]


def settings_with(runs: Mapping[tuple[str, int], Path], described: Path) -> dict[str, dict[str, Any]]:
    """The recorded settings by arm, and those of these runs, which have to be the same where there are some."""
    settings: dict[str, dict[str, Any]] = json.loads(described.read_text()) if described.exists() else {}
    for (arm, _), run in runs.items():
        own = settings_of(run)
        known = settings.setdefault(arm, own)
        if unlike := [each for each in own if each in known and own[each] != known[each]]:
            told = ", ".join(f"{each} {own[each]} (recorded: {known[each]})" for each in unlike)
            raise ValueError(f"{run.name} is no run of the {arm} of {described.parent.name}: {told}")
    return settings


def read_rows(path: Path) -> dict[tuple[str, int], dict[str, str]]:
    """The text of a runs.csv, by arm and seed; nothing if there is none."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row["arm"], int(row["seed"])): row for row in csv.DictReader(file)}


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


# The pages


def recorded() -> list[Experiment]:
    """All that have a run."""
    folders = sorted(path.parent for path in RESULTS.glob("*/experiment.json"))
    found = [read(folder.name) for folder in folders if (folder / "runs.csv").exists()]
    return [experiment for experiment in found if experiment.runs]


def with_tables(page: str, experiments: list[Experiment]) -> str:
    """A page with the tables of those experiments that it names."""
    for experiment in experiments:
        begin = BEGIN.format(experiment.name)
        before, found, rest = page.partition(begin)
        if found:
            _, _, after = rest.partition(END)
            page = "\n".join([before + begin, "", *tables(experiment), "", END]) + after
    return page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("add", help="record finished runs")
    adding.add_argument(
        "name", help="of the experiment, which benchmarks/results/NAME/experiment.json describes"
    )
    adding.add_argument("folder", type=Path, help="of a comparison's runs")
    given = parser.parse_args()
    if given.command == "add":
        told = json.loads((RESULTS / given.name / "experiment.json").read_text())
        for run in add(given.name, given.folder, told["split"], told["arms"]):
            print(f"added: {run}")
    experiments = recorded()
    for path in PAGES:
        path.write_text(with_tables(path.read_text(), experiments))
    shown = "".join(path.read_text() for path in SHOWN_ON)
    for picture, experiment in pictures(experiments, shown).items():
        draw(experiment).savefig(picture, dpi=110, metadata={"Source": fingerprint(experiment)})


if __name__ == "__main__":
    main()
