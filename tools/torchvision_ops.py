"""Lets timm be imported beside a CPU-only torch and the torchvision of the package index."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch.library import Library


@cache
def declare_missing_ops() -> Library | None:
    """Declare two ops of torchvision, for the life of what is returned, where its own library does not load.

    That of the package index is built for CUDA. With a CPU-only torch its library does not load, and importing it then
    fails for lack of these two, which neither timm's networks nor ours call.
    """
    if torch.version.cuda or not find_spec("torchvision") or version("torchvision").endswith("+cpu"):
        return None
    ops = Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        ops.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return ops
