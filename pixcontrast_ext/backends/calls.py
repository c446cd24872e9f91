"""What a backend is asked: a record per op, of inputs and of outputs to fill, which the op has checked and allocated.

Tensors are contiguous, but for maps, whose strides are any. Every field is one of the struct of the same name in
csrc/params.h, where there is one; `sizes` are its other fields, those that the kernels cannot ask a tensor for.
"""

from __future__ import annotations

import functools
from dataclasses import InitVar, dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

SCORE_BINS = 512  # over [-1, 1]


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Whether rows and labels lie in the same memory."""
    return one[0].shape == other[0].shape and all(
        a.data_ptr() == b.data_ptr() for a, b in zip(one, other, strict=True)
    )


class _Record:
    __slots__: tuple[str, ...] = ()

    @classmethod
    @functools.cache
    def names(cls) -> tuple[str, ...]:
        """Those of its fields."""
        return tuple(field.name for field in fields(cls))  # type: ignore[arg-type]  # all are dataclasses

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        values = (getattr(self, name) for name in self.names())
        return next(value.device for value in values if isinstance(value, Tensor))


@dataclass(slots=True)
class Sampling(_Record):
    """Anchors of a batch; the rules are those of `reference.hard_anchor_sampling`."""

    labels: Tensor  # [B, H, W] int64
    predictions: Tensor  # [B, H, W] int64
    priority: Tensor  # [B, H, W] int32
    num_classes: int
    max_samples: int
    max_views: int
    min_pixels: int
    ignore_index: int
    hard_share: int  # of what a pair gives, in units of 2^-24
    indices: Tensor  # [max_samples] int64 out
    anchor_labels: Tensor  # [max_samples] int32 out
    count: Tensor  # [] int32 out

    def sizes(self) -> dict[str, int]:
        batch, height, width = self.labels.shape
        return {"batch": batch, "pixels": height * width}


@dataclass(slots=True)
class Gather(_Record):
    """Chosen pixels of a map as rows; with `normalize` of unit length, or 0 where that is 0."""

    embeddings: Tensor  # [B, D, H, W], any strides
    indices: Tensor  # [A] int64, flat over B * H * W
    normalize: bool
    dtype: InitVar[torch.dtype]
    rows: Tensor  # [A, D] out
    inv_norm: Tensor  # [A] out, fp32 or fp64: times which pixels became rows

    def sizes(self) -> dict[str, int]:
        return {"num_rows": self.indices.shape[0]}


@dataclass(slots=True)
class GatherBackward(_Record):
    """The gradient of a map, of which every element is written."""

    grad_rows: Tensor  # [A, D]
    embeddings: Tensor  # [B, D, H, W], any strides
    indices: Tensor  # [A] int64
    inv_norm: Tensor  # [A], of the forward
    normalize: bool
    grad_embeddings: Tensor  # [B, D, H, W] dense, out

    def sizes(self) -> dict[str, int]:
        return {"num_rows": self.indices.shape[0]}


@dataclass(slots=True)
class Collect(_Record):
    """What a batch offers a bank.

    For each (image, class) its region, then its pixels of smallest (priority, pixel), in pixel order. A row whose norm
    is 0 or not finite is not offered: its label is -1, and it is all zeros.
    """

    embeddings: Tensor  # [B, D, H, W], any strides
    labels: Tensor  # [B, H, W] int64
    priority: Tensor  # [B, H, W] int32
    num_classes: int  # C
    pixels_per_image: int  # k
    ignore_index: int
    normalize: bool
    dtype: InitVar[torch.dtype]
    rows: Tensor  # [B, C, 1 + k, D] out
    row_labels: Tensor  # [B, C, 1 + k] int32 out

    def sizes(self) -> dict[str, int]:
        return {}


@dataclass(slots=True)
class Write(_Record):
    """Rows to append to the rings of a bank, in image order; if there are more than slots, only the last are kept."""

    rows: Tensor  # [N, C, 1 + k, D], dtype of the keys
    row_labels: Tensor  # [N, C, 1 + k] int32
    keys: Tensor  # [C, R + P, D] in and out
    key_labels: Tensor  # [C, R + P] int32 in and out
    region_ptr: Tensor  # [C] int64 in and out, and so the next three
    region_fill: Tensor
    pixel_ptr: Tensor
    pixel_fill: Tensor
    region_slots: int  # R

    def sizes(self) -> dict[str, int]:
        batch, num_classes, per_class, channels = self.rows.shape
        return {
            "batch": batch,
            "num_classes": num_classes,
            "pixels_per_image": per_class - 1,
            "row_bytes": channels * self.rows.element_size(),
            "pixel_slots": self.keys.shape[1] - self.region_slots,
        }


@dataclass(slots=True)
class InfonceForward(_Record):
    """Eq. (1) to (4) of `reference.py`, and the gradient of the anchors for g = 1."""

    anchors: Tensor  # [A, D]
    anchor_labels: Tensor  # [A] int32
    keys: Tensor  # [K, D]
    key_labels: Tensor  # [K] int32
    temperature: float
    exclude_self: bool
    with_grad: InitVar[bool]
    loss: Tensor  # [A] out, fp32 or fp64, and so the others
    neg_lse: Tensor  # [A] out
    pos_weight: Tensor  # [A] out
    pos_count: Tensor  # [A] int32 out
    anchor_grad: Tensor | None  # [A, D] out; None without gradient

    def __post_init__(self, with_grad: bool) -> None:
        if not with_grad:
            self.anchor_grad = None

    @property
    def in_batch(self) -> bool:
        """Whether the anchors are the keys."""
        return same((self.keys, self.key_labels), (self.anchors, self.anchor_labels))

    def sizes(self) -> dict[str, int]:
        return {"num_anchors": self.anchors.shape[0], "num_keys": self.keys.shape[0]}


@dataclass(slots=True)
class MinedForward(InfonceForward):
    """The same for the pairs that mining keeps: negatives of their own, and a range of cosines for each anchor.

    A negative takes part unless its cosine is below `neg_min`, a positive, one of the keys, unless its is `pos_max` or
    above. A NaN always does.
    """

    negatives: Tensor  # [M, D]
    negative_labels: Tensor  # [M] int32; those of an anchor's own class are not its negatives
    neg_min: Tensor  # [A] fp32
    pos_max: Tensor  # [A] fp32


@dataclass(slots=True)
class ScoreCounts(_Record):
    """How many negatives and how many positives of each anchor have their cosine in each of SCORE_BINS bins.

    The bins are equal parts of [-1, 1]; what lies outside belongs to the first and the last, NaN to the first.
    """

    anchors: Tensor  # [A, D]
    anchor_labels: Tensor  # [A] int32
    keys: Tensor  # [K, D], of which the positives are
    key_labels: Tensor  # [K] int32
    negatives: Tensor  # [M, D]
    negative_labels: Tensor  # [M] int32
    exclude_self: bool
    neg_counts: Tensor  # [A, SCORE_BINS] int32 out; 0 for an anchor without a label
    pos_counts: Tensor  # [A, SCORE_BINS] int32 out

    @property
    def in_batch(self) -> bool:
        """Whether the anchors are the keys."""
        return same((self.keys, self.key_labels), (self.anchors, self.anchor_labels))

    def sizes(self) -> dict[str, int]:
        return {"num_anchors": self.anchors.shape[0], "num_keys": self.keys.shape[0]}


@dataclass(slots=True)
class InfonceBackward(_Record):
    """Eq. (6): the gradient of the keys, or both halves of that of anchors that are the keys."""

    anchors: Tensor  # [A, D]
    anchor_labels: Tensor  # [A] int32
    keys: Tensor | None  # [K, D]; None: the anchors
    key_labels: Tensor | None  # [K] int32
    neg_lse: Tensor  # [A], of the forward
    pos_weight: Tensor  # [A], of the forward
    grad_scale: Tensor  # [A], g / |P|
    temperature: float
    exclude_self: bool
    grad: Tensor  # [K, D] out, fp32 or fp64; [A, D] without keys

    @property
    def others(self) -> tuple[Tensor, Tensor] | None:
        """The keys and their labels; None: the anchors and theirs."""
        if self.keys is None or self.key_labels is None:
            return None
        return self.keys, self.key_labels

    def sizes(self) -> dict[str, int]:
        return {"num_anchors": self.anchors.shape[0], "num_keys": self.grad.shape[0]}


@dataclass(slots=True)
class MinedBackward(InfonceBackward):
    """The same for the pairs that mining keeps: each anchor's own range, in either role."""

    neg_min: Tensor  # [A] fp32; inf: the keys are no negatives
    pos_max: Tensor  # [A] fp32; -inf: they are no positives


Call = Sampling | Gather | GatherBackward | Collect | Write | InfonceForward | InfonceBackward | ScoreCounts


class Backend(Protocol):
    """What the module of a backend has."""

    def unsupported(
        self,
        op: str,
        dtype: torch.dtype | None,
        channels: int | None = None,
        device: torch.device | None = None,
    ) -> str | None:
        """Why a call cannot be served, or None if it can."""

    def hard_anchor_sampling(self, call: Sampling) -> None: ...

    def gather(self, call: Gather) -> None: ...

    def gather_backward(self, call: GatherBackward) -> None: ...

    def enqueue_collect(self, call: Collect) -> None: ...

    def enqueue_write(self, call: Write) -> None: ...

    def infonce_forward(self, call: InfonceForward) -> None: ...

    def infonce_backward(self, call: InfonceBackward) -> None: ...

    def score_counts(self, call: ScoreCounts) -> None: ...

    def mined_forward(self, call: MinedForward) -> None: ...

    def mined_backward(self, call: MinedBackward) -> None: ...
