"""Compares the results of ops with the contract in slow loops."""

from __future__ import annotations

import torch
from torch import Tensor

from pixcontrast_ext import MemoryBank, hard_anchor_sampling
from tests.support import oracle

# For gathered rows and their gradient, relative to the largest value.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    scale = expected.norm()
    return ((found.double() - expected).norm() / scale).item() if scale > 0 else found.abs().max().item()


def check_sampling(labels, predictions, priority, backend, **settings):
    """Returns the number of anchors."""
    sample = hard_anchor_sampling(labels, predictions, priority=priority, backend=backend, **settings)
    min_pixels = settings.get("min_pixels")
    indices, anchor_labels = oracle.sampling(
        labels,
        predictions,
        priority,
        settings["num_classes"],
        settings["max_samples"],
        settings["max_views"],
        settings["max_views"] + 1 if min_pixels is None else min_pixels,
        settings.get("ignore_index", 255),
        settings.get("hard_fraction", 0.5),
    )
    padding = settings["max_samples"] - len(indices)
    assert sample.indices.tolist() == indices + [0] * padding
    assert sample.labels.tolist() == anchor_labels + [-1] * padding
    assert sample.count.item() == len(indices)
    assert (sample.indices.dtype, sample.labels.dtype, sample.count.dtype) == (
        torch.int64,
        torch.int32,
        torch.int32,
    )
    return len(indices)


def make_bank(classes, channels, regions, pixels, k, **kwargs):
    """A bank and its truth."""
    bank = MemoryBank(
        classes, channels, region_slots=regions, pixel_slots=pixels, pixels_per_image=k, **kwargs
    )
    return bank, oracle.Rings(classes, regions, pixels, k, kwargs.get("normalize", True))


def check_bank(bank, rings, *, rtol=0.0, atol=1e-6):
    """Every ring, its pointer and its fill."""
    offset = 0
    for kind, slots in rings.slots.items():
        for c in range(bank.num_classes):
            ptr, fill, stored = rings.expected(kind, c)
            assert (getattr(bank, f"{kind}_ptr")[c], getattr(bank, f"{kind}_fill")[c]) == (ptr, fill)
            labels, keys = (t[c, offset : offset + slots] for t in (bank.key_labels, bank.keys))
            assert labels.tolist() == [c if slot in stored else -1 for slot in range(slots)]
            expected = torch.zeros(slots, bank.embed_dim, dtype=torch.float64)
            for slot, row in stored.items():
                expected[slot] = row
            torch.testing.assert_close(keys.double(), expected, rtol=rtol, atol=atol)
        offset += slots
