"""What a forward visits: tiles of anchors of one class, and the columns that are worth a visit.

The lists have room for all anchors or all columns, whatever the data.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pixcontrast_ext.backends import splits
from pixcontrast_ext.backends.triton import launch
from pixcontrast_ext.backends.triton.infonce.operands import NO_LABEL
from pixcontrast_ext.backends.triton.infonce.prepare import Columns
from pixcontrast_ext.backends.triton.infonce.tiles import Pass
from pixcontrast_ext.backends.triton.sort import first_not_below

_PLAN = dict(BLOCK=1024, num_warps=8)


class Plan(NamedTuple):
    # [3, tiles] int32: smallest and largest label of each tile of columns, and whether some have none; for the
    # positives those of the keys, wherever the negatives are from
    ranges: Any
    # [A] int32: the first place of each tile of anchors of one class
    class_tiles: Any
    # [3, tiles] int32: tiles with labels; the smallest and largest, around all if some have none
    columns: Any
    # [5] int32: tiles of one class, how many programs share the walk of one, tiles of columns, and the smallest and
    # largest label of these
    counts: Any


@triton.jit
def append(listed, found, values, wanted):
    """Adds the wanted values to a list of `found`, in order."""
    tl.store(listed + found + tl.cumsum(wanted.to(tl.int32), 0) - 1, values, mask=wanted)


@triton.jit(do_not_specialize=["num_anchors", "num_tiles", "blocks", "fewest", "most"])
def infonce_plan_kernel(
    sorted_labels,  # [A] int32
    plan,  # Plan; all but its ranges out
    num_anchors,
    num_tiles,
    blocks,  # of the positives that the device works on at a time
    fewest,  # programs that share a walk
    most,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program finds the tiles of anchors, another those of columns."""
    found = 0
    lowest = NO_LABEL
    highest = -1
    if tl.program_id(0) == 0:
        for first in range(0, num_anchors, BLOCK):
            place = first + tl.arange(0, BLOCK)
            label = tl.load(sorted_labels + place, mask=place < num_anchors, other=-1)
            since = place - first_not_below(sorted_labels, num_anchors, label)
            begins = (label >= 0) & (since % ROWS == 0)
            append(plan.class_tiles, found, place, begins)
            found += tl.sum(begins.to(tl.int32), 0)
        tl.store(plan.counts, found)
        sharing = tl.minimum(tl.maximum(blocks // tl.maximum(found, 1), fewest), most)
        tl.store(plan.counts + 1, sharing)
    else:
        for first in range(0, num_tiles, BLOCK):
            tile = first + tl.arange(0, BLOCK)
            low = tl.load(plan.ranges + tile, mask=tile < num_tiles, other=0)
            high = tl.load(plan.ranges + num_tiles + tile, mask=tile < num_tiles, other=-1)
            ragged = tl.load(plan.ranges + 2 * num_tiles + tile, mask=tile < num_tiles, other=0) > 0
            append(plan.columns, found, tile, high >= 0)
            append(plan.columns + num_tiles, found, tl.where(ragged, 0, low), high >= 0)
            append(plan.columns + 2 * num_tiles, found, tl.where(ragged, NO_LABEL, high), high >= 0)
            found += tl.sum((high >= 0).to(tl.int32), 0)
            lowest = tl.minimum(lowest, tl.min(tl.where(high >= 0, low, NO_LABEL), 0))
            highest = tl.maximum(highest, tl.max(high, 0))
        tl.store(plan.counts + 2, found)
        tl.store(plan.counts + 3, lowest)
        tl.store(plan.counts + 4, highest)


def plan_of(sorted_labels: Tensor, ranges: Tensor, rows: int, blocks: int, fewest: int, most: int) -> Plan:
    """What the passes visit, of tiles of so many anchors."""
    plan = Plan(
        ranges,
        sorted_labels.new_empty(len(sorted_labels)),
        ranges.new_empty(ranges.shape),
        ranges.new_empty(5),
    )
    sizes = sorted_labels.shape[0], ranges.shape[1], blocks, fewest, most
    launch.start(infonce_plan_kernel, (2,), sorted_labels, plan, *sizes, ROWS=rows, **_PLAN)
    return plan


def plan_contrast(keys: Columns, negatives: Columns, of: Pass, of_positives: Pass) -> tuple[Plan, int]:
    """What the passes over the negatives and the positives visit, and how many programs may share one of the latter."""
    fewest = splits.fewest(keys.num_tiles, of.columns)
    tiles_of_rows = triton.cdiv(keys.sides.order.shape[0], of_positives.rows)
    tiles_of_keys = keys.num_tiles * (of.columns // of_positives.columns)
    most = max(fewest, min(of_positives.slots // tiles_of_rows, tiles_of_keys))
    sizes = of_positives.rows, of_positives.slots, fewest, most
    plan = plan_of(keys.sides.anchor_labels, negatives.ranges, *sizes)
    return plan._replace(ranges=keys.ranges), most
