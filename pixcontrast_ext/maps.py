"""Maps of labels and logits that go with one of embeddings: do they fit, how are they resized, their cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pixcontrast_ext.backends.errors import bad_class


def check_map(name: str, value: Tensor, dims: int, embeddings: Tensor) -> None:
    """Raises ValueError unless a map [B, ..., H, W] of `dims` dimensions goes with embeddings [B, D, h, w]."""
    if value.dim() != dims or value.shape[0] != embeddings.shape[0]:
        raise ValueError(
            f"{name} {tuple(value.shape)} do not fit embeddings {tuple(embeddings.shape)}: "
            f"expected {dims} dimensions and the same batch"
        )
    if value.device != embeddings.device:
        raise ValueError(f"{name} must be on {embeddings.device}, got {value.device}")
    if 0 in value.shape[-2:] and 0 not in embeddings.shape:
        raise ValueError(
            f"{name} {tuple(value.shape)} have no pixels for embeddings {tuple(embeddings.shape)}"
        )


def _nearest(size: int, target: int, device: torch.device) -> Tensor:
    """Which of `size` positions each of `target` takes, as `F.interpolate(mode="nearest")` does it: in fp32."""
    positions = torch.arange(target, dtype=torch.float32, device=device)
    if target == 0:
        return positions.long()
    return (positions * (size / target)).floor().long().clamp(max=size - 1)


def resize_nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Pick [..., h, w] out of [..., H, W] like `F.interpolate(mode="nearest")`, for any dtype, integers too."""
    height, width = maps.shape[-2:]
    if height != size[0]:
        maps = maps.index_select(-2, _nearest(height, size[0], maps.device))
    if width != size[1]:
        maps = maps.index_select(-1, _nearest(width, size[1], maps.device))
    return maps


def cross_entropy(
    logits: Tensor,  # [B, C, h, w]
    labels: Tensor,  # [B, H, W], any integer dtype
    *,
    num_classes: int,
    ignore_index: int,
    class_weights: Tensor | None = None,  # [C]
) -> Tensor:
    """Mean over the pixels that count, of logits upsampled bilinearly to the labels; 0 if there are none.

    Raises:
        ValueError: on the CPU, a label that is neither a class nor `ignore_index`; elsewhere such a pixel is ignored.
    """
    if labels.numel() == 0:
        return logits.sum() * 0.0
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    labels = labels.long()
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~valid & (labels != ignore_index)
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            raise bad_class("labels", place, int(labels[tuple(place)]), num_classes, ignore_index)
    labels = torch.where(valid, labels, -1)
    total = F.cross_entropy(logits, labels, weight=class_weights, ignore_index=-1, reduction="sum")
    count = valid.sum() if class_weights is None else (class_weights[labels.clamp(min=0)] * valid).sum()
    return total / torch.where(count > 0, count, 1)
