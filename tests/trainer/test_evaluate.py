"""Scores: IoU by hand and by torchmetrics, for a known model and for an exported one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

from pixcontrast_ext.trainer import train
from pixcontrast_ext.trainer.__main__ import main
from pixcontrast_ext.trainer.checkpoints import CheckpointStore
from pixcontrast_ext.trainer.config import DataConfig, InferenceConfig
from pixcontrast_ext.trainer.data import eval_loader
from pixcontrast_ext.trainer.datasets import IGNORE
from pixcontrast_ext.trainer.distributed import Ranks
from pixcontrast_ext.trainer.evaluate import (
    class_iou,
    confusion_matrix,
    evaluate,
    export_model,
    load_model,
)

CPU = torch.device("cpu")


def test_iou_of_a_worked_example():
    labels = torch.tensor([[0, 0, 1, 1], [1, 2, IGNORE, IGNORE]])
    predictions = torch.tensor([[0, 1, 1, 1], [0, 0, 2, 1]])
    confusion = confusion_matrix(labels, predictions, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    iou = class_iou(confusion)
    assert iou[:3].tolist() == pytest.approx([1 / 4, 2 / 4, 0 / 1])
    assert iou[3].isnan()
    # A class that the truth lacks has no IoU, whether it is predicted somewhere or not.
    missed = confusion_matrix(
        labels, torch.where(predictions == 2, 3, predictions).clone().index_fill_(1, torch.tensor([3]), 3), 4
    )
    assert missed[:, 3].sum() > 0
    assert class_iou(missed)[3].isnan()


def test_iou_is_that_of_torchmetrics():
    labels = torch.randint(0, 6, (3, 40, 50))
    predictions = torch.where(torch.rand(labels.shape) < 0.6, labels, torch.randint(0, 6, labels.shape))
    labels[torch.rand(labels.shape) < 0.2] = IGNORE
    metric = MulticlassJaccardIndex(8, average="none", ignore_index=IGNORE, zero_division=float("nan"))
    torch.testing.assert_close(
        class_iou(confusion_matrix(labels, predictions, 8)).float(),
        metric(predictions, labels),
        equal_nan=True,
    )


class Says(nn.Module):
    """Predicts class n for a grey level of n / 100, and class 2 for the right half of any image."""

    def forward(self, images):
        logits = -((images[:, :1] * 100 - torch.arange(4.0).view(1, 4, 1, 1)) ** 2)
        logits[:, 2, :, images.shape[3] // 2 :] = 99
        return {"seg": logits}


def test_scores_of_a_model_that_is_known():
    image = torch.tensor([0, 1, 1, 3]).repeat(2, 1)
    dataset = [
        ((image * 2.55).round().to(torch.uint8).expand(3, 2, 4), torch.tensor(label, dtype=torch.uint8))
        for label in ([[0, 1, 2, 2], [0, 0, 2, IGNORE]], [[1, 1, 1, 2], [IGNORE] * 4])
    ]
    scores = evaluate(Says(), eval_loader(dataset, 1), tuple("abcd"), Ranks(0, 1, CPU))
    assert scores.confusion.tolist() == [[2, 1, 0, 0], [1, 2, 1, 0], [0, 0, 4, 0], [0, 0, 0, 0]]
    assert scores.pixel_accuracy == 8 / 11
    assert list(scores.class_iou.values())[:3] == [2 / 4, 2 / 5, 4 / 5]
    assert math.isnan(scores.class_iou["d"])
    assert scores.miou == pytest.approx((2 / 4 + 2 / 5 + 4 / 5) / 3)
    # The right half of each window is class 2.
    windows = InferenceConfig(window=(2, 2), stride=(2, 2))
    scores = evaluate(Says(), eval_loader(dataset, 2), tuple("abcd"), Ranks(0, 1, CPU), options=windows)
    assert scores.confusion[:, 2].tolist() == [1, 2, 2, 0]


def test_an_exported_model_is_that_of_the_run_without_what_only_training_needs(tiny, tmp_path):
    config = tiny(steps=1)
    train.train(config)
    path = tmp_path / "deep" / "model.pt"
    parameters = export_model(config.out, path)
    state = torch.load(path, weights_only=True)
    assert state.keys() == {"step", "model", "config"}
    assert state["step"] == 1
    assert not any("embed" in name or "bank" in name for name in state["model"])
    whole = CheckpointStore(config.out / "checkpoints").load_latest()[1]["model"]
    assert any("embed_head" in name for name in whole)
    assert all(torch.equal(value, whole[name]) for name, value in state["model"].items())
    model, _, step = load_model(path, CPU)
    assert step == 1
    assert parameters == sum(weight.numel() for weight in model.parameters())
    with torch.no_grad():
        assert set(model(torch.rand(1, 3, 32, 48))) == {"seg"}
    assert [each.name for each in path.parent.iterdir()] == ["model.pt"]


def test_the_size_of_files_that_there_are_not(tiny, capsys):
    config = tiny("run", "off", steps=1)
    train.train(config)
    assert main(["eval", "--checkpoint", str(config.out), "--original-size"]) == 2
    assert "--original-size needs labels in files, and 'synthetic' has none" in capsys.readouterr().err


def test_a_run_says_how_it_is_evaluated_and_flags_override_it(tiny, camvid, tmp_path, monkeypatch, capsys):
    from pixcontrast_ext.trainer import __main__ as command

    views = InferenceConfig(scales=(0.5, 1.0), flip=True, average="logits")
    data = DataConfig(dataset="camvid", root=camvid(), size=(18, 24))
    config = tiny("run", "off", steps=1, batch_size=2, data=data, inference=views)
    train.train(config)
    seen, sizes = [], set()

    def watch(model, loader, *args, options, amp):
        seen.append(options)
        sizes.update(tuple(labels.shape[-2:]) for stacks in loader for _, labels in stacks)
        return evaluate(model, loader, *args, options=options, amp=amp)

    monkeypatch.setattr(command, "evaluate", watch)
    checkpoint = ["--checkpoint", str(config.out / "best.pt")]
    assert command.main(["eval", *checkpoint]) == 0
    assert sizes == {(18, 24)}
    assert command.main(["eval", *checkpoint, "--scales", "1", "--no-flip", "--original-size"]) == 0
    assert sizes == {(18, 24), (36, 48)}
    assert seen == [views, InferenceConfig(average="logits")]
    capsys.readouterr()
