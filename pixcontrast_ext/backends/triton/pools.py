"""Pools of pixels, which sampling and enqueue share.

A pool holds the pixels of one image that have one class and, in sampling, one hardness. Of each pool the smallest
(priority, pixel) are wanted, in pixel order.

A stable counting sort groups the pixels of each image by pool: chunks count, a scan gives every (pool, chunk) its
place, and chunks scatter. A pool is then a contiguous list in pixel order, and a radix select over it finds the
threshold that the wanted ones do not exceed. Only integers, so the outcome depends on nothing but the input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixcontrast_ext.backends.triton import launch

MAX_PIXELS = 2**31 - 1  # of an image

DIGIT_BITS: tl.constexpr = tl.constexpr(8)
DIGITS: tl.constexpr = tl.constexpr(256)

_COUNT = dict(CHUNK=256, BINS=128, num_warps=4)
_SCAN = dict(BLOCK=4096, num_warps=8)
SCATTER = dict(CHUNK=256, OTHERS=16, num_warps=4)


@triton.jit
def load_pools(labels, predictions, places, inside, num_classes, ignore_index, HARD_AND_EASY: tl.constexpr):
    """The pool of each pixel, -1 for one without a class."""
    label = tl.load(labels + places, mask=inside, other=-1)
    counts = (label >= 0) & (label < num_classes) & (label != ignore_index)
    pool = label
    if HARD_AND_EASY:
        easy = tl.load(predictions + places, mask=inside, other=-1) == label
        pool = label * 2 + easy.to(tl.int64)
    return tl.where(counts, pool, -1).to(tl.int32)


@triton.jit
def pool_count_kernel(
    labels,  # [B, pixels] int64
    predictions,  # [B, pixels] int64
    pixels,
    num_classes,
    ignore_index,
    num_pools,
    chunks,
    starts,  # [B, pools * chunks + 1] int32 out: pixels of each pool in each chunk
    HARD_AND_EASY: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    pixel = chunk * CHUNK + tl.arange(0, CHUNK)
    pool = load_pools(
        labels, predictions, image * pixels + pixel, pixel < pixels, num_classes, ignore_index, HARD_AND_EASY
    )
    starts += image * (tl.cast(num_pools, tl.int64) * chunks + 1)
    for first in range(0, num_pools, BINS):
        counted = (pool >= first) & (pool < first + BINS)
        counts = tl.histogram(tl.where(counted, pool - first, 0), BINS, mask=counted)
        of_pool = first + tl.arange(0, BINS)
        tl.store(starts + of_pool.to(tl.int64) * chunks + chunk, counts, mask=of_pool < num_pools)


@triton.jit
def pool_scan_kernel(starts, size, BLOCK: tl.constexpr):
    """Turns the counts of an image into places: the sum of those before it, and after the last the total."""
    starts += tl.program_id(0).to(tl.int64) * (size + 1)
    before = 0
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        counts = tl.load(starts + i, mask=i < size, other=0)
        tl.store(starts + i, before + tl.cumsum(counts, 0) - counts, mask=i < size)
        before += tl.sum(counts, 0)
    tl.store(starts + size, before)


@triton.jit
def pool_scatter_kernel(
    labels,  # [B, pixels] int64
    predictions,  # [B, pixels] int64
    priority,  # [B, pixels] int32
    pixels,
    num_classes,
    ignore_index,
    num_pools,
    chunks,
    starts,  # [B, pools * chunks + 1] int32
    keys,  # [B, pixels] int64 out: (priority, pixel), by pool and pixel
    HARD_AND_EASY: tl.constexpr,
    CHUNK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    pixel = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = pixel < pixels
    labels += image * pixels
    predictions += image * pixels
    pool = load_pools(labels, predictions, pixel, inside, num_classes, ignore_index, HARD_AND_EASY)
    rank = tl.zeros([CHUNK], tl.int32)  # pixels of the same pool that come before in the chunk
    for first in range(0, CHUNK, OTHERS):
        other = chunk * CHUNK + first + tl.arange(0, OTHERS)
        other_pool = load_pools(
            labels, predictions, other, other < pixels, num_classes, ignore_index, HARD_AND_EASY
        )
        before = (other_pool[None, :] == pool[:, None]) & (other[None, :] < pixel[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    starts += image * (tl.cast(num_pools, tl.int64) * chunks + 1)
    place = tl.load(starts + pool.to(tl.int64) * chunks + chunk, mask=pool >= 0, other=0) + rank
    urgency = tl.load(priority + image * pixels + pixel, mask=inside, other=0).to(tl.int64)
    tl.store(keys + image * pixels + place, (urgency << 32) | pixel, mask=pool >= 0)


@triton.jit
def select_threshold(keys, count, keep, BLOCK: tl.constexpr):
    """What the `keep` smallest of `count` keys do not exceed and the others do; 0 < keep <= count.

    The next one has to be larger, so keys may be equal where none is wanted: those of pairs that are not eligible.
    A radix select from the highest digit down, which ends as soon as all keys that share a digit are wanted.
    """
    flip = tl.full([], 1, tl.int64) << 63  # so that the order of the bits is that of signed keys
    digits = tl.full([], 0, tl.int64)
    known = tl.full([], 0, tl.int64)
    wanted = keep
    shift = 64 - DIGIT_BITS
    while shift >= 0:
        histogram = tl.zeros([DIGITS], tl.int32)
        for first in range(0, count, BLOCK):
            i = first + tl.arange(0, BLOCK)
            key = tl.load(keys + i, mask=i < count, other=0) ^ flip
            candidate = (i < count) & ((key & known) == digits)
            digit = ((key >> shift) & (DIGITS - 1)).to(tl.int32)
            histogram += tl.histogram(digit, DIGITS, mask=candidate)
        up_to = tl.cumsum(histogram, 0)
        found = tl.sum((up_to < wanted).to(tl.int32), 0)
        of_digit = tl.arange(0, DIGITS) == found
        share = tl.sum(tl.where(of_digit, histogram, 0), 0)
        wanted -= tl.sum(tl.where(of_digit, up_to - histogram, 0), 0)
        digits |= found.to(tl.int64) << shift
        known |= tl.full([], DIGITS - 1, tl.int64) << shift
        shift = tl.where(wanted == share, -1, shift - DIGIT_BITS)
    return (digits | ~known) ^ flip


class Pools(NamedTuple):
    """The pixels of each image, by pool."""

    keys: Tensor  # [B, pixels] int64
    starts: Tensor  # [B, pools * chunks + 1] int32: where each pool's part of each chunk begins in `keys`
    chunks: int  # of an image


def sort_pools(
    labels: Tensor,  # [B, H, W] int64
    predictions: Tensor | None,  # [B, H, W] int64; with them hard and easy pixels of a class are two pools
    priority: Tensor,  # [B, H, W] int32
    num_classes: int,
    ignore_index: int,
) -> Pools:
    batch, pixels = labels.shape[0], labels.shape[1] * labels.shape[2]
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"the Triton backend takes up to {MAX_PIXELS} pixels an image, got {tuple(labels.shape)}"
        )
    chunks = triton.cdiv(pixels, _COUNT["CHUNK"])
    num_pools = num_classes * (1 if predictions is None else 2)
    keys = torch.empty_like(labels, memory_format=torch.contiguous_format).view(batch, pixels)
    starts = labels.new_empty(batch, num_pools * chunks + 1, dtype=torch.int32)
    kinds = dict(HARD_AND_EASY=predictions is not None)
    predictions = labels if predictions is None else predictions
    classes = (pixels, num_classes, ignore_index, num_pools, chunks)
    grid = (batch * chunks,)
    launch.start(pool_count_kernel, grid, labels, predictions, *classes, starts, **kinds, **_COUNT)
    launch.start(pool_scan_kernel, (batch,), starts, num_pools * chunks, **_SCAN)
    launch.start(
        pool_scatter_kernel, grid, labels, predictions, priority, *classes, starts, keys, **kinds, **SCATTER
    )
    return Pools(keys, starts, chunks)
