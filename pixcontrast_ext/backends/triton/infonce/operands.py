"""Rows in chunks of channels as tensor cores take them, and their products."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pixcontrast_ext.backends.triton.numerics import INTERPRETED, power_of_two, rounded_to

NO_LABEL: tl.constexpr = tl.constexpr(2**31 - 1)  # none is above it
MOST_BLOCKS: tl.constexpr = tl.constexpr(1024)  # that prepare one side


class Sides(NamedTuple):
    """What the passes multiply."""

    anchors: Any  # [padded A, planes, width], in order
    order: Any  # [A] int32, the caller's index of each place
    anchor_labels: Any  # [A] int32, in order
    keys: Any  # [padded K, planes, width]; GUARDED: 16-bit ones as the caller has them, [K, channels]
    key_labels: Any  # [K] int32
    unscale: Any  # [2], what numbers of either side's planes are to be multiplied by


class Kept(NamedTuple):
    """Which pairs of an anchor mining keeps: negatives from a cosine on, positives below one. NaN is kept."""

    neg_min: Any  # [A]
    pos_max: Any  # [A]


class Terms(NamedTuple):
    """What the backward is told of anchors, in the caller's order."""

    neg_lse: Any  # [A]
    pos_weight: Any  # [A]
    grad_scale: Any  # [A]


class Factors(NamedTuple):
    """What it multiplies, in the anchors' order."""

    neg_lse_log2: Any  # [A] in log2 units, and inf for one without negatives
    push: Any  # [A] of the negatives of eq. (5)
    pull: Any  # [A] of the positives
    kept: Any  # Kept; only MINED
    peaks: Any  # [MOST_BLOCKS] the largest weights, 0 where there is none


class Operand(NamedTuple):
    """Rows in chunks of channels: tuples of [rows, chunk]. `rest` is the second plane, if there is one."""

    whole: Any
    rest: Any


@triton.jit
def load_chunk(lines, d, guard, WALK: tl.constexpr, GUARDED: tl.constexpr):
    """Channels d of rows; zeros for those that are not the caller's, if they are GUARDED."""
    if GUARDED:
        inside = guard[:, None]
        if WALK.chunks * WALK.chunk != WALK.channels:
            inside = inside & (d < WALK.channels)[None, :]
        chunk = tl.load(lines + d[None, :], mask=inside, other=0.0)
    else:
        chunk = tl.load(lines + d[None, :])
    if INTERPRETED:
        chunk = chunk.to(tl.float32)  # exact, and so are the products; the interpreter's own bf16 is not
    return chunk


@triton.jit
def load_rows(rows, place, guard, first, WALK: tl.constexpr, GUARDED: tl.constexpr):
    """Rows at their places, the chunk numbered `first` first. Those that are not GUARDED were prepared."""
    WIDTH: tl.constexpr = WALK.chunks * WALK.chunk
    STRIDE: tl.constexpr = WALK.channels if GUARDED else WALK.planes * WIDTH
    lines = rows + place.to(tl.int64)[:, None] * STRIDE
    whole = ()
    rest = ()
    for j in tl.static_range(WALK.chunks):
        d = (first + j) % WALK.chunks * WALK.chunk + tl.arange(0, WALK.chunk)
        whole = whole + (load_chunk(lines, d, guard, WALK, GUARDED),)
        if WALK.planes == 2:
            rest = rest + (load_chunk(lines + WIDTH, d, guard, WALK, GUARDED),)
    return Operand(whole, rest)


@triton.jit
def multiply_rows(left, right, WALK: tl.constexpr):
    """The scores left . right^T, [rows, columns].

    With two planes, each chunk's share is summed separately, small products first: tensor cores truncate their sums.
    """
    scores = tl.zeros([WALK.rows, WALK.columns], tl.float32)
    for j in tl.static_range(WALK.chunks):
        if WALK.planes == 2:
            share = tl.dot(left.rest[j], tl.trans(right.whole[j]))
            share = tl.dot(left.whole[j], tl.trans(right.rest[j]), share)
            scores += tl.dot(left.whole[j], tl.trans(right.whole[j]), share)
        else:
            scores = tl.dot(left.whole[j], tl.trans(right.whole[j]), scores)
    return scores


@triton.jit
def half_scales(sides, WALK: tl.constexpr):
    """Two powers of two that take a cosine to a product of operands, exactly unless that is beyond fp32.

    Their product may be beyond it where either half is not.
    """
    below = 0
    above = 0
    if WALK.in_planes:
        left = tl.load(sides.unscale).to(tl.int32, bitcast=True) >> 23
        right = tl.load(sides.unscale + 1).to(tl.int32, bitcast=True) >> 23
        exponent = 2 * 127 - left - right
        below = exponent >> 1
        above = exponent - below
    return power_of_two(below), power_of_two(above)


@triton.jit
def in_operands(cosines, halves, WALK: tl.constexpr):
    """Cosines in units of products of operands, so that these need no scale to be compared with them."""
    if WALK.in_planes:
        cosines = cosines * halves[0] * halves[1]
    return cosines


@triton.jit
def beside_scores(values, WALK: tl.constexpr):
    """Values of rows, in the threads that get the rows' scores: others would hand them over at every tile."""
    nothing = tl.zeros([WALK.rows, 16], tl.float16)
    scores = tl.dot(nothing, tl.zeros([16, WALK.columns], tl.float16))
    return tl.max(scores + values[:, None], 1)


@triton.jit
def add_weighted(outputs, weights, columns, dtype: tl.constexpr, WALK: tl.constexpr):
    """Adds weights . columns, of fp32 weights, to outputs: a tuple of the first chunks [rows, chunk].

    With two planes, each tile's share is summed separately. Rounding a weight to 16 bits costs up to 2e-3, and equal
    weights err alike, so that the errors add up. With two parts the remainder is multiplied too.
    """
    weight = rounded_to(weights, dtype)
    rest = weight
    if WALK.parts == 2:
        rest = rounded_to(weights - weight.to(tl.float32), dtype)
    if INTERPRETED:
        weight = weight.to(tl.float32)
        rest = rest.to(tl.float32)
    sums = ()
    for j in tl.static_range(WALK.out):
        if WALK.planes == 2:
            share = tl.dot(rest, columns.whole[j])
            share = tl.dot(weight, columns.rest[j], share)
            sums = sums + (outputs[j] + tl.dot(weight, columns.whole[j], share),)
        else:
            total = tl.dot(weight, columns.whole[j], outputs[j])
            if WALK.parts == 2:
                total = tl.dot(rest, columns.whole[j], total)
            sums = sums + (total,)
    return sums


@triton.jit
def zeros(WALK: tl.constexpr):
    """No output yet."""
    outputs = ()
    for _ in tl.static_range(WALK.out):
        outputs = outputs + (tl.zeros([WALK.rows, WALK.chunk], tl.float32),)
    return outputs


@triton.jit
def store_rows(target, place, inside, outputs, first, WALK: tl.constexpr):
    """Outputs to rows [*, channels] at their places."""
    lines = target + place.to(tl.int64)[:, None] * WALK.channels
    for j in tl.static_range(WALK.out):
        # A chunk past the last would be another program's first.
        d = (first + j) * WALK.chunk + tl.arange(0, WALK.chunk)[None, :]
        tl.store(lines + d, outputs[j], mask=inside[:, None] & (d < WALK.channels))
