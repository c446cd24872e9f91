"""How many of an anchor's negatives, and of its positives, have their cosine in each of many equal bins.

Every pair is added to its bin in memory: integers, which come out the same in any order. The bins of all anchors, 2 KB
each, stay in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pixcontrast_ext.backends import splits
from pixcontrast_ext.backends.calls import SCORE_BINS, ScoreCounts
from pixcontrast_ext.backends.triton import launch
from pixcontrast_ext.backends.triton.infonce.forward import differ, itself, tiles_of_class
from pixcontrast_ext.backends.triton.infonce.operands import load_rows, multiply_rows
from pixcontrast_ext.backends.triton.infonce.plan import plan_contrast
from pixcontrast_ext.backends.triton.infonce.prepare import prepare_contrast
from pixcontrast_ext.backends.triton.infonce.tiles import Pass, passes

BINS: tl.constexpr = tl.constexpr(SCORE_BINS)


@triton.jit
def bins_of_score(sides, WALK: tl.constexpr):
    """How many bins wide a product of operands of 1 is; a power of two, so that edges are exact."""
    wide = BINS / 2.0
    if WALK.in_planes:
        wide *= tl.load(sides.unscale) * tl.load(sides.unscale + 1)
        # 0 times inf would be NaN; what is scaled by less or more is in the middle or outside.
        wide = tl.minimum(tl.maximum(wide, 2.0**-100), 2.0**100)
    return wide


@triton.jit
def count_scores(counts, index, scores, counted, wide):
    """Adds rows of scores to the counts of anchors."""
    place = scores * wide
    place = tl.where(place == place, tl.floor(place), -BINS / 2.0)  # NaN
    place = tl.minimum(tl.maximum(place, -BINS / 2.0), BINS / 2.0 - 1.0)
    bins = counts + index.to(tl.int64)[:, None] * BINS + (place.to(tl.int32) + BINS // 2)
    # The compiler hands each row to one warp first. Most of its threads then meet in a few sectors of 8 bins, of which
    # a multiprocessor sends one or so per cycle; where products leave them, threads of a warp are in 8 rows.
    tl.atomic_add(bins, 1, mask=counted, sem="relaxed")


@triton.jit(do_not_specialize=["num_anchors", "num_keys"])
def infonce_counts_negatives_kernel(
    sides,  # Sides
    plan,  # Plan
    counts,  # [A, BINS] int32 in and out, in the caller's order
    num_anchors,
    num_keys,
    GUARDED: tl.constexpr,
    WALK: tl.constexpr,
):
    place = tl.program_id(0) * WALK.rows + tl.arange(0, WALK.rows)
    inside = place < num_anchors
    own = tl.maximum(tl.load(sides.anchor_labels + place, mask=inside, other=-1), -1)
    index = tl.load(sides.order + place, mask=inside, other=0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    listed = tl.load(plan.counts + 2)
    wide = bins_of_score(sides, WALK)
    first = tl.program_id(2)  # there is one: 0
    row = load_rows(sides.anchors, place, inside, first, WALK, False)
    tile = tl.load(plan.columns + split, mask=split < listed, other=0)
    column = tile * WALK.columns + tl.arange(0, WALK.columns)
    label = tl.load(sides.key_labels + column, mask=column < num_keys, other=-1)
    tile = tl.load(plan.columns + split + splits, mask=split + splits < listed, other=0)
    for i in tl.range(split, listed, splits, disable_licm=not WALK.hoist):
        key = load_rows(sides.keys, column, label >= 0, first, WALK, GUARDED)
        here_label = tl.maximum(label, -1)
        column = tile * WALK.columns + tl.arange(0, WALK.columns)
        label = tl.load(sides.key_labels + column, mask=column < num_keys, other=-1)
        tile = tl.load(plan.columns + i + 2 * splits, mask=i + 2 * splits < listed, other=0)
        scores = multiply_rows(row, key, WALK)
        count_scores(counts, index, scores, differ(here_label, own), wide)


@triton.jit(do_not_specialize=["num_anchors", "num_keys", "num_tiles", "exclude_self"])
def infonce_counts_positives_kernel(
    sides,  # Sides
    plan,  # Plan
    counts,  # [A, BINS] int32 in and out, in the caller's order
    num_anchors,
    num_keys,
    num_tiles,
    exclude_self,
    IN_ORDER: tl.constexpr,  # keys are the anchors, in their order
    PIECES: tl.constexpr,  # tiles of these columns in one of the plan's
    GUARDED: tl.constexpr,
    WALK: tl.constexpr,
):
    """Tiles of anchors of one class, with what may be keys of it. A program does one after the other."""
    first = tl.program_id(1)  # there is one: 0
    wide = bins_of_score(sides, WALK)
    class_tiles = tl.load(plan.counts)
    sharing = tl.load(plan.counts + 1)
    for item in tl.range(tl.program_id(0), class_tiles * sharing, tl.num_programs(0), num_stages=1):
        split = item // class_tiles
        begin = tl.load(plan.class_tiles + item % class_tiles)
        own = tl.load(sides.anchor_labels + begin)
        place = begin + tl.arange(0, WALK.rows)
        inside = tl.load(sides.anchor_labels + place, mask=place < num_anchors, other=-1) == own
        index = tl.load(sides.order + place, mask=inside, other=0)
        excluded = itself(sides, place, inside, num_anchors, exclude_self, IN_ORDER)
        row = load_rows(sides.anchors, tl.where(inside, place, begin), inside, first, WALK, False)
        low, high = tiles_of_class(plan.ranges, num_tiles, own, 4096)
        column = (low * PIECES + split) * WALK.columns + tl.arange(0, WALK.columns)
        label = tl.load(sides.key_labels + column, mask=column < num_keys, other=-1)
        for _ in tl.range(low * PIECES + split, high * PIECES, sharing, disable_licm=not WALK.hoist):
            key = load_rows(sides.keys, column, label >= 0, first, WALK, GUARDED)
            here, here_label = column, label
            column += sharing * WALK.columns
            label = tl.load(sides.key_labels + column, mask=column < num_keys, other=-1)
            scores = multiply_rows(row, key, WALK)
            positive = (here_label == own)[None, :] & (here[None, :] != excluded[:, None])
            count_scores(counts, index, scores, positive & inside[:, None], wide)


def _options(of: Pass) -> dict[str, int]:
    """With a buffer less than for products alone: rows on their way to a warp take its room."""
    return of.options | dict(num_stages=max(1, of.options["num_stages"] - 1))


def score_counts(call: ScoreCounts) -> None:
    """Adds to what is zero at first."""
    call.neg_counts.zero_()
    call.pos_counts.zero_()
    num_anchors = call.anchors.shape[0]
    if num_anchors == 0:
        return
    of, of_positives, _ = passes(call.anchors)
    keys, negatives = prepare_contrast(call, of)
    row_tiles = triton.cdiv(num_anchors, of.rows)
    shares = splits.choose(row_tiles, negatives.num_tiles, of.slots, of.columns)
    plan, most = plan_contrast(keys, negatives, of, of_positives)
    launch.start(
        infonce_counts_negatives_kernel,
        (row_tiles, shares),
        *(negatives.sides, plan, call.neg_counts, num_anchors, negatives.num_keys),
        GUARDED=negatives.guarded,
        WALK=of.walk,
        **_options(of),
    )
    launch.start(
        infonce_counts_positives_kernel,
        (min(of_positives.slots, num_anchors * most),),
        *(keys.sides, plan, call.pos_counts, num_anchors, keys.num_keys, keys.num_tiles),
        int(call.exclude_self),
        IN_ORDER=keys.in_order,
        PIECES=of.columns // of_positives.columns,
        GUARDED=keys.guarded,
        WALK=of_positives.walk,
        **_options(of_positives),
    )
