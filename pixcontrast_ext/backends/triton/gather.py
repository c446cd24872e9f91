"""Gathering chosen pixels from a strided map, and the dense gradient of the map.

Every element of the gradient is written exactly once: the sum of the rows that name its pixel, in row order, or zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixcontrast_ext.backends.calls import Gather, GatherBackward
from pixcontrast_ext.backends.triton import launch, pixels
from pixcontrast_ext.backends.triton.numerics import rounded_to
from pixcontrast_ext.backends.triton.pixels import inverse_norm, pixel_offset
from pixcontrast_ext.backends.triton.sort import first_not_below, sort

_ELEMENTS = 1024  # of a program's rows
_MAP = dict(BLOCK_PIXELS=128, BLOCK_D=64, num_warps=4)


@triton.jit
def gather_kernel(
    embeddings,  # [B, D, H, W]
    indices,  # [A] int64
    num_rows,
    num_pixels,
    channels,
    height,
    width,
    stride_batch,
    stride_channel,
    stride_row,
    stride_column,
    rows,  # [A, D] out
    inv_norm,  # [A] float32 out
    NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of pixels, normalised on the way; the row of an index outside the map is 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    index = tl.load(indices + row, mask=row < num_rows, other=-1)
    readable = (index >= 0) & (index < num_pixels)
    offset = pixel_offset(index, height, width, stride_batch, stride_row, stride_column, WIDE)
    pixel = tl.load(
        embeddings + offset[:, None] + d[None, :] * stride_channel,
        mask=readable[:, None] & (d < channels)[None, :],
        other=0.0,
    ).to(tl.float32)
    scale = tl.where(readable, 1.0, 0.0)
    if NORMALIZE:
        scale = inverse_norm(tl.sum(pixel * pixel, 1))
    value = rounded_to(pixel * scale[:, None], rows.dtype.element_ty)
    inside = (row < num_rows)[:, None] & (d < channels)[None, :]
    tl.store(rows + row[:, None] * channels + d[None, :], value, mask=inside)
    tl.store(inv_norm + row, scale, mask=row < num_rows)


@triton.jit
def gather_bwd_rows_kernel(
    grad_rows,  # [A, D]
    embeddings,  # [B, D, H, W]
    indices,  # [A] int64
    inv_norm,  # [A] float32
    num_rows,
    num_pixels,
    channels,
    height,
    width,
    stride_batch,
    stride_channel,
    stride_row,
    stride_column,
    wide,  # [A, D] float32 out: gradients of the pixels
    row_pixels,  # [A] int64 out: their indices, -1 for a row without gradient
    NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d(x / |x|): the gradient less its part along the row.

    A row without gradient names no pixel from here on, so that padding cannot carry a NaN into the map's gradient, nor
    keep one program busy with all of its rows.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    index = tl.load(indices + row, mask=row < num_rows, other=-1)
    readable = (index >= 0) & (index < num_pixels)
    places = row[:, None] * channels + d[None, :]
    inside = readable[:, None] & (d < channels)[None, :]
    grad = tl.load(grad_rows + places, mask=inside, other=0.0).to(tl.float32)
    named = tl.sum((grad != 0.0).to(tl.int32), 1) > 0
    if NORMALIZE:
        offset = pixel_offset(index, height, width, stride_batch, stride_row, stride_column, WIDE)
        scale = tl.load(inv_norm + row, mask=row < num_rows, other=0.0)[:, None]
        pixel = tl.load(
            embeddings + offset[:, None] + d[None, :] * stride_channel, mask=inside, other=0.0
        ).to(tl.float32)
        unit = pixel * scale
        along = tl.sum(tl.where(inside, grad * unit, 0.0), 1)
        grad = scale * (grad - along[:, None] * unit)
    tl.store(wide + places, grad, mask=inside & named[:, None])
    tl.store(row_pixels + row, tl.where(named, index, -1), mask=row < num_rows)


@triton.jit
def gather_bwd_map_kernel(
    wide,  # [A, D] float32
    sorted_pixels,  # [A] int64
    sorted_rows,  # [A] int32
    num_rows,
    num_pixels,
    channels,
    height,
    width,
    stride_batch,
    stride_channel,
    stride_row,
    stride_column,
    grad_map,  # [B, D, H, W] out, dense
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A strip of pixels and a slice of their channels."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS
    pixel = first + tl.arange(0, BLOCK_PIXELS)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D, BLOCK_PIXELS], tl.float32)
    begin = first_not_below(sorted_pixels, num_rows, first)
    end = first_not_below(sorted_pixels, num_rows, first + BLOCK_PIXELS)
    for i in range(begin, end):
        row = tl.load(sorted_rows + i).to(tl.int64)
        grad = tl.load(wide + row * channels + d, mask=d < channels, other=0.0)
        total += tl.where((pixel == tl.load(sorted_pixels + i))[None, :], grad[:, None], 0.0)
    offset = pixel_offset(pixel, height, width, stride_batch, stride_row, stride_column, WIDE)
    tl.store(
        grad_map + d[:, None] * stride_channel + offset[None, :],
        rounded_to(total, grad_map.dtype.element_ty),
        mask=(d < channels)[:, None] & (pixel < num_pixels)[None, :],
    )


def _num_pixels(embeddings: Tensor) -> int:
    return embeddings.shape[0] * embeddings.shape[2] * embeddings.shape[3]


def _wide(embeddings: Tensor) -> bool:
    return _num_pixels(embeddings) >= 2**31


def _rows_of(channels: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(channels)
    return dict(ROWS=max(1, _ELEMENTS // block_d), BLOCK_D=block_d, num_warps=4)


def gather(call: Gather) -> None:
    embeddings, num_rows = call.embeddings, call.indices.shape[0]
    tile = _rows_of(embeddings.shape[1])
    launch.start(
        gather_kernel,
        (triton.cdiv(num_rows, tile["ROWS"]),),
        embeddings,
        call.indices,
        num_rows,
        _num_pixels(embeddings),
        *pixels.sizes(embeddings),
        call.rows,
        call.inv_norm,
        NORMALIZE=call.normalize,
        WIDE=_wide(embeddings),
        **tile,
    )


def gather_backward(call: GatherBackward) -> None:
    embeddings, indices, grad_rows = call.embeddings, call.indices, call.grad_rows
    (num_rows, channels), num_pixels = grad_rows.shape, _num_pixels(embeddings)
    tile = _rows_of(channels)
    wide = torch.empty_like(grad_rows, dtype=torch.float32)
    row_pixels = torch.empty_like(indices)
    launch.start(
        gather_bwd_rows_kernel,
        (triton.cdiv(num_rows, tile["ROWS"]),),
        grad_rows,
        embeddings,
        indices,
        call.inv_norm,
        num_rows,
        num_pixels,
        *pixels.sizes(embeddings),
        wide,
        row_pixels,
        NORMALIZE=call.normalize,
        WIDE=_wide(embeddings),
        **tile,
    )
    sorted_rows, sorted_pixels = sort(row_pixels)
    launch.start(
        gather_bwd_map_kernel,
        (triton.cdiv(num_pixels, _MAP["BLOCK_PIXELS"]), triton.cdiv(channels, _MAP["BLOCK_D"])),
        wide,
        sorted_pixels,
        sorted_rows,
        num_rows,
        num_pixels,
        *pixels.sizes(call.grad_embeddings),
        call.grad_embeddings,
        WIDE=_wide(embeddings),
        **_MAP,
    )
