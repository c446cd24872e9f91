"""Blockwise InfoNCE in Triton, eq. (1) to (6) of backends/reference.py; the anchors x keys matrix is never stored.

In every pass a program has a tile of rows and walks over tiles of columns. Scores S = rows . columns^T become weights
P, and P . columns is added to the output, so that a column tile is loaded once for both products.

    pass        rows      columns           weights                    output
    negatives   anchors   keys              exp2(score - shift)        O, and the log-sum-exp, eq. (1)
    positives   anchors   their own class   sigma, eq. (4)             G, the loss and S, eq. (2) to (4)
    backward    keys      anchors           ds, eq. (5)                gradient of the keys, eq. (6)
    symmetric   anchors   anchors           ds plus its mirror         both halves of eq. (6)

Anchors are visited in the order of their class. A plan lists for each row tile the column tiles without a positive,
which take a loop without masks, those that may hold both kinds, and those of the own class. Several programs
share a list; each leaves a partial result, and a second stage adds those in a fixed order. Nothing is atomic.

Scores are in units of log2: scale = log2(e) / temperature, applied to the fp32 sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixcontrast_ext.backends import schedule
from pixcontrast_ext.backends.triton import launch
from pixcontrast_ext.backends.triton.numerics import (
    INTERPRETED,
    LN2,
    LOG2E,
    add_weighted,
    as_operand,
    log1p,
    multiply,
)

# A shift that lags behind the maximum by up to this much spares most tiles the rescaling of the output.
SLACK: tl.constexpr = tl.constexpr(8.0)
NO_LABEL: tl.constexpr = tl.constexpr(2**31 - 1)  # sorts behind every label

# The plan's lists: 0 of tiles with negatives only, 1 of those with positives as well or with columns without a label,
OWN: tl.constexpr = tl.constexpr(2)  # and this one of those that may hold positives


@triton.jit(do_not_specialize=["count"])
def infonce_order_kernel(
    rows,  # [count, channels]
    labels,  # [count] int32
    order,  # [count] int32 out
    sorted_labels,  # [count] int32 out
    sorted_rows,  # [PARTS, count, channels] out, as operands
    neg_lse,  # [count], and so the rest; only with WITH_COEFFICIENTS
    pos_weight,
    grad_scale,
    coefficients,  # [3, count] out: neg_lse in log2 units, the factors of negatives and of positives, all in order
    count,
    CHANNELS: tl.constexpr,
    inv_temperature,
    WITH_COEFFICIENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Puts rows in the order of (label, index), those without a label last: a place is the number of rows before it."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    label = tl.load(labels + index, mask=inside, other=-1)
    rank = (tl.where(label < 0, NO_LABEL, label).to(tl.int64) << 32) + index
    place = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, OTHERS):
        others = first + tl.arange(0, OTHERS)
        other_label = tl.load(labels + others, mask=others < count, other=-1)
        other_rank = (tl.where(other_label < 0, NO_LABEL, other_label).to(tl.int64) << 32) + others
        place += tl.sum((other_rank[None, :] < rank[:, None]).to(tl.int32), 1)
    tl.store(order + place, index, mask=inside)
    tl.store(sorted_labels + place, label, mask=inside)
    store_operands(rows, index, label, sorted_rows, place, inside, count, CHANNELS, BLOCK_D, PRECISION)
    if WITH_COEFFICIENTS:
        lse = tl.load(neg_lse + index, mask=inside, other=0.0) * LOG2E
        # Without negatives exp2(score - lse) has to be 0, and sigma as well.
        alone = lse == float("-inf")
        lse = tl.where(alone, float("inf"), lse)
        pull = tl.load(grad_scale + index, mask=inside, other=0.0) * inv_temperature
        pull = tl.where(alone, 0.0, pull)
        push = pull * tl.load(pos_weight + index, mask=inside, other=0.0)
        tl.store(coefficients + place, lse, mask=inside)
        tl.store(coefficients + count + place, push, mask=inside)
        tl.store(coefficients + 2 * count + place, pull, mask=inside)


@triton.jit
def store_operands(
    rows,
    index,
    label,
    target,
    place,
    inside,
    count,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Copies rows to their places as operands; zeros where there is no label, whatever stands there."""
    d = tl.arange(0, BLOCK_D)
    row = tl.load(
        rows + index.to(tl.int64)[:, None] * CHANNELS + d[None, :],
        mask=(label >= 0)[:, None] & (d < CHANNELS)[None, :],
        other=0.0,
    )
    whole, rest = as_operand(row, PRECISION)
    places = target + place.to(tl.int64)[:, None] * CHANNELS + d[None, :]
    written = inside[:, None] & (d < CHANNELS)[None, :]
    tl.store(places, whole, mask=written)
    if PRECISION == "tf32x3":
        tl.store(places + tl.cast(count, tl.int64) * CHANNELS, rest, mask=written)


@triton.jit(do_not_specialize=["count"])
def infonce_prepare_kernel(
    rows,  # [count, channels]
    labels,  # [count] int32
    target,  # [PARTS, count, channels] out, as operands
    count,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows that stay in their order, as operands."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    label = tl.load(labels + index, mask=inside, other=-1)
    store_operands(rows, index, label, target, index, inside, count, CHANNELS, BLOCK_D, PRECISION)


@triton.jit(do_not_specialize=["count", "num_tiles"])
def infonce_ranges_kernel(
    labels,  # [count] int32
    count,
    ranges,  # [3, tiles] int32 out: smallest and largest label, whether some have none; largest -1 without any
    num_tiles,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    places = tile[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    label = tl.load(labels + places, mask=places < count, other=-1)
    tl.store(ranges + tile, tl.min(tl.where(label < 0, NO_LABEL, label), 1), mask=tile < num_tiles)
    tl.store(ranges + num_tiles + tile, tl.max(tl.maximum(label, -1), 1), mask=tile < num_tiles)
    tl.store(ranges + 2 * num_tiles + tile, (tl.min(label, 1) < 0).to(tl.int32), mask=tile < num_tiles)


@triton.jit
def append(tiles, found, tile, wanted):
    """Adds the wanted tiles to a list of `found`, in order."""
    wanted = wanted.to(tl.int32)
    tl.store(tiles + found + tl.cumsum(wanted, 0) - 1, tile, mask=wanted > 0)
    return found + tl.sum(wanted, 0)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def infonce_plan_kernel(
    row_labels,  # [rows] int32
    num_rows,
    ranges,  # [3, num_tiles] int32
    num_tiles,
    tiles,  # [3, row tiles, num_tiles] int32 out
    tile_counts,  # [3, row tiles] int32 out
    ALL_PAIRS: tl.constexpr,  # positives count like negatives, and OWN is not wanted
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Which tiles of columns a tile of rows meets, and how."""
    row_tile, row_tiles = tl.program_id(0), tl.num_programs(0)
    rows = row_tile * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(row_labels + rows, mask=rows < num_rows, other=-1)
    own_low, own_high = tl.min(tl.where(label < 0, NO_LABEL, label), 0), tl.max(tl.maximum(label, -1), 0)
    pure_tiles = tiles + row_tile.to(tl.int64) * num_tiles
    mixed_tiles = pure_tiles + row_tiles.to(tl.int64) * num_tiles
    own_tiles = mixed_tiles + row_tiles.to(tl.int64) * num_tiles
    num_pure, num_mixed, num_own = 0, 0, 0
    for first in range(0, num_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        low = tl.load(ranges + tile, mask=tile < num_tiles, other=0)
        high = tl.load(ranges + num_tiles + tile, mask=tile < num_tiles, other=-1)
        some_have_none = tl.load(ranges + 2 * num_tiles + tile, mask=tile < num_tiles, other=1) > 0
        met = (high >= 0) & (own_high >= 0)
        apart = (high < own_low) | (own_high < low)
        pure = met & apart & (some_have_none == 0)
        mixed = met & (pure == 0)
        if not ALL_PAIRS:
            one_class = (low == high) & (own_low == own_high) & (low == own_low)
            num_own = append(own_tiles, num_own, tile, met & (apart == 0))
            mixed = mixed & (one_class == 0)
        num_pure = append(pure_tiles, num_pure, tile, pure)
        num_mixed = append(mixed_tiles, num_mixed, tile, mixed)
    tl.store(tile_counts + row_tile, num_pure)
    tl.store(tile_counts + row_tiles + row_tile, num_mixed)
    tl.store(tile_counts + 2 * row_tiles + row_tile, num_own)


@triton.jit
def load_operands(
    rows,
    place,
    inside,
    count,
    CHANNELS: tl.constexpr,
    first,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PREPARED: tl.constexpr,
):
    """BLOCK_D channels from `first` on of rows at places, as operands; zeros where it is not inside.

    PREPARED rows were stored as operands; others become such here.
    """
    d = first + tl.arange(0, BLOCK_D)
    places = rows + place.to(tl.int64)[:, None] * CHANNELS + d[None, :]
    mask = inside[:, None] & (d < CHANNELS)[None, :]
    whole = tl.load(places, mask=mask, other=0.0)
    if PREPARED and PRECISION == "tf32x3":
        rest = tl.load(places + tl.cast(count, tl.int64) * CHANNELS, mask=mask, other=0.0)
    elif PREPARED and PRECISION == "tf32":
        rest = whole
    else:
        whole, rest = as_operand(whole, PRECISION)
    return whole, rest


@triton.jit
def dot_rows(
    left,
    left_rest,
    left_rows,
    left_place,
    left_inside,
    left_count,
    right,
    right_rest,
    right_rows,
    right_place,
    right_inside,
    right_count,
    CHANNELS: tl.constexpr,
    PREPARED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """left . right^T, of operands; or of slices of them, fetched anew, where whole rows fill the registers."""
    scores = tl.zeros([left_place.shape[0], right_place.shape[0]], tl.float32)
    if SLICE == BLOCK_D:
        scores = multiply(left, left_rest, tl.trans(right), tl.trans(right_rest), scores, PRECISION)
    else:
        for first in range(0, CHANNELS, SLICE):
            a, a_rest = load_operands(
                left_rows, left_place, left_inside, left_count, CHANNELS, first, SLICE, PRECISION, True
            )
            b, b_rest = load_operands(
                right_rows,
                right_place,
                right_inside,
                right_count,
                CHANNELS,
                first,
                SLICE,
                PRECISION,
                PREPARED,
            )
            scores = multiply(a, a_rest, tl.trans(b), tl.trans(b_rest), scores, PRECISION)
    return scores


@triton.jit
def load_row_tile(
    rows,
    place,
    inside,
    count,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The rows of a program, unless they are fetched in slices."""
    row, rest = 0.0, 0.0
    if SLICE == BLOCK_D:
        row, rest = load_operands(rows, place, inside, count, CHANNELS, 0, BLOCK_D, PRECISION, True)
    return row, rest


@triton.jit
def load_labels(labels, column, count, MASKED: tl.constexpr):
    """Labels of columns, -1 behind the last, and which columns take part: all, unless MASKED."""
    if MASKED:
        label = tl.load(labels + column, mask=column < count, other=-1)
        inside = label >= 0
    else:
        label = column
        inside = tl.full(column.shape, 1, tl.int1)
    return label, inside


@triton.jit
def fold_negatives(
    shift,  # [BLOCK_A] running, log2 units
    total,  # [BLOCK_A] sum of exp2(score - shift)
    output,  # [BLOCK_A, BLOCK_D] sum of exp2(score - shift) key
    anchors,
    rows,
    num_anchors,
    anchor,
    anchor_rest,
    anchor_label,
    tiles,
    num_tiles,
    keys,
    key_labels,
    num_keys,
    CHANNELS: tl.constexpr,
    scale,
    MASKED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    HOIST: tl.constexpr,
    SLICE: tl.constexpr,
    WEIGHT_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    for i in tl.range(tl.program_id(1), num_tiles, tl.num_programs(1), disable_licm=not HOIST):
        column = tl.load(tiles + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        label, inside = load_labels(key_labels, column, num_keys, MASKED)
        key, key_rest = load_operands(keys, column, inside, num_keys, CHANNELS, 0, BLOCK_D, PRECISION, False)
        scores = dot_rows(
            anchor,
            anchor_rest,
            anchors,
            rows,
            rows < num_anchors,
            num_anchors,
            key,
            key_rest,
            keys,
            column,
            inside,
            num_keys,
            CHANNELS,
            False,
            BLOCK_D,
            SLICE,
            PRECISION,
        )
        if MASKED:
            negative = (label >= 0)[None, :] & (label[None, :] != anchor_label[:, None])
            scores = tl.where(negative, scores, float("-inf"))
        largest = tl.max(scores, 1) * scale
        moves = largest > shift + SLACK
        base = tl.where(moves, largest, shift)
        finite = tl.where(base == float("-inf"), 0.0, base)
        if tl.max(moves.to(tl.int32), 0) > 0:
            rescale = tl.exp2(shift - finite)
            total *= rescale
            if WITH_GRAD:
                output *= rescale[:, None]
        shift = base
        weights = tl.exp2(scores * scale - (finite - WEIGHT_BIAS)[:, None])
        total += tl.sum(weights, 1)
        if WITH_GRAD:
            output = add_weighted(output, weights, key, key_rest, keys.dtype.element_ty, PRECISION, 1)
    return shift, total, output


@triton.jit(do_not_specialize=["num_anchors", "num_keys", "most_tiles"])
def infonce_fwd_negatives_kernel(
    anchors,  # [PARTS, A, channels], in order
    sorted_labels,  # [A] int32
    num_anchors,
    keys,  # [K, channels]
    key_labels,  # [K] int32
    num_keys,
    CHANNELS: tl.constexpr,
    scale,
    tiles,  # [3, row tiles, column tiles] int32
    tile_counts,  # [3, row tiles] int32
    most_tiles,
    shift_parts,  # [splits, A] out
    total_parts,  # [splits, A] out
    output_parts,  # [splits, A, channels] out
    WITH_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    HOIST: tl.constexpr,  # loop invariants: the addresses that wgmma takes fill the registers
    SLICE: tl.constexpr,  # channels that are multiplied at a time; BLOCK_D: all
    WEIGHT_BIAS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_tile = tl.program_id(0)
    rows = row_tile * BLOCK_A + tl.arange(0, BLOCK_A)
    d = tl.arange(0, BLOCK_D)
    inside = rows < num_anchors
    label = tl.load(sorted_labels + rows, mask=inside, other=-1)
    anchor, anchor_rest = load_row_tile(
        anchors, rows, inside, num_anchors, CHANNELS, BLOCK_D, SLICE, PRECISION
    )
    shift = tl.full([BLOCK_A], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_A], tl.float32)
    output = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    row_tiles = tl.num_programs(0)
    for masked in tl.static_range(2):
        place = masked * row_tiles + row_tile
        shift, total, output = fold_negatives(
            shift,
            total,
            output,
            anchors,
            rows,
            num_anchors,
            anchor,
            anchor_rest,
            label,
            tiles + place.to(tl.int64) * most_tiles,
            tl.load(tile_counts + place),
            keys,
            key_labels,
            num_keys,
            CHANNELS,
            scale,
            masked == 1,
            WITH_GRAD,
            PRECISION,
            HOIST,
            SLICE,
            WEIGHT_BIAS,
            BLOCK_K,
            BLOCK_D,
        )
    parts = tl.program_id(1).to(tl.int64) * num_anchors + rows
    tl.store(shift_parts + parts, shift, mask=rows < num_anchors)
    tl.store(total_parts + parts, total, mask=rows < num_anchors)
    if WITH_GRAD:
        tl.store(
            output_parts + parts[:, None] * CHANNELS + d[None, :],
            output,
            mask=(rows < num_anchors)[:, None] & (d < CHANNELS)[None, :],
        )


@triton.jit(do_not_specialize=["num_anchors", "splits"])
def infonce_fwd_combine_kernel(
    shift_parts,  # [splits, A]
    total_parts,  # [splits, A]
    splits,
    num_anchors,
    shift,  # [A] out
    total,  # [A] out
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The splits of each anchor's negatives as one: the shift, and the sum of exp2(score - shift)."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & (rows < num_anchors)[None, :]
        parts = split.to(tl.int64)[:, None] * num_anchors + rows[None, :]
        largest = tl.maximum(
            largest, tl.max(tl.load(shift_parts + parts, mask=inside, other=float("-inf")), 0)
        )
    combined = tl.zeros([BLOCK], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & (rows < num_anchors)[None, :]
        parts = split.to(tl.int64)[:, None] * num_anchors + rows[None, :]
        part_shift = tl.load(shift_parts + parts, mask=inside, other=float("-inf"))
        part_total = tl.load(total_parts + parts, mask=inside, other=0.0)
        # A part without a shift has met no negative, or NaN only, which a maximum passes over.
        factor = tl.where(part_shift == float("-inf"), 1.0, tl.exp2(part_shift - largest[None, :]))
        combined += tl.sum(part_total * factor, 0)
    tl.store(shift + rows, largest, mask=rows < num_anchors)
    tl.store(total + rows, combined, mask=rows < num_anchors)


@triton.jit(do_not_specialize=["num_anchors", "num_keys", "most_tiles", "exclude_self"])
def infonce_fwd_positives_kernel(
    anchors,  # [PARTS, A, channels], in order
    order,  # [A] int32
    sorted_labels,  # [A] int32
    num_anchors,
    keys,  # [K, channels]
    key_labels,  # [K] int32
    num_keys,
    CHANNELS: tl.constexpr,
    scale,
    exclude_self,
    tiles,  # [3, row tiles, column tiles] int32
    tile_counts,  # [3, row tiles] int32
    most_tiles,
    shift,  # [A]
    total,  # [A]
    loss_parts,  # [splits, A] out
    pos_weight_parts,  # [splits, A] out
    pos_count_parts,  # [splits, A] int32 out
    output_parts,  # [splits, A, channels] out
    WITH_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    HOIST: tl.constexpr,
    SLICE: tl.constexpr,
    WEIGHT_BIAS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,
    SIGMA_SCALE: tl.constexpr,
    ROW_PIECES: tl.constexpr,  # so many row tiles make one of the plan: sigma takes more registers
    PIECES: tl.constexpr,  # and so many tiles of keys
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_tile = tl.program_id(0)
    rows = row_tile * BLOCK_A + tl.arange(0, BLOCK_A)
    d = tl.arange(0, BLOCK_D)
    own_label = tl.load(sorted_labels + rows, mask=rows < num_anchors, other=-1)
    index = tl.load(order + rows, mask=rows < num_anchors, other=0)
    inside = rows < num_anchors
    anchor, anchor_rest = load_row_tile(
        anchors, rows, inside, num_anchors, CHANNELS, BLOCK_D, SLICE, PRECISION
    )
    excluded = tl.where(exclude_self != 0, index, -1)
    neg_lse = tl.load(shift + rows, mask=rows < num_anchors, other=0.0)
    neg_lse += tl.log2(tl.load(total + rows, mask=rows < num_anchors, other=1.0)) - WEIGHT_BIAS
    loss = tl.zeros([BLOCK_A], tl.float32)
    pos_weight = tl.zeros([BLOCK_A], tl.float32)
    pos_count = tl.zeros([BLOCK_A], tl.int32)
    output = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    planned = row_tile // ROW_PIECES
    place = OWN * tl.cdiv(tl.num_programs(0), ROW_PIECES) + planned
    own_tiles = tiles + place.to(tl.int64) * most_tiles
    num_pieces = PIECES * tl.load(tile_counts + place)
    for i in tl.range(tl.program_id(1), num_pieces, tl.num_programs(1), disable_licm=not HOIST):
        piece = PIECES * tl.load(own_tiles + i // PIECES) + i % PIECES
        column = piece * BLOCK_K + tl.arange(0, BLOCK_K)
        label, labelled = load_labels(key_labels, column, num_keys, True)
        key, key_rest = load_operands(
            keys, column, labelled, num_keys, CHANNELS, 0, BLOCK_D, PRECISION, False
        )
        scores = dot_rows(
            anchor,
            anchor_rest,
            anchors,
            rows,
            inside,
            num_anchors,
            key,
            key_rest,
            keys,
            column,
            labelled,
            num_keys,
            CHANNELS,
            False,
            BLOCK_D,
            SLICE,
            PRECISION,
        )
        positive = (label >= 0)[None, :] & (label[None, :] == own_label[:, None])
        positive = positive & (column[None, :] != excluded[:, None])
        margin = neg_lse[:, None] - scores * scale
        odds = tl.exp2(-tl.abs(margin))
        sigma = tl.where(positive, tl.where(margin >= 0, 1.0, odds) / (1.0 + odds), 0.0)
        pair_loss = LN2 * tl.maximum(margin, 0.0) + log1p(odds)
        loss += tl.sum(tl.where(positive, pair_loss, 0.0), 1)
        pos_weight += tl.sum(sigma, 1)
        pos_count += tl.sum(positive.to(tl.int32), 1)
        if WITH_GRAD:
            weights = sigma * SIGMA_SCALE
            output = add_weighted(
                output, weights, key, key_rest, keys.dtype.element_ty, PRECISION, WEIGHT_PARTS
            )
    parts = tl.program_id(1).to(tl.int64) * num_anchors + rows
    tl.store(loss_parts + parts, loss, mask=rows < num_anchors)
    tl.store(pos_weight_parts + parts, pos_weight, mask=rows < num_anchors)
    tl.store(pos_count_parts + parts, pos_count, mask=rows < num_anchors)
    if WITH_GRAD:
        tl.store(
            output_parts + parts[:, None] * CHANNELS + d[None, :],
            output / SIGMA_SCALE,
            mask=(rows < num_anchors)[:, None] & (d < CHANNELS)[None, :],
        )


@triton.jit(do_not_specialize=["num_anchors", "splits"])
def infonce_fwd_finish_kernel(
    order,  # [A] int32
    sorted_labels,  # [A] int32
    num_anchors,
    CHANNELS: tl.constexpr,
    inv_temperature,
    splits,
    shift_parts,  # [splits, A]
    shift,  # [A]
    total,  # [A]
    negative_parts,  # [splits, A, channels]
    loss_parts,  # [splits, A]
    pos_weight_parts,  # [splits, A]
    pos_count_parts,  # [splits, A] int32
    positive_parts,  # [splits, A, channels]
    loss,  # [A] out, eq. (3)
    neg_lse,  # [A] out, eq. (1), natural units
    pos_weight,  # [A] out, eq. (4)
    pos_count,  # [A] int32 out
    anchor_grad,  # [A, channels] out, eq. (6) for g = 1
    WITH_GRAD: tl.constexpr,
    WEIGHT_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The second stage: adds up the splits of anchors, and puts them where the caller has them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_anchors
    d = tl.arange(0, BLOCK_D)
    index = tl.load(order + row, mask=inside, other=0)
    row_shift = tl.load(shift + row, mask=inside, other=0.0)
    row_total = tl.load(total + row, mask=inside, other=1.0)
    sum_loss = tl.zeros([ROWS], tl.float32)
    sum_weight = tl.zeros([ROWS], tl.float32)
    sum_count = tl.zeros([ROWS], tl.int32)
    negatives = tl.zeros([ROWS, BLOCK_D], tl.float32)
    positives = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        parts = split.to(tl.int64)[None, :] * num_anchors + row[:, None]
        present = inside[:, None] & (split < splits)[None, :]
        sum_loss += tl.sum(tl.load(loss_parts + parts, mask=present, other=0.0), 1)
        sum_weight += tl.sum(tl.load(pos_weight_parts + parts, mask=present, other=0.0), 1)
        sum_count += tl.sum(tl.load(pos_count_parts + parts, mask=present, other=0), 1)
        if WITH_GRAD:
            places = parts[:, :, None] * CHANNELS + d[None, None, :]
            read = present[:, :, None] & (d < CHANNELS)[None, None, :]
            part_shift = tl.load(shift_parts + parts, mask=present, other=float("-inf"))
            factor = tl.where(part_shift == float("-inf"), 1.0, tl.exp2(part_shift - row_shift[:, None]))
            part = tl.load(negative_parts + places, mask=read, other=0.0)
            negatives += tl.sum(part * factor[:, :, None], 1)
            positives += tl.sum(tl.load(positive_parts + places, mask=read, other=0.0), 1)
    labelled = tl.load(sorted_labels + row, mask=inside, other=-1) >= 0
    contrasts = labelled & (sum_count > 0)
    count = tl.maximum(sum_count, 1).to(tl.float32)
    lse = (row_shift + tl.log2(row_total) - WEIGHT_BIAS) * LN2
    tl.store(loss + index, tl.where(contrasts, sum_loss / count, 0.0), mask=inside)
    tl.store(neg_lse + index, tl.where(labelled, lse, float("-inf")), mask=inside)
    tl.store(pos_weight + index, tl.where(contrasts, sum_weight, 0.0), mask=inside)
    tl.store(pos_count + index, tl.where(contrasts, sum_count, 0), mask=inside)
    if WITH_GRAD:
        push = tl.where(row_total == 0.0, 0.0, sum_weight / row_total)
        grad = (push[:, None] * negatives - positives) * (inv_temperature / count)[:, None]
        tl.store(
            anchor_grad + index.to(tl.int64)[:, None] * CHANNELS + d[None, :],
            tl.where(contrasts[:, None], grad, 0.0),
            mask=inside[:, None] & (d < CHANNELS)[None, :],
        )


# --- backward ---


@triton.jit
def negative_gradient(score, lse, push):
    """ds of eq. (5) of a negative."""
    return push * tl.exp2(score - lse)


@triton.jit
def positive_gradient(score, lse, pull):
    """ds of eq. (5) of a positive."""
    return -pull / (1.0 + tl.exp2(score - lse))


@triton.jit
def fold_gradient(
    output,  # [BLOCK_K, BLOCK_D]
    rows,
    row_place,
    row_inside,
    num_rows,
    row,
    row_rest,
    row_label,
    row_index,
    row_lse,
    row_push,
    row_pull,
    tiles,
    num_tiles,
    anchors,
    order,
    sorted_labels,
    coefficients,
    num_anchors,
    CHANNELS: tl.constexpr,
    scale,
    weight_scale,
    exclude_self,
    MASKED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    HOIST: tl.constexpr,
    SLICE: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    for i in tl.range(tl.program_id(1), num_tiles, tl.num_programs(1), disable_licm=not HOIST):
        places = tl.load(tiles + i) * BLOCK_A + tl.arange(0, BLOCK_A)
        inside = places < num_anchors
        label = tl.load(sorted_labels + places, mask=inside, other=-1)
        index = tl.load(order + places, mask=inside, other=0)
        anchor, anchor_rest = load_operands(
            anchors, places, inside, num_anchors, CHANNELS, 0, BLOCK_D, PRECISION, True
        )
        lse = tl.load(coefficients + places, mask=inside, other=0.0)[None, :]
        push = tl.load(coefficients + num_anchors + places, mask=inside, other=0.0)[None, :]
        scores = dot_rows(
            row,
            row_rest,
            rows,
            row_place,
            row_inside,
            num_rows,
            anchor,
            anchor_rest,
            anchors,
            places,
            inside,
            num_anchors,
            CHANNELS,
            True,
            BLOCK_D,
            SLICE,
            PRECISION,
        )
        scores *= scale
        weights = negative_gradient(scores, lse, push)
        if SYMMETRIC:
            weights += negative_gradient(scores, row_lse[:, None], row_push[:, None])
        if MASKED:
            pull = tl.load(coefficients + 2 * num_anchors + places, mask=inside, other=0.0)[None, :]
            own = positive_gradient(scores, lse, pull)
            if SYMMETRIC:
                own += positive_gradient(scores, row_lse[:, None], row_pull[:, None])
            itself = (row_index[:, None] == index[None, :]) & (exclude_self != 0)
            positive = label[None, :] == row_label[:, None]
            weights = tl.where(positive, tl.where(itself, 0.0, own), weights)
            # An anchor that takes no part has factors of 0, its mirror may be anything.
            weights = tl.where((label >= 0)[None, :], weights, 0.0)
        weights *= weight_scale
        output = add_weighted(
            output, weights, anchor, anchor_rest, anchors.dtype.element_ty, PRECISION, WEIGHT_PARTS
        )
    return output


@triton.jit(do_not_specialize=["num_anchors", "num_keys", "most_tiles", "exclude_self"])
def infonce_bwd_keys_kernel(
    anchors,  # [PARTS, A, channels], in order
    order,  # [A] int32
    sorted_labels,  # [A] int32
    coefficients,  # [3, A]
    num_anchors,
    keys,  # [PARTS, K, channels]; the anchors if SYMMETRIC, in their order
    key_labels,  # [K] int32
    num_keys,
    CHANNELS: tl.constexpr,
    scale,
    exclude_self,
    peak,  # [] largest weight, of which fp16 needs to know; only with PEAK
    tiles,  # [3, row tiles, column tiles] int32
    tile_counts,  # [3, row tiles] int32
    most_tiles,
    grad_parts,  # [splits, K, channels] out
    SYMMETRIC: tl.constexpr,
    PEAK: tl.constexpr,
    PRECISION: tl.constexpr,
    HOIST: tl.constexpr,
    SLICE: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of the keys; of anchors that are the keys both halves at once."""
    row_tile, row_tiles = tl.program_id(0), tl.num_programs(0)
    places = row_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = places < num_keys
    d = tl.arange(0, BLOCK_D)
    label = tl.load(key_labels + places, mask=inside, other=-1)
    index, lse, push, pull = places, 0.0, 0.0, 0.0
    if SYMMETRIC:
        index = tl.load(order + places, mask=inside, other=0)
        lse = tl.load(coefficients + places, mask=inside, other=0.0)
        push = tl.load(coefficients + num_anchors + places, mask=inside, other=0.0)
        pull = tl.load(coefficients + 2 * num_anchors + places, mask=inside, other=0.0)
    row, row_rest = load_row_tile(keys, places, label >= 0, num_keys, CHANNELS, BLOCK_D, SLICE, PRECISION)
    weight_scale = 1.0
    if PEAK:  # a power of two that takes the largest weight to 2^14 and below, near the top of fp16's range
        exponent = tl.load(peak).to(tl.int32, bitcast=True) >> 23
        weight_scale = ((127 + 13 + 127 - tl.maximum(exponent, 17)) << 23).to(tl.float32, bitcast=True)
    output = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for masked in tl.static_range(2):
        listed = masked * row_tiles + row_tile
        output = fold_gradient(
            output,
            keys,
            places,
            label >= 0,
            num_keys,
            row,
            row_rest,
            label,
            index,
            lse,
            push,
            pull,
            tiles + listed.to(tl.int64) * most_tiles,
            tl.load(tile_counts + listed),
            anchors,
            order,
            sorted_labels,
            coefficients,
            num_anchors,
            CHANNELS,
            scale,
            weight_scale,
            exclude_self,
            masked == 1,
            SYMMETRIC,
            PRECISION,
            HOIST,
            SLICE,
            WEIGHT_PARTS,
            BLOCK_A,
            BLOCK_D,
        )
    # A row without a label takes no part, whatever the anchors hold.
    output = tl.where((label >= 0)[:, None], output / weight_scale, 0.0)
    parts = tl.program_id(1).to(tl.int64) * num_keys + index
    tl.store(
        grad_parts + parts[:, None] * CHANNELS + d[None, :],
        output,
        mask=inside[:, None] & (d < CHANNELS)[None, :],
    )


@triton.jit(do_not_specialize=["splits", "size"])
def infonce_bwd_finish_kernel(grad_parts, splits, size, grad, BLOCK: tl.constexpr):
    """The second stage of the backward: adds the splits, in order."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = grad_parts + elements
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, splits):
        total += tl.load(part, mask=elements < size, other=0.0)
        part += size
    tl.store(grad + elements, total, mask=elements < size)


# --- launchers ---


class Tile(NamedTuple):
    """How a pass goes about its work."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    hoist: bool = True  # loop invariants out of the walk
    slice: int | None = None  # channels whose products are summed at a time, fetched anew; None: all

    def options(self, block_d: int) -> dict[str, Any]:
        return dict(
            HOIST=self.hoist,
            SLICE=self.slice or block_d,
            BLOCK_D=block_d,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


class Tiles(NamedTuple):
    """The tiles of the passes; those of the positives divide those of the negatives, whose plan they share."""

    negatives: Tile
    positives: Tile
    backward: Tile
    resident: int  # programs that a multiprocessor holds at a time


# By (major number of the compute capability, what is multiplied): tiles for rows of up to so many channels. All of
# them compile without spills with the oldest and the newest Triton that are supported, for rows of 64, 128, 256 and 512
# channels, and those of (8, ...) fit the 99 KB of shared memory that the smallest device after an A100 has.
_TILES: dict[tuple[int, str], dict[int, Tiles]] = {
    (9, "half"): {
        64: Tiles(Tile(128, 128, 8, 3), Tile(128, 32, 8, 3), Tile(128, 64, 8, 3), 1),
        128: Tiles(Tile(128, 128, 8, 3), Tile(128, 16, 8, 3), Tile(128, 32, 8, 3), 1),
        256: Tiles(
            Tile(128, 64, 8, 3, hoist=False),
            Tile(128, 16, 8, 3, hoist=False),
            Tile(128, 16, 8, 3, hoist=False),
            1,
        ),
        512: Tiles(Tile(64, 32, 8, 3, hoist=False), Tile(32, 32, 8, 3), Tile(32, 32, 8, 3), 1),
    },
    (9, "tf32"): {
        64: Tiles(Tile(128, 64, 8, 3, False), Tile(128, 32, 8, 3, False), Tile(128, 32, 8, 3, False), 1),
        128: Tiles(Tile(128, 32, 8, 3, False), Tile(64, 32, 8, 3, False), Tile(128, 32, 8, 3, False), 1),
        256: Tiles(
            Tile(64, 32, 8, 3, False, 64), Tile(64, 32, 8, 3, False, 64), Tile(64, 32, 8, 3, False, 64), 1
        ),
        512: Tiles(
            Tile(32, 16, 8, 3, True, 64), Tile(32, 16, 8, 3, True, 64), Tile(32, 16, 8, 3, True, 64), 1
        ),
    },
    (9, "tf32x3"): {
        64: Tiles(Tile(128, 32, 8, 3, False), Tile(128, 32, 8, 3, False), Tile(128, 32, 8, 3, False), 1),
        128: Tiles(
            Tile(64, 32, 8, 3, False, 64), Tile(64, 16, 8, 3, False), Tile(64, 32, 8, 3, False, 64), 1
        ),
        256: Tiles(
            Tile(32, 32, 8, 2, True, 32), Tile(32, 16, 8, 2, True, 32), Tile(16, 16, 8, 2, True, 32), 1
        ),
        512: Tiles(
            Tile(16, 16, 8, 2, True, 32), Tile(16, 16, 8, 2, True, 32), Tile(16, 16, 8, 2, True, 32), 1
        ),
    },
    (8, "half"): {
        128: Tiles(Tile(64, 64, 4, 3), Tile(64, 16, 4, 3), Tile(64, 32, 8, 3), 2),
        256: Tiles(Tile(64, 32, 8, 3), Tile(64, 16, 8, 3), Tile(64, 16, 8, 3), 1),
        512: Tiles(Tile(32, 32, 8, 3), Tile(32, 32, 8, 3), Tile(32, 32, 8, 3), 1),
    },
    (8, "tf32"): {
        128: Tiles(Tile(64, 32, 8, 3), Tile(64, 32, 8, 3), Tile(64, 32, 8, 3), 1),
        256: Tiles(Tile(32, 32, 8, 3), Tile(32, 32, 8, 3), Tile(32, 32, 8, 3), 1),
        512: Tiles(Tile(16, 16, 8, 2, True, 64), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), 1),
    },
    (8, "tf32x3"): {
        128: Tiles(
            Tile(64, 16, 8, 2, True, 32), Tile(64, 16, 8, 2, True, 32), Tile(64, 16, 8, 2, True, 32), 1
        ),
        256: Tiles(
            Tile(64, 16, 8, 2, True, 32), Tile(32, 16, 8, 2, True, 32), Tile(32, 16, 8, 2, True, 32), 1
        ),
        512: Tiles(
            Tile(32, 16, 8, 2, True, 32), Tile(16, 16, 8, 2, True, 32), Tile(16, 16, 8, 2, True, 16), 1
        ),
    },
}

# The interpreter takes as long for a large tile as for a small one.
_ORDER = dict(BLOCK=64 if INTERPRETED else 16, OTHERS=512 if INTERPRETED else 256, num_warps=4)
_PREPARE = dict(BLOCK=256 if INTERPRETED else 16, num_warps=4)
_RANGES = dict(TILES=16, num_warps=4)
_PLAN = dict(TILES=1024, num_warps=4)
_COMBINE = dict(BLOCK=32, SPLITS=16, num_warps=4)
_FINISH = dict(ROWS=64 if INTERPRETED else 2, SPLITS=4, num_warps=4)
_BWD_FINISH = dict(BLOCK=1024, num_warps=4)


class Arithmetic(NamedTuple):
    """How rows of a dtype are multiplied."""

    precision: str  # of numerics.as_operand
    weight_parts: int  # in how many numbers of the dtype a weight is multiplied
    weight_bias: float  # log2 of a factor of exp2(score - shift); fp16 has few numbers below 1
    sigma_scale: float  # the same for weights of up to 1


def _arithmetic(dtype: torch.dtype) -> Arithmetic:
    if dtype == torch.bfloat16:
        return Arithmetic("half", 2, 0.0, 1.0)
    if dtype == torch.float16:
        return Arithmetic("half", 1, 7.0, 2.0**14)
    precision = "tf32x3" if schedule.full_float32(dtype) else "tf32"
    return Arithmetic(precision, 1, 0.0, 1.0)


def _tiles(device: torch.device, precision: str, channels: int) -> Tiles:
    major = 9 if launch.capability(device)[0] == 9 else 8  # what fits an A100 runs on those after Hopper
    return next(tiles for most, tiles in _TILES[major, precision].items() if channels <= most)


def _block_d(channels: int) -> int:
    return max(64, triton.next_power_of_2(channels))


def _scale(temperature: float) -> float:
    """log2(e) / temperature, above 0 in fp32 too: -inf times 0 would be NaN."""
    return max(LOG2E.value / temperature, 1e-37)


def _splits(
    device: torch.device, row_tiles: int, column_tiles: int, resident: int, columns_of_tile: int
) -> int:
    slots = 8 if device.type == "cpu" else launch.multiprocessors(device) * resident
    return schedule.splits(row_tiles, column_tiles, slots, columns_of_tile)


def _operands(rows: Tensor, precision: str) -> Tensor:
    """Memory for rows as operands [PARTS, rows, D]."""
    return rows.new_empty(2 if precision == "tf32x3" else 1, *rows.shape)


def _order(
    rows: Tensor,
    labels: Tensor,
    precision: str,
    coefficients: Tensor | None = None,
    sources: tuple[Tensor, ...] = (),
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The order of rows by (label, index), their labels in it, and themselves as operands; `sources` become
    `coefficients` on the way.
    """
    (count, channels) = rows.shape
    order, sorted_labels = torch.empty_like(labels), torch.empty_like(labels)
    sorted_rows = _operands(rows, precision)
    launch.launch(
        infonce_order_kernel,
        (triton.cdiv(count, _ORDER["BLOCK"]),),
        rows,
        labels,
        order,
        sorted_labels,
        sorted_rows,
        *(sources or (rows, rows, rows)),
        rows if coefficients is None else coefficients,
        count,
        channels,
        1.0 / temperature,
        WITH_COEFFICIENTS=coefficients is not None,
        PRECISION=precision,
        BLOCK_D=_block_d(channels),
        **_ORDER,
    )
    return order, sorted_labels, sorted_rows


def _prepare(rows: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Rows as operands; those of 16 bits are such already."""
    if precision == "half":
        return rows
    prepared = _operands(rows, precision)
    launch.launch(
        infonce_prepare_kernel,
        (triton.cdiv(rows.shape[0], _PREPARE["BLOCK"]),),
        rows,
        labels,
        prepared,
        *rows.shape,
        PRECISION=precision,
        BLOCK_D=_block_d(rows.shape[1]),
        **_PREPARE,
    )
    return prepared


def _plan(row_labels: Tensor, column_labels: Tensor, tile_rows: int, tile_columns: int, all_pairs: bool):
    """Lists of column tiles for each row tile [3, row tiles, column tiles], and their lengths [3, row tiles]."""
    row_tiles = triton.cdiv(row_labels.shape[0], tile_rows)
    column_tiles = triton.cdiv(column_labels.shape[0], tile_columns)
    ranges = row_labels.new_empty(3, column_tiles)
    tiles = row_labels.new_empty(3, row_tiles, column_tiles)
    tile_counts = row_labels.new_empty(3, row_tiles)
    launch.launch(
        infonce_ranges_kernel,
        (triton.cdiv(column_tiles, _RANGES["TILES"]),),
        column_labels,
        column_labels.shape[0],
        ranges,
        column_tiles,
        BLOCK=tile_columns,
        **_RANGES,
    )
    launch.launch(
        infonce_plan_kernel,
        (row_tiles,),
        row_labels,
        row_labels.shape[0],
        ranges,
        column_tiles,
        tiles,
        tile_counts,
        ALL_PAIRS=all_pairs,
        BLOCK=tile_rows,
        **_PLAN,
    )
    return tiles, tile_counts


def infonce_forward(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int32
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int32
    temperature: float,
    exclude_self: bool,
    loss: Tensor,  # [A] float32, out
    neg_lse: Tensor,  # [A] float32, out
    pos_weight: Tensor,  # [A] float32, out
    pos_count: Tensor,  # [A] int32, out
    anchor_grad: Tensor | None,  # [A, D] float32, out
) -> None:
    (num_anchors, channels), num_keys, device = anchors.shape, keys.shape[0], anchors.device
    if num_anchors == 0:
        return
    math_of = _arithmetic(anchors.dtype)
    negatives, positives, _, resident = _tiles(device, math_of.precision, channels)
    row_tiles, column_tiles = (
        triton.cdiv(num_anchors, negatives.rows),
        triton.cdiv(num_keys, negatives.columns),
    )
    row_pieces = negatives.rows // positives.rows
    splits = _splits(device, row_tiles, column_tiles, resident, negatives.columns)
    scale = _scale(temperature)
    with_grad = anchor_grad is not None
    block_d = _block_d(channels)

    order, sorted_labels, sorted_anchors = _order(anchors, anchor_labels, math_of.precision)
    tiles, tile_counts = _plan(sorted_labels, key_labels, negatives.rows, negatives.columns, all_pairs=False)

    def parts(*shape: int) -> Tensor:
        return loss.new_empty(splits, num_anchors, *shape)

    shift_parts, total_parts, loss_parts, weight_parts = parts(), parts(), parts(), parts()
    count_parts = parts().view(torch.int32)
    negative_parts = parts(channels) if with_grad else loss
    positive_parts = parts(channels) if with_grad else loss
    shift, total = torch.empty_like(loss), torch.empty_like(loss)
    blocks = dict(
        WITH_GRAD=with_grad,
        PRECISION=math_of.precision,
        WEIGHT_BIAS=math_of.weight_bias,
    )
    launch.launch(
        infonce_fwd_negatives_kernel,
        (row_tiles, splits),
        sorted_anchors,
        sorted_labels,
        num_anchors,
        keys,
        key_labels,
        num_keys,
        channels,
        scale,
        tiles,
        tile_counts,
        column_tiles,
        shift_parts,
        total_parts,
        negative_parts,
        BLOCK_A=negatives.rows,
        BLOCK_K=negatives.columns,
        **negatives.options(block_d),
        **blocks,
    )
    launch.launch(
        infonce_fwd_combine_kernel,
        (triton.cdiv(num_anchors, _COMBINE["BLOCK"]),),
        shift_parts,
        total_parts,
        splits,
        num_anchors,
        shift,
        total,
        **_COMBINE,
    )
    launch.launch(
        infonce_fwd_positives_kernel,
        (row_tiles * row_pieces, splits),
        sorted_anchors,
        order,
        sorted_labels,
        num_anchors,
        keys,
        key_labels,
        num_keys,
        channels,
        scale,
        int(exclude_self),
        tiles,
        tile_counts,
        column_tiles,
        shift,
        total,
        loss_parts,
        weight_parts,
        count_parts,
        positive_parts,
        WEIGHT_PARTS=math_of.weight_parts,
        SIGMA_SCALE=math_of.sigma_scale,
        ROW_PIECES=row_pieces,
        PIECES=negatives.columns // positives.columns,
        BLOCK_A=positives.rows,
        BLOCK_K=positives.columns,
        **positives.options(block_d),
        **blocks,
    )
    launch.launch(
        infonce_fwd_finish_kernel,
        (triton.cdiv(num_anchors, _FINISH["ROWS"]),),
        order,
        sorted_labels,
        num_anchors,
        channels,
        1.0 / temperature,
        splits,
        shift_parts,
        shift,
        total,
        negative_parts,
        loss_parts,
        weight_parts,
        count_parts,
        positive_parts,
        loss,
        neg_lse,
        pos_weight,
        pos_count,
        loss if anchor_grad is None else anchor_grad,
        WITH_GRAD=with_grad,
        WEIGHT_BIAS=math_of.weight_bias,
        BLOCK_D=block_d,
        **_FINISH,
    )


def _backward(
    anchors: Tensor,
    anchor_labels: Tensor,
    keys: Tensor | None,  # None: the anchors themselves
    key_labels: Tensor | None,
    neg_lse: Tensor,
    pos_weight: Tensor,
    grad_scale: Tensor,
    temperature: float,
    exclude_self: bool,
    grad: Tensor,
) -> None:
    (num_anchors, channels), num_rows, device = anchors.shape, grad.shape[0], anchors.device
    if num_rows == 0:
        return
    math_of = _arithmetic(anchors.dtype)
    _, _, tile, resident = _tiles(device, math_of.precision, channels)
    row_tiles, column_tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(num_anchors, tile.columns)
    splits = _splits(device, row_tiles, column_tiles, resident, tile.columns)
    peak = None
    if anchors.dtype == torch.float16 and num_anchors:
        peak = (grad_scale.abs() * pos_weight.clamp(min=1)).amax() / temperature

    coefficients = neg_lse.new_empty(3, num_anchors)
    order, sorted_labels, sorted_anchors = _order(
        anchors,
        anchor_labels,
        math_of.precision,
        coefficients,
        (neg_lse, pos_weight, grad_scale),
        temperature,
    )
    row_labels = sorted_labels if key_labels is None else key_labels
    rows = sorted_anchors if keys is None else _prepare(keys, row_labels, math_of.precision)
    tiles, tile_counts = _plan(row_labels, sorted_labels, tile.rows, tile.columns, all_pairs=True)
    grad_parts = grad if splits == 1 else grad.new_empty(splits, *grad.shape)
    launch.launch(
        infonce_bwd_keys_kernel,
        (row_tiles, splits),
        sorted_anchors,
        order,
        sorted_labels,
        coefficients,
        num_anchors,
        rows,
        row_labels,
        num_rows,
        channels,
        _scale(temperature),
        int(exclude_self),
        neg_lse if peak is None else peak,
        tiles,
        tile_counts,
        column_tiles,
        grad_parts,
        SYMMETRIC=keys is None,
        PEAK=peak is not None,
        PRECISION=math_of.precision,
        WEIGHT_PARTS=math_of.weight_parts,
        BLOCK_A=tile.columns,
        BLOCK_K=tile.rows,
        **tile.options(_block_d(channels)),
    )
    if splits > 1:
        launch.launch(
            infonce_bwd_finish_kernel,
            (triton.cdiv(grad.numel(), _BWD_FINISH["BLOCK"]),),
            grad_parts,
            splits,
            grad.numel(),
            grad,
            **_BWD_FINISH,
        )


def infonce_backward_keys(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int32
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int32
    neg_lse: Tensor,  # [A] float32
    pos_weight: Tensor,  # [A] float32
    grad_scale: Tensor,  # [A] float32, g / |P|
    temperature: float,
    exclude_self: bool,
    key_grad: Tensor,  # [K, D] float32, out
) -> None:
    _backward(
        anchors,
        anchor_labels,
        keys,
        key_labels,
        neg_lse,
        pos_weight,
        grad_scale,
        temperature,
        exclude_self,
        key_grad,
    )


def infonce_backward_symmetric(
    anchors: Tensor,  # [A, D], the keys as well
    anchor_labels: Tensor,  # [A] int32
    neg_lse: Tensor,  # [A] float32
    pos_weight: Tensor,  # [A] float32
    grad_scale: Tensor,  # [A] float32, g / |P|
    temperature: float,
    exclude_self: bool,
    anchor_grad: Tensor,  # [A, D] float32, out
) -> None:
    _backward(
        anchors,
        anchor_labels,
        None,
        None,
        neg_lse,
        pos_weight,
        grad_scale,
        temperature,
        exclude_self,
        anchor_grad,
    )
