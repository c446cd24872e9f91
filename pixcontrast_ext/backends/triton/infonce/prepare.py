"""Both sides as operands: anchors in order, fp32 rows as planes of fp16, and what is to be known of labels.

A plane is rows times a power of two that all rows of a side share; the second plane holds what the first leaves. The
power is 2^8 for a side whose largest number is in [2^-8, 2^7), as that of rows of length 1 is, and takes the largest to
[2^14, 2^15) otherwise. Of what is below 2^-25 in these units nothing is left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixcontrast_ext.backends.calls import InfonceForward, MinedForward, ScoreCounts, same
from pixcontrast_ext.backends.triton import launch
from pixcontrast_ext.backends.triton.infonce.operands import (
    MOST_BLOCKS,
    NO_LABEL,
    Factors,
    Kept,
    Sides,
    Terms,
)
from pixcontrast_ext.backends.triton.infonce.tiles import PADDING, Pass
from pixcontrast_ext.backends.triton.numerics import HALF_EXPONENT, LOG2E, power_of_two
from pixcontrast_ext.backends.triton.sort import sort

USUAL_EXPONENT: tl.constexpr = tl.constexpr(8)
SMALLEST_USUAL: tl.constexpr = tl.constexpr(-8)
SMALLEST_SUM: tl.constexpr = tl.constexpr(2.0**-10)  # of sigmas, that weights are scaled by
# Rows and channels that a block copies at a time, and tiles of whose labels it finds the ranges.
LINES: tl.constexpr = tl.constexpr(32)
STRIP: tl.constexpr = tl.constexpr(64)
RANGES: tl.constexpr = tl.constexpr(16)


class Source(NamedTuple):
    """A side as the caller has it, and where it goes."""

    rows: Any  # [*, channels]
    order: Any  # [count] int32, the row of each place; of anchors
    labels: Any  # [count] int32, of the places
    target: Any  # [padded count, planes, width] out
    peaks: Any  # [blocks], the largest number that each block has met


@triton.jit
def plane_exponent(peaks, count):
    """Times which power of two numbers of up to the largest of `peaks` become fp16 ones."""
    i = tl.arange(0, MOST_BLOCKS)
    peak = tl.max(tl.load(peaks + i, mask=i < count, other=0.0), 0)
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) - 127
    usual = (peak == 0.0) | ((exponent >= SMALLEST_USUAL) & (exponent < HALF_EXPONENT - USUAL_EXPONENT))
    return tl.where(usual, USUAL_EXPONENT, tl.minimum(HALF_EXPONENT - 1 - exponent, 126))


@triton.jit
def prepare_rows(
    source, padded, count, block, blocks, ORDERED: tl.constexpr, AGAIN: tl.constexpr, WALK: tl.constexpr
):
    """A block's share of a side; a row without a label becomes zeros, whatever it holds. Returns the exponent.

    Planes are written with the usual power of two, and AGAIN if the numbers that were met need another.
    """
    WIDTH: tl.constexpr = WALK.chunks * WALK.chunk
    exponent = USUAL_EXPONENT
    end = padded
    if AGAIN:
        exponent = plane_exponent(source.peaks, blocks)
        end = tl.where(exponent == USUAL_EXPONENT, 0, padded)
    largest = tl.zeros([LINES, STRIP], tl.float32)
    for start in range(block * LINES, end, blocks * LINES):
        place = start + tl.arange(0, LINES)
        label = tl.load(source.labels + place, mask=place < count, other=-1)
        row = place
        if ORDERED:
            row = tl.load(source.order + place, mask=label >= 0, other=0)
        lines = source.rows + row.to(tl.int64)[:, None] * WALK.channels
        to = source.target + place.to(tl.int64)[:, None] * (WALK.planes * WIDTH)
        for first in tl.range(0, WIDTH, STRIP):
            d = first + tl.arange(0, STRIP)[None, :]
            value = tl.load(lines + d, mask=(label >= 0)[:, None] & (d < WALK.channels), other=0.0)
            written = (place < padded)[:, None] & (d < WIDTH)
            if WALK.in_planes:
                size = tl.abs(value)
                largest = tl.maximum(largest, tl.where(size < float("inf"), size, 0.0))
                value *= power_of_two(exponent)
                whole = value.to(tl.float16)
                tl.store(to + d, whole, mask=written)
                if WALK.planes == 2:
                    tl.store(to + WIDTH + d, (value - whole.to(tl.float32)).to(tl.float16), mask=written)
            else:
                tl.store(to + d, value, mask=written)
    if WALK.in_planes and not AGAIN:
        tl.store(source.peaks + block, tl.max(tl.max(largest, 1), 0))
    return exponent


@triton.jit
def prepare_factors(source, terms, kept, factors, count, block, blocks, inv_temperature, MINED: tl.constexpr):
    """Those of eq. (5), of anchors in order."""
    peak = 0.0
    for start in range(block * LINES, count, blocks * LINES):
        place = start + tl.arange(0, LINES)
        label = tl.load(source.labels + place, mask=place < count, other=-1)
        index = tl.load(source.order + place, mask=label >= 0, other=0)
        neg_lse_log2 = tl.load(terms.neg_lse + index) * LOG2E
        # Without negatives exp2(score - neg_lse_log2) has to be 0, and sigma as well.
        alone = (neg_lse_log2 == float("-inf")) | (label < 0)
        pull = tl.where(alone, 0.0, tl.load(terms.grad_scale + index) * inv_temperature)
        pos_weight = tl.load(terms.pos_weight + index)
        push = tl.where(alone, 0.0, pos_weight * pull)
        # No sigma is larger than their sum S, except with a log-sum-exp that is of other keys: so from below.
        largest = tl.where(pos_weight > 0, tl.abs(pull) * tl.maximum(pos_weight, SMALLEST_SUM), 0.0)
        peak = tl.maximum(peak, tl.max(largest, 0))
        tl.store(
            factors.neg_lse_log2 + place, tl.where(alone, float("inf"), neg_lse_log2), mask=place < count
        )
        tl.store(factors.push + place, push, mask=place < count)
        tl.store(factors.pull + place, pull, mask=place < count)
        if MINED:
            tl.store(factors.kept.neg_min + place, tl.load(kept.neg_min + index), mask=place < count)
            tl.store(factors.kept.pos_max + place, tl.load(kept.pos_max + index), mask=place < count)
    tl.store(factors.peaks + block, peak)


@triton.jit(do_not_specialize=["num_anchors", "anchor_blocks", "num_keys", "key_blocks", "num_tiles"])
def infonce_prepare_kernel(
    anchors,  # Source
    keys,  # Source
    terms,  # Terms; only WITH_TERMS
    kept,  # Kept; only MINED
    factors,  # Factors, out; likewise
    unscale,  # [2, 4] out: of anchors and keys, and once more of anchors, for other keys beside them
    ranges,  # [3, tiles] int32 out: smallest and largest label, whether some have none; largest -1 without any
    num_anchors,
    anchor_blocks,
    num_keys,
    key_blocks,
    num_tiles,
    inv_temperature,
    WITH_TERMS: tl.constexpr,
    MINED: tl.constexpr,
    AGAIN: tl.constexpr,
    PADDED: tl.constexpr,  # rows are a multiple of it
    WALK: tl.constexpr,
):
    """Each side, and the ranges of the keys' labels, by blocks of their own."""
    block = tl.program_id(0)
    if block < anchor_blocks:
        padded = tl.cdiv(num_anchors, PADDED) * PADDED
        exponent = prepare_rows(anchors, padded, num_anchors, block, anchor_blocks, True, AGAIN, WALK)
        if AGAIN:
            tl.store(unscale, power_of_two(-exponent), mask=block == 0)
            tl.store(unscale + 4, power_of_two(-exponent), mask=block == 0)
            tl.store(unscale + 1, power_of_two(-exponent), mask=(block == 0) & (key_blocks == 0))
        if WITH_TERMS:
            prepare_factors(
                anchors, terms, kept, factors, num_anchors, block, anchor_blocks, inv_temperature, MINED
            )
    elif block < anchor_blocks + key_blocks:
        block -= anchor_blocks
        padded = tl.cdiv(num_keys, PADDED) * PADDED
        exponent = prepare_rows(keys, padded, num_keys, block, key_blocks, False, AGAIN, WALK)
        if AGAIN:
            tl.store(unscale + 1, power_of_two(-exponent), mask=block == 0)
    else:
        tile = (block - anchor_blocks - key_blocks) * RANGES + tl.arange(0, RANGES)
        places = tile[:, None] * WALK.columns + tl.arange(0, WALK.columns)[None, :]
        label = tl.load(keys.labels + places, mask=places < num_keys, other=-1)
        tl.store(ranges + tile, tl.min(tl.where(label < 0, NO_LABEL, label), 1), mask=tile < num_tiles)
        tl.store(ranges + num_tiles + tile, tl.max(tl.maximum(label, -1), 1), mask=tile < num_tiles)
        tl.store(ranges + 2 * num_tiles + tile, (tl.min(label, 1) < 0).to(tl.int32), mask=tile < num_tiles)


def _room(rows: Tensor, of: Pass) -> tuple[Tensor, int]:
    """Where rows go that are prepared, and how many blocks do it."""
    walk = of.walk
    padded = triton.cdiv(rows.shape[0], PADDING) * PADDING
    width = walk.planes.value * walk.chunks.value * walk.chunk.value
    dtype = torch.float16 if walk.in_planes.value else rows.dtype
    blocks = min(MOST_BLOCKS.value, triton.cdiv(padded, LINES.value))
    return rows.new_empty(padded, width, dtype=dtype), blocks


def _no_factors(anything: Tensor) -> Factors:
    """For kernels that read none."""
    return Factors(anything, anything, anything, Kept(anything, anything), anything)


def _launch(
    of: Pass,
    anchors: Source,
    keys: Source,
    blocks: tuple[int, int],  # of the anchors and of the keys
    unscale: Tensor,
    ranges: Tensor | None,
    terms: Terms | None = None,
    kept: Kept | None = None,
    factors: Factors | None = None,
    temperature: float = 1.0,
) -> None:
    num_tiles = 0 if ranges is None else ranges.shape[1]
    factors = factors or _no_factors(unscale)
    for again in (False, True) if of.walk.in_planes.value else (False,):
        range_blocks = 0 if again else triton.cdiv(num_tiles, RANGES.value)
        launch.start(
            infonce_prepare_kernel,
            (sum(blocks) + range_blocks,),
            *(anchors, keys, terms or Terms(unscale, unscale, unscale), kept or factors.kept, factors),
            *(unscale, keys.order if ranges is None else ranges),
            *(anchors.labels.shape[0], blocks[0], keys.labels.shape[0], blocks[1], num_tiles),
            1.0 / temperature,
            WITH_TERMS=terms is not None and not again,
            MINED=kept is not None and not again,
            AGAIN=again,
            PADDED=PADDING,
            WALK=of.walk,
            num_warps=4,
        )


def prepare(
    anchors: Tensor,
    anchor_labels: Tensor,
    others: tuple[Tensor, Tensor] | None,  # keys and their labels; None: the anchors, in their order
    of: Pass,
    ranges: Tensor | None = None,
    terms: Terms | None = None,
    kept: Kept | None = None,
    temperature: float = 1.0,
) -> tuple[Sides, Factors, bool]:
    """Both sides as operands of a pass, the factors made of `terms`, and whether keys are GUARDED.

    Fills `ranges` with the ranges of the keys' labels, by tiles of the pass's columns.
    """
    order, sorted_labels = sort(anchor_labels)
    sorted_anchors, anchor_blocks = _room(anchors, of)
    keys, key_labels = others or (anchors, sorted_labels)
    prepared_keys, key_blocks = sorted_anchors, 0
    in_planes = of.walk.in_planes.value
    if others is not None:
        prepared_keys, key_blocks = _room(keys, of) if in_planes else (keys, 0)
    peaks = anchors.new_empty(2, MOST_BLOCKS.value, dtype=torch.float32)
    unscale = anchors.new_empty(2, 4, dtype=torch.float32)
    factors = _no_factors(unscale)
    if terms is not None:
        neg_lse_log2, push, pull = (torch.empty_like(term) for term in terms)
        in_order = factors.kept if kept is None else Kept(*map(torch.empty_like, kept))
        factors = Factors(neg_lse_log2, push, pull, in_order, unscale.new_zeros(MOST_BLOCKS.value))
    _launch(
        of,
        Source(anchors, order, sorted_labels, sorted_anchors, peaks[0]),
        Source(keys, order, key_labels, prepared_keys, peaks[1]),
        (anchor_blocks, key_blocks),
        *(unscale, ranges, terms, kept, factors, temperature),
    )
    sides = Sides(sorted_anchors, order, sorted_labels, prepared_keys, key_labels, unscale)
    return sides, factors, others is not None and not in_planes


class Columns(NamedTuple):
    """What a pass of the forward walks over, beside the anchors."""

    sides: Sides
    ranges: Tensor  # [3, tiles] int32, of labels, by tiles of the negatives' columns
    guarded: bool
    in_order: bool  # they are the anchors, in their order

    @property
    def num_keys(self) -> int:
        return len(self.sides.key_labels)

    @property
    def num_tiles(self) -> int:
        return self.ranges.shape[1]


def prepare_contrast(call: InfonceForward | ScoreCounts, of: Pass) -> tuple[Columns, Columns]:
    """What the positives are found among, and the negatives; often the same, which is then prepared once."""

    def room_for_ranges(labels: Tensor) -> Tensor:
        return labels.new_empty(3, triton.cdiv(labels.shape[0], of.columns))

    anchors, keys = (call.anchors, call.anchor_labels), (call.keys, call.key_labels)
    ranges, in_order = room_for_ranges(call.key_labels), call.in_batch
    sides, _, guarded = prepare(*anchors, None if in_order else keys, of, ranges)
    columns = Columns(sides, ranges, guarded, in_order)
    if not isinstance(call, (MinedForward, ScoreCounts)):
        return columns, columns
    negatives = call.negatives, call.negative_labels
    if same(negatives, keys):
        return columns, columns
    ranges = room_for_ranges(call.negative_labels)
    sides = _prepare_others(sides, negatives, of, ranges)
    return columns, Columns(sides, ranges, not of.walk.in_planes.value, False)


def _prepare_others(sides: Sides, others: tuple[Tensor, Tensor], of: Pass, ranges: Tensor) -> Sides:
    """The anchors of `prepare` with other keys, GUARDED unless in planes. Fills the ranges of these."""
    keys, key_labels = others
    unscale = sides.unscale[1:]
    target, blocks = keys, 0
    peaks = unscale
    if of.walk.in_planes.value:
        target, blocks = _room(keys, of)
        blocks = max(blocks, 1)  # somebody has to write how they are scaled
        peaks = unscale.new_empty(MOST_BLOCKS.value)
    anchors = Source(sides.anchors, sides.order, sides.anchor_labels, sides.anchors, peaks)
    _launch(of, anchors, Source(keys, sides.order, key_labels, target, peaks), (0, blocks), unscale, ranges)
    return sides._replace(keys=target, key_labels=key_labels, unscale=unscale)
