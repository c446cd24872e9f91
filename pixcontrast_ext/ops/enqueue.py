"""Enqueueing a batch into a memory bank, in two steps, between which ranks can exchange what they collected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext.backends.calls import Backend, Collect, Write
from pixcontrast_ext.ops import library
from pixcontrast_ext.ops.exchange import Exchange
from pixcontrast_ext.ops.signature import INT32_MAX


def _allocate_collect(
    embeddings: Tensor, num_classes: int, pixels_per_image: int, dtype: torch.dtype, **_: Any
) -> dict[str, Tensor]:
    slots = (embeddings.shape[0], num_classes, 1 + pixels_per_image)
    return {
        "rows": embeddings.new_empty(*slots, embeddings.shape[1], dtype=dtype),
        "row_labels": embeddings.new_empty(slots, dtype=torch.int32),
    }


def _fill_collect(backend: Backend, call: Collect) -> None:
    if call.embeddings.numel() == 0:
        call.rows.zero_()
        call.row_labels.fill_(-1)
    else:
        backend.enqueue_collect(call)


library.define(
    "enqueue_collect(Tensor embeddings, Tensor labels, Tensor priority, SymInt num_classes, int pixels_per_image, "
    "int ignore_index, bool normalize, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    dict(embeddings="[B, D, H, W] T strided", labels="[B, H, W] int64", priority="[B, H, W] int32"),
    {
        "D": (1, None),
        "num_classes": (1, INT32_MAX),
        "B * num_classes": (0, INT32_MAX),
        "H * W": (0, 2**32 - 1),
        "pixels_per_image": (0, INT32_MAX),
    },
    Collect,
    _allocate_collect,
    _fill_collect,
)
library.define(
    "enqueue_write(Tensor rows, Tensor row_labels, Tensor(a!) keys, Tensor(b!) key_labels, Tensor(c!) region_ptr, "
    "Tensor(d!) region_fill, Tensor(e!) pixel_ptr, Tensor(f!) pixel_fill, int region_slots, str backend) -> ()",
    dict(
        keys="[C, S, D] T",
        key_labels="[C, S] int32",
        region_ptr="[C] int64",
        region_fill="[C] int64",
        pixel_ptr="[C] int64",
        pixel_fill="[C] int64",
        rows="[N, C, V, D] T",
        row_labels="[N, C, V] int32",
    ),
    {
        "D": (1, None),
        "V": (1, None),
        "region_slots": (0, "S"),
        "C": (0, INT32_MAX // 2),  # of two rings each
        "S": (0, INT32_MAX // 2),  # a slot and the candidates after it are added in int32
        "N * V": (0, INT32_MAX // 2),
    },
    Write,
    lambda **_: {},
    "enqueue_write",
)


def collect(
    embeddings: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64
    priority: Tensor,  # [B, H, W] int32
    backend: str,
    *,
    num_classes: int,
    pixels_per_image: int,
    ignore_index: int,
    normalize: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What a batch offers a bank: rows [B, C, 1 + pixels_per_image, D] and their labels, -1 where there is nothing.

    Slot 0 of an (image, class) is its region, the others its pixels of smallest (priority, pixel) in pixel
    order. Rows are of `dtype`; one whose norm is 0 or not finite is never offered. The arguments have
    been checked, and the backend serves them.
    """
    rows: tuple[Tensor, Tensor] = torch.ops.pixcontrast.enqueue_collect(
        embeddings.detach(),
        labels,
        priority,
        num_classes,
        pixels_per_image,
        ignore_index,
        normalize,
        dtype,
        backend,
    )
    return rows


def write(
    rows: Tensor,  # [N, C, 1 + k, D]
    row_labels: Tensor,  # [N, C, 1 + k] int32
    keys: Tensor,  # [C, R + P, D]
    key_labels: Tensor,  # [C, R + P] int32
    region_ptr: Tensor,  # [C] int64
    region_fill: Tensor,  # [C] int64
    pixel_ptr: Tensor,  # [C] int64
    pixel_fill: Tensor,  # [C] int64
    *,
    region_slots: int,
    exchange: Exchange,
    backend: str,
) -> None:
    """Append collected rows, those of all ranks in rank order, to the rings of a bank, in place and in image order.

    If there are more rows than slots, only the last ones are kept.
    """
    torch.ops.pixcontrast.enqueue_write_all_ranks(
        rows,
        row_labels,
        keys,
        key_labels,
        region_ptr,
        region_fill,
        pixel_ptr,
        pixel_fill,
        region_slots,
        exchange.number,
        backend,
    )
