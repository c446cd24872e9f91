"""A comparison compares like with like, and its figures are those of its runs."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import nct, t, ttest_rel

from pixcontrast_ext.trainer import __main__ as entry
from pixcontrast_ext.trainer.__main__ import main
from pixcontrast_ext.trainer.checkpoints import CheckpointError, CheckpointStore
from pixcontrast_ext.trainer.compare import CompareConfig, compare, finish_all, rare_classes
from pixcontrast_ext.trainer.comparison import (
    Comparison,
    answers,
    draw_comparison,
    fewest_pairs,
    findings,
    holm,
    interval,
    paired,
    record,
    table,
)
from pixcontrast_ext.trainer.config import DataConfig, ModelConfig
from pixcontrast_ext.trainer.logs import RunLog, read_rows
from pixcontrast_ext.trainer.train import Result, train
from tests.support import forked

FLAGS = (
    "--size 32 48 --synthetic-images 8 3 --batch-size 4 --embed-dim 8 --steps 2 --log-every 1 --device cpu"
)


@pytest.fixture
def config(tiny):
    run = tiny("compared", steps=2, log_every=1)
    return CompareConfig(seeds=(3, 4), run=replace(run, loss=replace(run.loss, warmup_steps=0)))


def test_runs_of_a_seed_share_weights_and_data_to_the_end(config):
    """As long as the contrast takes no part, all methods give the same run, even past the end of an epoch."""
    run = replace(config.run, steps=5, loss=replace(config.run.loss, warmup_steps=5))
    compare(replace(config, run=run))
    for seed in config.seeds:
        off, batch, bank = (
            [row["cross_entropy"] for row in read_rows(run.out / f"{method}-seed{seed}" / "train.csv")]
            for method in config.methods
        )
        assert len(off) == 5
        assert off == batch == bank


def test_runs_of_a_seed_differ_in_the_loss_alone(config):
    comparison = compare(config)
    first = {
        (method, seed): read_rows(config.run.out / f"{method}-seed{seed}" / "train.csv")[0]
        for method in config.methods
        for seed in config.seeds
    }
    for seed in config.seeds:
        # One number for the initial weights and the augmented first batch: it shows that they are alike.
        same = {first[method, seed]["cross_entropy"] for method in config.methods}
        assert len(same) == 1, same
        assert len({first[method, seed]["contrast"] for method in config.methods}) >= 2
    assert first["off", 3]["cross_entropy"] != first["off", 4]["cross_entropy"]

    written = json.loads((config.run.out / "compare.json").read_text())
    assert written["seeds"] == [3, 4]
    assert written["baseline"] == "off"
    for method, found in written["arms"].items():
        runs = [config.run.out / f"{method}-seed{seed}" for seed in config.seeds]
        assert found["miou"] == [read_rows(run / "val.csv")[-1]["miou"] for run in runs]
        assert all(seconds > 0 for seconds in found["seconds_per_step"])
        assert all(100 < memory < 100_000 for memory in found["memory_mib"])  # MiB of a process with torch
        models = [CheckpointStore(run / "checkpoints").load_latest()[1]["model"] for run in runs]
        assert all(any("embed_head" in name for name in model) == (method != "off") for model in models)
    assert comparison.baseline == "off"
    assert list(comparison.results) == ["off", "batch", "bank"]
    for picture in ("compare.png", "panels.png"):
        assert (config.run.out / picture).stat().st_size > 20_000


def test_resume_trains_what_is_missing_and_nothing_else(config):
    config = replace(config, methods=("off", "bank"))
    before = compare(config)
    shutil.rmtree(config.run.out / "bank-seed4")
    with pytest.raises(FileExistsError, match="compared holds a comparison or a run already: --resume or"):
        compare(replace(config, seeds=(4,), methods=("bank", "off")))
    assert not (config.run.out / "bank-seed4").exists()  # refused before anything was trained
    kept = {path: path.stat().st_mtime_ns for path in config.run.out.glob("*/checkpoints/*.pt")}
    assert len(kept) == 3
    moved = config.run.out.rename(config.run.out.with_name("moved"))
    config = replace(config, run=replace(config.run, out=moved, keep_checkpoints=1))
    kept = {moved / path.relative_to(path.parents[2]): time for path, time in kept.items()}
    after = compare(config, resume=True)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for method in config.methods:
        assert np.array_equal(before.values(method), after.values(method))
    other = replace(config, run=replace(config.run, optim=replace(config.run.optim, lr=0.5)))
    with pytest.raises(
        ValueError, match=r"off-seed3 was trained with --lr 0.02, now 0.5: choose another --out"
    ):
        compare(other, resume=True)


def test_resume_adds_and_drops_nothing(config):
    config = replace(config, seeds=(3,), methods=(), arm=("none --contrast off", "plain --contrast batch"))
    compare(config)
    # What comes later stands behind, so that the differences stay those to the first.
    compare(replace(config, methods=("off",), arm=()), resume=True)
    grown = compare(replace(config, seeds=(4,), arm=("cold --temperature 0.05",)), resume=True)
    assert grown.seeds == (3, 4)
    assert grown.baseline == "none"
    assert list(grown.results) == ["none", "plain", "off", "cold"]
    told = json.loads((config.run.out / "compare.json").read_text())
    assert list(told["arms"]) == ["none", "plain", "off", "cold"]
    assert told["looks"] == list(grown.looks) == [1, 2]
    with pytest.raises(ValueError, match=r"plain-seed3 was trained with --temperature 0.1, now 0.3"):
        compare(replace(config, arm=("plain --contrast batch --temperature 0.3",)), resume=True)
    with pytest.raises(ValueError, match=r"was trained with no --shared-steps"):
        compare(replace(config, shared_steps=1), resume=True)


def test_a_comparison_does_not_take_the_folder_of_a_run(tiny, config):
    train(replace(config.run, steps=1))
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="holds a"):
            compare(config, resume=resume)
    assert json.loads((config.run.out / "config.json").read_text())["steps"] == 1


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_left_of_a_run_becomes_none_of_the_comparisons(config, resume):
    path = config.runs()["batch", 3].out / "checkpoints" / "step-00000004-0123456789abcdef.pt"
    path.parent.mkdir(parents=True)
    path.touch()
    kind, told = (
        (ValueError, "no config.json that tells its options") if resume else (FileExistsError, "--resume or")
    )
    with pytest.raises(kind, match=f"batch-seed3 .*{told}"):
        compare(config, resume=resume)
    assert not (config.run.out / "config.json").exists()


def test_two_processes_do_not_compare_in_one_folder(config):
    with (
        forked.holding(config.run.out) as process,
        pytest.raises(FileExistsError, match=f"is in use by process {process}"),
    ):
        compare(config)
    assert not (config.run.out / "config.json").exists()


def test_jobs_end_with_the_comparison(environment, tmp_path):
    flags = FLAGS.replace("--steps 2", "--steps 100000 --checkpoint-every 100000 --eval-every 100000").split()
    command = [
        sys.executable,
        "-m",
        "pixcontrast_ext.trainer",
        "compare",
        "--seeds",
        "1",
        "2",
        "--methods",
        "off",
    ]
    command += ["--jobs", "2", "--out", str(tmp_path / "out"), *flags]
    running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    records = [tmp_path / "out" / f"off-seed{seed}" / "train.csv" for seed in (1, 2)]
    try:
        while not all(record.exists() for record in records):
            assert running.poll() is None
            time.sleep(0.2)
    finally:
        running.kill()
        running.wait()

    def sizes():
        return [record.stat().st_size for record in records]

    time.sleep(1)
    before = sizes()
    time.sleep(2)
    assert sizes() == before


def test_from_the_command_line(tmp_path, capsys, quick_tsne, monkeypatch, comparison):
    out = tmp_path / "out"
    options = tmp_path / "options.json"
    options.write_text(
        json.dumps({"temperature": 0.2, "contrast": "bank", "warmup_steps": 0, "project": "used"})
    )
    arguments = ["--seeds", "1", "--methods", "off", "bank", "--config", str(options), "--out", str(out)]
    assert main(["compare", *arguments, *FLAGS.split()]) == 0
    told = capsys.readouterr().out
    assert main(["compare", "--resume", "--out", str(out)]) == 0  # nothing has changed
    assert capsys.readouterr().out == told
    # Its config.json begins another of the same seeds and arms.
    monkeypatch.setattr(entry, "compare", lambda config, resume: given.append(config) or found)
    given, found = [], comparison
    assert main(["compare", "--config", str(out / "config.json"), "--out", str(tmp_path / "again")]) == 0
    assert (given[0].seeds, given[0].methods) == ((1,), ("off", "bank"))
    assert (given[0].run.out, given[0].run.loss.temperature) == (tmp_path / "again", 0.2)
    miou = read_rows(out / "bank-seed1" / "val.csv")[-1]["miou"]
    assert f"{miou:.4f}" in told
    assert "One seed" in told
    assert "95 % interval" not in told
    trained_with = json.loads((out / "bank-seed1" / "config.json").read_text())
    assert (trained_with["temperature"], trained_with["project"]) == (0.2, "used")
    assert json.loads((out / "compare.json").read_text())["arms"]["bank"]["difference"]["mIoU"][
        "interval_95"
    ] == [
        None,
        None,
    ]


def test_the_interval_is_that_of_a_paired_t_test():
    one, other = np.random.default_rng(0).random((2, 5))
    found = interval(other - one)
    expected = ttest_rel(other, one).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(other - one))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    alike = interval([0.25, 0.25, 0.25])
    assert (alike.mean, alike.low, alike.high) == (0.25, 0.25, 0.25)
    assert math.isnan(interval([0.1]).low)
    assert interval([0.1]).mean == 0.1


@pytest.fixture
def comparison(tmp_path):
    """Three seeds whose mIoU the bank raises by 0.02, 0.03 and 0.04, for a tenth more time and 50 MiB."""
    results = {}
    for method, gain in (("off", 0.0), ("bank", 0.02)):
        results[method] = []
        for seed in range(3):
            miou = 0.3 + 0.1 * seed + (gain + 0.01 * seed if gain else 0)
            out = tmp_path / f"{method}{seed}"
            log = RunLog(out)
            for step in (10, 20):
                log.add("val", {"step": step, "miou": miou * step / 20})
            log.close()
            results[method].append(Result(out, miou, {}, 0.5 + gain * 2.5, 1000 + 2500 * gain, 0.8))
    return Comparison((0, 1, 2), results)


def test_the_table_says_what_came_out(comparison):
    rows = {line[:20].strip(): line[20:].split() for line in table(comparison).splitlines()[1:]}
    assert rows["seed 1"] == ["0.4000", "0.4300"]
    assert rows["mean"] == ["0.4000", "0.4300"]
    assert rows["paired difference"] == ["+0.0300"]
    # 0.03 -+ 4.3027 * 0.01 / sqrt(3): Student's t for two degrees of freedom
    intervals = [
        line[20:].split() for line in table(comparison).splitlines() if line.startswith("  95 % interval")
    ]
    assert intervals == [["+0.0052", "to", "+0.0548"], ["+0.0000", "to", "+0.0000"]]
    assert rows["ms per step"] == ["500", "(1.00x)", "550", "(1.10x)"]
    assert rows["peak memory, MiB"] == ["1,000", "(+0)", "1,050", "(+50)"]


def of_seeds(*gains, rare=(), accuracy=0.0):
    """A comparison of cross-entropy with an arm that gains so much, seed by seed."""
    spread = np.random.default_rng(1).normal(0.4, 0.05, len(gains))
    results = {
        arm: [
            Result(
                None,
                base + gain * share,
                {"pole": base, "sky": base + gain * share},
                1.0,
                1.0,
                0.8 + accuracy * share,
            )
            for base, gain in zip(spread, gains, strict=True)
        ]
        for arm, share in (("off", 0), ("bank", 1))
    }
    return Comparison(tuple(range(len(gains))), results, "test", rare)


def test_p_is_exact_and_a_difference_takes_six_seeds():
    gains = [0.02, 0.021, 0.019, 0.022, 0.02, 0.018]
    assert paired(np.array(gains)).p == pytest.approx(2 / 64)
    assert of_seeds(*gains).difference("bank").is_shown
    assert "+ contrast with the bank: mIoU higher than cross-entropy by 0.0200." in findings(of_seeds(*gains))
    # An interval of five pairs is far above 0 as well.
    five = of_seeds(*gains[:5])
    assert five.difference("bank").low > 0.015
    assert not five.difference("bank").is_shown
    assert findings(five)[0] == (
        "5 seeds cannot show a difference in the mIoU, whatever the intervals say: for 1 at once the sign-flip test "
        "needs 6. --resume with --seeds up to that number adds to this comparison."
    )
    assert math.isnan(five.difference("bank").detectable)
    lower = of_seeds(*(-gain for gain in gains))
    assert "mIoU lower than cross-entropy by 0.0200" in findings(lower)[0]


def test_no_difference_is_told_with_what_would_have_been_found():
    gains = np.array([0.02, -0.02, 0.01, -0.015, 0.005, 0.0, 0.01, -0.01])
    comparison = of_seeds(*gains)
    found = comparison.difference("bank")
    error = gains.std(ddof=1) / math.sqrt(8)
    # A little more than Student's t alone finds, of 7 degrees: 0.975 and 0.8.
    assert 1 <= found.detectable / ((2.364624 + 0.896030) * error) < 1.15
    assert not found.is_shown
    assert findings(comparison) == [
        f"+ contrast with the bank: no difference in mIoU is shown; one of {found.detectable:.4f} would have been "
        "found four times in five."
    ]


@pytest.mark.parametrize(("pairs", "questions"), [(6, 1), (7, 1), (8, 2), (12, 4), (14, 3)])
def test_the_detectable_effect_is_found_four_times_in_five(pairs, questions):
    """By the very rule that calls a difference one, the other questions having no answer."""
    rng, found = np.random.default_rng(1), 0
    effect = paired(np.array([1.0, -1.0] * (pairs // 2) + [0.0] * (pairs % 2)), questions)
    effect = effect.detectable / np.std([1.0, -1.0] * (pairs // 2) + [0.0] * (pairs % 2), ddof=1)
    for _ in range(300):
        found += paired(rng.normal(effect, 1, pairs), questions).is_shown
    assert found / 300 == pytest.approx(0.8, abs=0.07)


@pytest.mark.parametrize(("pairs", "questions"), [(14, 1), (14, 20), (30, 20)])
def test_of_many_pairs_students_t_would_find_the_detectable_effect_as_often(pairs, questions):
    """Of normal differences it is the better of the two tests that have to agree."""
    alternating = np.resize([1.0, -1.0], pairs)
    effect = paired(alternating, questions).detectable / np.std(alternating, ddof=1)
    critical = t.ppf(1 - 0.05 / (2 * questions), pairs - 1)
    power = nct.sf(critical, pairs - 1, effect * math.sqrt(pairs))
    assert 0.79 < power < 0.86


def test_looking_again_after_more_seeds_is_told(comparison):
    """Of looks that could not have found anything, nothing."""
    (told,) = [line for line in findings(replace(comparison, looks=(2, 6, 12))) if "Looked" in line]
    assert told.startswith("Looked at after 6 and 12 seeds: ")
    assert not [line for line in findings(replace(comparison, looks=(1, 5, 12))) if "Looked" in line]


def test_fewer_pairs_than_can_answer_have_nothing_detectable():
    assert [fewest_pairs(questions) for questions in (1, 2, 3, 4)] == [6, 7, 7, 8]
    for questions in (1, 2, 3, 4, 7):
        fewest = fewest_pairs(questions)
        for pairs in (fewest - 1, fewest):
            alike = paired(np.linspace(1, 1.01, pairs), questions)
            assert alike.is_shown == (pairs >= fewest)
            assert math.isnan(alike.detectable) == (pairs < fewest)


def test_of_several_arms_six_seeds_say_that_they_cannot_tell():
    one = of_seeds(0.1, 0.101, 0.099, 0.1, 0.1, 0.1, rare=("sky",))
    two = replace(one, results={**one.results, "region": one.results["bank"]})
    told = findings(two)
    assert told[0].startswith(
        "6 seeds cannot show a difference in the mIoU, whatever the intervals say: for 2 at once"
    )
    assert told[1].startswith("6 seeds cannot show a difference in the secondary outcomes")
    assert not any("would have been found" in line for line in told)


def test_a_pair_with_a_nan_is_none():
    gains = np.array([0.01, 0.02, 0.03, 0.01, 0.02, 0.03])
    assert paired(np.append(gains, math.nan)) == paired(gains)
    nothing = paired(np.full(3, math.nan))
    assert (nothing.pairs, math.isnan(nothing.p), math.isnan(nothing.mean)) == (0, True, True)
    comparison = of_seeds(*gains, rare=("pole",))
    for result in comparison.results["off"]:
        result.class_iou["pole"] = math.nan
    assert math.isnan(comparison.difference("bank", "rare classes").p_holm)
    accuracy = comparison.difference("bank", "pixel accuracy")
    assert (accuracy.p_holm, accuracy.questions) == (accuracy.p, 1)


def test_a_question_that_cannot_be_asked_is_none():
    """It takes no part in Holm's correction, nor in how many pairs are enough, nor in what is detectable."""
    gains = np.array([0.02, 0.021, 0.019, 0.022, 0.02, 0.018])
    alone = answers({("bank", "mIoU"): gains})["bank", "mIoU"]
    found = answers({("bank", "mIoU"): gains, ("region", "mIoU"): gains[:1], ("cold", "mIoU"): gains[:0]})
    assert found["bank", "mIoU"] == alone
    assert alone.is_shown
    assert not math.isnan(alone.detectable)
    assert list(found) == [("bank", "mIoU"), ("region", "mIoU"), ("cold", "mIoU")]
    assert (found["cold", "mIoU"].pairs, found["cold", "mIoU"].is_shown) == (0, False)
    assert answers({}) == {}


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([0.02, math.nan])[0] == 0.02
    assert math.isnan(holm([0.02, math.nan])[1])


def test_more_arms_make_it_harder():
    gains = [0.02, 0.021, 0.019, 0.022, 0.02, 0.018]
    one = of_seeds(*gains)
    results = {**one.results, "region": one.results["bank"]}
    two = replace(one, results=results)
    assert two.difference("bank").p_holm == pytest.approx(4 / 64)
    assert not two.difference("bank").is_shown
    control = replace(one, results={**one.results, "aa": one.results["off"]})
    assert control.difference("bank").p_holm == pytest.approx(2 / 64)  # an A/A arm is no question more


def test_secondary_outcomes_are_corrected_among_themselves():
    gains = [0.02, 0.021, 0.019, 0.022, 0.02, 0.018]
    comparison = of_seeds(*gains, rare=("sky",), accuracy=0.01)
    assert comparison.outcomes == ("mIoU", "rare classes", "pixel accuracy")
    corrected = {outcome: found.p_holm for (_, outcome), found in comparison.answers.items()}
    assert corrected["mIoU"] == pytest.approx(2 / 64)
    assert corrected["rare classes"] == corrected["pixel accuracy"] == pytest.approx(4 / 64)
    assert comparison.difference("bank", "rare classes").mean == pytest.approx(0.02)
    assert comparison.difference("bank", "pixel accuracy").mean == pytest.approx(0.01)
    told = table(comparison)
    assert "rare classes (1)" in told
    assert told.startswith("mIoU on test")
    written = record(comparison)["arms"]["bank"]["difference"]
    assert written["rare classes"]["p_holm"] == pytest.approx(4 / 64)
    assert (written["mIoU"]["differs"], written["rare classes"]["differs"]) == (True, False)


def test_an_aa_arm_that_differs_is_a_warning():
    one = of_seeds(0.02, 0.021, 0.019, 0.022, 0.02, 0.018)
    suspect = replace(one, results={"off": one.results["off"], "aa": one.results["bank"]})
    assert findings(suspect)[-1] == (
        "The A/A arm differs, which trains the same loss. Chance does that in at most one comparison of ten; otherwise "
        "the arms differ in something besides the loss, and nothing here is to be trusted."
    )
    assert "5 seeds cannot show a difference in the mIoU of the A/A arm" in " ".join(
        findings(
            replace(suspect, seeds=suspect.seeds[:5], results={k: v[:5] for k, v in suspect.results.items()})
        )
    )
    assert "trusted" not in " ".join(findings(one))
    other = replace(one, results={"bank": one.results["off"], "aa": one.results["bank"]})
    assert "trusted" not in " ".join(findings(other))  # of the bank an A/A arm may differ


def test_arms_are_named_with_their_flags(config):
    arms = ("region --pixel-slots 0", 'cold --temperature 0.05 --mining "semi-hard"')
    config = replace(config, methods=("off",), arm=arms)
    runs = config.runs()
    assert list(runs) == [(arm, seed) for seed in (3, 4) for arm in ("off", "region", "cold")]
    assert runs["region", 3].loss == replace(config.run.loss, pixel_slots=0)
    assert runs["cold", 4].loss == replace(config.run.loss, temperature=0.05, mining="semi-hard")
    assert runs["cold", 4].out.name == "cold-seed4"
    assert replace(config, methods=("aa",), arm=()).runs()["aa", 3].loss.weight == 1e-9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": ("off --weight 1",)}, "two arms called 'off'"),
        ({"arm": ("../up --weight 1",)}, "--arm is called '../up'"),
        ({"arm": ("late --steps 9",)}, "--arm late has --steps, which all arms have in common"),
        ({"split": "valid"}, "--split is 'valid', must be one of"),
        ({"split": "train"}, "--split is 'train', which --train-splits has too"),
        ({"jobs": 0}, "--jobs is 0"),
        ({"shared_steps": 2}, "--shared-steps is 2, must be from 0 to below the last step 2"),
        ({"arm": ("short --stop-after 1",)}, "--arm short has --stop-after, which all arms have in common"),
        (
            {"arm": ("other --data-seed 5",)},
            "--arm other has --data-seed 5, but all arms train on the same: 0",
        ),
        ({"arm": ("few --batch-size 2",)}, "--arm few has --batch-size 2, but all arms train on the same: 4"),
        ({"arm": ("start --weight 1",), "shared_steps": 1}, "two arms called 'start'"),
        ({"rare": ("unicorn",)}, "--rare names unicorn"),
    ],
)
def test_bad_options_are_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes).validate()


def test_from_the_command_line_with_arms_jobs_and_a_split(tmp_path, capsys):
    out = str(tmp_path / "out")
    flags = [*FLAGS.replace("--synthetic-images 8 3", "--synthetic-images 3 4").split(), "--no-pictures"]
    flags += ["--train-splits", "val"]
    arms = ["--methods", "off", "--arm", "region", "--pixel-slots 0", "--arm", "plain", "--contrast=batch"]
    assert (
        main(["compare", "--seeds", "1", *arms, "--jobs", "2", "--split", "train", "--out", out, *flags]) == 0
    )
    told = capsys.readouterr().out
    assert told.split("\n")[0].split()[:3] == ["mIoU", "on", "train"]
    assert "One seed: how far" in told
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(record["arms"]) == ["off", "region", "plain"]
    trained_with = json.loads((tmp_path / "out" / "region-seed1" / "config.json").read_text())
    assert (trained_with["contrast"], trained_with["pixel_slots"]) == ("bank", 0)
    scored = json.loads((tmp_path / "out" / "plain-seed1" / "train.json").read_text())
    assert record["arms"]["plain"]["miou"][0] == scored["miou"]

    assert main(["compare", "--resume", "--out", out]) == 0  # with the same arms, split and jobs
    assert capsys.readouterr().out == told
    # Scores of an earlier step, and those that eval once left under this name, are not taken for the comparison's.
    of_plain = tmp_path / "out" / "plain-seed1"
    for other in ({"step": 1}, {"split": "train", "scales": [0.5, 1], "confusion": [[1]]}):
        (of_plain / "train.json").write_text(json.dumps(scored | {"miou": 0.9} | other))
        assert main(["compare", "--resume", "--out", out]) == 0
        assert capsys.readouterr().out == told
    assert main(["eval", "--checkpoint", str(of_plain), "--split", "train", "--out", str(of_plain)]) == 0
    capsys.readouterr()
    assert json.loads((of_plain / "train.json").read_text()) == scored
    assert json.loads((of_plain / "eval-train.json").read_text())["split"] == "train"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_jobs"] == 2
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/checkpoints/*.pt")}
    assert main(["compare", "--resume", "--seeds", "1", "2", "--jobs", "1", "--out", out]) == 0
    told = capsys.readouterr().out
    assert "seed 2" in told
    assert "2 seeds cannot show a difference" in told
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((tmp_path / "out").glob("*/checkpoints/*.pt"))) == len(kept) * 2


def test_an_arm_needs_a_name_and_flags(capsys):
    assert main(["compare", "--arm", "region"]) == 2
    assert "--arm takes a name and flags" in capsys.readouterr().err


def test_jobs_share_the_cores_that_this_process_may_use(config, monkeypatch):
    def look(*arguments, **options):
        raise KeyboardInterrupt(os.environ["OMP_NUM_THREADS"])

    monkeypatch.setattr(sys.modules[compare.__module__], "ProcessPoolExecutor", look)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for cores, threads in ((6, "3"), (1, "1")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        with pytest.raises(KeyboardInterrupt, match=f"^{threads}$"):
            finish_all(list(config.runs().values()), "val", jobs=2)


def test_a_run_that_fails_in_a_job_is_an_error(config, tmp_path):
    run = replace(config.run, data=DataConfig(dataset="camvid", root=tmp_path / "nowhere"))
    with pytest.raises((ValueError, OSError), match="nowhere"):
        finish_all([run], "val", jobs=2)
    assert "TQDM_DISABLE" not in os.environ


def test_shared_steps_are_those_of_an_unbroken_run(config):
    run = replace(config.run, steps=5, pictures=False, loss=replace(config.run.loss, warmup_steps=3))
    config = replace(config, run=run, seeds=(3,), methods=("off", "bank"))
    compare(config)
    shared = replace(config, shared_steps=2, run=replace(run, out=run.out.with_name("shared")))
    compare(shared)

    def state(config, arm):
        return CheckpointStore(config.run.out / f"{arm}-seed3" / "checkpoints").load_latest()[1]

    start = state(shared, "start")
    assert start["step"] == 2
    assert not any("embed_head" in name for name in start["model"])
    for name, value in state(config, "off")["model"].items():
        assert torch.equal(value, state(shared, "off")["model"][name]), name
    assert [row["step"] for row in read_rows(shared.run.out / "bank-seed3" / "train.csv")] == [3, 4, 5]
    bank = state(shared, "bank")
    assert any("embed_head" in name for name in bank["model"])
    # The warm-up ends when it does without shared steps.
    for each in (config, shared):
        contrast = {
            row["step"]: row["contrast"] for row in read_rows(each.run.out / "bank-seed3" / "train.csv")
        }
        assert contrast[3] == 0
        assert min(contrast[4], contrast[5]) > 0
    assert (bank["criterion"]["contrast.bank.key_labels"] >= 0).any()
    entropy = {
        arm: read_rows(shared.run.out / f"{arm}-seed3" / "train.csv")[0]["cross_entropy"]
        for arm in ("off", "bank")
    }
    assert entropy["off"] == entropy["bank"]


def test_a_checkpoint_to_branch_from_has_to_fit(tiny):
    train(tiny("start", "off", steps=2))
    with pytest.raises(ValueError, match="is of step 2, the run ends at 2"):
        train(tiny("late", "off", steps=2, branch_from=tiny("start").out))
    other = tiny("other", "off", branch_from=tiny("start").out)
    with pytest.raises(ValueError, match="does not fit this run"):
        train(replace(other, net=ModelConfig(model="hrnet_w18")))
    adam = replace(other.optim, optimizer="adamw", lr=1e-3)
    with pytest.raises(ValueError, match=r"--optimizer is 'adamw', but .*start was trained with 'sgd'"):
        train(replace(other, out=other.out.with_name("adam"), optim=adam))
    with pytest.raises(CheckpointError, match="no checkpoint to branch from"):
        train(tiny("third", "off", branch_from=tiny("nothing").out.parent))


def test_rare_classes_are_below_two_percent(tiny, camvid):
    run = tiny("run", data=DataConfig(dataset="camvid", root=camvid()))
    assert "sky" not in rare_classes(run)
    assert "road" not in rare_classes(run)
    assert "pole" in rare_classes(run)


def test_the_picture_has_curves_and_differences(comparison, tmp_path):
    path = draw_comparison(comparison, tmp_path / "compare.png")
    pixels = np.array(Image.open(path).convert("RGB"))
    half = int(pixels.shape[1] * 0.58)
    orange = (pixels == (255, 127, 14)).all(2)
    blue = (pixels == (31, 119, 180)).all(2)
    assert blue[:, :half].sum() > 200
    assert orange[:, :half].sum() > 200
    assert orange[:, half:].sum() > 60
    assert blue[:, half:].sum() == 0  # the baseline has no difference to show


def test_without_a_known_peak_the_table_leaves_memory_out(comparison):
    results = {
        method: [replace(result, memory_mib=math.nan) for result in of_method]
        for method, of_method in comparison.results.items()
    }
    assert "memory" not in table(replace(comparison, results=results))


def test_two_ranks_compare(tmp_path):
    out = tmp_path / "out"
    options = ["--seeds", 0, "--methods", "off", "bank", "--out", out]
    told = forked.ranks(tmp_path, 2, "compare", *options, *FLAGS.split(), "--no-pictures")
    assert told.count("mIoU on val") == 1
    written = json.loads((out / "compare.json").read_text())
    assert all(0 <= found["miou"][0] <= 1 for found in written["arms"].values())
