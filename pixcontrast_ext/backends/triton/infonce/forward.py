"""The forward: the negatives of all anchors, then the positives of one class at a time, then both as one.

A shift that is known before the walk over the negatives needs neither a maximum nor a rescaling at every tile. It is
the largest score of a few tiles, and whether it served shows in the sum that comes of it. Where it did not, the largest
score of all tiles is found, and the walk is repeated. Mining keeps the largest scores of an anchor's negatives, so that
no shift has to look at its range.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixcontrast_ext.backends import splits
from pixcontrast_ext.backends.calls import InfonceForward, MinedForward
from pixcontrast_ext.backends.triton import launch
from pixcontrast_ext.backends.triton.infonce.operands import (
    NO_LABEL,
    Kept,
    add_weighted,
    beside_scores,
    half_scales,
    in_operands,
    load_rows,
    multiply_rows,
    store_rows,
    zeros,
)
from pixcontrast_ext.backends.triton.infonce.plan import plan_contrast
from pixcontrast_ext.backends.triton.infonce.prepare import prepare_contrast
from pixcontrast_ext.backends.triton.infonce.tiles import passes, scale_of
from pixcontrast_ext.backends.triton.numerics import (
    HALF_EXPONENT,
    LN2,
    SMALLEST_SCALE,
    log1p,
    product,
    reciprocal,
)

# Tiles, about, in which a program looks for its share of a shift; a quarter of its own at most.
SAMPLED: tl.constexpr = tl.constexpr(2)
# Exponents of two that fp16 weights reach, of at most HALF_EXPONENT: that of the largest score of the sample, which
# leaves room for larger ones, and that of the largest of all.
SAMPLE_EXPONENT: tl.constexpr = tl.constexpr(5.0)
TOP_EXPONENT: tl.constexpr = tl.constexpr(float(HALF_EXPONENT.value))
SIGMA_SCALE: tl.constexpr = tl.constexpr(2.0**HALF_EXPONENT.value)
FINISH = dict(ROWS=1, SPLITS=16, num_warps=4)


class Parts(NamedTuple):
    """What programs leave that share a walk, in the order of visits."""

    largest: Any  # [splits, A] of the negatives' scores
    again: Any  # [tiles of rows] int32: the shift did not serve
    shift: Any  # [A] in log2 units
    # [programs beside each other, splits, A] sums of exp2(score - shift); inf where a weight is beyond its dtype.
    sum: Any
    away: Any  # [splits, A, channels] sums of exp2(score - shift) key
    loss: Any  # [programs of the plan, A] of the positives, and so the rest
    pos_weight: Any
    pos_count: Any  # int32
    towards: Any  # [*, A, channels] sums of sigma key times sigma_scale; not written without a positive


class Outputs(NamedTuple):
    """As the caller has them, in his order."""

    loss: Any  # [A] eq. (3)
    neg_lse: Any  # [A] eq. (1)
    pos_weight: Any  # [A] eq. (4)
    pos_count: Any  # [A] int32
    anchor_grad: Any  # [A, channels] eq. (6) for g = 1; only WITH_GRAD


@triton.jit
def scale_of_scores(sides, scale, WALK: tl.constexpr):
    """From a product of operands to log2 units."""
    if WALK.in_planes:
        scale *= tl.load(sides.unscale) * tl.load(sides.unscale + 1)
        scale = tl.maximum(scale, SMALLEST_SCALE)
    return scale


@triton.jit
def sigma_scale(WALK: tl.constexpr):
    """What sigma, which is at most 1, is multiplied by."""
    return SIGMA_SCALE if WALK.half else 1.0


@triton.jit
def differ(column_labels, row_labels):
    """Whether two labels differ and both are one, [rows, columns].

    Right for rows that have a label, and for the others if whatever is none is -1.
    """
    return (column_labels[None, :] ^ row_labels[:, None]) > 0


@triton.jit
def sum_of(parts, beside, splits, num_anchors, place, inside, SPLITS: tl.constexpr):
    """The sum over the splits of anchors' negatives, as the programs numbered `beside` know it.

    Each of those adds the chunks of a score in another order, and its weights belong to its own sum.
    """
    sum = tl.zeros(place.shape, tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)[:, None]
        part = (beside * splits + split).to(tl.int64) * num_anchors + place[None, :]
        sum += tl.sum(tl.load(parts.sum + part, mask=(split < splits) & inside[None, :], other=0.0), 0)
    return sum


@triton.jit
def shift_served(sum, listed, with_grad, WALK: tl.constexpr):
    """Whether nothing has overflowed, and nothing that matters has vanished.

    A weight in fp16, or in two parts of fp16, is off by up to 2^-25. The sum of the weights has to be so large that
    this is at most 2^-11 of it, or 2^-19 for two parts.
    """
    least = 2.0**-60
    if WALK.half:
        of_weights = listed * WALK.columns * (2.0**-6 if WALK.parts == 2 else 2.0**-14)
        least = tl.where(with_grad != 0, of_weights, least)
    return (sum >= least) & (sum <= 2.0**100)


@triton.jit(do_not_specialize=["num_anchors", "num_keys", "with_grad"])
def infonce_fwd_shift_kernel(
    sides,  # Sides
    plan,  # Plan
    parts,  # Parts; the largest and whether again, out
    num_anchors,
    num_keys,
    with_grad,  # weights were multiplied
    AGAIN: tl.constexpr,  # all tiles, of rows whose shift did not serve
    GUARDED: tl.constexpr,
    WALK: tl.constexpr,
):
    place = tl.program_id(0) * WALK.rows + tl.arange(0, WALK.rows)
    inside = place < num_anchors
    own = tl.load(sides.anchor_labels + place, mask=inside, other=-1)
    split, splits = tl.program_id(1), tl.num_programs(1)
    listed = tl.load(plan.counts + 2)
    step = splits * tl.maximum(tl.cdiv(listed, SAMPLED * splits), 4)
    end = num_anchors
    if AGAIN:
        step = splits
        has_negative = (own >= 0) & ((tl.load(plan.counts + 3) < own) | (tl.load(plan.counts + 4) > own))
        beside = tl.where(with_grad != 0, tl.cdiv(WALK.chunks, WALK.out), 1)
        again = 0
        for i in range(0, beside):
            sum = sum_of(parts, i, splits, num_anchors, place, inside, 16)
            served = shift_served(sum, listed, with_grad, WALK)
            again = tl.maximum(again, tl.max((has_negative & (served == 0)).to(tl.int32), 0))
        tl.store(parts.again + tl.program_id(0), again, mask=split == 0)
        listed = tl.where(again > 0, listed, 0)
        end = tl.where(again > 0, num_anchors, 0)
    first = tl.program_id(2)  # there is one: 0
    row = load_rows(sides.anchors, place, inside, first, WALK, False)
    largest = tl.full([WALK.rows], float("-inf"), tl.float32)
    tile = tl.load(plan.columns + split, mask=split < listed, other=0)
    column = tile * WALK.columns + tl.arange(0, WALK.columns)
    label = tl.load(sides.key_labels + column, mask=column < num_keys, other=-1)
    tile = tl.load(plan.columns + split + step, mask=split + step < listed, other=0)
    for i in tl.range(split, listed, step, disable_licm=not WALK.hoist):
        key = load_rows(sides.keys, column, label >= 0, first, WALK, GUARDED)
        here_label = label
        column = tile * WALK.columns + tl.arange(0, WALK.columns)
        label = tl.load(sides.key_labels + column, mask=column < num_keys, other=-1)
        tile = tl.load(plan.columns + i + 2 * step, mask=i + 2 * step < listed, other=0)
        scores = tl.where(differ(here_label, own), multiply_rows(row, key, WALK), float("-inf"))
        largest = tl.maximum(largest, tl.max(scores, 1))
    tl.store(parts.largest + split.to(tl.int64) * num_anchors + place, largest, mask=place < end)


@triton.jit(do_not_specialize=["num_anchors", "num_keys", "num_tiles", "again"])
def infonce_fwd_negatives_kernel(
    sides,  # Sides
    plan,  # Plan
    parts,  # Parts; the shift and sums out
    kept,  # Kept; only MINED
    num_anchors,
    num_keys,
    num_tiles,
    again,  # only rows whose shift did not serve
    scale,
    MINED: tl.constexpr,
    GUARDED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    WALK: tl.constexpr,
):
    place = tl.program_id(0) * WALK.rows + tl.arange(0, WALK.rows)
    inside = place < num_anchors
    own = tl.load(sides.anchor_labels + place, mask=inside, other=-1)
    split, splits = tl.program_id(1), tl.num_programs(1)
    part = split.to(tl.int64) * num_anchors + place
    first = tl.program_id(2) * WALK.out
    walks = (again == 0) | (tl.load(parts.again + tl.program_id(0), mask=again != 0, other=0) > 0)
    listed = tl.where(walks, tl.load(plan.counts + 2), 0)
    end = tl.where(walks, num_anchors, 0)
    scale = scale_of_scores(sides, scale, WALK)
    row = load_rows(sides.anchors, place, inside, first, WALK, False)
    shift = tl.full([WALK.rows], float("-inf"), tl.float32)
    for start in range(0, tl.where(walks, splits, 0), 16):
        other = start + tl.arange(0, 16)[:, None]
        found = parts.largest + other.to(tl.int64) * num_anchors + place[None, :]
        found = tl.load(found, mask=(other < splits) & inside[None, :], other=float("-inf"))
        shift = tl.maximum(shift, tl.max(found, 0))
    shift = tl.where(shift == float("-inf"), 0.0, product(shift, scale))
    if WALK.half and WITH_GRAD:
        # Where numbers lie so far apart that it would be rounded, there is no room to be made.
        room = tl.where(again != 0, TOP_EXPONENT, SAMPLE_EXPONENT)
        shift -= tl.where(tl.abs(shift) < 2.0**20, room, 0.0)
    shift = beside_scores(shift, WALK)
    neg_min = shift
    if MINED:
        index = tl.load(sides.order + place, mask=inside, other=0)
        neg_min = in_operands(tl.load(kept.neg_min + index), half_scales(sides, WALK), WALK)
        neg_min = beside_scores(neg_min, WALK)
    sum = tl.zeros([WALK.rows], tl.float32)
    largest = tl.zeros([WALK.rows], tl.float32)
    outputs = zeros(WALK)
    own_low = tl.min(tl.where(own < 0, NO_LABEL, own), 0)
    own_high = tl.max(own, 0)
    # The index of a tile is loaded two visits ahead, and its labels one: the copy of its keys waits for neither.
    tile = tl.load(plan.columns + split, mask=split < listed, other=0)
    column = tile * WALK.columns + tl.arange(0, WALK.columns)
    label = column
    if GUARDED:
        label = tl.load(sides.key_labels + column, mask=column < num_keys, other=-1)
    tile = tl.load(plan.columns + split + splits, mask=split + splits < listed, other=0)
    for i in tl.range(split, listed, splits, disable_licm=not WALK.hoist):
        key = load_rows(sides.keys, column, label >= 0, first, WALK, GUARDED)
        here = column
        column = tile * WALK.columns + tl.arange(0, WALK.columns)
        if GUARDED:
            label = tl.load(sides.key_labels + column, mask=column < num_keys, other=-1)
        tile = tl.load(plan.columns + i + 2 * splits, mask=i + 2 * splits < listed, other=0)
        scores = multiply_rows(row, key, WALK)
        low = tl.load(plan.columns + num_tiles + i)
        high = tl.load(plan.columns + 2 * num_tiles + i)
        if (low <= own_high) & (high >= own_low):
            here_label = tl.load(sides.key_labels + here, mask=here < num_keys, other=-1)
            scores = tl.where(differ(here_label, own), scores, float("-inf"))
        if MINED:
            scores = tl.where(scores < neg_min[:, None], float("-inf"), scores)
        weights = tl.exp2(product(scores, scale) - shift[:, None])
        sum += tl.sum(weights, 1)
        if WITH_GRAD:
            if WALK.half:
                largest = tl.maximum(largest, tl.max(weights, 1))
            outputs = add_weighted(outputs, weights, key, sides.anchors.dtype.element_ty, WALK)
    if WITH_GRAD:
        store_rows(parts.away, part, place < end, outputs, first, WALK)
    tl.store(parts.shift + place, shift, mask=place < tl.where((split == 0) & (first == 0), end, 0))
    part += (tl.program_id(2) * splits).to(tl.int64) * num_anchors
    tl.store(parts.sum + part, tl.where(largest <= 60000.0, sum, float("inf")), mask=place < end)


@triton.jit
def tiles_of_class(ranges, num_tiles, label, BLOCK: tl.constexpr):
    """The tiles of columns between which all keys of a class lie: its own, where keys are grouped by class."""
    begin = num_tiles
    end = 0
    for first in range(0, num_tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        low = tl.load(ranges + tile, mask=tile < num_tiles, other=NO_LABEL)
        high = tl.load(ranges + num_tiles + tile, mask=tile < num_tiles, other=-1)
        met = (low <= label) & (high >= label)
        begin = tl.minimum(begin, tl.min(tl.where(met, tile, num_tiles), 0))
        end = tl.maximum(end, tl.max(tl.where(met, tile + 1, 0), 0))
    return begin, end


@triton.jit
def itself(sides, place, inside, num_anchors, exclude_self, IN_ORDER: tl.constexpr):
    """The key that is no positive of an anchor, or -1."""
    excluded = tl.where(exclude_self != 0, place, -1)
    if not IN_ORDER:
        end = tl.where(exclude_self != 0, num_anchors, 0)
        excluded = tl.load(sides.order + place, mask=inside & (place < end), other=-1)
    return excluded


@triton.jit(do_not_specialize=["num_anchors", "num_keys", "num_tiles", "splits", "exclude_self"])
def infonce_fwd_positives_kernel(
    sides,  # Sides
    plan,  # Plan
    parts,  # Parts; out, but those of the negatives
    kept,  # Kept; only MINED
    num_anchors,
    num_keys,
    num_tiles,
    splits,  # of the negatives
    exclude_self,
    scale,
    IN_ORDER: tl.constexpr,  # keys are the anchors, in their order
    PIECES: tl.constexpr,  # tiles of these columns in one of the plan's
    MINED: tl.constexpr,
    GUARDED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    WALK: tl.constexpr,
):
    """Tiles of anchors of one class, with what may be keys of it. A program does one after the other."""
    first = tl.program_id(1) * WALK.out
    scale = scale_of_scores(sides, scale, WALK)
    class_tiles = tl.load(plan.counts)
    sharing = tl.load(plan.counts + 1)
    for item in tl.range(tl.program_id(0), class_tiles * sharing, tl.num_programs(0), num_stages=1):
        split = item // class_tiles
        begin = tl.load(plan.class_tiles + item % class_tiles)
        own = tl.load(sides.anchor_labels + begin)
        place = begin + tl.arange(0, WALK.rows)
        inside = tl.load(sides.anchor_labels + place, mask=place < num_anchors, other=-1) == own
        excluded = itself(sides, place, inside, num_anchors, exclude_self, IN_ORDER)
        sum = sum_of(parts, 0, splits, num_anchors, place, inside, 64)
        neg_lse_log2 = tl.load(parts.shift + place, mask=inside, other=0.0) + tl.log2(sum)
        neg_lse_log2 = beside_scores(neg_lse_log2, WALK)
        # Rows past the last may be another tile's, or none.
        row = load_rows(sides.anchors, tl.where(inside, place, begin), inside, first, WALK, False)
        loss = tl.zeros([WALK.rows], tl.float32)
        pos_weight = tl.zeros([WALK.rows], tl.float32)
        of_class = tl.zeros([WALK.columns], tl.int32)
        pos_max = neg_lse_log2
        if MINED:
            index = tl.load(sides.order + place, mask=inside, other=0)
            pos_max = in_operands(tl.load(kept.pos_max + index), half_scales(sides, WALK), WALK)
            pos_max = beside_scores(pos_max, WALK)
        pos_count = tl.zeros([WALK.rows], tl.int32)
        outputs = zeros(WALK)
        low, high = tiles_of_class(plan.ranges, num_tiles, own, 4096)
        # Not MINED, all rows have as many positives, but for those that meet themselves.
        since = excluded // WALK.columns - low * PIECES
        met = (excluded >= 0) & (excluded < num_keys) & (since % sharing == split)
        met = met & (since >= 0) & (since < (high - low) * PIECES)
        met = met & (tl.load(sides.key_labels + excluded, mask=met, other=-1) == own)
        column = (low * PIECES + split) * WALK.columns + tl.arange(0, WALK.columns)
        label = tl.load(sides.key_labels + column, mask=column < num_keys, other=-1)
        for _ in tl.range(low * PIECES + split, high * PIECES, sharing, disable_licm=not WALK.hoist):
            key = load_rows(sides.keys, column, label >= 0, first, WALK, GUARDED)
            here, here_label = column, label
            column += sharing * WALK.columns
            label = tl.load(sides.key_labels + column, mask=column < num_keys, other=-1)
            scores = multiply_rows(row, key, WALK)
            positive = (here_label == own)[None, :] & (here[None, :] != excluded[:, None])
            if MINED:
                positive &= (scores >= pos_max[:, None]) == 0
                pos_count += tl.sum(positive.to(tl.int32), 1)
            margin = neg_lse_log2[:, None] - product(scores, scale)
            odds = tl.exp2(-tl.abs(margin))
            sigma = tl.where(margin >= 0, 1.0, odds) * reciprocal(1.0 + odds)
            sigma = tl.where(positive, sigma, 0.0)
            pair_loss = LN2 * tl.maximum(margin, 0.0) + log1p(odds)
            loss += tl.sum(tl.where(positive, pair_loss, 0.0), 1)
            pos_weight += tl.sum(sigma, 1)
            of_class += (here_label == own).to(tl.int32)
            if WITH_GRAD:
                weights = sigma * sigma_scale(WALK)
                outputs = add_weighted(outputs, weights, key, sides.anchors.dtype.element_ty, WALK)
        if not MINED:
            pos_count = tl.sum(of_class, 0) - met.to(tl.int32)
        part = split.to(tl.int64) * num_anchors + place
        written = inside & (place < tl.where(first == 0, num_anchors, 0))
        tl.store(parts.loss + part, loss, mask=written)
        tl.store(parts.pos_weight + part, pos_weight, mask=written)
        tl.store(parts.pos_count + part, pos_count, mask=written)
        if WITH_GRAD:
            stored = inside & (pos_count > 0)
            if MINED:
                # Wherever it looked: the last bit of a score is each program's own, so beside a threshold the one that
                # stores its count may have kept another positive.
                looked = low * PIECES + split < high * PIECES
                stored = inside & (place < tl.where(looked, num_anchors, 0))
            store_rows(parts.towards, part, stored, outputs, first, WALK)


@triton.jit(do_not_specialize=["num_anchors", "splits"])
def infonce_fwd_finish_kernel(
    sides,  # Sides
    negatives,  # Sides, with the keys that the negatives are of
    plan,  # Plan
    parts,  # Parts
    outs,  # Outputs, out
    num_anchors,
    splits,
    inv_temperature,
    MINED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    WALK: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second stage: adds up what was left of anchors, in order, and puts it where the caller has them."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < num_anchors
    labelled = tl.load(sides.anchor_labels + place, mask=inside, other=-1) >= 0
    index = tl.load(sides.order + place, mask=inside, other=0)
    sum = sum_of(parts, 0, splits, num_anchors, place, inside, SPLITS)
    shift = tl.load(parts.shift + place, mask=inside, other=0.0)
    sharing = tl.load(plan.counts + 1)
    loss = tl.zeros([ROWS], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    pos_count = tl.zeros([ROWS], tl.int32)
    for first in range(0, sharing, SPLITS):
        split = first + tl.arange(0, SPLITS)[None, :]
        part = split.to(tl.int64) * num_anchors + place[:, None]
        present = labelled[:, None] & (split < sharing)
        loss += tl.sum(tl.load(parts.loss + part, mask=present, other=0.0), 1)
        weight += tl.sum(tl.load(parts.pos_weight + part, mask=present, other=0.0), 1)
        pos_count += tl.sum(tl.load(parts.pos_count + part, mask=present, other=0), 1)
    contrasts = labelled & (pos_count > 0)
    count = tl.maximum(pos_count, 1).to(tl.float32)
    neg_lse = tl.where(labelled, (shift + tl.log2(sum)) * LN2, float("-inf"))
    tl.store(outs.loss + index, tl.where(contrasts, loss / count, 0.0), mask=inside)
    tl.store(outs.neg_lse + index, neg_lse, mask=inside)
    tl.store(outs.pos_weight + index, tl.where(contrasts, weight, 0.0), mask=inside)
    tl.store(outs.pos_count + index, tl.where(contrasts, pos_count, 0), mask=inside)
    if WITH_GRAD:
        factor = inv_temperature / count
        if WALK.in_planes and not MINED:
            factor *= tl.load(sides.unscale + 1)
        for start in tl.range(0, WALK.channels, BLOCK):
            d = start + tl.arange(0, BLOCK)
            beside = start // (WALK.out * WALK.chunk)
            sum = sum_of(parts, beside, splits, num_anchors, place, inside, SPLITS)
            per_weight = tl.where(sum == 0.0, 0.0, weight / sum)
            row = (d < WALK.channels)[None, None, :]
            away = tl.zeros([ROWS, BLOCK], tl.float32)
            towards = tl.zeros([ROWS, BLOCK], tl.float32)
            for first in range(0, splits, SPLITS):
                split = first + tl.arange(0, SPLITS)[None, :]
                part = split.to(tl.int64) * num_anchors + place[:, None]
                present = contrasts[:, None] & (split < splits)
                lines = parts.away + part[:, :, None] * WALK.channels + d[None, None, :]
                away += tl.sum(tl.load(lines, mask=present[:, :, None] & row, other=0.0), 1)
            for first in range(0, sharing, SPLITS):
                split = first + tl.arange(0, SPLITS)[None, :]
                part = split.to(tl.int64) * num_anchors + place[:, None]
                present = contrasts[:, None] & (split < sharing)
                present = tl.load(parts.pos_count + part, mask=present, other=0) > 0
                lines = parts.towards + part[:, :, None] * WALK.channels + d[None, None, :]
                towards += tl.sum(tl.load(lines, mask=present[:, :, None] & row, other=0.0), 1)
            if WALK.in_planes and MINED:
                away *= tl.load(negatives.unscale + 1)
                towards *= tl.load(sides.unscale + 1)
            grad = (per_weight[:, None] * away - towards / sigma_scale(WALK)) * factor[:, None]
            lines = outs.anchor_grad + index.to(tl.int64)[:, None] * WALK.channels + d[None, :]
            written = inside[:, None] & (d < WALK.channels)[None, :]
            tl.store(lines, tl.where(contrasts[:, None], grad, 0.0), mask=written)


def _room_for_parts(
    loss: Tensor, row_tiles: int, shares: int, most: int, beside: int, channels: int | None
) -> Parts:
    """Of that many programs on each tile of rows, `most` of them for the positives; without channels no gradient."""
    size = loss.shape[0]
    sums = loss.new_empty(1 + beside, shares, size)
    part_loss, part_weight, part_count = loss.new_empty(3, most, size)
    return Parts(
        largest=sums[0],
        again=loss.new_empty(row_tiles, dtype=torch.int32),
        shift=torch.empty_like(loss),
        sum=sums[1:],
        away=loss if channels is None else loss.new_empty(shares, size, channels),
        loss=part_loss,
        pos_weight=part_weight,
        pos_count=part_count.view(torch.int32),
        towards=loss if channels is None else loss.new_empty(most, size, channels),
    )


def infonce_forward(call: InfonceForward) -> None:
    """Of all pairs, or of those that mining keeps."""
    anchors, loss = call.anchors, call.loss
    num_anchors, channels = anchors.shape
    if num_anchors == 0:
        return
    of, of_positives, _ = passes(anchors)
    mined = isinstance(call, MinedForward)
    keys, negatives = prepare_contrast(call, of)
    row_tiles = triton.cdiv(num_anchors, of.rows)
    shares = splits.choose(row_tiles, negatives.num_tiles, of.slots, of.columns)
    plan, most = plan_contrast(keys, negatives, of, of_positives)
    with_grad = call.anchor_grad is not None
    beside = of.beside if with_grad else 1
    parts = _room_for_parts(loss, row_tiles, shares, most, beside, channels if with_grad else None)
    grad = loss if call.anchor_grad is None else call.anchor_grad
    outs = Outputs(loss, call.neg_lse, call.pos_weight, call.pos_count, grad)
    kept = Kept(call.neg_min, call.pos_max) if isinstance(call, MinedForward) else Kept(loss, loss)
    scale = scale_of(call.temperature)
    for again in (False, True):
        launch.start(
            infonce_fwd_shift_kernel,
            (row_tiles, shares),
            *(negatives.sides, plan, parts, num_anchors, negatives.num_keys, int(with_grad)),
            AGAIN=again,
            GUARDED=negatives.guarded,
            WALK=of.walk,
            **of.options,
        )
        launch.start(
            infonce_fwd_negatives_kernel,
            (row_tiles, shares, beside),
            *(negatives.sides, plan, parts, kept, num_anchors, negatives.num_keys, negatives.num_tiles),
            *(int(again), scale),
            MINED=mined,
            GUARDED=negatives.guarded,
            WITH_GRAD=with_grad,
            WALK=of.walk,
            **of.options,
        )
    launch.start(
        infonce_fwd_positives_kernel,
        (min(of_positives.slots, num_anchors * most), of_positives.beside if with_grad else 1),
        *(keys.sides, plan, parts, kept, num_anchors, keys.num_keys, keys.num_tiles),
        *(shares, int(call.exclude_self), scale),
        IN_ORDER=keys.in_order,
        PIECES=of.columns // of_positives.columns,
        MINED=mined,
        GUARDED=keys.guarded,
        WITH_GRAD=with_grad,
        WALK=of_positives.walk,
        **of_positives.options,
    )
    launch.start(
        infonce_fwd_finish_kernel,
        (triton.cdiv(num_anchors, FINISH["ROWS"]),),
        *(keys.sides, negatives.sides, plan, parts, outs, num_anchors, shares, 1.0 / call.temperature),
        MINED=mined,
        WITH_GRAD=with_grad,
        WALK=of.walk,
        BLOCK=of.walk.chunk.value,
        **FINISH,
    )
