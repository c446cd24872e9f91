"""Sorting by (value, index), and searching what is sorted: InfoNCE's anchors by label, gather's rows by pixel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixcontrast_ext.backends.triton import launch

_FEW = 2048  # of which each is compared with all
SORT = dict(BLOCK=16, OTHERS=256, num_warps=4)


@triton.jit
def rank_of(value):
    """What values are sorted by: the negative ones, which are alike, come last."""
    return tl.where(value < 0, 2**63 - 1, value.to(tl.int64))


@triton.jit(do_not_specialize=["count"])
def sort_kernel(values, order, ordered, count, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    """The place of each is the number of those that come before it."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    value = tl.load(values + index, mask=inside, other=-1)
    rank = rank_of(value)[:, None]
    place = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, OTHERS):
        other = first + tl.arange(0, OTHERS)
        others = rank_of(tl.load(values + other, mask=other < count, other=-1))[None, :]
        before = (others < rank) | ((others == rank) & (other[None, :] < index[:, None]))
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(order + place, index, mask=inside)
    tl.store(ordered + place, value, mask=inside)


@triton.jit
def first_not_below(ordered, count, value):
    """The first place in ordered values of one that does not come before `value`, which is one number or a tile."""
    low = tl.zeros(value.shape, tl.int32)
    high = low + count
    step = count  # halves as often as the distance does
    while step > 0:
        middle = (low + high) // 2
        other = tl.load(ordered + middle, mask=low < high, other=0)
        below = (low < high) & (rank_of(other) < value)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
        step //= 2
    return low


def sort(values: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of integers [count] by (value, index), int32, and the integers in that order; negative ones last."""
    count = values.shape[0]
    if count > _FEW:
        order = torch.where(values < 0, 2**63 - 1, values.long()).sort(stable=True).indices
        return order.int(), values[order]
    order, ordered = torch.empty_like(values, dtype=torch.int32), torch.empty_like(values)
    launch.start(sort_kernel, (triton.cdiv(count, SORT["BLOCK"]),), values, order, ordered, count, **SORT)
    return order, ordered
