"""Steering a selection of pixels: which of them are hard, and with what chance each is drawn.

It changes the labels, predictions and priorities that an op gets, so that no kernel has to know of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixcontrast_ext.ops import checks

ANCHORS = ("hard", "random")

_LEAST_EXPONENT = -256  # of a time that is still told from 0; those of fp32 weights have -160 to 155


def check_anchors(anchors: str) -> None:
    """Raise ValueError unless `anchors` is one of `ANCHORS`."""
    if anchors not in ANCHORS:
        raise ValueError(f"anchors must be 'hard' or 'random', got {anchors!r}")


def check_hard(hard: Tensor, shape: tuple[int, ...] | None, device: torch.device) -> None:
    """Raise TypeError or ValueError unless `hard` is bool, of this shape (None: of any), on this device."""
    if not isinstance(hard, Tensor) or hard.dtype != torch.bool:
        got = hard.dtype if isinstance(hard, Tensor) else type(hard).__name__
        raise TypeError(f"hard must be a bool tensor, got {got}")
    checks.check_place("hard", hard, shape, device)


def predictions_for(labels: Tensor, predictions: Tensor | None, hard: Tensor | None, anchors: str) -> Tensor:
    """Predictions [B, H, W] int64 that are wrong just where a pixel is to count as hard.

    With anchors="random" none is: so all pixels of a class are one pool.
    """
    if anchors == "random" or (hard is None and predictions is None):
        return labels
    if hard is not None:
        return torch.where(hard, -1, labels)  # which is no class
    assert predictions is not None
    return predictions.long()


def only_drawn(labels: Tensor, confidence: Tensor, ignore_index: int) -> Tensor:
    """Labels [B, H, W] int64, ignored where the confidence is 0 (or, on a GPU, negative or NaN)."""
    return torch.where(confidence > 0, labels, ignore_index)


def weigh_priority(priority: Tensor, confidence: Tensor) -> Tensor:
    """Priorities by which pixels are drawn without replacement, with chance proportional to their confidence.

    A race: each pixel arrives after a time that is exponentially distributed, its rate the confidence, and those that
    arrive first are taken. The uniform number behind the time is the priority's low 31 bits, so the sign does not
    count: what `torch.randint` draws from all of int32, or from 0 on, is uniform alike. Small ones come first.
    """
    uniform = ((priority & torch.iinfo(torch.int32).max).double() + 0.5) / 2**31  # in (0, 1)
    time = -torch.log1p(-uniform) / confidence.detach().double()
    # Numbers that are not negative lie in the order of their bits. Of the 64 there is room for 9 of the exponent and 22
    # of the fraction.
    bits = (time.view(torch.int64) >> 30) - ((1023 + _LEAST_EXPONENT) << 22)
    return bits.clamp(0, torch.iinfo(torch.int32).max).int()
