"""Batches and banks for tests of the losses."""

from __future__ import annotations

import torch

from pixcontrast_ext import MemoryBank


def batch(size=(2, 12, 14, 9), classes=4, labels_size=None, ignored=0.2):
    count, _, height, width = size
    embeddings = torch.randn(size, requires_grad=True)
    labels = torch.randint(0, classes, (count, *(labels_size or (height, width))))
    labels[torch.rand(labels.shape) < ignored] = 255
    logits = torch.randn(count, classes, height, width, requires_grad=True)
    return embeddings, labels, logits


def bank_of(classes=4, channels=12, **settings):
    return MemoryBank(classes, channels, **(dict(region_slots=20, pixel_slots=30) | settings))
