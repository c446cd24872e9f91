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

from pixcontrast_ext.backends.triton import launch
from pixcontrast_ext.backends.triton.infonce.operands import MOST_BLOCKS, NO_LABEL, Factors, Sides, Terms
from pixcontrast_ext.backends.triton.infonce.tiles import PADDING, Pass
from pixcontrast_ext.backends.triton.numerics import HALF_EXPONENT, LOG2E, power_of_two
from pixcontrast_ext.backends.triton.sort import sort

USUAL_EXPONENT: tl.constexpr = tl.constexpr(8)
SMALLEST_USUAL: tl.constexpr = tl.constexpr(-8)
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
def prepare_factors(source, terms, factors, count, block, blocks, inv_temperature):
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
        push = tl.where(alone, 0.0, tl.load(terms.pos_weight + index) * pull)
        peak = tl.maximum(peak, tl.max(tl.maximum(tl.abs(pull), tl.abs(push)), 0))
        tl.store(
            factors.neg_lse_log2 + place, tl.where(alone, float("inf"), neg_lse_log2), mask=place < count
        )
        tl.store(factors.push + place, push, mask=place < count)
        tl.store(factors.pull + place, pull, mask=place < count)
    tl.store(factors.peaks + block, peak)


@triton.jit(do_not_specialize=["num_anchors", "anchor_blocks", "num_keys", "key_blocks", "num_tiles"])
def infonce_prepare_kernel(
    anchors,  # Source
    keys,  # Source
    terms,  # Terms; only WITH_TERMS
    factors,  # Factors, out; likewise
    unscale,  # [2] out
    ranges,  # [3, tiles] int32 out: smallest and largest label, whether some have none; largest -1 without any
    num_anchors,
    anchor_blocks,
    num_keys,
    key_blocks,
    num_tiles,
    inv_temperature,
    WITH_TERMS: tl.constexpr,
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
            tl.store(unscale + 1, power_of_two(-exponent), mask=(block == 0) & (key_blocks == 0))
        if WITH_TERMS:
            prepare_factors(anchors, terms, factors, num_anchors, block, anchor_blocks, inv_temperature)
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


def prepare(
    anchors: Tensor,
    anchor_labels: Tensor,
    others: tuple[Tensor, Tensor] | None,  # keys and their labels; None: the anchors, in their order
    of: Pass,
    ranges: Tensor | None = None,
    terms: Terms | None = None,
    temperature: float = 1.0,
) -> tuple[Sides, Factors, bool]:
    """Both sides as operands of a pass, the factors made of `terms`, and whether keys are GUARDED.

    Fills `ranges` with the ranges of the keys' labels, by tiles of the pass's columns.
    """
    walk, in_planes = of.walk, of.walk.in_planes.value
    dtype = torch.float16 if in_planes else anchors.dtype
    width = walk.planes.value * walk.chunks.value * walk.chunk.value

    def room(rows: Tensor) -> tuple[Tensor, int]:
        padded = triton.cdiv(rows.shape[0], PADDING) * PADDING
        blocks = min(MOST_BLOCKS.value, triton.cdiv(padded, LINES.value))
        return rows.new_empty(padded, width, dtype=dtype), blocks

    order, sorted_labels = sort(anchor_labels)
    sorted_anchors, anchor_blocks = room(anchors)
    keys, key_labels = others or (anchors, sorted_labels)
    prepared_keys, key_blocks = sorted_anchors, 0
    if others is not None:
        prepared_keys, key_blocks = room(keys) if in_planes else (keys, 0)
    peaks = anchors.new_empty(2, MOST_BLOCKS.value, dtype=torch.float32)
    unscale = anchors.new_empty(2, dtype=torch.float32)
    factors = Factors(unscale, unscale, unscale, unscale)
    if terms is not None:
        neg_lse_log2, push, pull = (torch.empty_like(term) for term in terms)
        factors = Factors(neg_lse_log2, push, pull, unscale.new_zeros(MOST_BLOCKS.value))
    num_tiles = 0 if ranges is None else ranges.shape[1]
    for again in (False, True) if in_planes else (False,):
        range_blocks = 0 if again else triton.cdiv(num_tiles, RANGES.value)
        launch.start(
            infonce_prepare_kernel,
            (anchor_blocks + key_blocks + range_blocks,),
            Source(anchors, order, sorted_labels, sorted_anchors, peaks[0]),
            Source(keys, order, key_labels, prepared_keys, peaks[1]),
            *(terms or Terms(unscale, unscale, unscale), factors),
            *(unscale, order if ranges is None else ranges),
            *(anchors.shape[0], anchor_blocks, key_labels.shape[0], key_blocks, num_tiles, 1.0 / temperature),
            WITH_TERMS=terms is not None and not again,
            AGAIN=again,
            PADDED=PADDING,
            WALK=walk,
            num_warps=4,
        )
    sides = Sides(sorted_anchors, order, sorted_labels, prepared_keys, key_labels, unscale)
    return sides, factors, others is not None and not in_planes
