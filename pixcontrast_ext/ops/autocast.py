"""Which dtype a matrix product of rows takes: their own, or that of the autocast region it is called in."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(rows: Tensor) -> torch.dtype:
    """The dtype in which rows are multiplied, as `torch.matmul` has it: fp64 is left alone."""
    kind = rows.device.type
    if rows.dtype == torch.float64 or rows.is_meta or not torch.is_autocast_enabled(kind):
        return rows.dtype
    return torch.get_autocast_dtype(kind)


def to_product(rows: Tensor) -> Tensor:
    """Rows in the dtype of their products; themselves if they have it. Their gradient comes in their own dtype."""
    return rows.to(product_dtype(rows))
