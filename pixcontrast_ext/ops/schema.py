"""What the ops of InfoNCE, mined or not, have in common: the shapes of their arguments, and their outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext.ops.signature import INT32_MAX, Limits

ANCHORS = dict(anchors="[A, D] T", anchor_labels="[A] int32")
KEYS = dict(keys="[K, D] T", key_labels="[K] int32")
TERMS = dict(neg_lse="[A] sum(T)", pos_weight="[A] sum(T)", grad_scale="[A] sum(T)")
LIMITS: dict[str, Limits] = {"D": (1, None), "A": (0, INT32_MAX)}
LIMITS_WITH_KEYS = LIMITS | {"K": (0, INT32_MAX)}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of rows of this one are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allocate_forward(anchors: Tensor, with_grad: bool, **_: Any) -> dict[str, Tensor]:
    """Outputs of a forward, mined or not."""
    size, channels = anchors.shape
    dtype = accumulator(anchors.dtype)
    return {
        "loss": anchors.new_empty(size, dtype=dtype),
        "neg_lse": anchors.new_empty(size, dtype=dtype),
        "pos_weight": anchors.new_empty(size, dtype=dtype),
        "pos_count": anchors.new_empty(size, dtype=torch.int32),
        "anchor_grad": anchors.new_empty(size if with_grad else 0, channels, dtype=dtype),
    }


def allocate_backward(anchors: Tensor, keys: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
    """The output of a backward: the gradient of the keys, or of anchors that are the keys."""
    rows = anchors if keys is None else keys
    return {"grad": rows.new_empty(rows.shape, dtype=accumulator(rows.dtype))}
