"""InfoNCE on the CPU: a loop over tiles of anchors x keys small enough to stay in cache.

With AVX2 and AVX-512 the forward and the contrast of anchors with each other are native throughout, a call each
(`_fused`); elsewhere, and in the backward of keys, the products are torch's and the steps between them native. Extra
memory is a few tiles, whatever the number of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext.backends import native
from pixcontrast_ext.backends.calls import (
    SCORE_BINS,
    InfonceBackward,
    InfonceForward,
    MinedBackward,
    MinedForward,
    ScoreCounts,
    same,
)
from pixcontrast_ext.backends.precision import full_float32_products

# A tile of scores is 4 MiB, and is written and read three times while it is in the shared cache. Smaller tiles would
# fit the cores' own caches, but cost more in starting and joining threads than they save.
BLOCK_A = 1024
BLOCK_K = 1024

LOG2_E = math.log2(math.e)
SMALLEST_SCALE = 1e-37  # -inf times 0 would be NaN


def _scale(temperature: float) -> float:
    """What dot products are multiplied by."""
    return max(LOG2_E / temperature, SMALLEST_SCALE)


def _widen(source: Tensor, indices: Tensor | None, rows: Tensor) -> Tensor:
    """rows[i] = source[indices[i]] in fp32; the first rows in their order if `indices` is None."""
    native.launch(
        "widen",
        source=source,
        indices=indices,
        num_rows=rows.shape[0],
        channels=rows.shape[1],
        rows=rows,
        threads=torch.get_num_threads(),
    )
    return rows


def _plan_tiles(key_labels: Tensor, block_k: int, capacity: int = 0) -> Tensor:
    """Tiles of up to block_k keys: [tiles, 3] int64 of (first, size, label or -1 if they differ)."""
    capacity = capacity or key_labels.shape[0] // block_k * 2 + 64
    tiles, count = torch.empty(capacity, 3, dtype=torch.int64), torch.empty((), dtype=torch.int64)
    native.launch(
        "plan_tiles",
        key_labels=key_labels,
        num_keys=key_labels.shape[0],
        max_keys=block_k,
        tiles=tiles,
        capacity=capacity,
        num_tiles=count,
    )
    return tiles[: int(count)] if int(count) <= capacity else _plan_tiles(key_labels, block_k, int(count))


class _Keys:
    """Tiles of the keys, as fp32 copies in one buffer."""

    def __init__(self, keys: Tensor, key_labels: Tensor):
        self.keys, self.key_labels = keys, key_labels
        self._buffer = torch.empty(min(BLOCK_K, keys.shape[0]), keys.shape[1], dtype=torch.float32)
        self._indices = torch.empty(BLOCK_K, dtype=torch.int64)
        self._cursor = torch.empty(2, dtype=torch.int64)
        tiles = _plan_tiles(key_labels, BLOCK_K).tolist()
        self.tiles: list[tuple[int, int, int]] = [tuple(tile) for tile in tiles]  # (first, size, label)

    def rows(self, first: int, size: int) -> Tensor:
        """Consecutive keys [size, D], whatever their labels.

        Copied even if they are fp32 already: the products then find them in the cache, and take a tenth less time.
        """
        return _widen(self.keys[first : first + size], None, self._buffer[:size])

    def labelled(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """The labelled ones among consecutive keys, and their labels: the others may hold anything, even NaN."""
        labels = self.key_labels[first : first + size]
        if (labels >= 0).all():
            return self.rows(first, size), labels
        chosen = (labels >= 0).nonzero().squeeze(1)
        return _widen(self.keys, chosen + first, self._buffer[: chosen.shape[0]]), labels[chosen]

    def of_class(self, label: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The keys of one class, in order: (rows [n, D] fp32, indices [n])."""
        self._cursor[0] = 0
        while self._cursor[0] < self.key_labels.shape[0]:
            native.launch(
                "collect_keys",
                key_labels=self.key_labels,
                num_keys=self.key_labels.shape[0],
                max_keys=BLOCK_K,
                label=label,
                cursor=self._cursor[0],
                indices=self._indices,
                found=self._cursor[1],
            )
            size = int(self._cursor[1])
            if size == 0:
                return
            indices = self._indices[:size]
            first, last = int(indices[0]), int(indices[-1])
            if last - first == size - 1 and self.keys.dtype == torch.float32:
                yield self.keys[first : last + 1], indices  # too few anchors for a copy to pay
            else:
                yield _widen(self.keys, indices, self._buffer[:size]), indices


class _AnchorBlock:
    """Some anchors that have a label, sorted by class and widened to fp32."""

    def __init__(self, anchors: Tensor, anchor_labels: Tensor, order: Tensor):
        self.index = order  # [n], row of each in the caller's tensors
        self.labels = anchor_labels[order]
        self.rows = _widen(anchors, order, torch.empty(order.shape[0], anchors.shape[1], dtype=torch.float32))
        classes, sizes = torch.unique_consecutive(self.labels, return_counts=True)
        stops = sizes.cumsum(0).tolist()
        starts = [0, *stops[:-1]]
        self.ranges = {c: (a, b) for c, a, b in zip(classes.tolist(), starts, stops, strict=True)}

    def __len__(self) -> int:
        return self.index.shape[0]

    def other_than(self, label: int) -> list[tuple[int, int]]:
        """Ranges of the anchors that a key of `label` is a negative of."""
        start, stop = self.ranges.get(label, (0, 0))
        return [(a, b) for a, b in ((0, start), (stop, len(self))) if a < b]


def _anchor_blocks(anchors: Tensor, anchor_labels: Tensor) -> Iterator[_AnchorBlock]:
    order = torch.argsort(anchor_labels, stable=True)
    order = order[int((anchor_labels < 0).sum()) :]
    for start in range(0, order.shape[0], BLOCK_A):
        yield _AnchorBlock(anchors, anchor_labels, order[start : start + BLOCK_A])


class _Sums:
    """What the two passes of the forward sum up for a block of anchors."""

    def __init__(self, size: int, channels: int, with_grad: bool):
        self.shift = torch.full((size,), -math.inf, dtype=torch.float32)
        self.sum = torch.zeros(size, dtype=torch.float32)  # of exp2((dot product - shift) * scale)
        self.loss_sum = torch.zeros(size, dtype=torch.float64)
        self.pos_weight_sum = torch.zeros(size, dtype=torch.float64)
        self.pos_counts = torch.zeros(size, dtype=torch.int64)
        # O of pass 1, before its division, and G of pass 2
        self.negatives = torch.zeros(size, channels, dtype=torch.float32) if with_grad else None
        self.positives = torch.zeros(size, channels, dtype=torch.float32) if with_grad else None


class _Thresholds:
    """What mining keeps of a block of anchors: cosines from `neg_min` on, and below `pos_max`."""

    def __init__(self, block: _AnchorBlock, call: MinedForward | MinedBackward):
        self.neg_min, self.pos_max = call.neg_min[block.index], call.pos_max[block.index]


_Rows = tuple[Tensor, Tensor]  # with their labels


def infonce_forward(call: InfonceForward) -> None:
    _forward(call, (call.keys, call.key_labels), None, None)


def mined_forward(call: MinedForward) -> None:
    _forward(call, (call.negatives, call.negative_labels), call.neg_min, call.pos_max)


def _fused(kernel: str, call: InfonceForward | ScoreCounts, negatives: _Rows, **fields: Any) -> bool:
    """Call a fused kernel; False if the instruction set has none."""
    if not native.has_fused():
        return False
    native.launch(
        kernel,
        anchors=call.anchors,
        anchor_labels=call.anchor_labels,
        num_anchors=call.anchors.shape[0],
        channels=call.anchors.shape[1],
        keys=call.keys,
        key_labels=call.key_labels,
        num_keys=call.keys.shape[0],
        negatives=negatives[0],
        negative_labels=negatives[1],
        num_negatives=negatives[0].shape[0],
        exclude_self=call.exclude_self,
        threads=torch.get_num_threads(),
        **fields,
    )
    return True


def _forward(call: InfonceForward, negatives: _Rows, neg_min: Tensor | None, pos_max: Tensor | None) -> None:
    outputs: dict[str, Any] = dict(
        loss=call.loss,
        neg_lse=call.neg_lse,
        pos_weight=call.pos_weight,
        pos_count=call.pos_count,
        anchor_grad=call.anchor_grad,
    )
    kept = dict(neg_min=neg_min, pos_max=pos_max)
    if _fused("contrast_forward", call, negatives, temperature=call.temperature, **kept, **outputs):
        return
    for name, output in outputs.items():
        if output is not None:
            output.fill_(-math.inf if name == "neg_lse" else 0)  # what rows without a label keep
    walk = _Walk((call.keys, call.key_labels), negatives)
    for block in _anchor_blocks(call.anchors, call.anchor_labels):
        sums = _Sums(len(block), call.anchors.shape[1], call.anchor_grad is not None)
        thresholds = _Thresholds(block, call) if isinstance(call, MinedForward) else None
        walk.sum_up(block, _scale(call.temperature), call.exclude_self, sums, thresholds)
        native.launch(
            "infonce_finish",
            num_rows=len(block),
            channels=call.anchors.shape[1],
            anchor_index=block.index,
            **vars(sums),
            weight_sum=sums.sum,
            scale=_scale(call.temperature),
            temperature=call.temperature,
            **outputs,
            threads=torch.get_num_threads(),
        )


def score_counts(call: ScoreCounts) -> None:
    negatives = call.negatives, call.negative_labels
    if _fused("contrast_counts", call, negatives, neg_counts=call.neg_counts, pos_counts=call.pos_counts):
        return
    call.neg_counts.zero_()
    call.pos_counts.zero_()
    walk = _Walk((call.keys, call.key_labels), negatives)
    for block in _anchor_blocks(call.anchors, call.anchor_labels):
        neg_counts, pos_counts = torch.zeros(2, len(block), SCORE_BINS, dtype=torch.int32)
        walk.count(block, call.exclude_self, neg_counts, pos_counts)
        call.neg_counts.index_copy_(0, block.index, neg_counts)
        call.pos_counts.index_copy_(0, block.index, pos_counts)


class _Walk:
    """Both passes tile by tile, with products of torch."""

    def __init__(self, keys: _Rows, negatives: _Rows):
        self.keys = _Keys(*keys)
        self.negatives = self.keys if same(keys, negatives) else _Keys(*negatives)
        most = max(keys[1].shape[0], negatives[1].shape[0])
        self._buffer = torch.empty(BLOCK_A * min(BLOCK_K, most), dtype=torch.float32)

    def sum_up(
        self, block: _AnchorBlock, scale: float, exclude_self: bool, sums: _Sums, kept: _Thresholds | None
    ) -> None:
        def negatives(start: int, stop: int, weights: Tensor, tile: Tensor, labels: Tensor | None) -> None:
            native.launch(
                "infonce_negatives",
                scores=weights,
                num_rows=stop - start,
                num_keys=tile.shape[0],
                anchor_labels=block.labels[start:stop],
                key_labels=labels,
                neg_min=None if kept is None else kept.neg_min[start:stop],
                scale=scale,
                shift=sums.shift[start:stop],
                sum=sums.sum[start:stop],
                output=None if sums.negatives is None else sums.negatives[start:stop],
                channels=tile.shape[1],
                threads=torch.get_num_threads(),
            )
            if sums.negatives is not None:
                sums.negatives[start:stop].addmm_(weights, tile)

        def positives(start: int, stop: int, sigma: Tensor, tile: Tensor, indices: Tensor) -> None:
            native.launch(
                "infonce_positives",
                scores=sigma,
                num_rows=stop - start,
                num_keys=tile.shape[0],
                shift=sums.shift[start:stop],
                sum_log2=sum_log2[start:stop],
                anchor_index=block.index[start:stop] if exclude_self else None,
                key_index=indices if exclude_self else None,
                pos_max=None if kept is None else kept.pos_max[start:stop],
                scale=scale,
                loss_sum=sums.loss_sum[start:stop],
                pos_weight_sum=sums.pos_weight_sum[start:stop],
                pos_counts=sums.pos_counts[start:stop],
                threads=torch.get_num_threads(),
            )
            if sums.positives is not None:
                sums.positives[start:stop].addmm_(sigma, tile)

        self._each_negative_tile(block, negatives)
        sum_log2 = sums.sum.log2()
        self._each_positive_tile(block, positives)

    def count(self, block: _AnchorBlock, exclude_self: bool, neg_counts: Tensor, pos_counts: Tensor) -> None:
        def count(
            start: int,
            stop: int,
            scores: Tensor,
            labels: Tensor | None,
            indices: Tensor | None,
            counts: Tensor,
        ) -> None:
            native.launch(
                "count_scores",
                scores=scores,
                num_rows=stop - start,
                num_keys=scores.shape[1],
                anchor_labels=block.labels[start:stop],
                key_labels=labels,
                anchor_index=None if indices is None else block.index[start:stop],
                key_index=indices,
                counts=counts[start:stop],
                threads=torch.get_num_threads(),
            )

        self._each_negative_tile(
            block,
            lambda start, stop, scores, _, labels: count(start, stop, scores, labels, None, neg_counts),
        )
        self._each_positive_tile(
            block,
            lambda start, stop, scores, _, indices: count(
                start, stop, scores, None, indices if exclude_self else None, pos_counts
            ),
        )

    def _scores(self, block: _AnchorBlock, start: int, stop: int, tile: Tensor) -> Tensor:
        """Of some anchors and a tile, in a buffer that the next call takes again."""
        count = tile.shape[0]
        out = self._buffer[: (stop - start) * count].view(-1, count)
        return torch.mm(block.rows[start:stop], tile.T, out=out)

    def _each_negative_tile(
        self, block: _AnchorBlock, visit: Callable[[int, int, Tensor, Tensor, Tensor | None], None]
    ) -> None:
        """Calls visit(first anchor, last, scores, tile, labels or None if none is the anchors' own)."""
        with full_float32_products():
            for first, size, label in self.negatives.tiles:
                if label >= 0:
                    tile, labels = self.negatives.rows(first, size), None
                else:
                    tile, labels = self.negatives.labelled(first, size)
                for start, stop in block.other_than(label):
                    visit(start, stop, self._scores(block, start, stop, tile), tile, labels)

    def _each_positive_tile(
        self, block: _AnchorBlock, visit: Callable[[int, int, Tensor, Tensor, Tensor], None]
    ) -> None:
        """Calls visit(first anchor, last, scores, tile, indices of the keys)."""
        with full_float32_products():
            for label, (start, stop) in block.ranges.items():
                for tile, indices in self.keys.of_class(label):
                    visit(start, stop, self._scores(block, start, stop, tile), tile, indices)


class _Factors:
    """What eq. (5) needs of each anchor of a block: the log-sum-exp, and g / (|P| temperature) with and without S.

    An anchor without negatives has sigma = 0; +inf with factors of zero gives it that without a special case.
    """

    def __init__(self, block: _AnchorBlock, call: InfonceBackward):
        per_logit = call.grad_scale[block.index] / call.temperature
        neg_lse = call.neg_lse[block.index]
        alone = neg_lse == -math.inf
        self.neg_lse_log2 = torch.where(alone, math.inf, neg_lse * LOG2_E)
        self.pull = torch.where(alone, 0.0, per_logit)
        self.push = torch.where(alone, 0.0, per_logit * call.pos_weight[block.index])
        self.kept = _Thresholds(block, call) if isinstance(call, MinedBackward) else None


def _score_gradients(
    scores: Tensor,
    row_labels: Tensor,
    block: _AnchorBlock,
    factors: _Factors,
    row_index: Tensor | None,  # with exclude_self
    row_factors: _Factors | None,  # of rows that are anchors too
    temperature: float,
) -> None:
    def of_rows(name: str) -> Tensor | None:
        return None if row_factors is None else getattr(row_factors, name)

    def threshold(of: _Factors | None, name: str) -> Tensor | None:
        return None if of is None or of.kept is None else getattr(of.kept, name)

    native.launch(
        "infonce_score_gradients",
        scores=scores,
        num_rows=scores.shape[0],
        num_anchors=scores.shape[1],
        row_labels=row_labels,
        anchor_labels=block.labels,
        row_index=row_index,
        anchor_index=None if row_index is None else block.index,
        neg_lse_log2=factors.neg_lse_log2,
        push=factors.push,
        pull=factors.pull,
        row_neg_lse_log2=of_rows("neg_lse_log2"),
        row_push=of_rows("push"),
        row_pull=of_rows("pull"),
        neg_min=threshold(factors, "neg_min"),
        pos_max=threshold(factors, "pos_max"),
        row_neg_min=threshold(row_factors, "neg_min"),
        row_pos_max=threshold(row_factors, "pos_max"),
        scale=_scale(temperature),
        threads=torch.get_num_threads(),
    )


def infonce_backward(call: InfonceBackward) -> None:
    if call.others is None and native.has_fused():
        native.launch(
            "contrast_backward",
            anchors=call.anchors,
            anchor_labels=call.anchor_labels,
            num_anchors=call.anchors.shape[0],
            channels=call.anchors.shape[1],
            exclude_self=call.exclude_self,
            temperature=call.temperature,
            neg_lse=call.neg_lse,
            pos_weight=call.pos_weight,
            grad_scale=call.grad_scale,
            neg_min=call.neg_min if isinstance(call, MinedBackward) else None,
            pos_max=call.pos_max if isinstance(call, MinedBackward) else None,
            grad=call.grad,
            threads=torch.get_num_threads(),
        )
        return
    call.grad.zero_()
    with full_float32_products():
        if call.others is None:
            _backward_symmetric(call)
        else:
            _backward_keys(call, _Keys(*call.others))


def _backward_keys(call: InfonceBackward, keys: _Keys) -> None:
    scores = torch.empty(BLOCK_K * min(BLOCK_A, call.anchors.shape[0]), dtype=torch.float32)
    for block in _anchor_blocks(call.anchors, call.anchor_labels):
        factors = _Factors(block, call)
        for first, count, _ in keys.tiles:
            tile, last = keys.rows(first, count), first + count
            ds = torch.mm(tile, block.rows.T, out=scores[: count * len(block)].view(count, -1))
            index = torch.arange(first, last) if call.exclude_self else None
            _score_gradients(ds, keys.key_labels[first:last], block, factors, index, None, call.temperature)
            call.grad[first:last].addmm_(ds, block.rows)


def _backward_symmetric(call: InfonceBackward) -> None:
    blocks = [(block, _Factors(block, call)) for block in _anchor_blocks(call.anchors, call.anchor_labels)]
    for rows, row_factors in blocks:
        grad = torch.zeros_like(rows.rows)
        for block, factors in blocks:
            ds = rows.rows @ block.rows.T
            index = rows.index if call.exclude_self else None
            _score_gradients(ds, rows.labels, block, factors, index, row_factors, call.temperature)
            grad.addmm_(ds, block.rows)
        call.grad[rows.index] = grad


mined_backward = infonce_backward  # the factors of a block know what mining keeps
