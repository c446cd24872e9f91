"""Configurations: files, flags that override them, and refused values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pixcontrast_ext.trainer.config import (
    DataConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
    config_of,
    flags_of_file,
    flatten,
    load_config,
    parse_flags,
    save_config,
)


def test_a_saved_config_reads_back_the_same(tmp_path):
    config = TrainConfig(
        out=Path("a folder/x"),
        compile=True,
        amp="bf16",
        data=DataConfig(dataset="camvid", root=Path("/data"), crop=(7, 9), zoom=(0.5, 2.0), augment=False),
        loss=LossConfig(contrast="batch", min_pixels=None, temperature=0.07),
        optim=OptimConfig(lr=1e-3, weight_decay=1e-06),
    )
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert config_of(flatten(config), tmp_path) == config
    assert load_config(tmp_path / "config.json") != replace(config, steps=config.steps + 1)


def test_a_save_that_dies_leaves_the_config_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    save_config(TrainConfig(), path)

    def die(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            save_config(TrainConfig(steps=7), path)
    assert load_config(path) == TrainConfig()
    save_config(TrainConfig(steps=7), path)
    assert load_config(path).steps == 7


def test_a_file_needs_not_name_every_option_and_flags_override_it(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"lr": 0.5, "steps": 7, "augment": false, "contrast": "off"}')
    config = parse_flags(TrainConfig, [*flags_of_file(path), "--steps", "9", "--augment"])
    assert (config.optim.lr, config.steps, config.data.augment, config.loss.contrast) == (0.5, 9, True, "off")
    assert config.batch_size == TrainConfig().batch_size


def test_keys_that_begin_with_an_underscore_are_comments(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"_source": "a paper", "steps": 7, "_": [1, {"a": 2}]}')
    assert load_config(path) == TrainConfig(steps=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"lr": 0.5, "learning_rate": 1, "bach": 2}',
            r"mine\.json has unknown options: bach, learning_rate",
        ),
        ('{"lr": }', r"mine\.json is not valid JSON"),
        ("[1]", r"mine\.json must hold one JSON object of options, found list"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json does not exist"):
        load_config(tmp_path / "absent.json")


def test_a_value_of_the_wrong_kind_is_refused(tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"contrast": "sometimes"}))
    with pytest.raises(SystemExit):
        load_config(path)
    assert "sometimes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps is 0, must be at least 1"),
        (["--batch-size", "-2"], "--batch-size is -2, must be at least 1"),
        (["--lr", "0"], "--lr is 0.0, must be finite and above 0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--clip", "-1"], "--clip is -1.0, must be finite and not negative"),
        (["--zoom", "2", "1"], r"--zoom is \(2.0, 1.0\), must be 0 < low <= high"),
        (["--crop", "0", "5"], r"--crop is \(0, 5\), must be at least 1 by 1"),
        (["--size", "50", "50", "--scale", "0.5"], "--scale is 0.5, must be left out where --size is given"),
        (["--hard-fraction", "1.5"], "--hard-fraction is 1.5, must be from 0 to 1"),
        (["--region-slots", "-1"], "--region-slots is -1, must be finite and not negative"),
        (
            ["--contrast", "bank", "--region-slots", "0", "--pixel-slots", "0"],
            "--region-slots is 0, must be above 0 where the bank keeps no pixels",
        ),
        (
            ["--contrast", "bank", "--region-slots", "0", "--pixels-per-image", "0"],
            "--region-slots is 0, must be above 0 where the bank keeps no pixels",
        ),
        (["--mining-fraction", "0"], "--mining-fraction is 0.0, must be above 0 and at most 1"),
        (["--mining-negatives", "0"], "--mining-negatives is 0, must be at least 1"),
        (["--bank-samples", "0"], "--bank-samples is 0, must be at least 1"),
        (["--region-views", "-1"], "--region-views is -1, must be at least 1"),
        (["--min-purity", "-0.1"], "--min-purity is -0.1, must be from 0 to 1"),
        (["--min-purity", "nan"], "--min-purity is nan, must be from 0 to 1"),
        (["--train-fraction", "0"], "--train-fraction is 0.0, must be above 0 and at most 1"),
        (["--synthetic-images", "5", "0"], r"--synthetic-images is \(5, 0\)"),
    ],
)
def test_values_out_of_range_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_flags(TrainConfig, flags).validate()


def test_the_defaults_are_valid():
    TrainConfig().validate()
