"""The backward: the gradient of the keys, and of anchors that are the keys both halves at once.

Rows are keys, and columns are anchors, in their order: those that may be of the rows' classes lie side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pixcontrast_ext.backends import splits
from pixcontrast_ext.backends.calls import InfonceBackward, MinedBackward
from pixcontrast_ext.backends.triton import launch
from pixcontrast_ext.backends.triton.infonce.operands import (
    MOST_BLOCKS,
    NO_LABEL,
    Factors,
    Kept,
    Terms,
    add_weighted,
    half_scales,
    in_operands,
    load_rows,
    multiply_rows,
    store_rows,
    zeros,
)
from pixcontrast_ext.backends.triton.infonce.prepare import prepare
from pixcontrast_ext.backends.triton.infonce.tiles import passes, scale_of
from pixcontrast_ext.backends.triton.numerics import power_of_two, product, reciprocal
from pixcontrast_ext.backends.triton.sort import first_not_below

# Weights of the largest exponent take this one; a peak below 2^SMALLEST_PEAK counts as that.
LARGEST_EXPONENT: tl.constexpr = tl.constexpr(9)
SMALLEST_PEAK: tl.constexpr = tl.constexpr(-110)
assert LARGEST_EXPONENT.value - SMALLEST_PEAK.value <= 127, "the power of two is a float"

_FINISH = dict(BLOCK=1024, num_warps=4)


@triton.jit
def load_factors(factors, place, inside, halves, MINED: tl.constexpr, WALK: tl.constexpr):
    """Those of the anchors at places; others have no part in anything."""
    neg_lse_log2 = tl.load(factors.neg_lse_log2 + place, mask=inside, other=float("inf"))
    push = tl.load(factors.push + place, mask=inside, other=0.0)
    pull = tl.load(factors.pull + place, mask=inside, other=0.0)
    kept = factors.kept
    if MINED:
        neg_min = tl.load(factors.kept.neg_min + place, mask=inside, other=float("inf"))
        pos_max = tl.load(factors.kept.pos_max + place, mask=inside, other=float("-inf"))
        kept = Kept(in_operands(neg_min, halves, WALK), in_operands(pos_max, halves, WALK))
    return Factors(neg_lse_log2, push, pull, kept, factors.peaks)


@triton.jit
def score_gradient(
    cosines, scores, of, positive, AXIS: tl.constexpr, MASKED: tl.constexpr, MINED: tl.constexpr
):
    """The gradient ds of eq. (5), of a positive and of a negative, from the factors `of` anchors, spread along AXIS."""
    odds = tl.exp2(scores - tl.expand_dims(of.neg_lse_log2, AXIS))
    gradient = tl.expand_dims(of.push, AXIS) * odds
    if MINED:
        gradient = tl.where(cosines < tl.expand_dims(of.kept.neg_min, AXIS), 0.0, gradient)
    if MASKED:
        towards = -tl.expand_dims(of.pull, AXIS) * reciprocal(1.0 + odds)
        if MINED:
            towards = tl.where(cosines >= tl.expand_dims(of.kept.pos_max, AXIS), 0.0, towards)
        gradient = tl.where(positive, towards, gradient)
    return gradient


class Rows(NamedTuple):
    """A program's keys."""

    row: Any  # Operand
    label: Any
    excluded: Any  # the anchor that is a row itself, or -1
    factors: Any  # Factors; only if SYMMETRIC
    first: Any  # chunk of the output


@triton.jit
def fold_gradient(
    outputs, rows, sides, factors, tile, num_anchors, scale, weight_scale, halves, MASKED: tl.constexpr,
    SYMMETRIC: tl.constexpr, MINED: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Adds a tile of anchors to the output."""
    place = tile * WALK.columns + tl.arange(0, WALK.columns)
    inside = place < num_anchors
    anchor = load_rows(sides.anchors, place, inside, rows.first, WALK, False)
    others = load_factors(factors, place, inside, halves, MINED, WALK)
    cosines = multiply_rows(rows.row, anchor, WALK)  # in units of operands
    scores = product(cosines, scale)
    positive = inside[None, :]
    if MASKED:
        label = tl.load(sides.anchor_labels + place, mask=inside, other=-1)
        positive = label[None, :] == rows.label[:, None]
    weights = score_gradient(cosines, scores, others, positive, 0, MASKED, MINED)
    if SYMMETRIC:
        weights += score_gradient(cosines, scores, rows.factors, positive, 1, MASKED, MINED)
    if MASKED:
        index = place
        if not SYMMETRIC:
            index = tl.load(sides.order + place, mask=inside, other=0)
        # An anchor that takes no part has factors of 0, its mirror may be anything.
        itself = positive & (rows.excluded[:, None] == index[None, :])
        weights = tl.where((label >= 0)[None, :] & (itself == 0), weights, 0.0)
    return add_weighted(outputs, weights * weight_scale, anchor, sides.anchors.dtype.element_ty, WALK)


@triton.jit(do_not_specialize=["num_anchors", "num_keys", "exclude_self"])
def infonce_bwd_keys_kernel(
    sides,  # Sides; keys are the anchors, in their order, if SYMMETRIC
    factors,  # Factors
    grad_parts,  # [splits, K, channels] out
    num_anchors,
    num_keys,
    exclude_self,
    scale,
    SYMMETRIC: tl.constexpr,
    MINED: tl.constexpr,
    GUARDED: tl.constexpr,
    WALK: tl.constexpr,
):
    place = tl.program_id(0) * WALK.rows + tl.arange(0, WALK.rows)
    inside = place < num_keys
    label = tl.load(sides.key_labels + place, mask=inside, other=-1)
    first = tl.program_id(2) * WALK.out
    split, splits = tl.program_id(1), tl.num_programs(1)
    own_factors = factors
    halves = half_scales(sides, WALK)
    index = place
    if SYMMETRIC:
        index = tl.load(sides.order + place, mask=inside, other=0)
        own_factors = load_factors(factors, place, inside, halves, MINED, WALK)
    factor = 1.0
    if WALK.in_planes:
        factor = tl.load(sides.unscale)
        scale *= factor * tl.load(sides.unscale + 1)
    weight_scale = 1.0
    if WALK.half:
        # A power of two that takes the largest weight to 2^10 or less. That leaves fp16 room above, as a log-sum-exp of
        # other rows than these may make weights larger, and precision below, for weights a thousandth as large.
        peak = tl.max(tl.load(factors.peaks + tl.arange(0, MOST_BLOCKS)), 0)
        exponent = tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) - 127, SMALLEST_PEAK) - LARGEST_EXPONENT
        weight_scale = power_of_two(-exponent)
        factor *= power_of_two(exponent)
    row = load_rows(sides.keys, place, label >= 0, first, WALK, GUARDED)
    rows = Rows(row, label, tl.where(exclude_self != 0, place, -1), own_factors, first)

    # Tiles of the rows' classes lie between begin and end; of all others, only the last may lack labels.
    low = tl.min(tl.where(label < 0, NO_LABEL, label), 0)
    high = tl.max(label, 0)
    next_class = high.to(tl.int64) + 1
    labelled = first_not_below(sides.anchor_labels, num_anchors, tl.full([], 2**31, tl.int64))
    begin = first_not_below(sides.anchor_labels, num_anchors, low) // WALK.columns
    end = tl.cdiv(first_not_below(sides.anchor_labels, num_anchors, next_class), WALK.columns)
    own = tl.maximum(end - begin, 0)
    whole = labelled // WALK.columns
    pure = whole - tl.minimum(own, tl.maximum(whole - begin, 0))
    mixed = own + tl.where((labelled % WALK.columns != 0) & (end <= whole), 1, 0)
    # A tile of rows without a label takes no part.
    pure = tl.where(high < 0, 0, pure)
    mixed = tl.where(high < 0, 0, mixed)
    outputs = zeros(WALK)
    for i in tl.range(split, pure, splits, disable_licm=not WALK.hoist):
        tile = tl.where(i < begin, i, i + own)
        outputs = fold_gradient(
            outputs, rows, sides, factors, tile, num_anchors, scale, weight_scale, halves, False, SYMMETRIC, MINED, WALK
        )  # fmt: skip
    for i in tl.range(split, mixed, splits, disable_licm=not WALK.hoist):
        tile = tl.where(i < own, begin + i, whole)
        outputs = fold_gradient(
            outputs, rows, sides, factors, tile, num_anchors, scale, weight_scale, halves, True, SYMMETRIC, MINED, WALK
        )  # fmt: skip
    # A row without a label takes no part, whatever the anchors hold.
    shown = ()
    for j in tl.static_range(WALK.out):
        shown = shown + (tl.where((label >= 0)[:, None], outputs[j] * factor, 0.0),)
    parts = split.to(tl.int64) * num_keys + index
    store_rows(grad_parts, parts, inside, shown, first, WALK)


@triton.jit(do_not_specialize=["splits", "size"])
def infonce_bwd_finish_kernel(grad_parts, splits, size, grad, BLOCK: tl.constexpr):
    """The second stage: adds the splits, in order."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        part = grad_parts + tl.cast(split, tl.int64) * size + elements
        total += tl.load(part, mask=elements < size, other=0.0)
    tl.store(grad + elements, total, mask=elements < size)


def infonce_backward(call: InfonceBackward) -> None:
    """Of all pairs, or of those that mining keeps."""
    anchors, grad = call.anchors, call.grad
    num_anchors, num_rows = anchors.shape[0], grad.shape[0]
    if num_rows == 0:
        return
    if num_anchors == 0:
        grad.zero_()
        return
    *_, of = passes(anchors)
    row_tiles, column_tiles = triton.cdiv(num_rows, of.rows), triton.cdiv(num_anchors, of.columns)
    shares = splits.choose(row_tiles, column_tiles, of.slots, of.columns)
    terms = Terms(call.neg_lse, call.pos_weight, call.grad_scale)
    kept = Kept(call.neg_min, call.pos_max) if isinstance(call, MinedBackward) else None
    sides, factors, guarded = prepare(
        *(anchors, call.anchor_labels, call.others, of),
        terms=terms,
        kept=kept,
        temperature=call.temperature,
    )
    grad_parts = grad if shares == 1 else grad.new_empty(shares, *grad.shape)
    launch.start(
        infonce_bwd_keys_kernel,
        (row_tiles, shares, of.beside),
        *(sides, factors, grad_parts),
        *(num_anchors, num_rows, int(call.exclude_self), scale_of(call.temperature)),
        SYMMETRIC=call.others is None,
        MINED=kept is not None,
        GUARDED=guarded,
        WALK=of.walk,
        **of.options,
    )
    if shares > 1:
        grid = (triton.cdiv(grad.numel(), _FINISH["BLOCK"]),)
        launch.start(infonce_bwd_finish_kernel, grid, grad_parts, shares, grad.numel(), grad, **_FINISH)
