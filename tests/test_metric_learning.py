"""`infonce` beside the losses of pytorch-metric-learning: where definitions coincide, values and gradients do.

These are the lines of docs/guide/metric-learning.md for those who come from there.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext import MemoryBank, infonce

pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed: make test")

from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss, SupConLoss
from pytorch_metric_learning.reducers import AvgNonZeroReducer, PerAnchorReducer

TEMPERATURE = 0.1
EQUAL = torch.arange(24) % 4
UNEQUAL = torch.tensor([0] * 9 + [1] * 2 + [2] * 7 + [3] * 6)
PAIRS = torch.arange(24) // 2


def rows(count=24):
    return torch.randn(count, 16, requires_grad=True)


def agree(ours, theirs, embeddings):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(loss, embeddings, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def within_the_batch(embeddings, labels):
    unit = F.normalize(embeddings)
    return infonce(unit, labels, unit, labels, temperature=TEMPERATURE, exclude_self=True)


def test_ntxent_of_classes_of_one_size():
    embeddings = rows()
    agree(within_the_batch(embeddings, EQUAL), NTXentLoss(TEMPERATURE)(embeddings, EQUAL), embeddings)


def test_ntxent_averaged_over_anchors():
    """By itself it averages over pairs, in which large classes count more."""
    embeddings = rows()
    per_anchor = NTXentLoss(TEMPERATURE, reducer=PerAnchorReducer(AvgNonZeroReducer()))
    agree(within_the_batch(embeddings, UNEQUAL), per_anchor(embeddings, UNEQUAL), embeddings)
    over_pairs = NTXentLoss(TEMPERATURE)(embeddings, UNEQUAL)
    assert (within_the_batch(embeddings, UNEQUAL) - over_pairs).abs() > 1e-4


def test_supcon_of_one_positive():
    """With more its denominator holds the other positives too."""
    embeddings = rows()
    agree(within_the_batch(embeddings, PAIRS), SupConLoss(TEMPERATURE)(embeddings, PAIRS), embeddings)
    assert (within_the_batch(embeddings, EQUAL) - SupConLoss(TEMPERATURE)(embeddings, EQUAL)).abs() > 1e-3


def test_two_views_without_labels():
    """SimCLR's loss, as lightly's NTXentLoss has it: the other view of a row is its only positive."""
    embeddings, count = rows(), 12
    logits = F.normalize(embeddings) @ F.normalize(embeddings).T / TEMPERATURE
    logits = logits.masked_fill(torch.eye(2 * count, dtype=torch.bool), -torch.inf)
    theirs = F.cross_entropy(logits, torch.arange(2 * count).roll(count))
    agree(within_the_batch(embeddings, torch.arange(count).repeat(2)), theirs, embeddings)


def test_ntxent_against_a_bank():
    """A full one: a label below 0, of slots not yet filled, is a class to them and nothing to us."""
    bank = MemoryBank(4, 16, region_slots=2, pixel_slots=3)
    while (bank.key_labels < 0).any():
        bank.enqueue(torch.randn(1, 16, 8, 8), torch.randint(0, 4, (1, 8, 8)))
    keys, key_labels = bank.flat()
    embeddings = rows()
    ours = infonce(F.normalize(embeddings), EQUAL, keys, key_labels, temperature=TEMPERATURE)
    theirs = NTXentLoss(TEMPERATURE)(embeddings, EQUAL, ref_emb=keys, ref_labels=key_labels.long())
    agree(ours, theirs, embeddings)


def test_cross_batch_memory():
    """Against the batch itself and what came before; theirs enqueues first, so the batch is in it."""
    size = len(EQUAL)
    memory = CrossBatchMemory(NTXentLoss(TEMPERATURE), 16, memory_size=2 * size)
    before = rows().detach()
    memory(before, EQUAL)
    embeddings = rows()
    unit = F.normalize(embeddings)
    keys = torch.cat([unit.detach(), F.normalize(before)])
    labels = torch.cat([EQUAL, EQUAL])
    ours = infonce(unit, EQUAL, keys, labels, temperature=TEMPERATURE, exclude_self=True)
    agree(ours, memory(embeddings, EQUAL), embeddings)
