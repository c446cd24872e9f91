"""Reading pixels out of a [B, D, H, W] map of any strides, and their norms."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def pixel_offset(index, height, width, stride_batch, stride_row, stride_column):
    """Where the first channel of a pixel lies; `index` is int64, flat over B * H * W."""
    column, line = index % width, index // width
    return (line // height) * stride_batch + (line % height) * stride_row + column * stride_column


@triton.jit
def inverse_norm(squares):
    """1 / norm from the sum of squares; 0 for a zero norm and for one that overflows, NaN stays NaN."""
    return tl.where(squares > 0, 1.0 / tl.sqrt(squares), squares)


def sizes(embeddings: Tensor) -> tuple[int, ...]:
    """Of a map, as kernels take them: channels, height, width, and strides of image, channel, row and column."""
    if embeddings.dim() != 4:
        raise ValueError(f"expected a [B, D, H, W] tensor, got {tuple(embeddings.shape)}")
    return (*embeddings.shape[1:], *embeddings.stride())
