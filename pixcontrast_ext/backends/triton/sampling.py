"""Hard-anchor sampling in five launches.

Three sort the pixels into pools, one plans how many anchors each pool gives, and one selects them. The rules are
numbered as in backends/reference.py, which states them in full.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pixcontrast_ext.backends.calls import Sampling
from pixcontrast_ext.backends.triton import launch
from pixcontrast_ext.backends.triton.pools import select_threshold, sort_pools

NO_PAIR: tl.constexpr = tl.constexpr(2**63 - 1)  # sorts after every pair

_PLAN = dict(BLOCK=1024, num_warps=8)
_SELECT = dict(BLOCK=2048, num_warps=8)


@triton.jit
def load_pair(starts, pair, inside, batch, num_classes, chunks):
    """Where the hard and the easy pixels of a pair (class, image) begin in the image's keys, and how many there are."""
    image, label = (pair % batch).to(tl.int64), (pair // batch).to(tl.int64)
    starts += image * (2 * tl.cast(num_classes, tl.int64) * chunks + 1) + 2 * label * chunks
    hard = tl.load(starts, mask=inside, other=0)
    easy = tl.load(starts + chunks, mask=inside, other=0)
    end = tl.load(starts + 2 * chunks, mask=inside, other=0)
    return hard, easy, easy - hard, end - easy


@triton.jit
def sampling_plan_kernel(
    priority,  # [B, pixels] int32
    keys,  # [B, pixels] int64
    starts,  # [B, 2 * num_classes * chunks + 1] int32
    pixels,
    batch,
    num_classes,
    chunks,
    max_samples,
    max_views,
    min_pixels,
    hard_share,
    pair_keys,  # [num_classes * B] int64 scratch
    pool_keep,  # [num_classes * B, 2] int32 out: rows that the hard and the easy pool give
    pool_rows,  # [num_classes * B, 2] int32 out: the first of them
    indices,  # [max_samples] int64 out: here the padding
    anchor_labels,  # [max_samples] int32 out: here the padding
    count,  # [] int32 out
    BLOCK: tl.constexpr,
):
    """Rules 2 to 4, and the places of rule 6; one program."""
    pairs = num_classes * batch
    total = 0
    for first in range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        _, _, hard, easy = load_pair(starts, pair, pair < pairs, batch, num_classes, chunks)
        eligible = (hard + easy > 0) & (hard + easy >= min_pixels)
        total += tl.sum(eligible.to(tl.int32), 0)
    views = tl.maximum(tl.minimum(max_samples // tl.maximum(total, 1), max_views), 1)

    threshold = tl.full([], NO_PAIR, tl.int64)
    if total > max_samples:  # rule 3
        for first in range(0, pairs, BLOCK):
            pair = first + tl.arange(0, BLOCK)
            inside = pair < pairs
            hard_place, easy_place, hard, easy = load_pair(starts, pair, inside, batch, num_classes, chunks)
            eligible = (hard + easy > 0) & (hard + easy >= min_pixels)
            image, label = (pair % batch).to(tl.int64), (pair // batch).to(tl.int64)
            # A pool is in pixel order; of both pools the earlier pixel is the first in raster order.
            hard_first = tl.load(keys + image * pixels + hard_place, mask=inside & (hard > 0), other=0)
            easy_first = tl.load(keys + image * pixels + easy_place, mask=inside & (easy > 0), other=0)
            hard_pixel = tl.where(hard > 0, hard_first & 0xFFFFFFFF, pixels)
            easy_pixel = tl.where(easy > 0, easy_first & 0xFFFFFFFF, pixels)
            pixel = tl.minimum(hard_pixel, easy_pixel)
            urgency = tl.load(priority + image * pixels + pixel, mask=inside & eligible, other=0).to(tl.int64)
            pair_key = (urgency << 32) | (image * num_classes + label)
            tl.store(pair_keys + pair, tl.where(eligible, pair_key, NO_PAIR), mask=inside)
        tl.debug_barrier()  # the selection reads what other threads wrote
        threshold = select_threshold(pair_keys, pairs, max_samples, BLOCK)

    rows = 0
    for first in range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        inside = pair < pairs
        _, _, hard, easy = load_pair(starts, pair, inside, batch, num_classes, chunks)
        stays = (hard + easy > 0) & (hard + easy >= min_pixels)
        if total > max_samples:
            stays = stays & (tl.load(pair_keys + pair, mask=inside, other=NO_PAIR) <= threshold)
        take = tl.where(stays, tl.minimum(views, hard + easy), 0).to(tl.int32)
        wanted = (take.to(tl.int64) * hard_share >> 24).to(tl.int32)
        keep_hard = tl.minimum(hard, tl.maximum(wanted, take - easy))
        row = rows + tl.cumsum(take, 0) - take
        tl.store(pool_keep + 2 * pair, keep_hard, mask=inside)
        tl.store(pool_keep + 2 * pair + 1, take - keep_hard, mask=inside)
        tl.store(pool_rows + 2 * pair, row, mask=inside)
        tl.store(pool_rows + 2 * pair + 1, row + keep_hard, mask=inside)
        rows += tl.sum(take, 0)
    tl.store(count, rows)
    for first in range(0, max_samples, BLOCK):
        row = first + tl.arange(0, BLOCK)
        padding = (row >= rows) & (row < max_samples)
        tl.store(indices + row, tl.zeros([BLOCK], tl.int64), mask=padding)
        tl.store(anchor_labels + row, tl.full([BLOCK], -1, tl.int32), mask=padding)


@triton.jit
def sampling_select_kernel(
    keys,  # [B, pixels] int64
    starts,  # [B, 2 * num_classes * chunks + 1] int32
    pixels,
    batch,
    num_classes,
    chunks,
    pool_keep,  # [num_classes * B, 2] int32
    pool_rows,  # [num_classes * B, 2] int32
    indices,  # [max_samples] int64 out
    anchor_labels,  # [max_samples] int32 out
    BLOCK: tl.constexpr,
):
    """Rules 5 and 6, a program per pool."""
    pair, kind = tl.program_id(0) // 2, tl.program_id(0) % 2
    keep = tl.load(pool_keep + tl.program_id(0))
    if keep > 0:
        hard_place, easy_place, hard, easy = load_pair(starts, pair, True, batch, num_classes, chunks)
        image = (pair % batch).to(tl.int64)
        pool = keys + image * pixels + tl.where(kind == 0, hard_place, easy_place)
        size = tl.where(kind == 0, hard, easy)
        threshold = select_threshold(pool, size, keep, BLOCK)
        row = tl.load(pool_rows + tl.program_id(0))
        for first in range(0, size, BLOCK):
            i = first + tl.arange(0, BLOCK)
            key = tl.load(pool + i, mask=i < size, other=NO_PAIR)
            chosen = (i < size) & (key <= threshold)
            place = row + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(indices + place, image * pixels + (key & 0xFFFFFFFF), mask=chosen)
            label = tl.full([BLOCK], 0, tl.int32) + pair // batch
            tl.store(anchor_labels + place, label, mask=chosen)
            row += tl.sum(chosen.to(tl.int32), 0)


def hard_anchor_sampling(call: Sampling) -> None:
    labels, num_classes = call.labels, call.num_classes
    batch, pixels = labels.shape[0], labels.shape[1] * labels.shape[2]
    if batch * pixels == 0:
        call.indices.zero_()
        call.anchor_labels.fill_(-1)
        call.count.zero_()
        return
    pools = sort_pools(labels, call.predictions, call.priority, num_classes, call.ignore_index)
    pairs = num_classes * batch
    pool_keep = labels.new_empty(pairs, 2, dtype=torch.int32)
    pool_rows = torch.empty_like(pool_keep)
    sizes = (pixels, batch, num_classes, pools.chunks)
    launch.start(
        sampling_plan_kernel,
        (1,),
        call.priority,
        pools.keys,
        pools.starts,
        *sizes,
        call.max_samples,
        min(call.max_views, call.max_samples),
        call.min_pixels,
        call.hard_share,
        labels.new_empty(pairs),
        pool_keep,
        pool_rows,
        call.indices,
        call.anchor_labels,
        call.count,
        **_PLAN,
    )
    launch.start(
        sampling_select_kernel,
        (2 * pairs,),
        pools.keys,
        pools.starts,
        *sizes,
        pool_keep,
        pool_rows,
        call.indices,
        call.anchor_labels,
        **_SELECT,
    )
