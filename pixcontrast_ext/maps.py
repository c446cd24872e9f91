"""Maps of labels and logits that go with one of embeddings: do they fit, how are they resized, their cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pixcontrast_ext.backends.errors import bad_class
from pixcontrast_ext.ops import checks


def check_map(name: str, value: Tensor, dims: int, embeddings: Tensor, of: str = "embeddings") -> None:
    """Raises ValueError unless a map [B, ..., H, W] of `dims` dimensions goes with embeddings [B, D, h, w].

    `of` is what the error calls these.
    """
    if value.dim() != dims or value.shape[0] != embeddings.shape[0]:
        raise ValueError(
            f"{name} {tuple(value.shape)} do not fit {of} {tuple(embeddings.shape)}: "
            f"expected {dims} dimensions and the same batch"
        )
    if value.device != embeddings.device:
        raise ValueError(f"{name} must be on {embeddings.device}, got {value.device}")
    if 0 in value.shape[-2:] and 0 not in embeddings.shape:
        raise ValueError(f"{name} {tuple(value.shape)} have no pixels for {of} {tuple(embeddings.shape)}")


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


def pick_predictions(
    predictions: Tensor | None,  # [B, H, W], any integer dtype, or logits [B, C, H, W]
    num_classes: int,
    embeddings: Tensor,  # [B, D, h, w]
    of: str,
) -> Tensor:
    """The predicted classes of the pixels of embeddings, int64. Errors as those of `check_map`, and TypeError."""
    if not isinstance(predictions, Tensor):
        raise TypeError(f"predictions must be a tensor, got {type(predictions).__name__}")
    size = (embeddings.shape[2], embeddings.shape[3])
    if predictions.dtype.is_floating_point:
        check_map("logits", predictions, 4, embeddings, of)
        if predictions.shape[1] != num_classes:
            raise ValueError(
                f"logits must have num_classes={num_classes} channels, got {tuple(predictions.shape)}"
            )
        # argmax, which takes four times as long over the channels of a map on a CPU.
        return resize_nearest(predictions.detach(), size).max(dim=1).indices
    if not checks.is_integer(predictions):
        raise TypeError(f"predictions must be integers or floating-point logits, got {predictions.dtype}")
    check_map("predictions", predictions, 3, embeddings, of)
    return resize_nearest(predictions, size).long()


def pick_confidence(name: str, confidence: Tensor, embeddings: Tensor, of: str = "embeddings") -> Tensor:
    """The confidence of the pixels of embeddings. Errors as those of `check_map` and `check_weights`."""
    checks.check_weights(name, confidence, None, embeddings.device)
    check_map(name, confidence, 3, embeddings, of)
    return resize_nearest(confidence.detach(), (embeddings.shape[2], embeddings.shape[3]))


# Far less than one pixel in a cell's share, far more than the rounding of fp32.
_ROUNDING = 1e-6


def pick_labels(
    labels: Tensor,  # [B, H, W], any integer dtype
    size: tuple[int, int],
    min_purity: float,
    ignore_index: int,
) -> Tensor:
    """The labels of the cells of a [B, h, w] grid, int64: the nearest ones, ignored where a cell is not pure enough.

    The purity of cell (i, j) is the share of its label among the labels under it, those of the rows floor(i * H / h) to
    ceil((i + 1) * H / h), the last excluded, and likewise of the columns.
    """
    picked = resize_nearest(labels, size)
    if min_purity > 0 and labels.shape != picked.shape and 0 not in picked.shape:
        if labels.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch does not compare
            labels, picked = labels.long(), picked.long()
        pure = _purity(labels, picked) >= min_purity - _ROUNDING
        return torch.where(pure, picked.long(), ignore_index)
    return picked.long()


def pick_classes(
    labels: Tensor, size: tuple[int, int], min_purity: float, num_classes: int, ignore_index: int
) -> Tensor:
    """As `pick_labels`. Raises ValueError on the CPU for one that is no class, if they had another size.

    Else whoever takes the pixels raises it, of a place that the caller knows.
    """
    picked = pick_labels(labels, size, min_purity, ignore_index)
    if not torch.compiler.is_compiling() and picked.shape != labels.shape:  # a graph is for either
        check_classes(f"labels, resized to {size[0]}x{size[1]}, ", picked, num_classes, ignore_index)
    return picked


def _purity(labels: Tensor, picked: Tensor) -> Tensor:
    """Share of the label of each cell, [B, h, w], among the labels under it; fp32."""
    batch, height, width = labels.shape
    rows, columns = picked.shape[1:]
    if height % rows == 0 and width % columns == 0:
        cells = labels.view(batch, rows, height // rows, columns, width // columns)
        return (cells == picked[:, :, None, :, None]).mean((2, 4), dtype=torch.float32)
    below, inside_rows = _under(height, rows, labels.device)
    right, inside_columns = _under(width, columns, labels.device)
    cells = labels[:, below][..., right]  # [B, h, S, w, T]
    inside = inside_rows[:, :, None, None] & inside_columns
    same = (cells == picked[:, :, None, :, None]) & inside
    return same.sum((2, 4), dtype=torch.float32) / inside.sum((1, 3), dtype=torch.float32)


def _under(size: int, target: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The positions, of `size`, under each of `target` cells, [target, S], and which of these are; others fill up."""
    cell = torch.arange(target, device=device)[:, None]
    first, end = cell * size // target, ((cell + 1) * size + target - 1) // target
    positions = first + torch.arange((size + target - 1) // target + 1, device=device)
    return positions.clamp(max=size - 1), positions < end


def check_classes(name: str, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise ValueError on the CPU for a label that is neither a class nor `ignore_index`."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(labels, FakeTensor):
        return
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise bad_class(name, place, int(labels[tuple(place)]), num_classes, ignore_index)


def cross_entropy(
    logits: Tensor,  # [B, C, h, w]
    labels: Tensor,  # [B, H, W], any integer dtype
    *,
    num_classes: int,
    ignore_index: int,
    class_weights: Tensor | None = None,  # [C]
    align_corners: bool = False,
) -> Tensor:
    """Mean over the pixels that count, of logits upsampled bilinearly to the labels; 0 if there are none.

    Raises:
        ValueError: on the CPU, a label that is neither a class nor `ignore_index`; elsewhere such a pixel is ignored.
    """
    if labels.numel() == 0:
        return logits.sum() * 0.0
    if logits.shape[2:] != labels.shape[1:]:
        logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=align_corners)
    labels = labels.long()
    check_classes("labels", labels, num_classes, ignore_index)
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    labels = torch.where(valid, labels, -1)
    if logits.dtype in (torch.float16, torch.bfloat16):  # the sum of many pixels is past fp16's range
        logits = logits.float()
    if class_weights is not None:
        class_weights = class_weights.to(logits.dtype)
    total = F.cross_entropy(logits, labels, weight=class_weights, ignore_index=-1, reduction="sum")
    count = valid.sum() if class_weights is None else (class_weights[labels.clamp(min=0)] * valid).sum()
    return total / torch.where(count > 0, count, 1)
