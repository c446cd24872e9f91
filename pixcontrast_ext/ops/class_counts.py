"""How often each class occurs, counted on the device and without a wait for it, as `torch.bincount` would need."""

from __future__ import annotations

import torch
from torch import Tensor


def count_classes(labels: Tensor, num_classes: int) -> Tensor:
    """How often each class occurs, [C] int64; labels that are no class do not count."""
    labels = labels.long()  # of fewer bits, `num_classes` might be another number
    where = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes).flatten()
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=labels.device)
    return counts.index_add_(0, where, torch.ones_like(where))[:-1]


def count_per_image(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """How many pixels of each class each image of a batch [B, H, W] has, [B, C] int64."""
    images, labels = labels.shape[0], labels.long()
    first = torch.arange(images, device=labels.device)[:, None, None] * num_classes
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    return count_classes(torch.where(valid, first + labels, -1), images * num_classes).view(-1, num_classes)
