"""Enqueueing a batch into a memory bank, in two steps, so that ranks can exchange what they collected in
between.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from pixcontrast_ext import backends, ops
from pixcontrast_ext.ops.exchange import Exchange
from pixcontrast_ext.ops.priority import check_priority, draw_priority
from pixcontrast_ext.ops.signature import INT32_MAX


def _allocate_collect(
    embeddings: Tensor,
    labels: Tensor,
    priority: Tensor,
    num_classes: int,
    pixels_per_image: int,
    ignore_index: int,
    normalize: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    slots = (embeddings.shape[0], num_classes, 1 + pixels_per_image)
    return (
        embeddings.new_empty(*slots, embeddings.shape[1], dtype=dtype),
        embeddings.new_empty(slots, dtype=torch.int32),
    )


def _fill_collect(
    module: ModuleType,
    embeddings: Tensor,
    labels: Tensor,
    priority: Tensor,
    num_classes: int,
    pixels_per_image: int,
    ignore_index: int,
    normalize: bool,
    dtype: torch.dtype,
    outputs: tuple[Tensor, Tensor],
) -> None:
    if embeddings.numel() == 0:
        outputs[0].zero_()
        outputs[1].fill_(-1)
        return
    module.enqueue_collect(
        embeddings,
        labels.contiguous(),
        priority.contiguous(),
        num_classes,
        pixels_per_image,
        ignore_index,
        normalize,
        *outputs,
    )


def _allocate_write(*args: object) -> None:
    return None


def _fill_write(
    module: ModuleType,
    rows: Tensor,
    row_labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    region_ptr: Tensor,
    region_fill: Tensor,
    pixel_ptr: Tensor,
    pixel_fill: Tensor,
    region_slots: int,
    outputs: None,
) -> None:
    module.enqueue_write(
        rows.contiguous(),
        row_labels.contiguous(),
        keys,
        key_labels,
        region_ptr,
        region_fill,
        pixel_ptr,
        pixel_fill,
        region_slots,
    )


ops.define(
    "enqueue_collect(Tensor embeddings, Tensor labels, Tensor priority, int num_classes, int pixels_per_image, "
    "int ignore_index, bool normalize, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    dict(embeddings="[B, D, H, W] T", labels="[B, H, W] int64", priority="[B, H, W] int32"),
    {
        "D": (1, None),
        "num_classes": (1, INT32_MAX),
        "B * num_classes": (0, INT32_MAX),
        "H * W": (0, 2**32 - 1),
        "pixels_per_image": (0, INT32_MAX),
    },
    _allocate_collect,
    _fill_collect,
)
ops.define(
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
        "S": (0, INT32_MAX // 2),  # a slot and the candidates behind it are added up in int32
        "N * V": (0, INT32_MAX // 2),
    },
    _allocate_write,
    _fill_write,
)


def collect(
    embeddings: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W]
    *,
    num_classes: int,
    pixels_per_image: int,
    ignore_index: int,
    normalize: bool,
    dtype: torch.dtype,
    priority: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What a batch offers a bank: rows [B, C, 1 + pixels_per_image, D] and their labels, -1 where there is
    nothing.

    Slot 0 of an (image, class) is its region, the others its pixels of smallest (priority, pixel) in pixel
    order. Rows are of `dtype`; one whose norm is 0 or not finite is never offered.

    Raises:
        TypeError, ValueError: as `MemoryBank.enqueue`.
    """
    ops.check_embeddings(embeddings)
    batch, _, height, width = embeddings.shape
    ops.check_labels("labels", labels, (batch, height, width), embeddings.device)
    if priority is None:
        priority = draw_priority(labels, generator)
    check_priority(priority, labels)
    rows: tuple[Tensor, Tensor] = torch.ops.pixcontrast.enqueue_collect(
        embeddings.detach(),
        labels.long(),
        priority,
        num_classes,
        pixels_per_image,
        ignore_index,
        normalize,
        dtype,
        backends.resolve(backend, "enqueue_collect", embeddings.device, ops.widest(embeddings.dtype, dtype)),
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
    backend: str | None = None,
) -> None:
    """Append collected rows, those of all ranks in rank order, to the rings of a bank, in place, in image order; the
    last ones of more than a ring stay.
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
        backends.resolve(backend, "enqueue_write", keys.device, keys.dtype),
    )
