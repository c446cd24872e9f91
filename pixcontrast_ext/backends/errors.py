"""What is said of a value that only a look at the data shows to be wrong, by whichever part of the package looks."""

from __future__ import annotations

import torch
from torch import Tensor

from pixcontrast_ext.backends.calls import Collect, Sampling


def bad_class(name: str, place: list[int], label: int, num_classes: int, ignore_index: int) -> ValueError:
    return ValueError(
        f"{name}{place} is {label}, expected 0 <= label < num_classes={num_classes} or ignore_index={ignore_index}"
    )


def bad_label(call: Sampling | Collect, position: int, label: int) -> ValueError:
    """Of `labels`, at a position that is flat over them."""
    place = [int(i) for i in torch.unravel_index(torch.tensor(position), call.labels.shape)]
    return bad_class("labels", place, label, call.num_classes, call.ignore_index)


def bad_index(embeddings: Tensor, row: int, index: int) -> ValueError:
    batch, _, height, width = embeddings.shape
    return ValueError(f"indices[{row}] is {index}, expected 0 <= index < B*H*W={batch * height * width}")
