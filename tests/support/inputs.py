"""Random inputs of the ops: rows with labels, and maps."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BANK, RANDOM, BLOCKS = "bank", "random", "blocks"  # orders of keys

# Memory layouts of a map [B, D, H, W].
LAYOUTS = {
    "contiguous": lambda e: e.contiguous(),
    "channels_last": lambda e: e.contiguous(memory_format=torch.channels_last),
    "transposed": lambda e: e.transpose(2, 3).contiguous().transpose(2, 3),
    "offset": lambda e: F.pad(e, (1, 2, 3, 0))[:, :, 3:, 1:-2],  # storage offset and padded strides
    "strided": lambda e: e.repeat_interleave(2, 1)[:, ::2],
}


def draw_rows(
    a: int,
    k: int,
    d: int,
    classes: int,
    *,
    order: str = RANDOM,
    dtype: torch.dtype = torch.float32,
    label_dtype: torch.dtype = torch.int64,
    unlabelled: float | None = 0.1,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors, their labels, keys and their labels; all rows are unit vectors.

    The keys come in a bank's order, in random order, or in short and long runs of a class. A share `unlabelled` of both
    has label -1.
    """
    anchors, keys = (F.normalize(torch.randn(n, d, device=device), dim=1).to(dtype) for n in (a, k))
    anchor_labels, key_labels = (
        torch.randint(0, classes, (n,), device=device, dtype=label_dtype) for n in (a, k)
    )
    if order == BANK:
        anchor_labels, key_labels = anchor_labels.sort().values, key_labels.sort().values
    elif order == BLOCKS:
        runs = torch.randint(0, classes, (k,)).repeat_interleave(torch.randint(1, 150, (k,)))
        key_labels = runs[:k]
    if unlabelled is not None:
        anchor_labels[torch.rand(a) < unlabelled] = -1
        key_labels[torch.rand(k) < unlabelled] = -1
    return anchors, anchor_labels, keys, key_labels


class Maps(NamedTuple):
    embeddings: Tensor | None  # [B, D, H, W]
    labels: Tensor  # [B, H, W]
    predictions: Tensor | None  # [B, H, W]
    priority: Tensor  # [B, H, W] int32


def draw_maps(
    batch: int,
    height: int,
    width: int,
    classes: int,
    *,
    channels: int | None = None,
    ignored: float = 0.2,
    wrong: float | None = None,
    priorities: int = 2**31 - 1,
    generator: torch.Generator | None = None,
) -> Maps:
    """Labels and priorities of images; embeddings if there are channels, predictions if a share `wrong` is given.

    Priorities lie between -`priorities` and `priorities`; a small range gives ties.
    """
    shape = (batch, height, width)
    embeddings = (
        None if channels is None else torch.randn(batch, channels, height, width, generator=generator)
    )
    labels, predictions = torch.randint(0, classes, shape, generator=generator), None
    if wrong is not None:
        flip = torch.rand(shape, generator=generator) < wrong
        predictions = torch.where(flip, torch.randint(0, classes, shape, generator=generator), labels)
    labels[torch.rand(shape, generator=generator) < ignored] = 255
    priority = torch.randint(-priorities, priorities, shape, dtype=torch.int32, generator=generator)
    return Maps(embeddings, labels, predictions, priority)
