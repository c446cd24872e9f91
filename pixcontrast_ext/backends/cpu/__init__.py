"""The C++ backend for CPU tensors: sampling, gather and enqueue are one native call each, and so is most of InfoNCE.

What has no products of its own is a loop over tiles: the backward of keys, and all of it without AVX2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixcontrast_ext.backends import native
from pixcontrast_ext.backends.calls import Collect, Gather, GatherBackward, Sampling, Write
from pixcontrast_ext.backends.cpu.infonce import (
    infonce_backward,
    infonce_forward,
    mined_backward,
    mined_forward,
    score_counts,
)
from pixcontrast_ext.backends.errors import bad_index, bad_label

__all__ = [
    "enqueue_collect",
    "enqueue_write",
    "gather",
    "gather_backward",
    "hard_anchor_sampling",
    "infonce_backward",
    "infonce_forward",
    "mined_backward",
    "mined_forward",
    "score_counts",
    "unsupported",
]


def unsupported(
    op: str, dtype: torch.dtype | None, channels: int | None = None, device: torch.device | None = None
) -> str | None:
    """Why this backend cannot serve a call, or None if it can."""
    if dtype is not None and dtype not in native.DTYPES:
        return f"{dtype} is not one of float32, float16, bfloat16"
    return native.unavailable or native.wrong_instruction_set


def hard_anchor_sampling(call: Sampling) -> None:
    try:
        native.launch(
            "sampling", call, pool_keys=torch.empty_like(call.labels), threads=torch.get_num_threads()
        )
    except native.BadValue as error:
        raise bad_label(call, *error.args) from None


def gather(call: Gather) -> None:
    _gather("gather", call, call.rows)


def gather_backward(call: GatherBackward) -> None:
    _gather("gather_backward", call, call.grad_rows)


def _gather(kernel: str, call: Gather | GatherBackward, rows: Tensor) -> None:
    wide = torch.empty(rows.shape, dtype=torch.float32)
    try:
        native.launch(kernel, call, wide=wide, threads=torch.get_num_threads())
    except native.BadValue as error:
        raise bad_index(call.embeddings, *error.args) from None


def enqueue_collect(call: Collect) -> None:
    batch, channels = call.embeddings.shape[:2]
    of_classes = batch, call.num_classes
    try:
        native.launch(
            "collect",
            call,
            pool_keys=torch.empty_like(call.labels),
            weights=torch.zeros(call.labels.numel() + native._C.LANES - 1, dtype=torch.float32),
            sums=torch.empty(*of_classes, channels, dtype=torch.float64),
            wide=torch.empty(*of_classes, call.pixels_per_image, channels, dtype=torch.float32),
            threads=torch.get_num_threads(),
        )
    except native.BadValue as error:
        raise bad_label(call, *error.args) from None


def enqueue_write(call: Write) -> None:
    try:
        native.launch("write", call, threads=torch.get_num_threads())
    except native.BadValue as error:
        position, value = error.args
        kind, label = "fill" if position % 2 else "pointer", position // 2
        raise ValueError(f"a ring {kind} of class {label} is {value}, outside of its ring") from None
