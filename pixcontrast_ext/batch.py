"""What passes between the stages of a step of the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pixcontrast_ext.bank import MemoryBank
from pixcontrast_ext.maps import check_classes, check_map, pick_confidence, pick_labels
from pixcontrast_ext.ops import checks, steering


class Keys(NamedTuple):
    """What a step enqueues."""

    embeddings: Tensor  # [B, D, h, w]
    labels: Tensor  # [B, h, w] int64
    confidence: Tensor | None  # [B, h, w]


class Batch(NamedTuple):
    """The checked inputs of a step of the loss."""

    embeddings: Tensor  # [B, D, h, w]
    labels: Tensor  # [B, h, w] int64
    predictions: Tensor  # [B, h, w] int64
    confidence: Tensor | None = None  # [B, h, w]
    keys: Keys | None = None  # if it is not the batch that is enqueued


class Outcome(NamedTuple):
    """The results of a step of the loss."""

    loss: Tensor  # []
    contrast: Tensor  # [] the same before its weight
    anchor_labels: Tensor  # [A], -1 where there is no anchor


def zero_of(embeddings: Tensor) -> Tensor:
    """A zero that gives the embeddings a gradient of zero, whatever they hold (0 * NaN would be NaN).

    `DistributedDataParallel` demands a gradient for every parameter in every step, so also for the head's.
    """
    return embeddings[:0].sum(dtype=torch.float32)


def checked_keys(
    keys_from: tuple[Tensor, ...], bank: MemoryBank | None, min_purity: float, ignore_index: int
) -> Keys:
    """What the bank gets in place of the batch. Raises TypeError or ValueError unless it takes that."""
    if bank is None:
        raise ValueError("keys_from fills a bank, and the loss has none")
    if not isinstance(keys_from, (tuple, list)) or len(keys_from) not in (2, 3):
        got = len(keys_from) if isinstance(keys_from, (tuple, list)) else type(keys_from).__name__
        raise TypeError(
            f"keys_from must be (embeddings, labels) or (embeddings, labels, confidence), got {got}"
        )
    embeddings, labels, *confidences = keys_from
    checks.check_embeddings(embeddings, "embeddings of keys_from")
    bank.check(embeddings, "embeddings of keys_from")
    checks.check_labels("labels of keys_from", labels, None, embeddings.device)
    check_map("labels of keys_from", labels, 3, embeddings)
    size = (embeddings.shape[2], embeddings.shape[3])
    labels = pick_labels(labels, size, min_purity, ignore_index)
    check_classes("labels of keys_from", labels, bank.num_classes, ignore_index)
    if not confidences:
        return Keys(embeddings, labels, None)
    confidence = pick_confidence("confidence of keys_from", confidences[0], embeddings)
    return Keys(embeddings, steering.only_drawn(labels, confidence, ignore_index), confidence)
