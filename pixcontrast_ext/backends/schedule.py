"""What backends have in common on the host: how a walk is shared out, and how exact fp32 products are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

# Columns that a block adds up at most. A tensor core cuts its sum off, so that a gradient falls short by as much as
# 1.3e-9 of itself for each column of the walk; the sum over the blocks is rounded to nearest.
LONGEST_WALK = 65_536
MOST_SPLITS = 1024


def fewest_splits(column_tiles: int, columns_of_tile: int) -> int:
    """How many blocks share a walk at least, for none to have more than LONGEST_WALK columns."""
    return max(1, -(-column_tiles // (LONGEST_WALK // columns_of_tile)))


@functools.lru_cache(maxsize=4096)
def splits(row_tiles: int, column_tiles: int, slots: int, columns_of_tile: int) -> int:
    """How many blocks share the walk of a row tile over the columns: the fewest that fill the device evenly, and
    leave none of them more than LONGEST_WALK columns.

    `slots` blocks run at a time. A wave of blocks takes as long as its longest walk.
    """
    fewest = fewest_splits(column_tiles, columns_of_tile)
    most = max(fewest, min(column_tiles, 2 * slots // max(row_tiles, 1), MOST_SPLITS))

    def cost(count: int) -> int:
        return -(-row_tiles * count // slots) * -(-column_tiles // count)

    least = min(cost(count) for count in range(fewest, most + 1))
    return next(count for count in range(fewest, most + 1) if cost(count) <= 1.05 * least)


def device_index(device: torch.device | None) -> int:
    """The number of a CUDA device; of the current one where none is named."""
    named = None if device is None else device.index
    return torch.cuda.current_device() if named is None else named


def full_float32(dtype: torch.dtype) -> bool:
    """Whether fp32 rows are to keep fp32's accuracy. Both of torch's ways to allow TF32 end in this setting."""
    setting = torch.backends.cuda.matmul
    if not hasattr(setting, "fp32_precision"):  # torch before 2.9
        return dtype == torch.float32 and not setting.allow_tf32
    return dtype == torch.float32 and setting.fp32_precision != "tf32"


@contextlib.contextmanager
def full_float32_products() -> Iterator[None]:
    """`torch.set_float32_matmul_precision("medium")` allows bf16 products on a CPU, which logits cannot
    bear.
    """
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    if setting is None:  # torch before 2.9: one setting for all devices
        full, before, put = (
            "highest",
            torch.get_float32_matmul_precision(),
            torch.set_float32_matmul_precision,
        )
    else:
        full, before = "ieee", setting.fp32_precision
        put = functools.partial(setattr, setting, "fp32_precision")
    if before in ("none", full):
        yield
        return
    put(full)
    try:
        yield
    finally:
        put(before)
