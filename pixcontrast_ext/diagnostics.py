"""Numbers that say what the contrast has to work with, and how its gradient compares with another loss's.

Plain PyTorch on some thousand rows: they are read every hundred steps, not in every one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pixcontrast_ext.bank import MemoryBank
from pixcontrast_ext.batch import Batch
from pixcontrast_ext.ops.class_counts import count_classes, count_per_image
from pixcontrast_ext.ops.sampling import AnchorSample

if TYPE_CHECKING:
    from pixcontrast_ext.loss import PixelContrastLoss


def compare_gradients(loss: Tensor, other: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """How strongly one loss pulls at a tensor beside another, and whether both pull the same way.

    For the contrast beside the cross-entropy, with `shared` the features that classifier and projection head both read:
    by a rule of thumb a ratio below 0.05 says that the contrast's weight is too small to matter, one above 2 that it
    overrules the other.
    Both graphs are kept, and no parameter's gradient is touched.

    Args:
        loss, other: scalars.
        shared: any tensor that both depend on, such as the backbone's feature map.

    Returns:
        |d loss / d shared| / |d other / d shared|, and the cosine of the two gradients: scalars on the device. Where
        the latter is zero the ratio is inf, or NaN if both are; the cosine is NaN where one of both is.

    Raises:
        RuntimeError: a loss that does not depend on `shared`.
    """
    first, second = (
        torch.autograd.grad(of, shared, retain_graph=True)[0].float().flatten() for of in (loss, other)
    )
    lengths = first.norm(), second.norm()
    return lengths[0] / lengths[1], torch.dot(first, second) / (lengths[0] * lengths[1])


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """NaN if none is counted."""
    return torch.where(counted, values, 0).sum() / counted.sum()


def of_step(loss: PixelContrastLoss, batch: Batch, anchors: AnchorSample, rows: Tensor) -> dict[str, Tensor]:
    """All that `PixelContrastLoss.diagnostics` returns but the loss itself."""
    found = of_rows(rows, anchors.labels, loss) | of_anchors(anchors, batch, loss.num_classes)
    if loss.anchors == "random":
        found["hard_share"] = torch.full_like(found["hard_share"], math.nan)  # nobody looked
    return found if loss.bank is None else found | of_bank(loss.bank, batch.labels)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.float(), dim=1, eps=torch.finfo(torch.float32).tiny)


def _sums(bank: MemoryBank) -> Tensor:
    """The sum of each class's unit keys, [C, D] fp32, without a copy of the bank, whose free slots are zeros."""
    if bank.normalize:
        return bank.keys.sum(1, dtype=torch.float32)
    return torch.stack([_unit(of_class).sum(0) for of_class in bank.keys])


def of_rows(
    rows: Tensor,  # [A, D]
    labels: Tensor,  # [A] int32, -1 in padding
    loss: PixelContrastLoss,
) -> dict[str, Tensor]:
    """Cosines, the loss at chance, at these cosines and for points, and the number of keys of each class."""
    rows, some_class, bank = _unit(rows), labels.clamp(min=0).long(), loss.bank
    if bank is None:  # the anchors themselves, each without itself
        of_class, itself = count_classes(labels, loss.num_classes), 1
        where = torch.where(labels >= 0, labels, loss.num_classes).long()
        sums = rows.new_zeros(loss.num_classes + 1, rows.shape[1]).index_add_(0, where, rows)[:-1]
    else:
        of_class, itself = count_classes(bank.key_labels, loss.num_classes), 0
        sums = _sums(bank)
    positives, negatives = of_class[some_class] - itself, of_class.sum() - of_class[some_class]
    contrasted = (labels >= 0) & (positives > 0) & (negatives > 0)
    own = (rows * sums[some_class]).sum(1)
    others = rows @ sums.sum(0) - own
    own = own - itself * (rows * rows).sum(1)
    positive_cosine = _mean(own / positives.clamp(min=1), contrasted)
    negative_cosine = _mean(others / negatives.clamp(min=1), contrasted)

    taken = negatives.float()
    drawn = None if loss.mining is None else loss.mining.drawn(loss.mining.negatives)
    if drawn is not None:  # of equal cosines mining keeps all that were drawn, on average these
        taken = taken * (drawn / of_class.sum().clamp(min=1)).clamp(max=1)
    classes = (of_class > 0).sum()
    least = -1 / (classes - 1).clamp(
        min=1
    )  # of the cosine of two classes, where all are as far apart as can be

    def loss_at(difference: Tensor | float) -> Tensor:
        """Of a mean over positives of log(1 + N exp(difference / temperature)), by eq. (3)."""
        return loss.scale * _mean(F.softplus(taken.log() + difference / loss.temperature), contrasted)

    return {
        "chance": loss_at(0.0),
        "expected": loss_at(negative_cosine - positive_cosine),
        "floor": loss_at(least - 1),
        "positive_cosine": positive_cosine,
        "negative_cosine": negative_cosine,
        "contrasted": contrasted.sum(),
        "positives_of": of_class,
    }


def of_anchors(anchors: AnchorSample, batch: Batch, num_classes: int) -> dict[str, Tensor]:
    """How many anchors of which class, and how many of them are hard."""
    chosen = anchors.labels >= 0
    if batch.labels.numel() == 0:
        hard = torch.zeros_like(chosen)
    else:
        hard = (batch.predictions.flatten() != batch.labels.flatten())[anchors.indices]
    return {
        "anchors": chosen.sum(),
        "hard_share": _mean(hard.float(), chosen),
        "anchors_of": count_classes(anchors.labels, num_classes),
    }


def of_bank(bank: MemoryBank, labels: Tensor) -> dict[str, Tensor]:
    """How full each class's rings are, and how much of them this batch [B, H, W] replaces."""
    pixels = count_per_image(labels, bank.num_classes, bank.ignore_index)
    found = {}
    for name, slots, fill, added in (
        ("region", bank.region_slots, bank.region_fill, (pixels > 0).sum(0)),
        ("pixel", bank.pixel_slots, bank.pixel_fill, pixels.clamp(max=bank.pixels_per_image).sum(0)),
    ):
        found[f"{name}_fill_of"] = (
            fill / slots if slots else torch.full_like(added, math.nan, dtype=torch.float32)
        )
        found[f"{name}_turnover_of"] = added / slots if slots else found[f"{name}_fill_of"]
    return found
