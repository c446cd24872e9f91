"""Class weights: the median frequency against loops, files, and what a training does with them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext.trainer import train as training
from pixcontrast_ext.trainer.balance import (
    WEIGHTS,
    count_classes,
    median_frequency,
    read_weights,
    save_weights,
)
from pixcontrast_ext.trainer.checkpoints import CheckpointError
from pixcontrast_ext.trainer.data import IGNORE, dataset_spec
from pixcontrast_ext.trainer.logs import read_rows
from pixcontrast_ext.trainer.train import CrossEntropy, train

NAMES = ("sky", "road", "pole")


def images(*labels):
    return [(torch.zeros(3, 2, 2), torch.tensor(label)) for label in labels]


def test_median_frequency_is_that_of_loops():
    labels = [[[0, 0], [0, 1]], [[0, 1], [1, IGNORE]], [[0, 0], [0, 0]]]
    # Class 0: 8 of 11 pixels; 1: 3 of the 7 pixels of two images; 2 is in none.
    frequencies = {0: 8 / 11, 1: 3 / 7}
    median = np.median(list(frequencies.values()))
    expected = [median / frequencies[0], median / frequencies[1], 1]
    counts = count_classes(images(*labels), 3)
    assert median_frequency(*counts).tolist() == pytest.approx(expected)
    assert torch.equal(
        sum(count_classes(images(*labels), 3, rank=rank, world=2) for rank in range(2)), counts
    )


def test_no_label_at_all():
    counts = count_classes(images([[IGNORE, IGNORE], [IGNORE, IGNORE]]), 3)
    assert median_frequency(*counts).tolist() == [1, 1, 1]


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "weights.json"
    save_weights(torch.tensor([0.5, 1.0, 2.25]), NAMES, path)
    assert read_weights(path, NAMES).tolist() == [0.5, 1.0, 2.25]
    path.write_text(json.dumps({"_source": "mine", "pole": 3, "sky": 1, "road": 0}))
    assert read_weights(path, NAMES).tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1, 2, 3]", "found list"),
        ('{"sky": 1, "road": 1}', "lacks pole and has nothing too much"),
        ('{"sky": 1, "road": 1, "pole": 1, "sea": 1}', "lacks nothing and has sea too much"),
        ('{"sky": 1, "road": 1, "pole": -1}', "gives pole the weight -1"),
        ('{"sky": 1, "road": true, "pole": 1}', "gives road the weight True"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, text, message):
    path = tmp_path / "weights.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_weights(path, NAMES)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file, nor off, auto or one of cityscapes"):
        read_weights(tmp_path / "none.json", NAMES)


def test_the_packages_files_fit_their_datasets():
    files = list(WEIGHTS.glob("*.json"))
    assert files
    for file in files:
        weights = read_weights(file, dataset_spec(file.stem).classes)
        assert weights.min() > 0.5
        assert weights.max() < 2


def test_cross_entropy_takes_them():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    weights = torch.tensor([0.5, 1.0, 2.0])
    expected = F.cross_entropy(logits, labels, weights)
    assert CrossEntropy(weights)(logits, None, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_run_counts_once_and_every_arm_gets_the_same(tiny, tmp_path, monkeypatch):
    counted = []

    def count(*args):
        counted.append(args)
        return median_frequency(*args)

    monkeypatch.setattr(training, "median_frequency", count)
    first = {}
    for contrast in ("off", "bank"):
        config = tiny(contrast, contrast, steps=2, log_every=1, checkpoint_every=1)
        config = replace(config, loss=replace(config.loss, class_weights="auto"))
        train(config)
        first[contrast] = read_rows(config.out / "train.csv")[0]["cross_entropy"]
        written = json.loads((config.out / "class_weights.json").read_text())
        assert tuple(written) == dataset_spec("synthetic").classes
        assert len(set(written.values())) > 2
    assert first["off"] == first["bank"]
    assert len(counted) == 2
    train(replace(config, steps=3), resume=True)
    assert len(counted) == 2
    of_other_values = replace(
        config, steps=4, loss=replace(config.loss, class_weights=str(tmp_path / "other.json"))
    )
    (tmp_path / "other.json").write_text(json.dumps(written | {dataset_spec("synthetic").classes[0]: 7.0}))
    with pytest.raises(
        ValueError, match=r"--class-weights are \[7.0, .*, but .*step-00000003.* was trained with \["
    ):
        train(of_other_values, resume=True)
    with pytest.raises(ValueError, match=r"--class-weights are off, but .* was trained with"):
        train(replace(config, steps=4, loss=replace(config.loss, class_weights="off")), resume=True)
    # What a run left that failed before its first step is not taken for that of other data.
    failed = replace(config, out=tmp_path / "failed", branch_from=tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        train(failed)
    other = replace(failed, branch_from=None, data=replace(config.data, data_seed=7))
    before = (failed.out / "class_weights.json").read_text()
    train(other)
    assert (failed.out / "class_weights.json").read_text() != before
    plain = tiny("plain", "off", steps=1, log_every=1)
    train(plain)
    assert read_rows(plain.out / "train.csv")[0]["cross_entropy"] != first["off"]


def test_a_named_file_that_does_not_fit_is_an_error(tiny):
    config = tiny("run", "off", steps=1)
    with pytest.raises(ValueError, match=r"cityscapes\.json lacks"):
        train(replace(config, loss=replace(config.loss, class_weights="cityscapes")))
