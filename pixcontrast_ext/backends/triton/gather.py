"""Gathering chosen pixels from a strided map, and the dense gradient of the map.

The gradient is zeros, over which the sum of the rows that name a pixel is written, in row order, once.
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
from pixcontrast_ext.backends.triton.sort import sort

_ELEMENTS = 1024  # of a program's rows


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
    channels,
    height,
    width,
    stride_batch,
    stride_channel,
    stride_row,
    stride_column,
    grad_map,  # [B, D, H, W] in (0) and out
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A row per program: that of the first one to name a pixel adds up all that do."""
    i = tl.program_id(0)
    pixel = tl.load(sorted_pixels + i)
    before = tl.load(sorted_pixels + tl.maximum(i - 1, 0))
    if (pixel >= 0) & ((i == 0) | (before != pixel)):
        d = tl.arange(0, BLOCK_D).to(tl.int64)
        total = tl.zeros([BLOCK_D], tl.float32)
        named = pixel
        while named == pixel:
            row = tl.load(sorted_rows + i).to(tl.int64)
            total += tl.load(wide + row * channels + d, mask=d < channels, other=0.0)
            i += 1
            named = tl.load(sorted_pixels + i, mask=i < num_rows, other=-1)
        offset = pixel_offset(pixel, height, width, stride_batch, stride_row, stride_column, WIDE)
        value = rounded_to(total, grad_map.dtype.element_ty)
        tl.store(grad_map + offset + d * stride_channel, value, mask=d < channels)


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
        (num_rows,),
        wide,
        sorted_pixels,
        sorted_rows,
        num_rows,
        *pixels.sizes(call.grad_embeddings),
        call.grad_embeddings.zero_(),
        WIDE=_wide(embeddings),
        BLOCK_D=tile["BLOCK_D"],
        num_warps=1,
    )
