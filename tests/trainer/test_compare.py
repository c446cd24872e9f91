"""A comparison compares like with like, and its figures are those of its runs."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ttest_rel

from pixcontrast_ext.trainer.__main__ import main
from pixcontrast_ext.trainer.checkpoints import CheckpointStore
from pixcontrast_ext.trainer.compare import (
    CompareConfig,
    Comparison,
    compare,
    draw_comparison,
    interval,
    table,
)
from pixcontrast_ext.trainer.logs import RunLog, read_rows
from pixcontrast_ext.trainer.train import Result
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
    for method, found in written["methods"].items():
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
    with pytest.raises(FileExistsError, match="off-seed4 holds a run already"):
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
        assert np.array_equal(before.miou(method), after.miou(method))
    other = replace(config, run=replace(config.run, optim=replace(config.run.optim, lr=0.5)))
    with pytest.raises(
        ValueError, match=r"off-seed3 was trained with --lr 0.02, now 0.5: choose another --out"
    ):
        compare(other, resume=True)


def test_from_the_command_line(tmp_path, capsys):
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
    miou = read_rows(out / "bank-seed1" / "val.csv")[-1]["miou"]
    assert f"{miou:.4f}" in told
    assert "One seed" in told
    assert "95 % interval" not in told
    trained_with = json.loads((out / "bank-seed1" / "config.json").read_text())
    assert (trained_with["temperature"], trained_with["project"]) == (0.2, "used")
    assert json.loads((out / "compare.json").read_text())["methods"]["bank"]["difference"]["interval_95"] == [
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
            results[method].append(Result(out, miou, {}, 0.5 + gain * 2.5, 1000 + 2500 * gain))
    return Comparison((0, 1, 2), results)


def test_the_table_says_what_came_out(comparison):
    rows = {line[:20].strip(): line[20:].split() for line in table(comparison).splitlines()[1:]}
    assert rows["seed 1"] == ["0.4000", "0.4300"]
    assert rows["mean"] == ["0.4000", "0.4300"]
    assert rows["paired difference"] == ["+0.0300"]
    # 0.03 -+ 4.3027 * 0.01 / sqrt(3): Student's t for two degrees of freedom
    assert rows["95 % interval"] == ["+0.0052", "to", "+0.0548"]
    assert rows["ms per step"] == ["500", "(1.00x)", "550", "(1.10x)"]
    assert rows["peak memory, MiB"] == ["1,000", "(+0)", "1,050", "(+50)"]


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
    told = forked.ranks(tmp_path, 2, "compare", *options, *FLAGS.split())
    assert told.count("mIoU on val") == 1
    written = json.loads((out / "compare.json").read_text())
    assert all(0 <= found["miou"][0] <= 1 for found in written["methods"].values())
