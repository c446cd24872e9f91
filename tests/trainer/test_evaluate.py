from __future__ import annotations

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from pixcontrast_ext.trainer.datasets import IGNORE
from pixcontrast_ext.trainer.evaluate import class_iou, confusion_matrix


def test_iou_of_a_worked_example():
    labels = torch.tensor([[0, 0, 1, 1], [1, 2, IGNORE, IGNORE]])
    predictions = torch.tensor([[0, 1, 1, 1], [0, 0, 2, 1]])
    confusion = confusion_matrix(labels, predictions, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    iou = class_iou(confusion)
    assert iou[:3].tolist() == pytest.approx([1 / 4, 2 / 4, 0 / 1]) and iou[3].isnan()


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
