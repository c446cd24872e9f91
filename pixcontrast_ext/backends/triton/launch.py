"""Launching a kernel where its tensors are, and what there is to know of that device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of the device's multiprocessors; the interpreter does as a Hopper would."""
    return (9, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Enqueue a kernel on the current stream of the device of its tensors; an empty grid enqueues nothing.

    Products and sums are fused as the compiler sees fit, whatever its default.
    """
    if 0 in grid:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    if device.type != "cuda":  # interpreted
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, enable_fp_fusion=True, **options)
