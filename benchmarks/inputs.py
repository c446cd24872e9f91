"""What the ops are fed: unit embeddings around a direction per class, and scenes of blobs as cameras see them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrast_inputs(
    num_anchors: int, num_keys: int, dim: int, dtype: torch.dtype, num_classes: int = 19, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit anchors sorted by class, as the sampler yields them, and unit keys in the bank's layout.

    Embeddings scatter around a direction per class, so that positives are nearer than negatives.
    Returns anchors [A, D], anchor_labels [A], keys [K, D], key_labels [K].
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_classes, dim, generator=generator)

    def scatter(labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), dim, generator=generator)
        return F.normalize(centres[labels] + noise, dim=1).to(device, dtype)

    anchor_labels = torch.randint(num_classes, (num_anchors,), generator=generator).sort().values
    key_labels = torch.arange(num_keys) * num_classes // max(1, num_keys)
    anchors, keys = scatter(anchor_labels), scatter(key_labels)
    return anchors, anchor_labels.int().to(device), keys, key_labels.int().to(device)


def scenes(
    batch: int,
    height: int,
    width: int,
    num_classes: int = 19,
    ignore_index: int = 255,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Labels and predictions [B, H, W] int64: blobs of frequent and rare classes, some void, ~20 % errors."""
    generator = torch.Generator().manual_seed(1)
    size = (height, width)

    def smooth(channels: int, scale: int) -> Tensor:
        coarse = torch.randn(
            batch, channels, max(1, height // scale), max(1, width // scale), generator=generator
        )
        return F.interpolate(coarse, size, mode="bilinear")

    frequency = torch.randn(batch, num_classes, 1, 1, generator=generator)
    truth = (smooth(num_classes, 8) + 0.5 * frequency).argmax(1)
    wrong = torch.rand(batch, height, width, generator=generator) < 0.2
    guess = torch.randint(num_classes, (batch, height, width), generator=generator)
    predictions = torch.where(wrong, guess, truth)
    labels = truth.masked_fill(smooth(1, 16)[:, 0] > 1.0, ignore_index)
    return labels.to(device), predictions.to(device)


def embedding_map(
    batch: int, dim: int, height: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Unit pixel embeddings [B, D, H, W], as the authors' head delivers them."""
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(batch, dim, height, width, generator=generator)
    return F.normalize(embeddings, dim=1).to(device, dtype)


def draw_priority(labels: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2**31 - 1, labels.shape, generator=generator, dtype=torch.int32).to(labels.device)
