"""Blockwise InfoNCE: the contrastive loss of anchors against keys, without their A x K matrix."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext import backends
from pixcontrast_ext.backends.calls import InfonceBackward, InfonceForward
from pixcontrast_ext.ops import autocast, checks, library
from pixcontrast_ext.ops.mined_infonce import MinedInfoNCE
from pixcontrast_ext.ops.mining import Mining, Thresholds, check_contrast, drawn_of, thresholds_of
from pixcontrast_ext.ops.schema import (
    ANCHORS,
    KEYS,
    LIMITS,
    LIMITS_WITH_KEYS,
    TERMS,
    allocate_backward,
    allocate_forward,
)

library.define(
    "infonce_forward(Tensor anchors, Tensor anchor_labels, Tensor keys, Tensor key_labels, float temperature, "
    "bool exclude_self, bool with_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    ANCHORS | KEYS,
    LIMITS_WITH_KEYS,
    InfonceForward,
    allocate_forward,
    "infonce_forward",
)
library.define(
    "infonce_backward_keys(Tensor anchors, Tensor anchor_labels, Tensor keys, Tensor key_labels, Tensor neg_lse, "
    "Tensor pos_weight, Tensor grad_scale, float temperature, bool exclude_self, str backend) -> Tensor",
    ANCHORS | KEYS | TERMS,
    LIMITS_WITH_KEYS,
    InfonceBackward,
    allocate_backward,
    "infonce_backward",
)
library.define(
    "infonce_backward_symmetric(Tensor anchors, Tensor anchor_labels, Tensor neg_lse, Tensor pos_weight, "
    "Tensor grad_scale, float temperature, bool exclude_self, str backend) -> Tensor",
    ANCHORS | TERMS,
    LIMITS,
    functools.partial(InfonceBackward, keys=None, key_labels=None),
    allocate_backward,
    "infonce_backward",
)


class BlockwiseInfoNCE(torch.autograd.Function):
    """Loss per anchor [A] and |P| [A].

    Keys other than the anchors: the forward finishes the anchors' gradient, so the backward only scales it,
    and nothing of the keys is kept unless they need a gradient themselves. `keys=None` contrasts the anchors
    with each other: the scores are symmetric, and one recomputing backward serves both roles.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_labels: Tensor,
        keys: Tensor | None,
        key_labels: Tensor | None,
        temperature: float,
        exclude_self: bool,
        grad_enabled: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Loss and |P| of each anchor; `grad_enabled` is whether the anchors' gradient may be asked for."""
        symmetric = keys is None
        with_grad = grad_enabled and ctx.needs_input_grad[0] and not symmetric
        loss, neg_lse, pos_weight, pos_count, anchor_grad = torch.ops.pixcontrast.infonce_forward(
            anchors,
            anchor_labels,
            anchors if keys is None else keys,
            anchor_labels if key_labels is None else key_labels,
            temperature,
            exclude_self,
            with_grad,
            backend,
        )
        if symmetric:
            ctx.save_for_backward(pos_count, anchors, anchor_labels, neg_lse, pos_weight)
        elif ctx.needs_input_grad[2]:
            ctx.save_for_backward(
                pos_count, anchor_grad, anchors, anchor_labels, keys, key_labels, neg_lse, pos_weight
            )
        else:
            ctx.save_for_backward(pos_count, anchor_grad)
        ctx.symmetric, ctx.dtype = symmetric, anchors.dtype
        ctx.temperature, ctx.exclude_self, ctx.backend = temperature, exclude_self, backend
        ctx.mark_non_differentiable(pos_count)
        return loss, pos_count

    @staticmethod
    @library.differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Gradients of the anchors and, if they need one, of the keys."""
        pos_count, *saved = ctx.saved_tensors
        settings = (ctx.temperature, ctx.exclude_self, ctx.backend)
        grad_anchors = grad_keys = None
        if ctx.symmetric:
            grad_scale = grad_loss / pos_count.clamp(min=1)
            grad_anchors = torch.ops.pixcontrast.infonce_backward_symmetric(*saved, grad_scale, *settings).to(
                ctx.dtype
            )
        else:
            anchor_grad, *inputs = saved
            if ctx.needs_input_grad[0]:
                grad_anchors = (anchor_grad * grad_loss[:, None]).to(ctx.dtype)
            if ctx.needs_input_grad[2]:
                grad_scale = grad_loss / pos_count.clamp(min=1)
                grad_keys = torch.ops.pixcontrast.infonce_backward_keys(*inputs, grad_scale, *settings).to(
                    ctx.dtype
                )
        return grad_anchors, None, grad_keys, None, None, None, None, None


def infonce(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A]
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K]
    *,
    temperature: float,
    reduction: str = "mean",
    exclude_self: bool = False,
    negatives: tuple[Tensor, Tensor] | None = None,  # [M, D] and [M]
    neg_min: Tensor | None = None,  # [A]
    pos_max: Tensor | None = None,  # [A]
    anchor_weights: Tensor | None = None,  # [A]
    backend: str | None = None,
) -> Tensor:
    """Pixel contrast of eq. (3) in arXiv 2101.11939: every positive against all negatives of its anchor.

    Replaces, without the A x K matrix and with the gradient of the anchors finished in the forward:

        scores = anchors @ keys.T / temperature
        same = anchor_labels[:, None] == key_labels[None, :]
        neg_lse = scores.masked_fill(same, -inf).logsumexp(1, keepdim=True)
        loss = (F.softplus(neg_lse - scores) * same).sum(1) / same.sum(1)

    Rows of label < 0 on either side take no part. An anchor without positives has loss 0 and stays out of the
    mean; without negatives each of its positives has loss 0. Sums are in fp32 and in a fixed order.
    Differentiable once, in anchors and keys; passing one tensor as both (with the same labels) takes a
    cheaper, symmetric path.

    Under `torch.autocast` the products are taken in its dtype, as `torch.matmul` takes them: all rows but fp64 ones are
    cast to it first, whatever their dtype. What follows the products stays in fp32, and gradients have the dtypes of
    the rows. A cast is a copy in every call: keys that are in that dtype already need none.

    Args:
        anchors, keys: of one dtype, or of any under autocast, fp32, fp16 or bf16 (fp64 on the reference backend);
            usually of unit norm.
        anchor_labels, key_labels: any integer dtype; values beyond int32 are an error on the CPU, no class elsewhere.
        temperature: divides the scores.
        reduction: "mean" over the anchors that have a positive (0 if none has), or "none".
        exclude_self: key i is not a positive of anchor i.
        negatives: rows and their labels, of which the negatives are taken in place of the keys, whose labels then
            only say which are positives: `DrawnKeys.negatives` of `draw_keys`. No A x M matrix is stored either.
        neg_min, pos_max: fp32. Of each anchor's pairs those take part whose cosine (the plain product of the rows) is
            not below `neg_min`, for a negative, or below `pos_max`, for a positive: `score_thresholds`. |P| counts
            the positives that remain. A NaN always takes part.
        anchor_weights: floating point, in [0, inf). The mean is then sum w_i loss_i / sum w_i over the anchors that
            have a positive, 0 if their weights are all 0; their scale does not matter. No gradient reaches them. On a
            GPU, where nothing looks at them, a negative weight and NaN count as 0, and an infinite one alone.
        backend: see `available_backends`.

    Returns:
        Scalar for "mean", [A] for "none"; fp32 whatever the input's dtype (fp64 for fp64).

    Raises:
        TypeError: rows or weights that are not floating point, rows that differ in dtype, labels that are not
            integers.
        ValueError: shapes that do not fit, mixed devices, a temperature that is not positive and finite, an
            unknown reduction, weights without a mean, a backend that cannot serve the call; on the CPU also a
            weight that is negative or not finite.
    """
    check_contrast(anchors, anchor_labels, keys, key_labels, negatives)
    check_temperature("temperature", temperature)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if anchor_weights is not None:
        if reduction == "none":
            raise ValueError("anchor_weights weight the mean, got reduction='none'")
        checks.check_weights("anchor_weights", anchor_weights, (anchors.shape[0],), anchors.device)

    in_batch = keys is anchors and key_labels is anchor_labels
    anchors, anchor_labels = autocast.to_product(anchors), checks.to_int32("anchor_labels", anchor_labels)
    others = None
    if anchor_weights is not None and not in_batch:  # there a row is a key as well
        anchor_labels = torch.where(anchor_weights > 0, anchor_labels, -1)
    if not in_batch:
        others = autocast.to_product(keys), checks.to_int32("key_labels", key_labels)
    width = operator.index(anchors.shape[1])
    mined = not (negatives is None and neg_min is None and pos_max is None)
    op = "mining" if mined else "infonce"
    name = backends.resolve(backend, op, anchors.device, anchors.dtype, width)
    if mined:
        kept = Thresholds(
            _threshold("neg_min", neg_min, -math.inf, anchors),
            _threshold("pos_max", pos_max, math.inf, anchors),
        )
        if negatives is not None:
            negatives = autocast.to_product(negatives[0]), checks.to_int32("negatives[1]", negatives[1])
        loss, pos_count = contrast_mined(
            anchors, anchor_labels, others, negatives, kept, float(temperature), exclude_self, name
        )
    else:
        loss, pos_count = contrast_rows(
            anchors, anchor_labels, others, float(temperature), exclude_self, name
        )
    return loss if reduction == "none" else mean_of(loss, pos_count, anchor_weights)


def _threshold(name: str, value: Tensor | None, infinite: float, anchors: Tensor) -> Tensor:
    """A cosine for each anchor: `value`, or one that keeps everything."""
    if value is None:
        return anchors.new_full((anchors.shape[0],), infinite, dtype=torch.float32)
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a float32 tensor, got {got}")
    checks.check_place(name, value, (anchors.shape[0],), anchors.device)
    return value.detach()


def _distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same tensors, but a view for each that came before: torch.compile takes none twice."""
    found: list[Tensor | None] = []
    for i, tensor in enumerate(tensors):
        again = tensor is not None and any(tensor is other for other in tensors[:i])
        found.append(tensor.view_as(tensor) if tensor is not None and again else tensor)
    return found


def contrast_mined(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int32
    others: tuple[Tensor, Tensor] | None,  # keys [K, D] and their labels [K] int32; None: the anchors
    negatives: tuple[Tensor, Tensor] | None,  # rows [M, D] and their labels [M] int32; None: the keys
    kept: Thresholds,
    temperature: float,
    exclude_self: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `contrast_rows`, of the pairs that `kept` keeps."""
    if others is None and negatives is not None:
        others = anchors, anchor_labels
    outputs: tuple[Tensor, Tensor] = MinedInfoNCE.apply(  # type: ignore[no-untyped-call]
        *_distinct(anchors, anchor_labels, *(others or (None, None)), *(negatives or (None, None))),
        *kept,
        temperature,
        exclude_self,
        torch.is_grad_enabled(),
        backend,
    )
    return outputs


def draw_and_contrast(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int32
    others: tuple[Tensor, Tensor] | None,  # see contrast_rows; without them an anchor is no key of its own
    mining: Mining,
    draw: Callable[[Tensor], Tensor],
    of_class: int | None,  # keys of each class, where all have as many
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`contrast_rows` with the keys that `mining` draws."""
    keys, key_labels = others or (anchors, anchor_labels)
    drawn, exclude_self = drawn_of(keys, key_labels, mining, draw, of_class), others is None
    positives = keys, drawn.positive_labels
    negatives = drawn.negatives or positives
    kept = thresholds_of(anchors, anchor_labels, positives, negatives, mining, exclude_self, backend)
    every = None if others is None and drawn.negatives is None else positives
    return contrast_mined(
        anchors, anchor_labels, every, drawn.negatives, kept, temperature, exclude_self, backend
    )


def contrast_rows(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int32
    others: tuple[Tensor, Tensor]
    | None,  # keys [K, D] and their labels [K] int32; None: the anchors themselves
    temperature: float,
    exclude_self: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`infonce` of what has been checked, by a backend that serves it: loss [A] and |P| [A]."""
    outputs: tuple[Tensor, Tensor] = BlockwiseInfoNCE.apply(  # type: ignore[no-untyped-call]
        *_distinct(anchors, anchor_labels, *(others or (None, None))),
        temperature,
        exclude_self,
        torch.is_grad_enabled(),
        backend,
    )
    return outputs


def mean_of(loss: Tensor, pos_count: Tensor, anchor_weights: Tensor | None = None) -> Tensor:
    """Over the anchors that have a positive, of equal weight unless told; 0 if none has."""
    if anchor_weights is None:
        return loss.sum() / (pos_count > 0).sum().clamp(min=1)
    weights = anchor_weights.detach()
    weights = torch.where((pos_count > 0) & (weights > 0), weights, 0)  # NaN is not above 0
    # Of any scale: the largest becomes 1. Where nothing has looked at them, an infinite one counts alone.
    largest = torch.nn.functional.pad(weights, (0, 1)).amax()  # 0 without an anchor
    weights = torch.where(
        largest < torch.inf, weights / torch.where(largest > 0, largest, 1), weights.isinf()
    )
    weights = weights.to(loss.dtype)
    # An anchor of weight 0 has no part in the value, even if its loss is NaN.
    return torch.where(weights > 0, loss * weights, 0).sum() / weights.sum().clamp(min=1)


def check_temperature(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless `value` is a positive and finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be an int or a float, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
