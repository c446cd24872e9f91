"""Rows as tensor cores take them: fp32 ones as planes of fp16, and both sides of a product in chunks of channels.

A plane is fp16 numbers: rows times a power of two that all rows of a side share. The second plane holds what the first
leaves. The power is 2^8 for a side whose largest number is in [2^-8, 2^7), as that of rows of length 1 is, and takes
the largest to [2^14, 2^15) otherwise. Of what is below 2^-25 in these units nothing is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixcontrast_ext.backends.triton import launch
from pixcontrast_ext.backends.triton.infonce.tiles import PADDING, Constants, Pass
from pixcontrast_ext.backends.triton.numerics import INTERPRETED, rounded_to

USUAL_EXPONENT: tl.constexpr = tl.constexpr(8)
SMALLEST_USUAL: tl.constexpr = tl.constexpr(-8)
MOST_BLOCKS: tl.constexpr = tl.constexpr(1024)  # that prepare one side
ROW_PADDING: tl.constexpr = tl.constexpr(PADDING)
NO_LABEL: tl.constexpr = tl.constexpr(2**31 - 1)  # sorts behind every label
# The interpreter takes as long for a large tile as for a small one.
_ROWS, _BLOCK, _TILES = (256, 512, 256) if INTERPRETED else (32, 64, 16)


class Sides(NamedTuple):
    """What the passes multiply."""

    anchors: Any  # [padded A, planes, width], in order
    order: Any  # [A] int32, the caller's index of each place
    anchor_labels: Any  # [A] int32, in order
    keys: Any  # [padded K, planes, width]; GUARDED: 16-bit ones as the caller has them, [K, channels]
    key_labels: Any  # [K] int32
    unscale: Any  # [2], what numbers of either side's planes are to be multiplied by


class Operand(NamedTuple):
    """Rows in chunks of channels: tuples of [rows, chunk]. `rest` is the second plane, if there is one."""

    whole: Any
    rest: Any


@triton.jit
def load_chunk(lines, d, guard, CHANNELS: tl.constexpr, GUARDED: tl.constexpr):
    """Channels d of rows; zeros for those that are not the caller's, if they are GUARDED."""
    if GUARDED:
        inside = guard[:, None]
        if CHANNELS % d.shape[0] != 0:
            inside = inside & (d < CHANNELS)[None, :]
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
        whole = whole + (load_chunk(lines, d, guard, WALK.channels, GUARDED),)
        if WALK.planes == 2:
            rest = rest + (load_chunk(lines + WIDTH, d, guard, WALK.channels, GUARDED),)
    return Operand(whole, rest)


@triton.jit
def multiply_rows(left, right, WALK: tl.constexpr):
    """left . right^T, [rows, columns]. Of two planes, the share of each chunk is summed apart, small products first:
    tensor cores cut their sums off.
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
def add_weighted(outputs, weights, columns, dtype: tl.constexpr, WALK: tl.constexpr):
    """outputs + weights . columns, of fp32 weights: a tuple of the first chunks [rows, chunk]. Of two planes, the share
    of a tile is summed apart.

    A weight of 16 bits is off by up to 2e-3, and all alike where the weights are; two parts of it are not.
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
def scaled(outputs, factor, WALK: tl.constexpr):
    """Outputs times a factor a row."""
    products = ()
    for j in tl.static_range(WALK.out):
        products = products + (outputs[j] * factor[:, None],)
    return products


@triton.jit
def store_rows(target, place, inside, outputs, first, WALK: tl.constexpr):
    """Outputs to rows [*, channels] at their places."""
    lines = target + place.to(tl.int64)[:, None] * WALK.channels
    for j in tl.static_range(WALK.out):
        # A chunk behind the last would be another's first.
        d = (first + j) * WALK.chunk + tl.arange(0, WALK.chunk)[None, :]
        tl.store(lines + d, outputs[j], mask=inside[:, None] & (d < WALK.channels))


# --- preparing them ---


@dataclass(frozen=True, repr=False)
class Sizes(Constants):
    """Of rows that are prepared."""

    channels: Any  # of a row as the caller has it
    width: Any  # and as it is stored, in whole chunks
    planes: Any  # 0: 16-bit numbers as they are
    rows: Any  # that a block copies at a time
    block: Any  # channels of them


class Source(NamedTuple):
    """A side as the caller has it, and where it goes."""

    rows: Any  # [*, channels]
    order: Any  # [count] int32, the row of each place; only if it is ORDERED
    labels: Any  # [count] int32, of the places
    target: Any  # [padded count, planes, width] out
    peaks: Any  # [blocks], the largest number that each block has met


@triton.jit
def power_of_two(exponent):
    """Of an exponent from -126 to 127."""
    return ((tl.cast(exponent, tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def plane_exponent(peaks, count):
    """Times which power of two numbers of up to the largest of `peaks` become fp16 ones."""
    i = tl.arange(0, MOST_BLOCKS)
    peak = tl.max(tl.load(peaks + i, mask=i < count, other=0.0), 0)
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) - 127
    usual = (peak == 0.0) | ((exponent >= SMALLEST_USUAL) & (exponent < 15 - USUAL_EXPONENT))
    return tl.where(usual, USUAL_EXPONENT, tl.minimum(14 - exponent, 126))


@triton.jit
def prepare_rows(
    source, count, block, blocks, ORDERED: tl.constexpr, AGAIN: tl.constexpr, SIZES: tl.constexpr
):
    """A share of a side; zeros where there is no label, whatever stands there. Planes are written with the usual power
    of two, and AGAIN where the numbers met need another. Returns the exponent.
    """
    exponent = USUAL_EXPONENT
    padded = tl.cdiv(count, ROW_PADDING) * ROW_PADDING
    end = padded
    if AGAIN:
        exponent = plane_exponent(source.peaks, blocks)
        end = tl.where(exponent == USUAL_EXPONENT, 0, padded)
    largest = tl.zeros([SIZES.rows, SIZES.block], tl.float32)
    for start in range(block * SIZES.rows, end, blocks * SIZES.rows):
        place = start + tl.arange(0, SIZES.rows)
        label = tl.load(source.labels + place, mask=place < count, other=-1)
        row = place
        if ORDERED:
            row = tl.load(source.order + place, mask=label >= 0, other=0)
        lines = source.rows + row.to(tl.int64)[:, None] * SIZES.channels
        STORED: tl.constexpr = SIZES.width * (2 if SIZES.planes == 2 else 1)
        to = source.target + place.to(tl.int64)[:, None] * STORED
        for first in tl.range(0, SIZES.width, SIZES.block):
            d = first + tl.arange(0, SIZES.block)[None, :]
            value = tl.load(lines + d, mask=(label >= 0)[:, None] & (d < SIZES.channels), other=0.0)
            written = (place < padded)[:, None] & (d < SIZES.width)
            if SIZES.planes == 0:
                tl.store(to + d, value, mask=written)
            else:
                size = tl.abs(value)
                largest = tl.maximum(largest, tl.where(size < float("inf"), size, 0.0))
                value *= power_of_two(exponent)
                whole = value.to(tl.float16)
                tl.store(to + d, whole, mask=written)
                if SIZES.planes == 2:
                    rest = (value - whole.to(tl.float32)).to(tl.float16)
                    tl.store(to + SIZES.width + d, rest, mask=written)
    if SIZES.planes > 0 and not AGAIN:
        tl.store(source.peaks + block, tl.max(tl.max(largest, 1), 0))
    return exponent


@triton.jit(do_not_specialize=["num_anchors", "anchor_blocks", "num_keys", "key_blocks", "num_tiles"])
def infonce_prepare_kernel(
    anchors,  # Source
    keys,  # Source
    unscale,  # [2] out
    ranges,  # [3, tiles] int32 out: smallest and largest label, whether some have none; largest -1 without any
    num_anchors,
    anchor_blocks,
    num_keys,
    key_blocks,
    num_tiles,
    AGAIN: tl.constexpr,
    SIZES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Anchors in order, fp32 rows as planes, and the ranges of the keys' labels: each by blocks of its own."""
    block = tl.program_id(0)
    if block < anchor_blocks:
        exponent = prepare_rows(anchors, num_anchors, block, anchor_blocks, True, AGAIN, SIZES)
        if AGAIN:
            tl.store(unscale, power_of_two(-exponent), mask=block == 0)
            tl.store(unscale + 1, power_of_two(-exponent), mask=(block == 0) & (key_blocks == 0))
    elif block < anchor_blocks + key_blocks:
        block -= anchor_blocks
        exponent = prepare_rows(keys, num_keys, block, key_blocks, False, AGAIN, SIZES)
        if AGAIN:
            tl.store(unscale + 1, power_of_two(-exponent), mask=block == 0)
    else:
        tile = (block - anchor_blocks - key_blocks) * TILES + tl.arange(0, TILES)
        places = tile[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        label = tl.load(keys.labels + places, mask=places < num_keys, other=-1)
        tl.store(ranges + tile, tl.min(tl.where(label < 0, NO_LABEL, label), 1), mask=tile < num_tiles)
        tl.store(ranges + num_tiles + tile, tl.max(tl.maximum(label, -1), 1), mask=tile < num_tiles)
        tl.store(ranges + 2 * num_tiles + tile, (tl.min(label, 1) < 0).to(tl.int32), mask=tile < num_tiles)


def prepare(
    anchors: Tensor,
    order: Tensor,
    anchor_labels: Tensor,
    keys: Tensor | None,  # None: the anchors in their order
    key_labels: Tensor,
    of: Pass,
    ranges: Tensor | None = None,
) -> tuple[Sides, bool]:
    """The rows of both sides as operands of a pass, and whether keys are GUARDED. Fills `ranges` with those of the
    keys' labels, in tiles of its columns.
    """
    width, in_planes = of.walk.chunks.value * of.walk.chunk.value, of.walk.in_planes.value
    planes = of.walk.planes.value if in_planes else 0
    sizes = Sizes(anchors.shape[1], width, planes, _ROWS, min(_BLOCK, triton.next_power_of_2(width)))
    dtype = torch.float16 if in_planes else anchors.dtype

    def room(rows: Tensor) -> tuple[Tensor, int]:
        padded = triton.cdiv(rows.shape[0], PADDING) * PADDING
        blocks = min(MOST_BLOCKS.value, triton.cdiv(padded, _ROWS))
        return rows.new_empty(padded, max(planes, 1), width, dtype=dtype), blocks

    sorted_anchors, anchor_blocks = room(anchors)
    prepared_keys, key_blocks = sorted_anchors, 0
    if keys is not None:
        prepared_keys, key_blocks = room(keys) if in_planes else (keys, 0)
    peaks = anchors.new_empty(2, MOST_BLOCKS.value, dtype=torch.float32)
    unscale = anchors.new_empty(2, dtype=torch.float32)
    num_tiles = 0 if ranges is None else ranges.shape[1]
    for again in (False, True) if in_planes else (False,):
        range_blocks = 0 if again else triton.cdiv(num_tiles, _TILES)
        launch.launch(
            infonce_prepare_kernel,
            (anchor_blocks + key_blocks + range_blocks,),
            Source(anchors, order, anchor_labels, sorted_anchors, peaks[0]),
            Source(anchors if keys is None else keys, order, key_labels, prepared_keys, peaks[1]),
            unscale,
            order if ranges is None else ranges,
            *(anchors.shape[0], anchor_blocks, key_labels.shape[0], key_blocks, num_tiles),
            AGAIN=again,
            SIZES=sizes,
            COLUMNS=of.columns,
            TILES=_TILES,
            num_warps=4,
        )
    sides = Sides(sorted_anchors, order, anchor_labels, prepared_keys, key_labels, unscale)
    return sides, keys is not None and not in_planes
