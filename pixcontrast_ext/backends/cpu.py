"""The C++ backend for CPU tensors.

Sampling, gather and enqueue are one native call each. InfoNCE is a loop over tiles of anchors x keys small enough to
stay in cache. With AVX-512 its forward is native throughout (`_FusedWalk`); elsewhere, and in the backwards, the
products are torch's and the steps between them native. Extra memory is a few tiles, whatever the number of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pixcontrast_ext.backends import native, schedule

# A tile of scores is 4 MiB, and is written and read three times while it is in the shared cache. Smaller tiles would
# fit the cores' own caches, but cost more in starting and joining threads than they save.
BLOCK_A = 1024
BLOCK_K = 1024

LOG2_E = math.log2(math.e)


def unsupported(
    op: str, dtype: torch.dtype | None, channels: int | None = None, device: torch.device | None = None
) -> str | None:
    """Why this backend cannot serve a call, or None if it can."""
    if dtype is not None and dtype not in native.DTYPE_CODES:
        return f"{dtype} is not one of float32, float16, bfloat16"
    return native.unavailable or native.wrong_instruction_set


def _bad_label(labels: Tensor, error: ValueError, num_classes: int, ignore_index: int) -> ValueError:
    position, value = error.args
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), labels.shape))
    return ValueError(
        f"labels{list(place)} is {value}, "
        f"expected 0 <= label < num_classes={num_classes} or ignore_index={ignore_index}"
    )


def _bad_index(embeddings: Tensor, error: ValueError) -> ValueError:
    row, value = error.args
    batch, _, height, width = embeddings.shape
    return ValueError(f"indices[{row}] is {value}, expected 0 <= index < B*H*W={batch * height * width}")


def hard_anchor_sampling(
    labels: Tensor,  # [B, H, W] int64
    predictions: Tensor,  # [B, H, W] int64
    priority: Tensor,  # [B, H, W] int32
    num_classes: int,
    max_samples: int,
    max_views: int,
    min_pixels: int,
    ignore_index: int,
    indices: Tensor,  # [max_samples] int64, out
    anchor_labels: Tensor,  # [max_samples] int32, out
    count: Tensor,  # [] int32, out
) -> None:
    try:
        native.launch(
            "sampling",
            labels=labels,
            predictions=predictions,
            priority=priority,
            batch=labels.shape[0],
            pixels=labels.shape[1] * labels.shape[2],
            num_classes=num_classes,
            max_samples=max_samples,
            max_views=max_views,
            min_pixels=min_pixels,
            ignore_index=ignore_index,
            pool_keys=torch.empty(labels.shape, dtype=torch.int64),
            indices=indices,
            anchor_labels=anchor_labels,
            count=count,
            threads=native.threads(),
        )
    except native.BadValue as error:
        raise _bad_label(labels, error, num_classes, ignore_index) from None


def gather(
    embeddings: Tensor,  # [B, D, H, W]
    indices: Tensor,  # [A] int64
    normalize: bool,
    rows: Tensor,  # [A, D], out
    inv_norm: Tensor,  # [A] float32, out
) -> None:
    try:
        native.launch(
            "gather",
            **native.map_fields(embeddings),
            indices=indices,
            num_rows=indices.shape[0],
            normalize=normalize,
            wide=torch.empty(rows.shape, dtype=torch.float32),
            rows_dtype=native.DTYPE_CODES[rows.dtype],
            rows=rows,
            inv_norm=inv_norm,
            threads=native.threads(),
        )
    except native.BadValue as error:
        raise _bad_index(embeddings, error) from None


def gather_backward(
    grad_rows: Tensor,  # [A, D]
    embeddings: Tensor,  # [B, D, H, W]
    indices: Tensor,  # [A] int64
    inv_norm: Tensor,  # [A] float32
    normalize: bool,
    grad_embeddings: Tensor,  # [B, D, H, W] dense, out
) -> None:
    strides = grad_embeddings.stride()
    try:
        native.launch(
            "gather_backward",
            **native.map_fields(embeddings),
            indices=indices,
            num_rows=indices.shape[0],
            normalize=normalize,
            rows_dtype=native.DTYPE_CODES[grad_rows.dtype],
            grad_rows=grad_rows,
            inv_norm=inv_norm,
            wide=torch.empty(grad_rows.shape, dtype=torch.float32),
            grad_map=grad_embeddings,
            grad_stride_batch=strides[0],
            grad_stride_channel=strides[1],
            grad_stride_row=strides[2],
            grad_stride_column=strides[3],
            threads=native.threads(),
        )
    except native.BadValue as error:
        raise _bad_index(embeddings, error) from None


def enqueue_collect(
    embeddings: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64
    priority: Tensor,  # [B, H, W] int32
    num_classes: int,
    pixels_per_image: int,
    ignore_index: int,
    normalize: bool,
    rows: Tensor,  # [B, C, 1 + k, D], out
    row_labels: Tensor,  # [B, C, 1 + k] int32, out
) -> None:
    batch, channels = embeddings.shape[:2]
    try:
        native.launch(
            "collect",
            **native.map_fields(embeddings),
            labels=labels,
            priority=priority,
            num_classes=num_classes,
            pixels_per_image=pixels_per_image,
            ignore_index=ignore_index,
            normalize=normalize,
            pool_keys=torch.empty(labels.shape, dtype=torch.int64),
            weights=torch.zeros(labels.numel() + 15, dtype=torch.float32),
            sums=torch.empty(batch, num_classes, channels, dtype=torch.float64),
            wide=torch.empty(batch, num_classes, pixels_per_image, channels, dtype=torch.float32),
            rows_dtype=native.DTYPE_CODES[rows.dtype],
            rows=rows,
            row_labels=row_labels,
            threads=native.threads(),
        )
    except native.BadValue as error:
        raise _bad_label(labels, error, num_classes, ignore_index) from None


def enqueue_write(
    rows: Tensor,  # [N, C, 1 + k, D], dtype of the keys
    row_labels: Tensor,  # [N, C, 1 + k] int32
    keys: Tensor,  # [C, R + P, D], in and out
    key_labels: Tensor,  # [C, R + P] int32, in and out
    region_ptr: Tensor,  # [C] int64, in and out, and so the next three
    region_fill: Tensor,
    pixel_ptr: Tensor,
    pixel_fill: Tensor,
    region_slots: int,
) -> None:
    try:
        native.launch(
            "write",
            rows=rows,
            row_labels=row_labels,
            batch=rows.shape[0],
            num_classes=keys.shape[0],
            pixels_per_image=rows.shape[2] - 1,
            row_bytes=rows.shape[3] * rows.element_size(),
            region_slots=region_slots,
            pixel_slots=keys.shape[1] - region_slots,
            keys=keys,
            key_labels=key_labels,
            region_ptr=region_ptr,
            region_fill=region_fill,
            pixel_ptr=pixel_ptr,
            pixel_fill=pixel_fill,
            threads=native.threads(),
        )
    except native.BadValue as error:
        position, value = error.args
        kind, label = "fill" if position % 2 else "pointer", position // 2
        raise ValueError(f"a ring {kind} of class {label} is {value}, outside of its ring") from None


def _widen(source: Tensor, indices: Tensor | None, rows: Tensor) -> Tensor:
    """rows[i] = source[indices[i]] in fp32; the first rows in their order if `indices` is None."""
    native.launch(
        "widen",
        source=source,
        source_dtype=native.DTYPE_CODES[source.dtype],
        indices=indices,
        num_rows=rows.shape[0],
        channels=rows.shape[1],
        rows=rows,
        threads=native.threads(),
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
        """Of consecutive keys those that have a label, and their labels: the others may hold anything, even
        NaN.
        """
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
    """Some anchors that have a label, sorted by class and widened to fp32, or bf16 as they are."""

    def __init__(self, anchors: Tensor, anchor_labels: Tensor, order: Tensor, dtype: torch.dtype):
        self.index = order  # [n], row of each in the caller's tensors
        self.labels = anchor_labels[order]
        if dtype == torch.float32:
            self.rows = _widen(
                anchors, order, torch.empty(order.shape[0], anchors.shape[1], dtype=torch.float32)
            )
        else:
            self.rows = F.pad(anchors[order], (0, anchors.shape[1] % 2))  # bf16 is multiplied in pairs
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


def _anchor_blocks(
    anchors: Tensor, anchor_labels: Tensor, dtype: torch.dtype = torch.float32
) -> Iterator[_AnchorBlock]:
    order = torch.argsort(anchor_labels, stable=True)
    order = order[int((anchor_labels < 0).sum()) :]
    for start in range(0, order.shape[0], BLOCK_A):
        yield _AnchorBlock(anchors, anchor_labels, order[start : start + BLOCK_A], dtype)


class _Sums:
    """What the two passes of the forward sum up for a block of anchors."""

    def __init__(self, size: int, channels: int, with_grad: bool, rounds_weights: bool):
        self.shift = torch.full((size,), -math.inf, dtype=torch.float32)
        self.sum = torch.zeros(size, dtype=torch.float32)  # of exp2(score - shift)
        self.weight_sum = torch.zeros_like(self.sum) if rounds_weights else self.sum
        self.loss_sum = torch.zeros(size, dtype=torch.float64)
        self.pos_weight_sum = torch.zeros(size, dtype=torch.float64)
        self.pos_counts = torch.zeros(size, dtype=torch.int64)
        # O of pass 1, before its division, and G of pass 2
        self.negatives = torch.zeros(size, channels, dtype=torch.float32) if with_grad else None
        self.positives = torch.zeros(size, channels, dtype=torch.float32) if with_grad else None


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
    for out, nothing in ((loss, 0), (neg_lse, -math.inf), (pos_weight, 0), (pos_count, 0), (anchor_grad, 0)):
        if out is not None:
            out.fill_(nothing)  # what rows without a label keep
    fused_dtype = native.fused_dtype(keys.dtype)
    walk: _FusedWalk | _TorchWalk = (
        _TorchWalk(keys, key_labels) if fused_dtype is None else _FusedWalk(keys, key_labels, fused_dtype)
    )
    for block in _anchor_blocks(anchors, anchor_labels, fused_dtype or torch.float32):
        sums = _Sums(len(block), anchors.shape[1], anchor_grad is not None, fused_dtype == torch.bfloat16)
        walk(block, LOG2_E / temperature, exclude_self, sums)
        native.launch(
            "infonce_finish",
            num_rows=len(block),
            channels=anchors.shape[1],
            anchor_index=block.index,
            **vars(sums),
            temperature=temperature,
            loss=loss,
            neg_lse=neg_lse,
            pos_weight=pos_weight,
            pos_count=pos_count,
            anchor_grad=anchor_grad,
            threads=native.threads(),
        )


class _FusedWalk:
    """Both passes in one native call, whose products are its own."""

    def __init__(self, keys: Tensor, key_labels: Tensor, dtype: torch.dtype):
        self.keys, self.key_labels = keys, key_labels
        self.block_k = native.fused_block_k()
        self.tiles = _plan_tiles(key_labels, self.block_k)
        # a tile packed for either product, and the next tile
        self.panels = torch.empty(2 * 2 * self.block_k * (-(-keys.shape[1] // 32) * 32), dtype=dtype)

    def __call__(self, block: _AnchorBlock, scale: float, exclude_self: bool, sums: _Sums) -> None:
        native.launch(
            "infonce_fused_forward",
            anchors=block.rows,
            num_rows=len(block),
            channels=self.keys.shape[1],
            anchor_labels=block.labels,
            anchor_index=block.index if exclude_self else None,
            keys=self.keys,
            keys_dtype=native.DTYPE_CODES[self.keys.dtype],
            key_labels=self.key_labels,
            num_keys=self.keys.shape[0],
            tiles=self.tiles,
            num_tiles=self.tiles.shape[0],
            scale=scale,
            panels=self.panels,
            neg_lse=torch.empty(len(block), dtype=torch.float32),
            **vars(sums),
            threads=native.threads(),
        )


class _TorchWalk:
    """Both passes tile by tile, with products of torch."""

    def __init__(self, keys: Tensor, key_labels: Tensor):
        self.keys = _Keys(keys, key_labels)

    def __call__(self, block: _AnchorBlock, scale: float, exclude_self: bool, sums: _Sums) -> None:
        scores = torch.empty(len(block) * min(BLOCK_K, self.keys.keys.shape[0]), dtype=torch.float32)
        with schedule.full_float32_products():
            self._negatives(block, scale, scores, sums)
            self._positives(block, scale, exclude_self, scores, sums)

    def _negatives(self, block: _AnchorBlock, scale: float, scores: Tensor, sums: _Sums) -> None:
        for first, size, label in self.keys.tiles:
            if label >= 0:
                tile, labels = self.keys.rows(first, size), None
            else:
                tile, labels = self.keys.labelled(first, size)
            count = tile.shape[0]
            for start, stop in block.other_than(label):
                weights = torch.mm(
                    block.rows[start:stop], tile.T, out=scores[: (stop - start) * count].view(-1, count)
                )
                native.launch(
                    "infonce_negatives",
                    scores=weights,
                    num_rows=stop - start,
                    num_keys=count,
                    anchor_labels=block.labels[start:stop],
                    key_labels=labels,
                    scale=scale,
                    shift=sums.shift[start:stop],
                    sum=sums.sum[start:stop],
                    output=None if sums.negatives is None else sums.negatives[start:stop],
                    channels=tile.shape[1],
                    threads=native.threads(),
                )
                if sums.negatives is not None:
                    sums.negatives[start:stop].addmm_(weights, tile)

    def _positives(
        self, block: _AnchorBlock, scale: float, exclude_self: bool, scores: Tensor, sums: _Sums
    ) -> None:
        neg_lse_log2 = sums.shift + sums.sum.log2()
        for label, (start, stop) in block.ranges.items():
            for tile, indices in self.keys.of_class(label):
                count = tile.shape[0]
                sigma = torch.mm(
                    block.rows[start:stop], tile.T, out=scores[: (stop - start) * count].view(-1, count)
                )
                native.launch(
                    "infonce_positives",
                    scores=sigma,
                    num_rows=stop - start,
                    num_keys=count,
                    neg_lse=neg_lse_log2[start:stop],
                    anchor_index=block.index[start:stop] if exclude_self else None,
                    key_index=indices if exclude_self else None,
                    scale=scale,
                    loss_sum=sums.loss_sum[start:stop],
                    pos_weight_sum=sums.pos_weight_sum[start:stop],
                    pos_counts=sums.pos_counts[start:stop],
                    threads=native.threads(),
                )
                if sums.positives is not None:
                    sums.positives[start:stop].addmm_(sigma, tile)


class _Scales:
    """Per anchor of a block, what eq. (5) needs: log-sum-exp in log2 units, and g / (|P| temperature) with
    and without S.

    An anchor without negatives has sigma = 0; +inf with zero scales gives it that without a special case.
    """

    def __init__(
        self, block: _AnchorBlock, neg_lse: Tensor, pos_weight: Tensor, grad_scale: Tensor, temperature: float
    ):
        per_logit = grad_scale[block.index] / temperature
        lse = neg_lse[block.index]
        alone = lse == -math.inf
        self.neg_lse = torch.where(alone, math.inf, lse * LOG2_E)
        self.pos_scale = torch.where(alone, 0.0, per_logit)
        self.neg_scale = torch.where(alone, 0.0, per_logit * pos_weight[block.index])


def _coefficients(
    scores: Tensor,
    row_labels: Tensor,
    block: _AnchorBlock,
    scales: _Scales,
    row_index: Tensor | None,
    row_scales: _Scales | None,
    temperature: float,
) -> None:
    native.launch(
        "infonce_coefficients",
        scores=scores,
        num_rows=scores.shape[0],
        num_anchors=scores.shape[1],
        row_labels=row_labels,
        anchor_labels=block.labels,
        row_index=row_index,
        anchor_index=None if row_index is None else block.index,
        neg_lse=scales.neg_lse,
        neg_scale=scales.neg_scale,
        pos_scale=scales.pos_scale,
        row_neg_lse=None if row_scales is None else row_scales.neg_lse,
        row_neg_scale=None if row_scales is None else row_scales.neg_scale,
        row_pos_scale=None if row_scales is None else row_scales.pos_scale,
        scale=LOG2_E / temperature,
        threads=native.threads(),
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
    key_grad.zero_()
    tiles = _Keys(keys, key_labels)
    scores = torch.empty(BLOCK_K * min(BLOCK_A, anchors.shape[0]), dtype=torch.float32)
    with schedule.full_float32_products():
        for block in _anchor_blocks(anchors, anchor_labels):
            scales = _Scales(block, neg_lse, pos_weight, grad_scale, temperature)
            for first, count, _ in tiles.tiles:
                tile = tiles.rows(first, count)
                ds = torch.mm(tile, block.rows.T, out=scores[: count * len(block)].view(count, -1))
                index = torch.arange(first, first + count) if exclude_self else None
                _coefficients(ds, key_labels[first : first + count], block, scales, index, None, temperature)
                key_grad[first : first + count].addmm_(ds, block.rows)


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
    anchor_grad.zero_()
    with schedule.full_float32_products():
        blocks = [
            (block, _Scales(block, neg_lse, pos_weight, grad_scale, temperature))
            for block in _anchor_blocks(anchors, anchor_labels)
        ]
        for rows, row_scales in blocks:
            grad = torch.zeros_like(rows.rows)
            for block, scales in blocks:
                ds = rows.rows @ block.rows.T
                index = rows.index if exclude_self else None
                _coefficients(ds, rows.labels, block, scales, index, row_scales, temperature)
                grad.addmm_(ds, block.rows)
            anchor_grad[rows.index] = grad
