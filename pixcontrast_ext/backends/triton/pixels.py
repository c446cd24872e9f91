"""Reading pixels out of a [B, D, H, W] map of any strides, and their norms."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def pixel_offset(index, height, width, stride_batch, stride_row, stride_column, WIDE: tl.constexpr):
    """Where the first channel of a pixel lies; `index` is flat over B * H * W.

    Divides in 32 bits, a tenth of the time that 64 take, unless the pixels are too many for it (WIDE).
    """
    if not WIDE:
        index = index.to(tl.int32)
    column, line = index % width, index // width
    image, row = (line // height).to(tl.int64), (line % height).to(tl.int64)
    return image * stride_batch + row * stride_row + column.to(tl.int64) * stride_column


@triton.jit
def inverse_norm(squares):
    """1 / norm from the sum of squares; 0 for a zero norm and for one that overflows, NaN stays NaN.

    The faster square root takes subnormal squares for 0.
    """
    return tl.where(squares > 0, 1.0 / tl.sqrt_rn(squares), squares)


def sizes(embeddings: Tensor) -> tuple[int, ...]:
    """Of a map, as kernels take them: channels, height, width, and strides of image, channel, row and column."""
    if embeddings.dim() != 4:
        raise ValueError(f"expected a [B, D, H, W] tensor, got {tuple(embeddings.shape)}")
    return (*embeddings.shape[1:], *embeddings.stride())
