"""Hard-anchor sampling: which pixels of a batch become anchors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pixcontrast_ext import backends
from pixcontrast_ext.backends.calls import Sampling
from pixcontrast_ext.ops import checks, library, steering
from pixcontrast_ext.ops.priority import check_priority, draw_priority
from pixcontrast_ext.ops.signature import INT32_MAX


class AnchorSample(NamedTuple):
    """The outcome of `hard_anchor_sampling`; A is `max_samples`."""

    indices: Tensor  # [A] int64, flat over B * H * W; 0 in padding rows
    labels: Tensor  # [A] int32; -1 in padding rows
    count: Tensor  # type: ignore[assignment]  # [] int32, the rows that are not padding; stays on the device


def part_of_samples(max_samples: int) -> int:
    """This rank's part of the anchors that all ranks of the default process group take together."""
    if not (dist.is_available() and dist.is_initialized()):
        return max_samples
    ranks = dist.get_world_size()
    if max_samples < ranks:
        raise ValueError(
            f"max_samples={max_samples} over {ranks} ranks leaves some of them none: at least 1 each"
        )
    return max_samples // ranks + (dist.get_rank() < max_samples % ranks)


class SamplingRule(NamedTuple):
    """The numbers of `hard_anchor_sampling`, all of them, in the order of the op."""

    num_classes: int
    max_samples: int
    max_views: int
    min_pixels: int
    ignore_index: int
    hard_share: int  # see `share_of`


SHARE_UNITS = 2**24


def share_of(fraction: float) -> int:
    """A fraction in [0, 1] as the integer that the op takes, so that all backends round alike.

    Rounded up, so that a fraction which is a little less than what was meant, like 0.3, gives 3 of 10.

    Raises:
        TypeError, ValueError: it is no number, or out of range.
    """
    checks.check_share("hard_fraction", fraction)
    return math.ceil(fraction * SHARE_UNITS)


def _allocate(labels: Tensor, max_samples: int, **_: Any) -> dict[str, Tensor]:
    return {
        "indices": labels.new_empty(max_samples, dtype=torch.int64),
        "anchor_labels": labels.new_empty(max_samples, dtype=torch.int32),
        "count": labels.new_empty((), dtype=torch.int32),
    }


library.define(
    "hard_anchor_sampling(Tensor labels, Tensor predictions, Tensor priority, int num_classes, int max_samples, "
    "int max_views, int min_pixels, int ignore_index, int hard_share, str backend) -> (Tensor, Tensor, Tensor)",
    dict(labels="[B, H, W] int64", predictions="[B, H, W] int64", priority="[B, H, W] int32"),
    {
        "num_classes": (1, INT32_MAX),
        "B * num_classes": (0, INT32_MAX // 2),  # pairs of a hard and an easy pool
        "H * W": (0, 2**32 - 1),
        "max_samples": (1, INT32_MAX),
        "max_views": (1, None),
        "min_pixels": (0, None),
        "hard_share": (0, SHARE_UNITS),
    },
    Sampling,
    _allocate,
    "hard_anchor_sampling",
)


def hard_anchor_sampling(
    labels: Tensor,  # [B, H, W]
    predictions: Tensor | None,  # [B, H, W]
    *,
    num_classes: int,
    max_samples: int = 1024,
    max_views: int = 100,
    min_pixels: int | None = None,
    ignore_index: int = 255,
    hard: Tensor | None = None,  # [B, H, W]
    confidence: Tensor | None = None,  # [B, H, W]
    hard_fraction: float = 0.5,
    anchors: str = "hard",
    priority: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> AnchorSample:
    """Choose up to `max_samples` pixels to be anchors, a share of them hard (mispredicted) if there are enough.

    Every (image, class) of at least `min_pixels` pixels gives the same number of anchors, at most
    `max_views`. The shape is fixed and nothing waits for the device. `backends/reference.py` states the rules
    in full. Source: arXiv 2101.11939, "segmentation-aware hard anchor sampling"; what is there called
    hard example sampling chooses among the keys.

    Args:
        labels: ground truth, any integer dtype.
        predictions: predicted classes, any integer dtype; None if `hard` is given or anchors="random".
        num_classes: classes are 0 to num_classes - 1.
        max_samples: A, the number of rows returned.
        max_views: the most anchors of one class in one image.
        min_pixels: the fewest pixels of a class in an image for it to take part; None means max_views + 1.
        ignore_index: label of pixels that do not count.
        hard: bool, the pixels that are hard, in place of those that are mispredicted.
        confidence: floating point, in [0, inf). Pixels are drawn without replacement with chance proportional to it, of
            either kind and class by itself. A pixel of confidence 0 is never drawn and does not count for `min_pixels`.
            Its scale does not matter. Which classes take part where there are more than `max_samples` follows it too.
        hard_fraction: share of the anchors of a class in an image that are hard, rounded down; if one kind runs short,
            the other makes up the difference.
        anchors: "hard" for a share of hard ones, or "random": all pixels of a class in an image are one pool, whatever
            was predicted and whatever `hard` says.
        priority: [B, H, W] int32; pixels of small priority are chosen first. Drawn by `torch.randint` if
            None. The same priority gives the same anchors on every backend. With `confidence` it should be uniform over
            int32, or over its numbers from 0 on.
        generator: for that draw.
        backend: see `available_backends`.

    Returns:
        `AnchorSample`, rows ordered by class, image, hard before easy, pixel, then padding.

    Raises:
        TypeError: labels or predictions that are not integers, priority that is not int32, hard that is not bool,
            confidence that is not floating point.
        ValueError: shapes or devices that differ; a number out of range; unknown `anchors`; on the CPU also a label
            that is neither a class nor `ignore_index`, and a confidence that is negative or not finite (on a GPU such a
            pixel is ignored, but for one of infinite confidence, which comes first).
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an integer tensor, got {type(labels).__name__}")
    checks.check_labels("labels", labels, tuple(labels.shape), labels.device)
    if labels.dim() != 3:
        raise ValueError(f"labels must have shape [B, H, W], got {tuple(labels.shape)}")
    steering.check_anchors(anchors)
    if predictions is not None or (hard is None and anchors == "hard"):
        checks.check_labels("predictions", predictions, tuple(labels.shape), labels.device)
    if hard is not None:
        steering.check_hard(hard, tuple(labels.shape), labels.device)
    if confidence is not None:
        checks.check_weights("confidence", confidence, tuple(labels.shape), labels.device)
    checks.check_at_least(1, num_classes=num_classes, max_samples=max_samples, max_views=max_views)
    if min_pixels is None:
        min_pixels = max_views + 1
    checks.check_at_least(0, min_pixels=min_pixels)
    if priority is None:
        priority = draw_priority(labels, generator)
    check_priority(priority, labels)
    labels = labels.long()
    predictions = steering.predictions_for(labels, predictions, hard, anchors)
    if confidence is not None:
        labels = steering.only_drawn(labels, confidence, ignore_index)
        priority = steering.weigh_priority(priority, confidence)
    return sample(
        labels,
        predictions,
        priority,
        SamplingRule(num_classes, max_samples, max_views, min_pixels, ignore_index, share_of(hard_fraction)),
        backends.resolve(backend, "hard_anchor_sampling", labels.device, None),
    )


def sample(
    labels: Tensor,  # [B, H, W] int64
    predictions: Tensor,  # [B, H, W] int64
    priority: Tensor,  # [B, H, W] int32
    rule: SamplingRule,
    backend: str,
) -> AnchorSample:
    """`hard_anchor_sampling` of what has been checked, by a backend that serves it."""
    chosen = torch.ops.pixcontrast.hard_anchor_sampling(labels, predictions, priority, *rule, backend)
    return AnchorSample(*chosen)
