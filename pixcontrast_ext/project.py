"""Projecting the pixels that a step uses, and no others: rows pass the head in place of maps.

A head reads every pixel by itself, so the choice of the pixels may come first. On a whole map it costs more, in time
and in memory, than all that follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pixcontrast_ext.ops.gather import gather
from pixcontrast_ext.ops.sampling import AnchorSample, SamplingRule, sample

Head = Callable[[Tensor], Tensor]
"""From features [1, C_in, N, 1] to embeddings [1, D, N, 1], each pixel by itself."""

_OF_SEVERAL_PIXELS = (
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
"""Layers that would mix rows, which are pixels of any images. Batch norm does on a map what it does here."""


def _reads_several(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return isinstance(layer, _OF_SEVERAL_PIXELS)
    padded = not isinstance(layer.padding, str) and any(layer.padding)
    return padded or {*layer.kernel_size, *layer.stride} != {1}


def check_head(head: Any) -> None:
    """Raise TypeError for a head that cannot be called, ValueError for a usual layer that reads several pixels."""
    if not callable(head):
        raise TypeError(f"head must be a module or another callable, got {type(head).__name__}")
    for name, layer in head.named_modules() if isinstance(head, nn.Module) else ():
        if _reads_several(layer):
            raise ValueError(
                f"head must read each pixel by itself, but {f'its layer {name!r}' if name else 'it'} is {layer}: "
                "leave it to the model, and give the loss what comes out of it"
            )


class Candidates(NamedTuple):
    """Pixels of a batch that were drawn for the bank, in rows of a fixed number."""

    pixels: AnchorSample
    groups: Tensor  # [N] int64: image * C + class; -1 in padding rows
    priority: Tensor  # [N] int32, that of each pixel
    images: int


class Source(NamedTuple):
    """Where a step reads its anchors, and in training what it enqueues."""

    embeddings: Tensor  # the batch's map [B, D, h, w], or rows that were projected, [1, D, N, 1]
    backend: str = ""  # that serves them, if they are read at all
    anchors: AnchorSample | None = None
    places: Tensor | None = None  # [A] int64, of the anchors in the embeddings


def draw_candidates(
    labels: Tensor,  # [B, H, W] int64
    priority: Tensor,  # [B, H, W] int32
    rule: SamplingRule,
    backend: str,
) -> Candidates:
    """Draw pixels of each class of each image, those of smallest (priority, pixel), whatever was predicted.

    They are in the order of the pixels within a class of an image.
    """
    pixels = sample(labels, labels, priority, rule, backend)
    images, height, width = labels.shape
    if 0 in labels.shape:
        return Candidates(pixels, pixels.labels.long(), torch.zeros_like(pixels.labels), 1)
    groups = pixels.indices // (height * width) * rule.num_classes + pixels.labels
    groups = torch.where(pixels.labels >= 0, groups, -1)
    return Candidates(pixels, groups, priority.flatten()[pixels.indices], images)


def project(
    head: Head,
    features: Tensor,  # [B, C_in, H, W]
    anchors: AnchorSample | None,
    candidates: AnchorSample | None,
    trains: bool,
    backend: str,
) -> Tensor:
    """Read the features of pixels and pass them through the head, all of them as one map, [1, C_in, N, 1].

    The anchors come first. Batch norm sees only labelled pixels: rows of padding repeat the others in turn. If
    there are none at all, rows are 0. The statistics of a head that is a module stay as they are then, and in a call
    that does not train.

    Raises:
        TypeError, ValueError: the head gives anything but [1, D, N, 1] in floating point.
    """
    parts = [each for each in (anchors, candidates) if each is not None]
    labels = torch.cat([each.labels for each in parts])
    indices = torch.cat([each.indices for each in parts])[_stand_ins(labels)]
    count = 0 if anchors is None else anchors.labels.shape[0]
    rows = []
    if anchors is not None:
        read = gather(features, indices[:count], False, features.dtype, backend)
        rows.append(torch.where((anchors.labels >= 0)[:, None], read, read.detach()))
    if candidates is not None:
        rows.append(gather(features.detach(), indices[count:], False, features.dtype, backend))
    some = (labels >= 0).any()
    maps = torch.where(some, torch.cat(rows), 0).T[None, :, :, None]
    embeddings = _call(head, maps, some, trains)
    if not isinstance(embeddings, Tensor) or not embeddings.dtype.is_floating_point:
        got = embeddings.dtype if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise TypeError(f"head must give a floating-point tensor, got {got}")
    size = labels.shape[0]
    if embeddings.dim() != 4 or (embeddings.shape[0], *embeddings.shape[2:]) != (1, size, 1):
        shapes = f"{tuple(embeddings.shape)} of {tuple(maps.shape)}"
        raise ValueError(f"head must give [1, D, N, 1] of features [1, C_in, N, 1], got {shapes}")
    return embeddings


def _stand_ins(labels: Tensor) -> Tensor:
    """For each row the one that is read in its place: itself, or for the n-th of padding the n-th of the others.

    If there is more padding than others, it begins again with the first.
    """
    padding = labels < 0
    others_first = padding.to(torch.uint8).argsort(stable=True)
    count = (~padding).sum().clamp(min=1)
    stand_in = others_first[(padding.cumsum(0) - 1) % count]
    return torch.where(padding, stand_in, torch.arange(labels.shape[0], device=labels.device))


def _call(head: Head, maps: Tensor, some: Tensor, trains: bool) -> Tensor:
    """Call the head, and have its buffers as they were unless it trains and `some` row holds a pixel."""
    buffers = dict(head.named_buffers()) if isinstance(head, nn.Module) and head.training else {}
    if not buffers or any(
        isinstance(buffer, nn.parameter.UninitializedBuffer) for buffer in buffers.values()
    ):
        return head(maps)  # a lazy module makes its buffers in its first call
    assert isinstance(head, nn.Module)
    # The head updates copies, which nobody writes again: a graph holds on to running statistics for its backward.
    updated = {name: buffer.clone() for name, buffer in buffers.items()}
    embeddings: Tensor = torch.func.functional_call(head, updated, (maps,))
    if trains:
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(torch.where(some, updated[name], buffer))
    return embeddings
