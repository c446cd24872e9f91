"""Example mining: which keys an anchor is contrasted with (arXiv 2101.11939, section 3.3, hard example mining).

First a draw that all anchors share, then for each of them the hardest part of what was drawn. Ranking within a random
draw gives nearly the same as drawing among the ranked, and takes a fraction of the products.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pixcontrast_ext import backends
from pixcontrast_ext.backends.calls import SCORE_BINS
from pixcontrast_ext.ops import autocast, checks
from pixcontrast_ext.ops.priority import check_priority, draw_priority
from pixcontrast_ext.ops.signature import INT32_MAX

STRATEGIES = ("random", "semi-hard", "hardest")


def _share(count: float, fraction: float) -> int:
    """ceil(count x fraction), where a product that only rounding takes above an integer is that integer."""
    return math.ceil(count * fraction * (1 - 2**-40))


@dataclass(frozen=True)
class Mining:
    """How many of an anchor's keys take part in its loss, and which.

    Args:
        strategy: "random" takes any; "semi-hard" any among the hardest `fraction`; "hardest" the `negatives` and
            `positives` hardest of all keys. A negative is hard if it is near, a positive if it is far.
        negatives: about how many an anchor meets; it meets fewer by the keys of its own class among those drawn. Of
            fewer than negatives / fraction keys "semi-hard" keeps no more than the `fraction`.
        positives: at most how many, about: bins of cosines are taken whole.
        fraction: the share that "semi-hard" ranks as hard, in (0, 1]; the others do not use it.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, with its value.
    """

    strategy: str = "semi-hard"
    negatives: int = 2048
    positives: int = 1024
    fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        checks.check_at_least(1, at_most=INT32_MAX, negatives=self.negatives, positives=self.positives)
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, (int, float)):
            raise TypeError(f"fraction must be a number, got {self.fraction!r}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction!r}")

    @property
    def by_cosine(self) -> bool:
        """Whether it looks at cosines."""
        return self.strategy != "random"

    def drawn(self, count: int) -> int | None:
        """How many keys are drawn for `count` of them to be kept; None is all."""
        if self.strategy == "hardest":
            return None
        return _share(count, 1 / self.fraction) if self.strategy == "semi-hard" else count


class DrawnKeys(NamedTuple):
    """The keys that anchors are ranked against and contrasted with."""

    negatives: tuple[Tensor, Tensor] | None  # rows [M, D] and their labels [M] int32; None: nothing was drawn
    positive_labels: Tensor  # [K] int32, -1 for a key that was not drawn; the given labels if all were


class Thresholds(NamedTuple):
    """The cosines between which an anchor's pairs take part."""

    neg_min: Tensor  # [A] fp32: negatives from it on; -inf: all
    pos_max: Tensor  # [A] fp32: positives below it; inf: all


def draw_keys(
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K]
    mining: Mining,
    *,
    priority: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> DrawnKeys:
    """Draw the keys that mining looks at: for the negatives among all, for the positives among each class.

    Those of smallest (priority, index) are drawn. Nothing waits for the device, and shapes depend on K alone. A draw as
    large as what there is takes everything and copies nothing. A gradient of the negatives reaches the keys.

    Args:
        keys: floating point.
        key_labels: any integer dtype; keys of a label < 0 are not drawn.
        mining: says how many.
        priority: [K] int32; drawn by `torch.randint` if None.
        generator: for that draw. A graph of torch.compile takes a `priority` instead.

    Returns:
        `DrawnKeys`, for `score_thresholds` and `infonce`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device.
    """
    check_mining(mining)
    if not isinstance(keys, Tensor) or not keys.dtype.is_floating_point or keys.dim() != 2:
        got = f"{keys.dtype} {tuple(keys.shape)}" if isinstance(keys, Tensor) else type(keys).__name__
        raise TypeError(f"keys must be a floating-point tensor [K, D], got {got}")
    checks.check_labels("key_labels", key_labels, (keys.shape[0],), keys.device)
    labels = checks.to_int32("key_labels", key_labels)
    if priority is not None:
        check_priority(priority, labels)

    def draw(labels: Tensor) -> Tensor:
        return draw_priority(labels, generator) if priority is None else priority

    drawn = drawn_of(keys, labels, mining, draw)
    # In the batch `infonce` looks whether labels of keys and anchors are one tensor.
    return drawn if drawn.positive_labels is not labels else drawn._replace(positive_labels=key_labels)


def check_mining(mining: Mining) -> None:
    """Raise TypeError unless it is one."""
    if not isinstance(mining, Mining):
        raise TypeError(
            f"mining must be a Mining, or in a loss a strategy or a dict of settings, got {mining!r}"
        )


def drawn_of(
    keys: Tensor,
    key_labels: Tensor,  # int32
    mining: Mining,
    draw: Callable[[Tensor], Tensor],  # a priority of the shape of labels
    most_of_class: int | None = None,
) -> DrawnKeys:
    """`draw_keys` of what has been checked; no class has more than `most_of_class` keys, if that is known."""
    size = key_labels.shape[0]
    negatives, positives = mining.drawn(mining.negatives), mining.drawn(mining.positives)
    draws_negatives = negatives is not None and negatives < size
    draws_positives = positives is not None and positives < (size if most_of_class is None else most_of_class)
    if not draws_negatives and not draws_positives:
        return DrawnKeys(None, key_labels)
    priority = draw(key_labels)
    drawn = keys, key_labels
    if draws_negatives:
        index = _smallest(key_labels, priority, operator.index(negatives))  # type: ignore[arg-type]
        found = index < size
        index = torch.where(found, index, 0)
        drawn = keys.index_select(0, index), torch.where(found, key_labels[index], -1)
    labels = _smallest_of_each(key_labels, priority, positives) if draws_positives else key_labels  # type: ignore[arg-type]
    return DrawnKeys(drawn, labels)


def _smallest(labels: Tensor, priority: Tensor, count: int) -> Tensor:
    """Indices of the `count` labelled keys of smallest (priority, index), ascending; K where there are none left."""
    size = labels.shape[0]
    index = torch.arange(size, device=labels.device)
    rank = (priority.long() - torch.iinfo(torch.int32).min << 31) | index  # unique, so that any top-k agrees
    rank = torch.where(labels >= 0, rank, torch.iinfo(torch.int64).max)
    chosen = rank.topk(count, largest=False, sorted=False).indices
    return torch.where(labels[chosen] >= 0, chosen, size).sort().values


def _smallest_of_each(labels: Tensor, priority: Tensor, count: int) -> Tensor:
    """The labels, but -1 for those that are not among the `count` keys of their class of smallest (priority, index)."""
    by_priority = priority.sort(stable=True).indices
    ordered, by_class = labels[by_priority].sort(stable=True)
    place = torch.arange(labels.shape[0], device=labels.device) - torch.searchsorted(ordered, ordered)
    kept = torch.where(place < count, ordered, -1)
    return torch.empty_like(labels).scatter_(0, by_priority[by_class], kept)


def score_thresholds(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A]
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K]
    mining: Mining,
    *,
    negatives: tuple[Tensor, Tensor] | None = None,  # [M, D] and [M]
    exclude_self: bool = False,
    backend: str | None = None,
) -> Thresholds:
    """Rank each anchor's keys by cosine, and find where mining cuts: in 512 equal bins over [-1, 1], without a sort.

    The smallest number of whole bins that holds what is asked for is kept, so somewhat more may be; if there are fewer
    keys than that, all are. No gradient flows. "random" keeps all. Under `torch.autocast` the cosines are products in
    its dtype, as those of `infonce` are.

    Args:
        anchors, keys: rows of unit norm, of one dtype: fp32, fp16 or bf16 (fp64 on the reference backend), or of any
            under autocast.
        anchor_labels, key_labels: any integer dtype; rows of a label < 0 take no part. For `key_labels` pass
            `DrawnKeys.positive_labels`.
        mining: says what is kept of each anchor's keys.
        negatives: `DrawnKeys.negatives`; None takes them from the keys.
        exclude_self: key i is not a positive of anchor i.
        backend: see `available_backends`.

    Returns:
        `Thresholds`, for `infonce(neg_min=, pos_max=)`.

    Raises:
        TypeError, ValueError: as `infonce`.
    """
    check_mining(mining)
    check_contrast(anchors, anchor_labels, keys, key_labels, negatives)
    anchors, width = autocast.to_product(anchors), operator.index(anchors.shape[1])
    name = backends.resolve(backend, "mining", anchors.device, anchors.dtype, width)
    every = autocast.to_product(keys), checks.to_int32("key_labels", key_labels)
    others = every
    if negatives is not None:
        others = autocast.to_product(negatives[0]), checks.to_int32("negatives[1]", negatives[1])
    anchor_labels = checks.to_int32("anchor_labels", anchor_labels)
    return thresholds_of(anchors, anchor_labels, every, others, mining, exclude_self, name)


def thresholds_of(
    anchors: Tensor,
    anchor_labels: Tensor,
    keys: tuple[Tensor, Tensor],
    negatives: tuple[Tensor, Tensor],
    mining: Mining,
    exclude_self: bool,
    backend: str,
) -> Thresholds:
    """`score_thresholds` of what has been checked, by a backend that serves it."""
    if not mining.by_cosine:
        nowhere = anchors.new_full((anchors.shape[0],), torch.inf, dtype=torch.float32)
        return Thresholds(-nowhere, nowhere)
    with torch.no_grad():
        nearest, farthest = torch.ops.pixcontrast.mining_counts(
            anchors.detach(),
            anchor_labels,
            keys[0].detach(),
            keys[1],
            negatives[0].detach(),
            negatives[1],
            exclude_self,
            backend,
        )
        # The highest bin from which up there are as many as wanted; those below it may hold the rest.
        up_to = nearest.cumsum(1, dtype=torch.int32)
        rest = up_to[:, -1:] - _wanted(up_to, mining, mining.negatives)
        neg_bin = (torch.searchsorted(up_to, rest, right=True) + (rest >= 0) - 1)[:, 0]
        up_to = farthest.cumsum(1, dtype=torch.int32)
        pos_bin = torch.searchsorted(up_to, _wanted(up_to, mining, mining.positives))[:, 0]
        half = SCORE_BINS / 2
        neg_min = torch.where(neg_bin > 0, neg_bin / half - 1, -torch.inf)
        pos_max = torch.where(pos_bin < SCORE_BINS - 1, (pos_bin + 1) / half - 1, torch.inf)
        return Thresholds(neg_min.float(), pos_max.float())


def _wanted(up_to: Tensor, mining: Mining, count: int) -> Tensor:
    """How many pairs an anchor keeps, [A, 1] int32, of those that are there; of fewer than that all."""
    there = up_to[:, -1:].contiguous()
    if mining.strategy != "semi-hard":
        return torch.full_like(there, count)
    return torch.ceil(there.double() * (mining.fraction * (1 - 2**-40))).clamp(min=1).int()


def check_contrast(
    anchors: Tensor, anchor_labels: Tensor, keys: Tensor, key_labels: Tensor, negatives: object
) -> None:
    """Raise TypeError or ValueError unless rows and labels of anchors, keys and negatives fit each other."""
    sides = [("anchors", anchors, "anchor_labels", anchor_labels), ("keys", keys, "key_labels", key_labels)]
    if negatives is not None:
        if not isinstance(negatives, tuple) or len(negatives) != 2:
            raise TypeError(f"negatives must be (rows, labels), got {type(negatives).__name__}")
        sides.append(("negatives[0]", negatives[0], "negatives[1]", negatives[1]))
    for name, rows, *_ in sides:
        if not isinstance(rows, Tensor) or not rows.dtype.is_floating_point:
            got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if rows.dim() != 2 or rows.shape[1] < 1:
            raise ValueError(f"{name} must have shape [rows, D] with D >= 1, got {tuple(rows.shape)}")
        if autocast.product_dtype(rows) != autocast.product_dtype(anchors):
            raise TypeError(f"anchors and {name} must have one dtype, got {anchors.dtype} and {rows.dtype}")
        if rows.shape[1] != anchors.shape[1]:
            shapes = f"{tuple(anchors.shape)} and {tuple(rows.shape)}"
            raise ValueError(f"anchors and {name} must have the same width, got {shapes}")
        if rows.device != anchors.device:
            raise ValueError(
                f"anchors and {name} must be on one device, got {anchors.device} and {rows.device}"
            )
    for _, rows, name, labels in sides:
        checks.check_labels(name, labels, (rows.shape[0],), rows.device)
