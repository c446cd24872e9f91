"""The tables of docs/experiments.md are those of the recorded runs, and recording takes each run once."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from dataclasses import astuple, replace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ttest_1samp, ttest_rel

from benchmarks import experiments
from benchmarks.experiments import (
    Experiment,
    add,
    draw,
    fingerprint,
    read,
    recorded,
    tables,
    verdict,
)
from pixcontrast_ext.trainer.compare import CompareConfig, compare
from pixcontrast_ext.trainer.comparison import ACCURACY, PRIMARY, RARE, holm, paired, text_of_p
from pixcontrast_ext.trainer.demo import ENDING


def test_pages_hold_the_tables_of_the_recorded_runs():
    for path in experiments.PAGES:
        page = path.read_text()
        assert experiments.with_tables(page, recorded()) == page, (
            f"{path.name}: run python -m benchmarks.experiments"
        )


def test_figures_in_prose_are_those_of_the_runs():
    """What README and pages tell of an experiment, with the digits that they give."""
    camvid, eighth = read("2026-11-27-camvid"), read("2026-11-28-camvid-eighth")
    own, common = read("2026-11-28-scenes-own"), read("2026-11-27-scenes")

    def gain(of, arm, outcome=PRIMARY, digits=3):
        pair = of.answers[arm, outcome]
        return [f"{each:+.{digits}f}" for each in (pair.mean, pair.low, pair.high)]

    readme, page, settings, start = (
        " ".join((experiments.ROOT / path).read_text().split())
        for path in ("README.md", "docs/experiments.md", "docs/settings.md", "docs/getting-started.md")
    )
    mean, low, high = gain(camvid, "contrast")
    assert len(camvid.seeds_of("contrast")) == 12
    assert f"gained {mean} mIoU on test (95 % interval {low} to {high}; from " in readme
    assert f"from {camvid.values('off', PRIMARY).mean():.3f}; probably overestimated)" in readme
    assert f"show a gain of {mean[1:]}" in page
    assert f"a gain of {mean[1:]} in mIoU" in settings
    of_features = sorted(gain(camvid, "contrast", each)[0] for each in experiments.PROBED)
    assert f"and {of_features[0]} to {of_features[-1]} in what their features are worth" in readme
    told = [f"{mean} ({low} to {high})" for mean, low, high in (gain(common, "w0.1"), gain(own, "w0.1"))]
    assert f"gained {' and '.join(told)}." in readme
    mean, low, high = gain(camvid, "contrast", digits=4)
    p = text_of_p(camvid.answers["contrast", PRIMARY].p_holm)
    assert f"by {mean[1:]} on average (95 % interval {low} to {high}, p {p})" in page
    assert all(camvid.answers["contrast", each].is_shown for each in camvid.outcomes)
    t = ttest_1samp(camvid.differences("contrast", PRIMARY), 0).statistic
    assert f"At twelve seeds |t| is {t:.1f}" in page
    assert len(eighth.seeds_of("contrast")) == 12
    mean, low, high = gain(eighth, "contrast")
    assert f"with an eighth of the labels {mean} ({low} to {high})." in readme
    assert f"with an eighth of its labels one of {mean[1:]}." in page
    assert f"with an eighth of its labels of {mean[1:]}, and" in settings
    mean, low, high = gain(eighth, "contrast", digits=4)
    p = text_of_p(eighth.answers["contrast", PRIMARY].p_holm)
    assert f"by {mean[1:]} on average (95 % interval {low} to {high}, p {p}). So are" in page
    assert all(eighth.answers["contrast", each].is_shown for each in eighth.outcomes)
    of_features = sorted(gain(eighth, "contrast", each)[0] for each in experiments.PROBED)
    assert f"worth by {of_features[0][1:]} to {of_features[-1][1:]}. The gain is about" in page
    by = gain(own, "w0.1")[0][1:]
    for text in (page, settings, start, " ".join(ENDING.split())):
        assert f"a gain of {by}" in text or f"higher by {by}" in text


def test_every_recorded_experiment_has_its_table():
    pages = "".join(path.read_text() for path in experiments.PAGES)
    assert len(recorded()) >= 3
    for each in recorded():
        assert experiments.BEGIN.format(each.name) in pages


def test_pictures_are_of_the_recorded_runs():
    pages = "".join(path.read_text() for path in experiments.SHOWN_ON)
    shown = experiments.pictures(recorded(), pages)
    assert len(shown) >= 2
    for path, experiment in shown.items():
        assert Image.open(path).text["Source"] == fingerprint(experiment), (
            f"{path.name}: run python -m benchmarks.experiments"
        )
    named = {f"plots/{path.name}" for path in shown}
    assert set(re.findall(r"plots/\d{4}-\d\d-\d\d-[\w.-]+\.png", pages)) == named
    stored = {f"plots/{path.name}" for path in experiments.PLOTS.glob("20*.png")}
    assert stored == named, "a picture that no page shows"


@pytest.fixture
def experiment():
    """Twelve seeds of two arms and six of an A/A arm; the contrast is better in rare classes, and worse in accuracy."""
    rng, runs = np.random.default_rng(0), {}
    for seed in range(12):
        base = 0.4 + 0.05 * rng.standard_normal()
        for arm in ("off", "contrast", *(["aa"] if seed < 6 else [])):
            noise, gains = 0.01 * rng.standard_normal(4), arm == "contrast"
            runs[arm, seed] = {
                "miou": base + noise[0],
                "pixel_accuracy": 0.8 + noise[1] - 0.05 * gains,
                "iou/pole": 0.1 + noise[2] + 0.05 * gains,
                "iou/sign": 0.2 + noise[3] + 0.05 * gains,
                "features/linear": 0.5 + noise[0],
                "seconds_per_step": 0.5 + 0.1 * gains,
            }
    arms = {"off": "cross-entropy", "contrast": "contrast", "aa": "A/A"}
    return Experiment("toy", arms, "test", runs, ("pole", "sign"))


def test_differences_are_paired_by_the_seeds_that_both_have(experiment):
    assert experiment.outcomes == [PRIMARY, RARE, ACCURACY, "features/linear"]
    assert experiment.seeds_of("aa") == list(range(6))
    compared = experiment.answers
    for arm, column in (("contrast", "miou"), ("aa", "miou")):
        pair = compared[arm, PRIMARY]
        one, other = (
            [experiment.runs[of, seed][column] for seed in experiment.seeds_of(arm)] for of in (arm, "off")
        )
        expected = ttest_rel(one, other).confidence_interval(0.95)
        assert pair.mean == pytest.approx(np.mean(np.subtract(one, other)))
        assert (pair.low, pair.high) == pytest.approx((expected.low, expected.high))
    gain = np.mean([experiment.differences("contrast", f"iou/{name}").mean() for name in ("pole", "sign")])
    assert compared["contrast", RARE].mean == pytest.approx(gain)


def test_classes_that_were_not_scored_are_left_out_of_their_mean(experiment):
    """And a seed that scored none of the rare ones has none."""
    runs = {key: {**run} for key, run in experiment.runs.items()}
    runs["contrast", 3]["iou/pole"] = runs["off", 4]["iou/pole"] = runs["off", 4]["iou/sign"] = math.nan
    fewer = replace(experiment, runs=runs)
    assert fewer.value("contrast", 3, RARE) == runs["contrast", 3]["iou/sign"]
    assert math.isnan(fewer.value("off", 4, RARE))
    assert fewer.answers["contrast", RARE].pairs == 11


def test_holm_counts_the_questions_of_an_arm_and_the_control_is_none(experiment):
    compared = experiment.answers
    for arm in ("contrast", "aa"):
        secondary = [RARE, ACCURACY, "features/linear"]
        raw = [paired(experiment.differences(arm, outcome)).p for outcome in secondary]
        assert [compared[arm, outcome].p_holm for outcome in secondary] == holm(raw)
        assert compared[arm, PRIMARY].p_holm == compared[arm, PRIMARY].p


def test_an_arm_that_has_hardly_begun_takes_nothing_from_another(experiment):
    """Recorded as it goes, an experiment has arms of one seed; costs and means are of the seeds that both have."""
    alone = replace(
        experiment, runs={key: run for key, run in experiment.runs.items() if key[0] != "aa" and key[1] < 6}
    )
    slow = {**experiment.runs["contrast", 0], "seconds_per_step": 0.75}
    begun = replace(alone, arms={**alone.arms, "cold": "cold"}, runs={**alone.runs, ("cold", 0): slow})
    for question, pair in alone.answers.items():
        assert astuple(begun.answers[question]) == pytest.approx(astuple(pair), nan_ok=True)
    text = "\n".join(tables(begun))
    assert "one seed is too few" in text
    faster = {**begun.runs["off", 0], "seconds_per_step": 0.25}
    text = "\n".join(tables(replace(begun, runs={**begun.runs, ("off", 0): faster})))
    assert "| 500 (1.00x) | 600 (1.20x) |  | 750 (3.00x) |" in text


def test_an_outcome_that_some_runs_lack_is_an_error(experiment):
    runs = {key: {**run} for key, run in experiment.runs.items()}
    del runs["contrast", 3]["features/linear"]
    with pytest.raises(ValueError, match="toy: contrast-seed3 lacks features/linear"):
        _ = replace(experiment, runs=runs).outcomes


def test_the_picture_shows_what_there_is(experiment):
    """Of the seeds that all arms but the control have, the means; and an interval only where there is one."""
    seven = {key: run for key, run in experiment.runs.items() if key[0] != "contrast" or key[1] < 7}
    for shown, count, title in (
        (experiment, 12, "bars the means"),
        (replace(experiment, runs=seven), 7, "bars the means of 7"),
    ):
        runs, differences = draw(shown).axes
        assert runs.get_title().endswith(title)
        bars = [line.get_ydata()[0] for line in runs.lines if line.get_color() == "C3"]
        means = [
            np.mean([shown.value(arm, seed, PRIMARY) for seed in range(count)]) for arm in ("off", "contrast")
        ]
        assert bars == pytest.approx(means)
    assert len(differences.containers) == 2 * 4
    assert all(each.has_xerr for each in differences.containers)

    begun = replace(experiment, runs={key: run for key, run in experiment.runs.items() if key[1] < 1})
    runs, differences = draw(begun).axes
    assert "means" not in runs.get_title()
    assert not [line for line in runs.lines if line.get_color() == "C3"]
    for each in differences.containers:
        assert not each.has_xerr
        assert each.lines[0].get_markerfacecolor() == "none"


def test_a_picture_knows_what_it_shows(experiment):
    before = fingerprint(experiment)
    assert fingerprint(replace(experiment, timed=False)) == before
    assert fingerprint(replace(experiment, split="val")) != before
    for column in ("miou", "iou/pole"):
        runs = {**experiment.runs, ("off", 11): {**experiment.runs["off", 11], column: 0.5}}
        assert fingerprint(replace(experiment, runs=runs)) != before


def test_tables_say_what_is_shown_and_what_is_not(experiment):
    text = "\n".join(tables(experiment))
    assert "| seed 11 | " in text
    (rare,) = [line for line in text.splitlines() if line.startswith("| contrast: rare classes")]
    (accuracy,) = [line for line in text.splitlines() if line.startswith("| contrast: pixel accuracy")]
    (miou,) = [line for line in text.splitlines() if line.startswith("| contrast: mIoU")]
    assert rare.endswith("| **higher** (12 seeds) |")
    assert accuracy.endswith("| **lower** (12 seeds) |")
    assert miou.endswith("| no difference shown (12 seeds) |")
    assert "| ms a step | 500 (1.00x) | 600 (1.20x) | 500 (1.00x) |" in text
    assert "ms a step" not in "\n".join(tables(replace(experiment, timed=False)))
    assert verdict(paired(np.full(5, 0.1) + 1e-3 * np.arange(5))) == "5 seeds are too few"
    alike = paired(np.full(6, 0.1) + 1e-3 * np.arange(6))
    assert (
        verdict(replace(alike, detectable=math.nan)) == "**higher** (6 seeds)"
    )  # beside arms with more seeds


def test_an_arm_is_judged_when_its_plan_says_so(experiment):
    """At the first look only if the primary outcome is clear, at the last whatever it is; each arm by its own looks."""
    t = {
        arm: abs(ttest_1samp(experiment.differences(arm, PRIMARY), 0).statistic) for arm in ("contrast", "aa")
    }

    def marks(arm, looks, runs=experiment.runs):
        plan = {"contrast": {"12": 0}, "aa": {"6": 0}} | looks if looks else {}
        planned = replace(experiment, looks=plan, runs=runs)
        lines = [line for line in tables(planned) if line.startswith(f"| {experiment.arms[arm]}: ")]
        assert len(lines) == 4
        return {line.split(" | ")[-1].strip(" |") for line in lines}, {
            line.split(" | ")[-2] for line in lines
        }

    judged = marks("contrast", {})
    assert "**higher** (12 seeds)" in judged[0]
    assert "" not in judged[1]
    for looks in ({"12": t["contrast"] * 0.9, "24": 0}, {"6": 0, "14": 4}, {"6": 1e9, "12": 1e9}):
        assert marks("contrast", {"contrast": looks, "aa": {"24": 0}}) == judged
    for looks, due in (({"12": t["contrast"] * 1.1, "24": 0}, 24), ({"6": 1e9, "14": 4, "24": 0}, 14)):
        assert marks("contrast", {"contrast": looks}) == ({f"not asked before {due} seeds"}, {""})
    early = replace(experiment, looks={"contrast": {"24": 0}, "aa": {"6": 0}})
    for (arm, outcome), pair in experiment.answers.items():
        shown, hidden = early.answers[arm, outcome], arm == "contrast"
        assert (shown.mean, shown.pairs) == (pair.mean, pair.pairs)
        assert (math.isnan(shown.low), math.isnan(shown.p)) == (hidden, hidden)
    assert [each.has_xerr for each in draw(early).axes[1].containers] == [False] * 4 + [True] * 4
    assert marks("aa", {"contrast": {"24": 0}}) == marks("aa", {})
    assert marks("aa", {"aa": {"8": 0}}) == ({"not asked before 8 seeds"}, {""})
    one = {key: run for key, run in experiment.runs.items() if key[1] == 0}
    assert marks("contrast", {"contrast": {"12": 4, "24": 0}}, one)[0] == {"not asked before 12 seeds"}


def test_a_planned_experiment_has_one_arm_besides_the_control(tmp_path, monkeypatch):
    """The questions of another would count among its own, and an arm without looks would be judged at any time."""
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    (tmp_path / "toy").mkdir()
    once = {"12": 0}

    def write(arms, looks):
        told = {"arms": dict.fromkeys(("off", *arms), "an arm"), "looks": dict.fromkeys(looks, once)}
        (tmp_path / "toy" / "experiment.json").write_text(json.dumps(told | {"split": "val"}))

    for arms, looks in ((("bank", "cold"), ()), (("bank",), ("bank",)), (("bank", "aa"), ("bank", "aa"))):
        write(arms, looks)
        assert read("toy").looks == dict.fromkeys(looks, once)
    for arms, looks in (
        (("bank", "cold"), ("bank", "cold")),
        (("bank", "cold"), ("bank",)),
        (("bank", "aa"), ("bank",)),
        (("bank",), ("bank", "aa")),
    ):
        write(arms, looks)
        with pytest.raises(ValueError, match=f"toy has looks for {', '.join(looks)} and the arms"):
            read("toy")


def test_finished_runs_are_taken_once_and_with_their_scores(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    run = tiny("compared", steps=2, log_every=1)
    config = CompareConfig(seeds=(3,), methods=("off", "bank"), split="val", run=run)
    compare(config)
    arms = {"off": "without", "bank": "with"}
    assert add("toy", run.out, "val", arms) == ["off-seed3", "bank-seed3"]
    assert add("toy", run.out, "val", arms) == []
    (tmp_path / "results" / "toy" / "experiment.json").write_text(json.dumps({"arms": arms, "split": "val"}))
    written = json.loads((run.out / "compare.json").read_text())["arms"]
    found = read("toy")
    for arm in arms:
        assert found.runs[arm, 3]["miou"] == pytest.approx(written[arm]["miou"][0], rel=1e-5)
        assert found.runs[arm, 3]["iou/disc"] == pytest.approx(
            written[arm]["class_iou"][0]["disc"], rel=1e-5, nan_ok=True
        )
        assert 0 <= found.runs[arm, 3]["features/linear"] <= 1
    # Another seed, of which one arm is not at its end.
    compare(replace(config, seeds=(3, 4)), resume=True)
    for checkpoint in (run.out / "bank-seed4" / "checkpoints").glob("*.pt"):
        checkpoint.unlink()
    assert add("toy", run.out, "val", arms) == ["off-seed4"]
    with (tmp_path / "results" / "toy" / "runs.csv").open() as file:
        assert [(row["arm"], row["seed"]) for row in csv.DictReader(file)] == [
            ("bank", "3"),
            ("off", "3"),
            ("off", "4"),
        ]
    described = tmp_path / "results" / "toy" / "settings.json"
    settings = json.loads(described.read_text())
    described.unlink()
    with pytest.raises(ValueError, match=r"toy has runs and no settings.json"):
        add("toy", run.out, "val", arms)
    described.write_text(json.dumps(settings))
    assert (settings["off"]["contrast"], settings["bank"]["contrast"]) == ("off", "bank")
    assert not [value for arm in settings.values() for value in arm.values() if str(tmp_path) in str(value)]
    longer = tmp_path / "longer"
    shutil.copytree(run.out / "off-seed4", longer / "off-seed5")
    told = json.loads((longer / "off-seed5" / "config.json").read_text())
    (longer / "off-seed5" / "config.json").write_text(json.dumps(told | {"seed": 5, "lr": 0.5}))
    with pytest.raises(
        ValueError, match=r"off-seed5 is no run of the off of toy: lr 0.5 \(recorded: 0.02\)$"
    ):
        add("toy", longer, "val", arms)
    # Another beginning than the others', and scenes that the other arm of the seed has not seen.
    branched = tmp_path / "branched"
    shutil.copytree(run.out / "off-seed3", branched / "start-seed6")
    for name, changes in (
        ("start-seed6", dict(stop_after=1)),
        ("off-seed6", dict(seed=6, branch_from="elsewhere/start-seed6")),
    ):
        shutil.copytree(run.out / "off-seed3", branched / name, dirs_exist_ok=True)
        (branched / name / "config.json").write_text(json.dumps(told | changes))
    with pytest.raises(ValueError, match=r"off-seed6 is no run .* shared_steps 1 \(recorded: 0\)$"):
        add("toy", branched, "val", arms)
    shutil.rmtree(branched / "start-seed6")
    with pytest.raises(ValueError, match=r"off-seed6 goes on from .*start-seed6, which is not there"):
        add("toy", branched, "val", arms)
    (run.out / "bank-seed4" / "config.json").write_text(
        json.dumps(json.loads((run.out / "bank-seed4" / "config.json").read_text()) | {"data_seed": 9})
    )
    with pytest.raises(ValueError, match="bank-seed4 is of --data-seed 9, another arm of its seed of 0"):
        add("toy", run.out, "val", arms)
    shutil.rmtree(run.out / "bank-seed4")
    assert add("toy", run.out, "test", {"off": "without"}) == []  # none has been scored on it
    with pytest.raises(FileNotFoundError, match="has no run of the arms other"):
        add("toy", run.out, "val", {"other": "other"})
