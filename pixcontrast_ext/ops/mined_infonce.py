"""InfoNCE of the pairs that mining keeps, and the histograms of cosines that mining ranks by: the ops beneath."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext.backends.calls import SCORE_BINS, MinedBackward, MinedForward, ScoreCounts
from pixcontrast_ext.ops import library
from pixcontrast_ext.ops.schema import (
    ANCHORS,
    KEYS,
    LIMITS,
    LIMITS_WITH_KEYS,
    TERMS,
    allocate_backward,
    allocate_forward,
)
from pixcontrast_ext.ops.signature import INT32_MAX

_NEGATIVES = dict(negatives="[M, D] T", negative_labels="[M] int32")
_KEPT = dict(neg_min="[A] float32", pos_max="[A] float32")
_LIMITS = LIMITS_WITH_KEYS | {"M": (0, INT32_MAX)}


def _allocate_counts(anchors: Tensor, **_: Any) -> dict[str, Tensor]:
    shape = anchors.shape[0], SCORE_BINS
    return {name: anchors.new_empty(shape, dtype=torch.int32) for name in ("neg_counts", "pos_counts")}


library.define(
    "mining_counts(Tensor anchors, Tensor anchor_labels, Tensor keys, Tensor key_labels, Tensor negatives, "
    "Tensor negative_labels, bool exclude_self, str backend) -> (Tensor, Tensor)",
    ANCHORS | KEYS | _NEGATIVES,
    _LIMITS,
    ScoreCounts,
    _allocate_counts,
    "score_counts",
)
library.define(
    "mining_forward(Tensor anchors, Tensor anchor_labels, Tensor keys, Tensor key_labels, Tensor negatives, "
    "Tensor negative_labels, Tensor neg_min, Tensor pos_max, float temperature, bool exclude_self, bool with_grad, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    ANCHORS | KEYS | _NEGATIVES | _KEPT,
    _LIMITS,
    MinedForward,
    allocate_forward,
    "mined_forward",
)
library.define(
    "mining_backward_keys(Tensor anchors, Tensor anchor_labels, Tensor keys, Tensor key_labels, Tensor neg_lse, "
    "Tensor pos_weight, Tensor grad_scale, Tensor neg_min, Tensor pos_max, float temperature, bool exclude_self, "
    "str backend) -> Tensor",
    ANCHORS | KEYS | TERMS | _KEPT,
    LIMITS_WITH_KEYS,
    MinedBackward,
    allocate_backward,
    "mined_backward",
)
library.define(
    "mining_backward_symmetric(Tensor anchors, Tensor anchor_labels, Tensor neg_lse, Tensor pos_weight, "
    "Tensor grad_scale, Tensor neg_min, Tensor pos_max, float temperature, bool exclude_self, str backend) -> Tensor",
    ANCHORS | TERMS | _KEPT,
    LIMITS,
    functools.partial(MinedBackward, keys=None, key_labels=None),
    allocate_backward,
    "mined_backward",
)


class MinedInfoNCE(torch.autograd.Function):
    """Loss per anchor [A] and |P| [A] of the pairs that each anchor's `neg_min` and `pos_max` keep.

    `keys=None` contrasts the anchors with each other; `negatives=None` takes the negatives from the keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_labels: Tensor,
        keys: Tensor | None,
        key_labels: Tensor | None,
        negatives: Tensor | None,
        negative_labels: Tensor | None,
        neg_min: Tensor,
        pos_max: Tensor,
        temperature: float,
        exclude_self: bool,
        grad_enabled: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Loss and |P| of each anchor; `grad_enabled` is whether the anchors' gradient may be asked for."""
        ctx.symmetric, ctx.shared = keys is None, negatives is None
        every = (anchors, anchor_labels) if keys is None else (keys, key_labels)
        others = every if negatives is None else (negatives, negative_labels)
        with_grad = grad_enabled and ctx.needs_input_grad[0] and not ctx.symmetric
        kept = (neg_min, pos_max)
        settings = (temperature, exclude_self)
        loss, neg_lse, pos_weight, pos_count, anchor_grad = torch.ops.pixcontrast.mining_forward(
            anchors, anchor_labels, *every, *others, *kept, *settings, with_grad, backend
        )
        ctx.dtype, ctx.settings = anchors.dtype, (*settings, backend)
        ctx.mark_non_differentiable(pos_count)
        saved = [pos_count, anchor_grad]
        ctx.recomputes = ctx.symmetric or ctx.needs_input_grad[2] or ctx.needs_input_grad[4]
        if ctx.recomputes:
            saved += [anchors, anchor_labels, neg_lse, pos_weight, *kept]
            for i, rows in ((2, every), (4, others)):
                if ctx.needs_input_grad[i]:
                    saved += rows
        ctx.save_for_backward(*saved)
        return loss, pos_count

    @staticmethod
    @library.differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Gradients of the anchors and, if they need one, of the keys and of the negatives."""
        pos_count, anchor_grad, *saved = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 12
        ops = torch.ops.pixcontrast
        if ctx.needs_input_grad[0] and not ctx.symmetric:
            grads[0] = (anchor_grad * grad_loss[:, None]).to(ctx.dtype)
        if not ctx.recomputes:
            return tuple(grads)
        anchors, anchor_labels, neg_lse, pos_weight, neg_min, pos_max, *rows = saved
        terms = neg_lse, pos_weight, grad_loss / pos_count.clamp(min=1)
        if ctx.symmetric:
            grad = ops.mining_backward_symmetric(
                anchors, anchor_labels, *terms, neg_min, pos_max, *ctx.settings
            )
            grads[0] = grad.to(ctx.dtype)
            return tuple(grads)

        def of(keys: Tensor, key_labels: Tensor, neg_min: Tensor, pos_max: Tensor) -> Tensor:
            grad: Tensor = ops.mining_backward_keys(
                anchors, anchor_labels, keys, key_labels, *terms, neg_min, pos_max, *ctx.settings
            )
            return grad.to(ctx.dtype)

        if ctx.needs_input_grad[2]:
            keys, key_labels, *rows = rows
            nowhere = neg_min if ctx.shared else torch.full_like(neg_min, torch.inf)
            grads[2] = of(keys, key_labels, nowhere, pos_max)
        if ctx.needs_input_grad[4]:
            negatives, negative_labels = rows
            grads[4] = of(negatives, negative_labels, neg_min, torch.full_like(pos_max, -torch.inf))
        return tuple(grads)
