"""The losses that a trainer calls."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixcontrast_ext import ops
from pixcontrast_ext.bank import MemoryBank
from pixcontrast_ext.ops.gather import gather_embeddings
from pixcontrast_ext.ops.infonce import check_temperature, infonce
from pixcontrast_ext.ops.sampling import hard_anchor_sampling
from pixcontrast_ext.ops.warmup import WarmUp


def _nearest(size: int, target: int, device: torch.device) -> Tensor:
    """Which of `size` positions each of `target` takes, by the rule of `F.interpolate(mode="nearest")`: in
    fp32.
    """
    positions = torch.arange(target, dtype=torch.float32, device=device)
    if target == 0:
        return positions.long()
    return (positions * (size / target)).floor().long().clamp(max=size - 1)


def resize_nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Pick [..., h, w] out of [..., H, W] like `F.interpolate(mode="nearest")`, on any dtype, integers
    included.
    """
    height, width = maps.shape[-2:]
    if height != size[0]:
        maps = maps.index_select(-2, _nearest(height, size[0], maps.device))
    if width != size[1]:
        maps = maps.index_select(-1, _nearest(width, size[1], maps.device))
    return maps


class PixelContrastLoss(nn.Module):
    """Pixel contrast of a batch against a memory bank, or within the batch (arXiv 2101.11939, section 3.2).

    Chooses anchors (`hard_anchor_sampling`), reads their embeddings (`gather_embeddings`) and contrasts them
    (`infonce`) with the bank, or with each other if there is none. In training mode the batch is enqueued
    afterwards.

    Args:
        num_classes: classes are 0 to num_classes - 1.
        temperature: divides the cosine similarities.
        base_temperature: scales the loss by temperature / base_temperature; None leaves it alone.
        max_samples, max_views, min_pixels: see `hard_anchor_sampling`.
        ignore_index: label of pixels that do not count.
        bank: of the same class count; a submodule, so it is saved with the loss.
        normalize: compare unit vectors.
        backend: see `available_backends`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, at construction.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        temperature: float = 0.1,
        base_temperature: float | None = None,
        max_samples: int = 1024,
        max_views: int = 100,
        min_pixels: int | None = None,
        ignore_index: int = 255,
        bank: MemoryBank | None = None,
        normalize: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        ops.check_at_least(1, num_classes=num_classes, max_samples=max_samples, max_views=max_views)
        if min_pixels is not None:
            ops.check_at_least(0, min_pixels=min_pixels)
        check_temperature("temperature", temperature)
        if base_temperature is not None:
            check_temperature("base_temperature", base_temperature)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
        if bank is not None:
            if not isinstance(bank, MemoryBank):
                raise TypeError(f"bank must be a MemoryBank, got {type(bank).__name__}")
            if bank.num_classes != num_classes:
                raise ValueError(f"the bank has {bank.num_classes} classes, the loss {num_classes}")
            if bank.ignore_index != ignore_index:
                raise ValueError(f"the bank ignores label {bank.ignore_index}, the loss {ignore_index}")
            if bank.normalize != normalize:
                raise ValueError(f"the bank has normalize={bank.normalize}, the loss normalize={normalize}")
        self.num_classes, self.temperature, self.base_temperature = num_classes, temperature, base_temperature
        self.max_samples, self.max_views, self.min_pixels = max_samples, max_views, min_pixels
        self.ignore_index, self.normalize, self.backend = ignore_index, normalize, backend
        self.bank = bank

    def extra_repr(self) -> str:
        return f"{self.num_classes}, temperature={self.temperature}, max_samples={self.max_samples}"

    def forward(self, embeddings: Tensor, labels: Tensor, predictions: Tensor) -> Tensor:
        """The loss, a scalar; a differentiable zero if nothing can be contrasted.

        Args:
            embeddings: [B, D, h, w], any strides; normalised here if `normalize`.
            labels: [B, H, W], any integer dtype; picked at the nearest pixel if the size differs.
            predictions: predicted classes [B, H', W'], or logits [B, C, H', W']; likewise.

        Raises:
            TypeError, ValueError: shapes, dtypes or devices that do not fit; on the CPU also a label that is
                neither a class nor `ignore_index`.
        """
        labels = self._labels_at(embeddings, labels)
        loss = self._contrast(embeddings, labels, predictions)
        self._enqueue(embeddings, labels)
        return loss

    def _labels_at(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        ops.check_embeddings(embeddings)
        if not isinstance(labels, Tensor) or not ops.is_integer(labels):
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels must be an integer tensor, got {got}")
        if self.bank is not None and embeddings.shape[1] != self.bank.embed_dim:
            raise ValueError(
                f"embeddings {tuple(embeddings.shape)} do not fit the bank, which is {self.bank.embed_dim} wide"
            )
        self._check_map("labels", labels, 3, embeddings)
        return resize_nearest(labels, (embeddings.shape[2], embeddings.shape[3]))

    def _check_map(self, name: str, value: Tensor, dims: int, embeddings: Tensor) -> None:
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

    def _predictions_at(self, embeddings: Tensor, predictions: Tensor) -> Tensor:
        size = (embeddings.shape[2], embeddings.shape[3])
        if not isinstance(predictions, Tensor):
            raise TypeError(f"predictions must be a tensor, got {type(predictions).__name__}")
        if predictions.dtype.is_floating_point:
            self._check_map("logits", predictions, 4, embeddings)
            if predictions.shape[1] != self.num_classes:
                raise ValueError(
                    f"logits must have num_classes={self.num_classes} channels, got {tuple(predictions.shape)}"
                )
            return resize_nearest(predictions.detach(), size).argmax(dim=1)
        if not ops.is_integer(predictions):
            raise TypeError(f"predictions must be integers or floating-point logits, got {predictions.dtype}")
        self._check_map("predictions", predictions, 3, embeddings)
        return resize_nearest(predictions, size)

    def _contrast(self, embeddings: Tensor, labels: Tensor, predictions: Tensor) -> Tensor:
        predictions = self._predictions_at(embeddings, predictions)
        sample = hard_anchor_sampling(
            labels,
            predictions,
            num_classes=self.num_classes,
            max_samples=self.max_samples,
            max_views=self.max_views,
            min_pixels=self.min_pixels,
            ignore_index=self.ignore_index,
            backend=self.backend,
        )
        anchors = gather_embeddings(
            embeddings,
            sample.indices,
            normalize=self.normalize,
            dtype=None if self.bank is None else self.bank.keys.dtype,
            backend=self.backend,
        )
        if self.bank is None:
            keys, key_labels = anchors, sample.labels
        else:
            keys, key_labels = self.bank.flat()
        loss = infonce(
            anchors,
            sample.labels,
            keys,
            key_labels,
            temperature=self.temperature,
            exclude_self=self.bank is None,
            backend=self.backend,
        )
        return loss if self.base_temperature is None else loss * (self.temperature / self.base_temperature)

    def _enqueue(self, embeddings: Tensor, labels: Tensor) -> None:
        if self.training and self.bank is not None:
            self.bank.enqueue(embeddings.detach(), labels, backend=self.backend)


class PixelContrastCrossEntropyLoss(nn.Module):
    """Cross-entropy + `weight` x `PixelContrastLoss`.

    During the first `warmup_steps` calls in training mode the contrast is not computed (a weight of zero
    would not keep a NaN out) while the bank already fills.

    Args:
        num_classes: channels of the logits.
        weight: of the contrast.
        warmup_steps: how many training steps do without it; counted in the buffer `step`, so resuming goes on
            counting.
        class_weights: [C], for the cross-entropy.
        **contrast: for `PixelContrastLoss`.
    """

    step: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        weight: float = 0.1,
        warmup_steps: int = 0,
        class_weights: Tensor | None = None,
        **contrast: Any,
    ) -> None:
        super().__init__()
        self.contrast = PixelContrastLoss(num_classes, **contrast)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be finite and not negative, got {weight!r}")
        ops.check_at_least(0, warmup_steps=warmup_steps)
        if class_weights is not None and not isinstance(class_weights, Tensor):
            raise TypeError(f"class_weights must be a tensor, got {type(class_weights).__name__}")
        if class_weights is not None and tuple(class_weights.shape) != (num_classes,):
            raise ValueError(
                f"class_weights must have shape ({num_classes},), got {tuple(class_weights.shape)}"
            )
        self.weight, self.warmup_steps = weight, warmup_steps
        self.register_buffer("class_weights", class_weights)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._warmup = WarmUp(warmup_steps, 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_warmup": None}

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy or a pickle: it counts on its own
        super().__setstate__(state)
        self._warmup = WarmUp(self.warmup_steps, int(self.step))

    @property
    def bank(self) -> MemoryBank | None:
        return self.contrast.bank

    def extra_repr(self) -> str:
        return f"weight={self.weight}, warmup_steps={self.warmup_steps}"

    def forward(self, logits: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: [B, C, h, w]; upsampled bilinearly to the labels for the cross-entropy.
            embeddings: [B, D, h', w'].
            labels: [B, H, W], any integer dtype.

        Raises:
            TypeError, ValueError: as `PixelContrastLoss.forward`.
        """
        contrast = self.contrast
        picked = contrast._labels_at(embeddings, labels)
        if logits.dim() != 4 or logits.shape[0] != labels.shape[0] or logits.shape[1] != contrast.num_classes:
            raise ValueError(
                f"logits must have shape [{labels.shape[0]}, {contrast.num_classes}, h, w], got {tuple(logits.shape)}"
            )
        loss = self._cross_entropy(logits, labels)
        if self.weight > 0 and (not self.training or self._warmup.over):
            loss = loss + self.weight * contrast._contrast(embeddings, picked, logits)
        contrast._enqueue(embeddings, picked)
        if self.training and not self._warmup.over:
            self._warmup.advance(self.step)
        return loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the pixels that count; 0 if there are none."""
        if labels.numel() == 0:
            return logits.sum() * 0.0
        size = (labels.shape[1], labels.shape[2])
        if logits.shape[2:] != labels.shape[1:]:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        contrast = self.contrast
        labels = labels.long()
        valid = (labels >= 0) & (labels < contrast.num_classes) & (labels != contrast.ignore_index)
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ~valid & (labels != contrast.ignore_index)
            if wrong.any():
                place = tuple(wrong.nonzero()[0].tolist())
                raise ValueError(
                    f"labels{list(place)} is {int(labels[place])}, expected 0 <= label < "
                    f"num_classes={contrast.num_classes} or ignore_index={contrast.ignore_index}"
                )
        labels = torch.where(valid, labels, -1)
        total = F.cross_entropy(logits, labels, weight=self.class_weights, ignore_index=-1, reduction="sum")
        if self.class_weights is None:
            count = valid.sum()
        else:
            count = (self.class_weights[labels.clamp(min=0)] * valid).sum()
        return total / torch.where(count > 0, count, 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._warmup = WarmUp(self.warmup_steps, int(self.step))
