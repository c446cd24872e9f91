"""The order of visits: anchors by (label, index), tiles of one class, and the columns that are worth a visit.

Places come from comparisons with all anchors where these are few, and otherwise from tiles that are sorted and then
searched: linear but for a logarithm. Lists are as long as the anchors or the columns, whatever the data.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixcontrast_ext.backends.triton import launch
from pixcontrast_ext.backends.triton.infonce.operands import NO_LABEL
from pixcontrast_ext.backends.triton.numerics import INTERPRETED, LOG2E

SORTED: tl.constexpr = tl.constexpr(256)  # anchors of a tile that is sorted
_FEW = 2048  # anchors of which each is compared with all
_SORT = dict(OTHERS=256 if INTERPRETED else 32, num_warps=4)
_ORDER = dict(BLOCK=64 if INTERPRETED else 16, OTHERS=512 if INTERPRETED else 256, num_warps=4)
_PLAN = dict(BLOCK=1024, num_warps=8)


@triton.jit
def rank_of(labels, index, count):
    """What anchors are sorted by, (label, index), and their labels; those without one come last, and what is no anchor
    behind them.
    """
    label = tl.load(labels + index, mask=index < count, other=-1)
    rank = (tl.where(label < 0, 2**31, label.to(tl.int64)) << 31) + index
    return tl.where(index < count, rank, 2**63 - 1), label


@triton.jit
def places_among(ranks, labels, first, end, count, OTHERS: tl.constexpr):
    """How many of the ranks of the anchors from `first` to `end` come before each."""
    places = tl.zeros([ranks.shape[0]], tl.int32)
    for start in range(first, end, OTHERS):
        other, _ = rank_of(labels, start + tl.arange(0, OTHERS), count)
        places += tl.sum((other[None, :] < ranks[:, None]).to(tl.int32), 1)
    return places


@triton.jit(do_not_specialize=["count"])
def infonce_sort_kernel(labels, sorted_ranks, count, OTHERS: tl.constexpr):
    """Sorts tiles of anchors, [tiles, SORTED] int64."""
    first = tl.program_id(0) * SORTED
    ranks, _ = rank_of(labels, first + tl.arange(0, SORTED), count)
    # What is no anchor ranks alike, and behind all others: it may go to any place there.
    ranks = tl.where(ranks == 2**63 - 1, ranks - SORTED + tl.arange(0, SORTED), ranks)
    end = tl.minimum(first + SORTED, count)
    places = places_among(ranks, labels, first, end, count, OTHERS)
    behind = first + tl.arange(0, SORTED) - count
    places = tl.where(behind >= 0, end - first + behind, places)
    tl.store(sorted_ranks + first + places, ranks)


@triton.jit
def places_in_tiles(ranks, sorted_ranks, tiles, TILES: tl.constexpr):
    """How many ranks of all sorted tiles come before each: a binary search in every tile."""
    places = tl.zeros([ranks.shape[0]], tl.int32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)[None, :]
        inside = (tile < tiles) & (ranks[:, None] >= 0)
        before = tl.zeros([ranks.shape[0], TILES], tl.int32)
        step = SORTED
        while step > 0:
            # So many come before, or `step` more: all of a tile if its last does.
            at = before + step - 1
            other = tl.load(sorted_ranks + tile * SORTED + at, mask=inside & (at < SORTED), other=2**63 - 1)
            before += tl.where(other < ranks[:, None], step, 0)
            step //= 2
        places += tl.sum(before, 1)
    return places


class Terms(NamedTuple):
    """What the backward knows of anchors: of the caller's or, in their order, what it multiplies."""

    lse: Any  # [A] of eq. (1); then in log2 units, and inf for one without negatives
    push: Any  # [A] pos_weight; then factors of the negatives of eq. (5)
    pull: Any  # [A] grad_scale; then factors of the positives


@triton.jit(do_not_specialize=["count", "tiles"])
def infonce_order_kernel(
    labels,  # [count] int32
    sorted_ranks,  # [tiles, SORTED] int64; only with TILED
    order,  # [count] int32 out
    sorted_labels,  # [count] int32 out
    terms,  # Terms; only with WITH_TERMS
    sorted_terms,  # Terms out
    count,
    tiles,
    inv_temperature,
    TILED: tl.constexpr,
    WITH_TERMS: tl.constexpr,
    OTHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Puts anchors in the order of their ranks: a place is the number of those before it."""
    if TILED:
        ranks = tl.load(sorted_ranks + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
        index = (ranks & 0x7FFFFFFF).to(tl.int32)
        inside = index < count
        label = tl.load(labels + index, mask=inside, other=-1)
        place = places_in_tiles(ranks, sorted_ranks, tiles, 16)
    else:
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = index < count
        ranks, label = rank_of(labels, index, count)
        place = places_among(ranks, labels, 0, count, count, OTHERS)
    tl.store(order + place, index, mask=inside)
    tl.store(sorted_labels + place, label, mask=inside)
    if WITH_TERMS:
        lse = tl.load(terms.lse + index, mask=inside, other=0.0) * LOG2E
        # Without negatives exp2(score - lse) has to be 0, and sigma as well.
        alone = (lse == float("-inf")) | (label < 0)
        factor = tl.load(terms.pull + index, mask=inside, other=0.0) * inv_temperature
        factor = tl.where(alone, 0.0, factor)
        weight = tl.where(alone, 0.0, tl.load(terms.push + index, mask=inside, other=0.0))
        tl.store(sorted_terms.lse + place, tl.where(alone, float("inf"), lse), mask=inside)
        tl.store(sorted_terms.push + place, factor * weight, mask=inside)
        tl.store(sorted_terms.pull + place, factor, mask=inside)


@triton.jit
def first_of_class(sorted_labels, count, label):
    """Where the first of these labels, or the first above it, stands."""
    low = tl.zeros(label.shape, tl.int32)
    high = low + count
    step = count  # halves as often as the distance does
    while step > 0:
        middle = (low + high) // 2
        other = tl.load(sorted_labels + middle, mask=low < high, other=0)
        below = (low < high) & (tl.where(other < 0, NO_LABEL, other) < label)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
        step //= 2
    return low


@triton.jit
def append(listed, found, values, wanted):
    """Adds the wanted values to a list of `found`, in order."""
    tl.store(listed + found + tl.cumsum(wanted.to(tl.int32), 0) - 1, values, mask=wanted)


class Plan(NamedTuple):
    """What a forward visits."""

    ranges: Any  # [3, tiles] int32: smallest and largest label of each tile of columns, and whether some have none
    class_tiles: Any  # [A] int32: the first place of each tile of anchors of one class
    columns: (
        Any  # [3, tiles] int32: tiles with labels; their smallest and largest, around all if some have none
    )
    counts: Any  # [3] int32: tiles of one class, how many programs share the walk of one, tiles of columns


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
    if tl.program_id(0) == 0:
        for first in range(0, num_anchors, BLOCK):
            place = first + tl.arange(0, BLOCK)
            label = tl.load(sorted_labels + place, mask=place < num_anchors, other=-1)
            since = place - first_of_class(sorted_labels, num_anchors, label)
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
        tl.store(plan.counts + 2, found)


# --- launching that ---


def order_of(
    labels: Tensor, terms: Terms | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Terms]:
    """The order of anchors by (label, index), their labels in it, and what becomes of `terms`."""
    count = labels.shape[0]
    order, sorted_labels = torch.empty_like(labels), torch.empty_like(labels)
    given = terms or Terms(labels, labels, labels)
    sorted_terms = Terms(*(torch.empty_like(term) for term in terms)) if terms else given
    tiles, tiled = triton.cdiv(count, SORTED.value), count > _FEW
    ranks = labels.new_empty(tiles * SORTED.value if tiled else 1, dtype=torch.int64)
    if tiled:
        launch.launch(infonce_sort_kernel, (tiles,), labels, ranks, count, **_SORT)
    launch.launch(
        infonce_order_kernel,
        (triton.cdiv(ranks.shape[0] if tiled else count, _ORDER["BLOCK"]),),
        *(labels, ranks, order, sorted_labels, given, sorted_terms, count, tiles, 1.0 / temperature),
        TILED=tiled,
        WITH_TERMS=terms is not None,
        **_ORDER,
    )
    return order, sorted_labels, sorted_terms


def plan_of(sorted_labels: Tensor, ranges: Tensor, rows: int, blocks: int, fewest: int, most: int) -> Plan:
    """What the passes visit, of tiles of so many anchors."""
    plan = Plan(ranges, torch.empty_like(sorted_labels), torch.empty_like(ranges), ranges.new_empty(3))
    sizes = sorted_labels.shape[0], ranges.shape[1], blocks, fewest, most
    launch.launch(infonce_plan_kernel, (2,), sorted_labels, plan, *sizes, ROWS=rows, **_PLAN)
    return plan
