"""The command line as users meet it: help, a run from training to evaluation, one-line errors."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pixcontrast_ext.trainer import inference
from pixcontrast_ext.trainer.__main__ import main
from pixcontrast_ext.trainer.config import InferenceConfig
from pixcontrast_ext.trainer.data import IGNORE, Synthetic
from pixcontrast_ext.trainer.demo import DemoConfig, demo
from pixcontrast_ext.trainer.distributed import Ranks
from pixcontrast_ext.trainer.files import write_json
from pixcontrast_ext.trainer.logs import read_rows
from pixcontrast_ext.trainer.train import train
from tests.support import forked

TINY = shlex.split("--size 32 48 --synthetic-images 8 3 --batch-size 4 --embed-dim 8 --no-pictures")


def void_pixels(count):
    return sum(int((label == IGNORE).sum()) for _, label in Synthetic("val", count, (32, 48)))


def test_help_lists_the_commands(trainer, capsys):
    done = trainer("--help")
    commands = ("train", "eval", "predict", "export", "compare", "probe", "check-data", "demo")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in commands)
    assert main(["fly"]) == 2
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "--contrast {off,batch,bank}" in capsys.readouterr().out


def test_train_then_resume_then_eval(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), "--steps", "2", *TINY]) == 0
    assert main(["train", "--out", str(out), "--resume", "--steps", "3"]) == 0  # all else from its own config
    assert json.loads((out / "config.json").read_text())["size"] == [32, 48]
    miou = read_rows(out / "val.csv")[-1]["miou"]
    assert f"mIoU {miou:.4f}" in capsys.readouterr().out

    moved = out.rename(tmp_path / "moved")
    assert main(["eval", "--checkpoint", str(moved), "--out", str(tmp_path / "scores")]) == 0
    scores = json.loads((tmp_path / "scores" / "eval-val.json").read_text())
    assert scores["step"] == 3
    assert scores["miou"] == pytest.approx(miou, abs=1e-6)
    assert np.sum(scores["confusion"]) == 3 * 32 * 48 - void_pixels(3)
    assert scores["pixel_accuracy"] == pytest.approx(
        np.trace(scores["confusion"]) / np.sum(scores["confusion"])
    )
    for picture in ("eval-val.png", "eval-val-confusion.png"):
        assert (tmp_path / "scores" / picture).stat().st_size > 5_000
    capsys.readouterr()
    seen = []
    averaged = inference.class_probabilities

    def watch(model, images, size, options, amp):
        seen.append(options)
        return averaged(model, images, size, options, amp)

    monkeypatch.setattr(inference, "class_probabilities", watch)
    views = ["--window", "16", "32", "--scales", "0.75", "1", "--flip", "--workers", "1"]
    assert main(["eval", "--checkpoint", str(moved), "--out", str(tmp_path / "views"), *views]) == 0
    views = json.loads((tmp_path / "views" / "eval-val.json").read_text())
    assert views["window"] == [16, 32]
    assert views["stride"] is None
    assert views["scales"] == [0.75, 1]
    assert views["flip"] is True
    assert set(seen) == {InferenceConfig(window=(16, 32), scales=(0.75, 1.0), flip=True)}
    assert len(seen) == 1 + 3  # the batch, and a panel for each of three images
    assert f"mIoU            {views['miou']:.4f}" in capsys.readouterr().out

    for command in (["eval"], ["predict", "--images", str(tmp_path), "--out", str(tmp_path / "masks")]):
        assert main([*command, "--checkpoint", str(moved), "--stride", "3", "3"]) == 2
        assert capsys.readouterr().err.startswith("error: --stride is (3, 3), must be left out")

    assert main(["train", "--out", str(moved), "--resume", "--steps", "4"]) == 0
    assert read_rows(moved / "val.csv")[-1]["step"] == 4
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--dataset", "camvid"], "error: camvid is read from files: give its folder with --root"),
        (["train", "--steps", "0"], "error: --steps is 0, must be at least 1"),
        (["train", "--config", "absent.json"], "error: config file absent.json does not exist"),
        (
            ["train", "--resume", "--out", "absent"],
            "error: absent has no run to resume, which has a config.json,",
        ),
        (
            ["train", "--resume", "--out", "absent", "--dataset", "synthetic", "--steps", "0"],
            "error: --steps is 0",
        ),
        (["eval", "--checkpoint", "absent.pt"], "error: checkpoint absent.pt does not exist"),
        (["eval", "--checkpoint", "."], "error: run . has no checkpoint"),
        (["eval", "--checkpoint", ".", "--workers", "-1"], "error: --workers is -1, must be at least 0"),
        (["compare", "--seed", "3"], "error: compare takes --seeds, not --seed"),
        (["compare", "--contrast=bank"], "error: compare takes --methods or --arm, not --contrast"),
        (["compare", "--seeds", "1", "1"], "error: --seeds is (1, 1), must be at least one and none twice"),
        (["compare", "--steps", "0"], "error: --steps is 0, must be at least 1"),
    ],
)
def test_bad_input_is_a_message_not_a_traceback(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_window_of_eval_is_checked_together_with_the_runs_stride(tiny, tmp_path, capsys):
    run = tiny("run", "off", steps=1)
    train(replace(run, inference=InferenceConfig(window=(32, 48), stride=(30, 40))))
    evaluating = ["eval", "--checkpoint", str(run.out), "--out", str(tmp_path / "scores")]
    assert main([*evaluating, "--stride", "33", "3"]) == 2
    assert "error: --stride is (33, 3), must be at most the window, (32, 48)" in capsys.readouterr().err
    assert main([*evaluating, "--stride", "10", "10"]) == 0  # of the run's window
    assert main([*evaluating, "--window", "8", "8"]) == 0  # not with the run's stride, which leaves gaps
    views = json.loads((tmp_path / "scores" / "eval-val.json").read_text())
    assert (views["window"], views["stride"]) == ([8, 8], None)


def test_demo_draws_and_prints(tmp_path, capsys, quick_tsne):
    config = DemoConfig(out=tmp_path / "demo", steps=2, synthetic_images=(8, 4))
    for name in ("off", "bank"):  # an earlier demo, which is replaced
        (config.out / name).mkdir(parents=True)
        for left in ("config.json", "train.csv"):
            (config.out / name / left).write_text("no longer there")
    (config.out / "demo.json").touch()
    results = demo(config)
    assert all(read_rows(config.out / name / "train.csv") for name in results)
    printed = capsys.readouterr().out
    for name, result in results.items():
        assert f"{result.miou:.3f}" in printed
        assert name in printed
    assert "linear probe" in printed
    assert "This is one seed" in printed
    for name in ("curves", "panels", "tsne"):
        assert str(config.out / f"{name}.png") in printed
        assert (config.out / f"{name}.png").stat().st_size > 20_000


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_clears_an_earlier_demo(tmp_path, monkeypatch, rank):
    def stop(config):
        raise KeyboardInterrupt

    module = sys.modules[demo.__module__]
    monkeypatch.setattr(module, "join_ranks", lambda: nullcontext(Ranks(rank, 1, torch.device("cpu"))))
    monkeypatch.setattr(module, "train", stop)
    earlier = tmp_path / "off" / "config.json"
    earlier.parent.mkdir()
    earlier.write_text("{}")
    with pytest.raises(FileExistsError, match="off was not left by a demo"):
        demo(DemoConfig(out=tmp_path))
    (tmp_path / "demo.json").touch()
    if rank == 0:
        for folder in (tmp_path / "off", tmp_path):  # somebody goes on training there, or is at a demo
            in_use = pytest.raises(FileExistsError, match=f"{folder.name} is in use by process")
            with forked.holding(folder), in_use:
                demo(DemoConfig(out=tmp_path))
        assert earlier.exists()
    with pytest.raises(KeyboardInterrupt):
        demo(DemoConfig(out=tmp_path))
    assert earlier.exists() == (rank == 1)


def test_without_the_extra_the_import_names_the_command(environment):
    code = (
        "import importlib.util as util\n"
        "real = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'kornia' else real(name, *rest)\n"
        "import pixcontrast_ext.trainer\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (
        "ImportError: pixcontrast_ext.trainer needs kornia: pip install 'pixcontrast-ext[train]'"
        in done.stderr
    )
    assert done.stderr.count("pip install") == 1


@pytest.mark.parametrize("command", ["predict", "export", "check-data"])
def test_what_writes_one_result_runs_in_one_process(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    needed = {
        "predict": ["--checkpoint", ".", "--images", ".", "--out", str(tmp_path)],
        "export": ["--checkpoint", ".", "--out", str(tmp_path / "model.pt")],
        "check-data": ["--dataset", "synthetic"],
    }
    assert main([command, *needed[command]]) == 2
    assert capsys.readouterr().err == f"error: {command} runs in one process, not in 2\n"


def test_an_error_of_a_loading_process_is_a_line(camvid, tmp_path, capsys):
    root = camvid()
    label = root / "trainannot" / "train2.png"
    Image.fromarray(np.full((36, 48), 77, np.uint8)).save(label)
    options = shlex.split("--batch-size 4 --steps 1 --embed-dim 8 --device cpu --no-pictures --workers 1")
    paths = ["--root", str(root), "--out", str(tmp_path / "run")]
    assert main(["train", "--dataset", "camvid", *paths, *options]) == 2
    assert capsys.readouterr().err.endswith(f"error: label {label} has values [77] outside 0..11\n")


def test_json_has_null_for_nan(tmp_path):
    write_json(tmp_path / "scores.json", {"class_iou": {"train": float("nan")}, "list": (1.5, float("nan"))})
    assert json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail) == {
        "class_iou": {"train": None},
        "list": [1.5, None],
    }
