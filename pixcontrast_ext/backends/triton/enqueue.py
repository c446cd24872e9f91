"""Enqueue in two steps: collect candidate rows, then write the labelled ones into the rings, in image order.

The candidates of an (image, class) are its region, the mean of the normalised pixel embeddings, and its pixels of
smallest (priority, pixel); their number is fixed.

The map is read once, in the order of the pixels' classes: every program takes an equal share of an image's pixels, sees
few classes in it, and leaves a sum for each. Walking along the sorted pixels, each step enters the next share i or a
later class c, so i + c is different for every (share, class) that overlap: it is the index of their partial sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pixcontrast_ext.backends.calls import Collect, Write
from pixcontrast_ext.backends.triton import launch, pixels
from pixcontrast_ext.backends.triton.numerics import product, rounded_to
from pixcontrast_ext.backends.triton.pixels import inverse_norm, pixel_offset
from pixcontrast_ext.backends.triton.pools import select_threshold, sort_pools

_SHARE = 512  # pixels that a program of the region sums takes
_ELEMENTS = 4096  # that it loads at a time
_ROWS = dict(BLOCK=512, ROWS=4, num_warps=4)
_WRITE = dict(CANDIDATES=32, num_warps=4)
_MAX_WRITE_D = 256


@triton.jit
def collect_regions_kernel(
    embeddings,  # [B, D, H, W]
    labels,  # [B, pixels] int64
    keys,  # [B, pixels] int64
    starts,  # [B, num_classes * chunks + 1] int32
    pixels,
    num_classes,
    chunks,
    shares,  # of an image
    channels,
    height,
    width,
    stride_batch,
    stride_channel,
    stride_row,
    stride_column,
    sums,  # [B, shares + num_classes, D] float32 out
    NORMALIZE: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of normalised pixels, for each class in a share of an image's sorted pixels."""
    image = (tl.program_id(0) // shares).to(tl.int64)
    share = tl.program_id(0) % shares
    embeddings += image * stride_batch
    keys += image * pixels
    labels += image * pixels
    starts += image * (tl.cast(num_classes, tl.int64) * chunks + 1)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    position = share * SHARE
    last = tl.minimum(position + SHARE, tl.load(starts + tl.cast(num_classes, tl.int64) * chunks))
    while position < last:
        label = tl.load(labels + (tl.load(keys + position) & 0xFFFFFFFF))
        end = tl.minimum(last, tl.load(starts + (label + 1) * chunks))
        total = tl.zeros([BLOCK_D, BLOCK_PIXELS], tl.float32)
        for first in range(position, end, BLOCK_PIXELS):
            i = first + tl.arange(0, BLOCK_PIXELS)
            pixel = tl.load(keys + i, mask=i < end, other=0) & 0xFFFFFFFF
            offset = pixel_offset(pixel, height, width, stride_batch, stride_row, stride_column, False)
            value = tl.load(
                embeddings + d[:, None] * stride_channel + offset[None, :],
                mask=(d < channels)[:, None] & (i < end)[None, :],
                other=0.0,
            ).to(tl.float32)
            if NORMALIZE:  # rounded, so that opposite pixels add up to 0
                value = product(value, inverse_norm(tl.sum(value * value, 0))[None, :])
            total += value
        place = image * (shares + num_classes) + share + label
        tl.store(sums + place * channels + d, tl.sum(total, 1), mask=d < channels)
        position = end


@triton.jit
def collect_rows_kernel(
    embeddings,  # [B, D, H, W]
    keys,  # [B, pixels] int64
    starts,  # [B, num_classes * chunks + 1] int32
    sums,  # [B, shares + num_classes, D] float32
    pixels,
    num_classes,
    chunks,
    shares,
    pixels_per_image,
    channels,
    height,
    width,
    stride_batch,
    stride_channel,
    stride_row,
    stride_column,
    chosen_pixels,  # [B, num_classes, pixels_per_image] int64 scratch
    rows,  # [B, num_classes, 1 + pixels_per_image, D] out
    row_labels,  # [B, num_classes, 1 + pixels_per_image] int32 out
    NORMALIZE: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What an image offers of one class. A row whose norm is zero or not finite is none."""
    pair = tl.program_id(0).to(tl.int64)
    image = (tl.program_id(0) // num_classes).to(tl.int64)
    label = (tl.program_id(0) % num_classes).to(tl.int64)
    embeddings += image * stride_batch
    keys += image * pixels
    starts += image * (tl.cast(num_classes, tl.int64) * chunks + 1)
    begin, end = tl.load(starts + label * chunks), tl.load(starts + (label + 1) * chunks)
    size = end - begin
    keep = tl.minimum(size, pixels_per_image)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    rows += pair * (1 + pixels_per_image) * channels
    row_labels += pair * (1 + pixels_per_image)
    chosen_pixels += pair * pixels_per_image
    dtype: tl.constexpr = rows.dtype.element_ty

    region = tl.zeros([BLOCK_D], tl.float64)
    if size > 0:
        sums += (image * (shares + num_classes) + label) * channels
        for share in range(begin // SHARE, (end - 1) // SHARE + 1):
            region += tl.load(sums + share * channels + d, mask=d < channels, other=0.0).to(tl.float64)
        if NORMALIZE:
            squares = tl.sum(region * region, 0)
            # A zero or NaN sum needs no scale: it is refused below.
            region *= 1.0 / tl.where(squares > 0, tl.sqrt(squares), 1.0)
        else:
            region *= 1.0 / size.to(tl.float64)
    value = rounded_to(region.to(tl.float32), dtype)
    stored = value.to(tl.float32)
    squares = tl.sum(stored * stored, 0)
    good = (squares > 0) & (squares < float("inf"))
    tl.store(rows + d, tl.where(good, value, 0.0), mask=d < channels)
    tl.store(row_labels, tl.where(good, label, -1).to(tl.int32))

    if keep > 0:
        threshold = select_threshold(keys + begin, size, keep, BLOCK)
        found = 0
        for first in range(begin, end, BLOCK):
            i = first + tl.arange(0, BLOCK)
            key = tl.load(keys + i, mask=i < end, other=0)
            chosen = (i < end) & (key <= threshold)
            place = found + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(chosen_pixels + place, key & 0xFFFFFFFF, mask=chosen)
            found += tl.sum(chosen.to(tl.int32), 0)
        tl.debug_barrier()  # other threads read what is chosen
    for first in range(0, pixels_per_image, ROWS):
        slot = first + tl.arange(0, ROWS)
        pixel = tl.load(chosen_pixels + slot, mask=slot < keep, other=0)
        offset = pixel_offset(pixel, height, width, stride_batch, stride_row, stride_column, False)
        values = tl.load(
            embeddings + offset[:, None] + d[None, :] * stride_channel,
            mask=(slot < keep)[:, None] & (d < channels)[None, :],
            other=0.0,
        ).to(tl.float32)
        if NORMALIZE:
            values *= inverse_norm(tl.sum(values * values, 1))[:, None]
        values = rounded_to(values, dtype)
        stored_rows = values.to(tl.float32)
        row_squares = tl.sum(stored_rows * stored_rows, 1)
        good_rows = (row_squares > 0) & (row_squares < float("inf"))
        place = 1 + slot
        inside = slot < pixels_per_image
        tl.store(
            rows + place.to(tl.int64)[:, None] * channels + d[None, :],
            tl.where(good_rows[:, None], values, 0.0),
            mask=inside[:, None] & (d < channels)[None, :],
        )
        tl.store(row_labels + place, tl.where(good_rows, label, -1).to(tl.int32), mask=inside)


@triton.jit
def write_kernel(
    rows,  # [N, num_classes, 1 + pixels_per_image, D]
    row_labels,  # [N, num_classes, 1 + pixels_per_image] int32
    batch,
    num_classes,
    pixels_per_image,
    channels,
    region_slots,
    pixel_slots,
    keys,  # [num_classes, region_slots + pixel_slots, D] in and out
    key_labels,  # [num_classes, region_slots + pixel_slots] int32 in and out
    region_ptr,  # [num_classes] int64 in and out, and so the next three
    region_fill,
    pixel_ptr,
    pixel_fill,
    CANDIDATES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A ring per program: counts what there is to write, of which the last `slots` stay, then copies those."""
    label = (tl.program_id(0) // 2).to(tl.int64)
    of_pixels = tl.program_id(0) % 2
    slots, per_image, first_slot = region_slots, 1, label * (region_slots + pixel_slots)
    ptr, fill = region_ptr + label, region_fill + label
    if of_pixels == 1:
        slots, per_image, first_slot = pixel_slots, pixels_per_image, first_slot + region_slots
        ptr, fill = pixel_ptr + label, pixel_fill + label
    if slots > 0:
        # Never an address outside of the ring.
        start = ((tl.load(ptr) % slots + slots) % slots).to(tl.int32)
        candidates = batch * per_image
        written = 0
        for first in range(0, candidates, CANDIDATES):
            candidate = first + tl.arange(0, CANDIDATES)
            place = row_of(candidate, label, per_image, of_pixels, num_classes, pixels_per_image)
            offered = tl.load(row_labels + place, mask=candidate < candidates, other=-1) == label
            written += tl.sum(offered.to(tl.int32), 0)
        before = 0
        for first in range(0, candidates, CANDIDATES):
            candidate = first + tl.arange(0, CANDIDATES)
            place = row_of(candidate, label, per_image, of_pixels, num_classes, pixels_per_image)
            offered = tl.load(row_labels + place, mask=candidate < candidates, other=-1) == label
            order = before + tl.cumsum(offered.to(tl.int32), 0) - 1
            stays = offered & (order >= written - slots)
            slot = first_slot + (start + order) % slots
            for channel in range(0, channels, BLOCK_D):
                d = channel + tl.arange(0, BLOCK_D)
                inside = stays[:, None] & (d < channels)[None, :]
                row = tl.load(rows + place[:, None] * channels + d[None, :], mask=inside)
                tl.store(keys + slot[:, None] * channels + d[None, :], row, mask=inside)
            tl.store(key_labels + slot, tl.full([CANDIDATES], 0, tl.int32) + label.to(tl.int32), mask=stays)
            before += tl.sum(offered.to(tl.int32), 0)
        filled = tl.minimum(tl.load(fill) + written, slots)
        tl.debug_barrier()  # everybody has read both
        tl.store(ptr, ((start + written) % slots).to(tl.int64))
        tl.store(fill, filled)


@triton.jit
def row_of(candidate, label, per_image, of_pixels, num_classes, pixels_per_image):
    """Where a candidate of a ring stands among the collected rows."""
    image = (candidate // per_image).to(tl.int64)
    return (image * num_classes + label) * (1 + pixels_per_image) + of_pixels + candidate % per_image


def enqueue_collect(call: Collect) -> None:
    embeddings, labels, num_classes = call.embeddings, call.labels, call.num_classes
    batch, channels = embeddings.shape[:2]
    num_pixels = labels.shape[1] * labels.shape[2]
    pools = sort_pools(labels, None, call.priority, num_classes, call.ignore_index)
    shares = triton.cdiv(num_pixels, _SHARE)
    block_d = triton.next_power_of_2(channels)
    sums = call.rows.new_empty(batch, shares + num_classes, channels, dtype=torch.float32)
    launch.start(
        collect_regions_kernel,
        (batch * shares,),
        embeddings,
        labels,
        pools.keys,
        pools.starts,
        num_pixels,
        num_classes,
        pools.chunks,
        shares,
        *pixels.sizes(embeddings),
        sums,
        NORMALIZE=call.normalize,
        SHARE=_SHARE,
        BLOCK_PIXELS=max(1, min(64, _ELEMENTS // block_d)),
        BLOCK_D=block_d,
        num_warps=8,
    )
    launch.start(
        collect_rows_kernel,
        (batch * num_classes,),
        embeddings,
        pools.keys,
        pools.starts,
        sums,
        num_pixels,
        num_classes,
        pools.chunks,
        shares,
        call.pixels_per_image,
        *pixels.sizes(embeddings),
        labels.new_empty(batch, num_classes, call.pixels_per_image),
        call.rows,
        call.row_labels,
        NORMALIZE=call.normalize,
        SHARE=_SHARE,
        BLOCK_D=block_d,
        **_ROWS,
    )


def enqueue_write(call: Write) -> None:
    batch, num_classes, per_class, channels = call.rows.shape
    launch.start(
        write_kernel,
        (2 * num_classes,),
        call.rows,
        call.row_labels,
        batch,
        num_classes,
        per_class - 1,
        channels,
        call.region_slots,
        call.keys.shape[1] - call.region_slots,
        call.keys,
        call.key_labels,
        call.region_ptr,
        call.region_fill,
        call.pixel_ptr,
        call.pixel_fill,
        BLOCK_D=min(_MAX_WRITE_D, triton.next_power_of_2(channels)),
        **_WRITE,
    )
