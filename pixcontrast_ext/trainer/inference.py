"""What a model says of images: at once or window by window, at several scales, with the mirror image.

What several views of a pixel say is averaged, as class probabilities or as logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixcontrast_ext.trainer.config import InferenceConfig


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients, for the length of the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def predict(
    model: nn.Module,
    images: Tensor,
    size: Sequence[int],
    options: InferenceConfig | None = None,
    amp: str = "off",
) -> Tensor:
    """Class of every pixel, [B, *size] int64, for images [B, 3, H, W] in [0, 1]."""
    if options is None or options == InferenceConfig():
        return _upsampled(_logits(model, images, amp), size, model).argmax(
            1
        )  # a softmax would change no maximum
    return class_probabilities(model, images, size, options, amp).argmax(1)


def class_probabilities(
    model: nn.Module, images: Tensor, size: Sequence[int], options: InferenceConfig, amp: str = "off"
) -> Tensor:
    """Probability of every class at every pixel, [B, C, *size] float32, for images [B, 3, H, W] in [0, 1].

    The mean over scales and, with `flip`, over the image and its mirror image. At each of them the probabilities
    of a sliding window are averaged where windows overlap, and resized to `size` then; those of a whole image are
    of its resized logits. With `average` of "logits" it is these that are averaged, and the outcome is their softmax.
    """
    total: Tensor | None = None
    for scale in options.scales:
        extent = [max(1, round(length * scale)) for length in images.shape[-2:]]
        scaled = images
        if scale != 1:
            scaled = F.interpolate(images, extent, mode="bilinear", align_corners=False, antialias=True)
        for mirrored in (False, True) if options.flip else (False,):
            view = scaled.flip(3) if mirrored else scaled
            if options.window is None:
                seen = _averaged(_upsampled(_logits(model, view, amp), size, model), options)
            else:
                seen = _upsampled(_through_windows(model, view, options, amp), size, model)
            seen = seen.flip(3) if mirrored else seen
            total = seen if total is None else total.add_(seen)
    assert total is not None  # InferenceConfig.validate: there is a scale
    total = total.div_(len(options.scales) * (2 if options.flip else 1))
    return total.softmax(1) if options.average == "logits" else total


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start so that they cover `length`: every `stride`, the last one flush with the end."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def _through_windows(model: nn.Module, images: Tensor, options: InferenceConfig, amp: str) -> Tensor:
    """What is averaged, [B, C, H, W], of images [B, 3, H, W], the mean of all windows that see a pixel."""
    assert options.window is not None
    height, width = images.shape[-2:]
    window = (min(options.window[0], height), min(options.window[1], width))
    stride = options.stride or tuple(max(1, length * 2 // 3) for length in options.window)
    total: Tensor | None = None
    windows = images.new_zeros(height, width)
    for top in window_starts(height, window[0], stride[0]):
        for left in window_starts(width, window[1], stride[1]):
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            seen = _averaged(_upsampled(_logits(model, images[place], amp), window, model), options)
            if total is None:
                total = seen.new_zeros(*seen.shape[:2], height, width)
            total[place] += seen
            windows[place] += 1
    assert total is not None
    return total.div_(windows)


def _averaged(logits: Tensor, options: InferenceConfig) -> Tensor:
    return logits if options.average == "logits" else logits.softmax(1)


def _logits(model: nn.Module, images: Tensor, amp: str) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp == "bf16"):
        logits: Tensor = model(images)["seg"].float()
    return logits


def _upsampled(maps: Tensor, size: Sequence[int], model: nn.Module) -> Tensor:
    if tuple(size) == tuple(maps.shape[-2:]):
        return maps
    align_corners = bool(getattr(model, "align_corners", False))  # see build_model
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=align_corners)
