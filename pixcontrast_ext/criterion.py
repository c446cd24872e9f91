"""The contrast together with the cross-entropy that it usually stands beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pixcontrast_ext.bank import MemoryBank
from pixcontrast_ext.loss import PixelContrastLoss
from pixcontrast_ext.maps import cross_entropy
from pixcontrast_ext.ops import checks
from pixcontrast_ext.ops.mining import Mining
from pixcontrast_ext.project import Head


class PixelContrastCrossEntropyLoss(nn.Module):
    """Cross-entropy + `weight` x `PixelContrastLoss`, which is its submodule `contrast`.

    When bank and warm-up advance, how validation counts, and what activation checkpointing may do is said there. With
    another segmentation loss use that class itself: weight and warm-up are its own.

    Args:
        num_classes: channels of the logits.
        weight: of the contrast; may be changed at any time.
        warmup_steps: how many training calls do without contrast.
        class_weights: [C], for the cross-entropy.
        align_corners: how logits are upsampled for it, as in `torch.nn.functional.interpolate`.
        The others: for `PixelContrastLoss`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, at construction.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        weight: float = 0.1,
        warmup_steps: int = 0,
        class_weights: Tensor | None = None,
        align_corners: bool = False,
        temperature: float = 0.1,
        base_temperature: float | None = None,
        max_samples: int = 1024,
        max_views: int = 100,
        min_pixels: int | None = None,
        hard_fraction: float = 0.5,
        anchors: str = "hard",
        min_purity: float = 0.0,
        max_samples_over: str = "rank",
        ignore_index: int = 255,
        bank: MemoryBank | Mapping[str, Any] | None = None,
        normalize: bool = True,
        mining: Mining | Mapping[str, Any] | str | None = None,
        generator: torch.Generator | None = None,
        head: Head | Mapping[str, Any] | None = None,
        bank_samples: int = 4096,
        region_views: int = 64,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        checks.check_at_least(2, num_classes=num_classes)  # a binary mask has two
        self.contrast = PixelContrastLoss(
            num_classes,
            weight=weight,
            warmup_steps=warmup_steps,
            temperature=temperature,
            base_temperature=base_temperature,
            max_samples=max_samples,
            max_views=max_views,
            min_pixels=min_pixels,
            hard_fraction=hard_fraction,
            anchors=anchors,
            min_purity=min_purity,
            max_samples_over=max_samples_over,
            ignore_index=ignore_index,
            bank=bank,
            normalize=normalize,
            mining=mining,
            generator=generator,
            head=head,
            bank_samples=bank_samples,
            region_views=region_views,
            backend=backend,
        )
        if class_weights is not None:
            device = class_weights.device if isinstance(class_weights, Tensor) else torch.device("cpu")
            checks.check_weights("class_weights", class_weights, (num_classes,), device)
            if class_weights.requires_grad:
                raise ValueError(
                    "class_weights must not require a gradient: they have none in a cross-entropy"
                )
        self.align_corners = bool(align_corners)
        self.register_buffer("class_weights", class_weights)
        # A copy, for the case that the buffer is given memory that nobody fills.
        known = class_weights is not None and not class_weights.is_meta
        self._class_weights = class_weights.tolist() if known and class_weights is not None else None

    @property
    def bank(self) -> MemoryBank | None:
        """The bank of `contrast`."""
        return self.contrast.bank

    @property
    def step(self) -> Tensor:
        """How far the warm-up is, [] int64; stops at `warmup_steps`."""
        return self.contrast.step

    @property
    def weight(self) -> float:
        """The factor of the contrast."""
        return self.contrast.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self.contrast.weight = value

    @property
    def warmup_steps(self) -> int:
        """How many training calls do without contrast."""
        return self.contrast.warmup_steps

    @warmup_steps.setter
    def warmup_steps(self, value: int) -> None:
        self.contrast.warmup_steps = value

    def reset_parameters(self) -> None:
        """Put the class weights back to those given at construction; `contrast` and its bank have their own."""
        if self.class_weights is None or self.class_weights.is_meta:
            return
        if self._class_weights is None:
            raise ValueError(
                "class_weights were given on the meta device, so their values are unknown: load them"
            )
        with torch.no_grad():
            self.class_weights.copy_(torch.tensor(self._class_weights, dtype=self.class_weights.dtype))

    def inspect(self) -> None:
        """As that of `contrast`, with the class weights: those given at construction count, if they are known."""
        if not self.contrast.uninspected or self.step.is_meta:
            return
        weights = self.class_weights
        if self._class_weights is not None:
            self.reset_parameters()
        elif weights is not None and not bool((weights >= 0).all() and weights.isfinite().all()):
            raise ValueError(
                f"class_weights were given on the meta device and not loaded, got {weights.tolist()}"
            )
        self.contrast.inspect()

    def train(self, mode: bool = True) -> PixelContrastCrossEntropyLoss:
        """As that of a module, after `inspect`."""
        self.inspect()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PixelContrastCrossEntropyLoss:
        was_meta = self.step.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and self._class_weights is not None:  # to_empty
            self.reset_parameters()
        return self

    def forward(
        self,
        logits: Tensor,
        embeddings: Tensor,
        labels: Tensor,
        *,
        hard: Tensor | None = None,
        confidence: Tensor | None = None,
        keys_from: tuple[Tensor, ...] | None = None,
        return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar.

        Args:
            logits: [B, C, h, w]; upsampled bilinearly to the labels for the cross-entropy.
            embeddings: [B, D, h', w']; with `head` features [B, C_in, h', w'].
            labels: [B, H, W], any integer dtype.
            hard, confidence, keys_from: for the contrast, see `PixelContrastLoss.forward`; not for the cross-entropy.
            return_parts: return (loss, parts) for a log: those of `PixelContrastLoss` and "cross_entropy"; the loss is
                cross_entropy + weight x contrast.

        Raises:
            TypeError, ValueError, RuntimeError: as `PixelContrastLoss.forward`.
        """
        contrast = self.contrast
        if contrast.uninspected and not torch.compiler.is_compiling():
            self.inspect()
        if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point:
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"logits must be a floating-point tensor, got {got}")
        if logits.dim() != 4 or logits.shape[1] != contrast.num_classes:
            raise ValueError(
                f"logits must have shape [B, {contrast.num_classes}, h, w], got {tuple(logits.shape)}"
            )
        batch = contrast.prepare(embeddings, labels, logits, hard, confidence, keys_from)
        entropy = cross_entropy(
            logits,
            labels,
            num_classes=contrast.num_classes,
            ignore_index=contrast.ignore_index,
            class_weights=self.class_weights,
            align_corners=self.align_corners,
        )
        outcome = contrast.take_step(batch)
        loss = entropy + outcome.loss
        if not return_parts:
            return loss
        return loss, {"cross_entropy": entropy.detach(), **contrast.parts(outcome)}

    def diagnostics(
        self,
        logits: Tensor,
        embeddings: Tensor,
        labels: Tensor,
        *,
        hard: Tensor | None = None,
        confidence: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As `PixelContrastLoss.diagnostics`, of what `forward` takes."""
        return self.contrast.diagnostics(embeddings, labels, logits, hard=hard, confidence=confidence)

    def warm_up(self, logits: Tensor, embeddings: Tensor, labels: Tensor, **steering: Any) -> None:
        """As `PixelContrastLoss.warm_up`, whose `hard`, `confidence` and `keys_from` it takes too."""
        self.contrast.warm_up(embeddings, labels, logits, **steering)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}step" in state_dict:  # where the count was when the contrast had no warm-up of its own
            state_dict[f"{prefix}contrast.step"] = state_dict.pop(f"{prefix}step")
        super()._load_from_state_dict(state_dict, prefix, *args)
