"""The faults of the published implementation (tfzhou/ContrastiveSeg at 287e5d3), one test each: none occurs here.

All tests use the public API, as a trainer would; #n is the issue in that repository. The eighth fault, banks that rank
0's overwrote, takes several processes: `test_distributed.py`.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from pixcontrast_ext import (
    MemoryBank,
    PixelContrastCrossEntropyLoss,
    PixelContrastLoss,
    hard_anchor_sampling,
    infonce,
)
from tests.support.backends import BACKENDS


def coded(labels, channels):
    """Embeddings whose direction tells the class: pixels of class c are unit vectors near axis c."""
    embeddings = F.one_hot(labels.clamp(max=channels - 1), channels).float() + 0.05 * torch.rand(
        *labels.shape, channels
    )
    return embeddings.permute(0, 3, 1, 2)


def used(bank):
    """Keys and labels of the slots in use."""
    keys, labels = bank.flat()
    return keys[labels >= 0], labels[labels >= 0]


def test_1_pixels_of_a_class_are_enqueued_under_that_class(backend):
    """#65: the permutation itself served as pixel indices, instead of indexing the pixels of the class."""
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    labels[:, 6:] = 1
    labels[:, 7, 4:] = 2
    bank = MemoryBank(3, 3, region_slots=0, pixel_slots=64, pixels_per_image=16)
    bank.enqueue(coded(labels, 3), labels, backend=backend)
    keys, key_labels = used(bank)
    assert torch.bincount(key_labels).tolist() == [32, 24, 8]
    assert torch.equal(keys.argmax(dim=1), key_labels.long())


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (31, 17)])
def test_2_labels_of_another_size_are_picked_where_the_embeddings_are(quick_backend, size):
    """#28: labels were strided by 8 for embeddings of stride 4."""
    labels = torch.randint(0, 4, (2, 32, 32))
    at_embeddings = F.interpolate(labels[:, None].float(), size, mode="nearest").squeeze(1).long()
    bank = MemoryBank(4, 4, region_slots=8, pixel_slots=64)
    criterion = PixelContrastLoss(4, bank=bank, min_pixels=1, max_samples=96, backend=quick_backend)
    criterion(coded(at_embeddings, 4), labels, labels)
    keys, key_labels = used(bank)
    assert bank.region_fill.tolist() == [2] * 4
    assert torch.equal(keys.argmax(dim=1), key_labels.long())
    assert (keys.max(dim=1).values > 0.98).all()  # regions hold one class as well


def test_3_rings_advance_by_what_was_written_and_wrap(backend):
    """#18, #55, #31: the pointer moved by 1 after several rows were written, and a wrap overwrote the tail."""
    bank = MemoryBank(1, 2, region_slots=3, pixel_slots=7, pixels_per_image=3, normalize=False)
    written = []
    for step in range(5):
        rows = 10 * (step + 1) + torch.arange(3.0)
        bank.enqueue(
            torch.stack([rows, torch.ones(3)]).view(1, 2, 1, 3),
            torch.zeros(1, 1, 3, dtype=torch.int64),
            backend=backend,
        )
        written += rows.tolist()
        expected = {i % 7: value for i, value in enumerate(written)}
        assert bank.keys[0, 3:, 0].tolist() == [expected.get(slot, 0.0) for slot in range(7)]
        assert (bank.pixel_ptr, bank.pixel_fill) == (len(written) % 7, min(len(written), 7))
        assert (bank.region_ptr, bank.region_fill) == ((step + 1) % 3, min(step + 1, 3))


def test_4_class_0_is_a_class_like_any_other(backend):
    """#35, #60, #66: it was never enqueued, and its zeros took part as keys."""
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[:, 2:] = 1
    bank = MemoryBank(2, 2, region_slots=2, pixel_slots=4, pixels_per_image=4)
    bank.enqueue(coded(labels, 2), labels, backend=backend)
    assert bank.region_fill.tolist() == [1, 1]
    assert bank.pixel_fill.tolist() == [4, 4]
    keys, key_labels = used(bank)
    assert (key_labels == 0).sum() == 5
    assert (keys.norm(dim=1) > 0.99).all()

    criterion = PixelContrastLoss(2, bank=bank, min_pixels=1, max_samples=96, backend=backend).eval()
    anchor = torch.tensor([[math.cos(0.4), math.sin(0.4)]])  # of class 0
    loss = criterion(
        anchor.view(1, 2, 1, 1),
        torch.zeros(1, 1, 1, dtype=torch.int64),
        torch.zeros(1, 1, 1, dtype=torch.int64),
    )
    scores = (keys @ anchor[0]).double() / 0.1
    negatives = scores[key_labels == 1].logsumexp(0)
    assert loss.item() == pytest.approx(
        F.softplus(negatives - scores[key_labels == 0]).mean().item(), rel=1e-5
    )


def test_5_no_key_of_a_bank_is_taken_for_the_anchor_itself(backend):
    """#16, #55: the mask (i, i) was applied to rows of the queue, out of bounds if anchors outnumbered keys."""
    anchors = F.normalize(torch.randn(6, 4), dim=1)
    keys, key_labels = anchors[:3].flip(0).contiguous(), torch.tensor([0, 1, 0])
    anchor_labels = torch.tensor([0, 1, 0, 1, 0, 1])
    found = infonce(
        anchors, anchor_labels, keys, key_labels, temperature=0.5, reduction="none", backend=backend
    )
    scores = anchors @ keys.T / 0.5
    for i, label in enumerate(anchor_labels.tolist()):
        own = key_labels == label
        expected = F.softplus(scores[i, ~own].logsumexp(0) - scores[i, own]).mean()
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-5)

    labels = torch.arange(2).repeat(8).view(1, 4, 4)
    bank = MemoryBank(2, 4, region_slots=1, pixel_slots=0)
    criterion = PixelContrastLoss(2, bank=bank, min_pixels=1, max_samples=96, backend=backend)
    embeddings = torch.randn(1, 4, 4, 4)
    criterion(embeddings, labels, labels)
    # 16 anchors and 2 keys, and every pair counts.
    rows = F.normalize(embeddings, dim=1).permute(0, 2, 3, 1).reshape(16, 4)
    scores = rows @ bank.flat()[0].T / 0.1
    own, other = scores.gather(1, labels.view(-1, 1)), scores.gather(1, 1 - labels.view(-1, 1))
    assert criterion(embeddings, labels, labels).item() == pytest.approx(
        F.softplus(other - own).mean().item(), rel=1e-4
    )


def test_6_slots_that_nobody_filled_take_no_part(backend):
    """Unfilled slots used to take part, as random unit vectors."""
    labels = torch.arange(2).repeat(8).view(1, 4, 4)
    embeddings = torch.randn(1, 4, 4, 4)
    losses = []
    for slots in (8, 200):
        bank = MemoryBank(2, 4, region_slots=slots, pixel_slots=slots, pixels_per_image=8)
        bank.enqueue(embeddings, labels, backend=backend)
        bank.keys[bank.key_labels < 0] = math.nan  # what an unused slot holds must not matter
        losses.append(
            PixelContrastLoss(2, bank=bank, min_pixels=1, max_samples=96, backend=backend).eval()(
                embeddings, labels, labels
            )
        )
    assert losses[0] > 0
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)


@pytest.mark.parametrize("with_bank", [True, False])
def test_7_nothing_to_contrast_is_zero_and_nan_stays_out(quick_backend, with_bank):
    """#68: no eligible class crashed; no positive gave 0 / 0, the warm-up 0 * NaN, unnormalised embeddings NaN."""

    def bank():
        return MemoryBank(3, 4, region_slots=2, pixel_slots=2) if with_bank else None

    embeddings = (torch.randn(1, 4, 4, 4) * 1e4).requires_grad_()
    few = torch.full((1, 4, 4), 255)
    few[0, 0, :2] = torch.tensor([0, 1])
    for labels, min_pixels in ((torch.full((1, 4, 4), 255), 1), (few, None), (few, 1)):
        criterion = PixelContrastLoss(
            3, bank=bank(), min_pixels=min_pixels, max_samples=96, backend=quick_backend
        )
        loss = criterion(embeddings, labels, labels)  # nothing to contrast, no eligible class, no positive
        (grad,) = torch.autograd.grad(loss, embeddings)
        assert loss.item() == 0
        assert (grad == 0).all()

    labels = torch.randint(0, 3, (1, 4, 4))
    criterion = PixelContrastLoss(3, bank=bank(), min_pixels=1, max_samples=96, backend=quick_backend)
    criterion(embeddings, labels, labels)
    assert criterion(embeddings, labels, labels).isfinite()

    criterion = PixelContrastCrossEntropyLoss(
        3, warmup_steps=1, bank=bank(), min_pixels=1, max_samples=96, backend=quick_backend
    )
    broken = torch.full((1, 4, 4, 4), math.nan, requires_grad=True)
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = criterion(logits, broken, labels)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert logits.grad.isfinite().all()
    assert broken.grad is None or (broken.grad == 0).all()


def test_9_half_of_the_anchors_are_mispredicted_pixels(backend):
    """#17, #22, #31, #47, #59: anchors were drawn at random, whatever was predicted."""
    labels = torch.arange(2).repeat_interleave(200).view(1, 20, 20)
    for wrong in (30, 120):
        predictions = labels.clone()
        predictions.view(2, 200)[:, :wrong] = 2
        sample = hard_anchor_sampling(
            labels, predictions, num_classes=3, max_samples=100, max_views=50, min_pixels=1, backend=backend
        )
        hard = predictions.flatten()[sample.indices] != sample.labels
        assert sample.count == 100
        assert hard.sum() == 50
        assert [int(hard[sample.labels == c].sum()) for c in range(2)] == [25, 25]

    # Only hard pixels have a loss: their embeddings are those of the other class.
    predictions = torch.where(torch.arange(400).view(1, 20, 20) % 10 == 0, 1 - labels, labels)
    embeddings = coded(predictions, 2)
    criterion = PixelContrastLoss(2, max_samples=40, max_views=20, backend=backend)
    informed = criterion(embeddings, labels, predictions)
    misled = criterion(embeddings, labels, labels)
    assert informed > 1.3 * misled


def profiled(step):
    """Ops run (nested ones too), Python functions entered, and peak memory above the start in bytes."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held, peak, ops = 0, 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
        ops += event.name().startswith(("aten::", "pixcontrast::"))
    return ops, calls, peak


# Without Triton: its interpreter runs Python.
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_10_work_does_not_grow_with_the_pairs_of_image_and_class(backend):
    """There was a Python loop over them: 1930 ops to sample a batch of 8, 2990 to enqueue it."""
    found = []
    for batch in (1, 16):  # 12 and 192 pairs
        labels = torch.arange(batch * 16 * 16).view(batch, 16, 16) % 12
        embeddings = torch.randn(batch, 8, 16, 16)
        bank = MemoryBank(12, 8, region_slots=1, pixel_slots=2)
        criterion = PixelContrastLoss(12, max_samples=240, min_pixels=1, bank=bank, backend=backend)
        criterion(embeddings, labels, labels)
        found.append(profiled(lambda c=criterion, e=embeddings, y=labels: c(e, y, y)))
    (ops, calls, _), (more_ops, more_calls, _) = found
    assert 0 < ops < 2000
    assert more_ops <= 1.05 * ops
    assert 0 < calls < 2000
    assert more_calls <= 1.05 * calls


def test_10_nothing_of_anchors_times_keys_is_stored():
    """There were 10.5 buffers of that size at peak."""
    anchors, keys, channels = 1000, 16000, 8
    bank = MemoryBank(4, channels, region_slots=0, pixel_slots=keys // 4, pixels_per_image=500)
    labels = torch.arange(8 * 32 * 64).view(8, 32, 64) % 4
    embeddings = torch.randn(8, channels, 32, 64, requires_grad=True)
    bank.enqueue(embeddings, labels)
    assert (bank.key_labels >= 0).all()
    peaks = {}
    for backend in ("cpu", "reference"):
        criterion = PixelContrastLoss(
            4, max_samples=anchors, max_views=1000, min_pixels=1, bank=bank, backend=backend
        )
        criterion.eval()
        peaks[backend] = profiled(lambda c=criterion: c(embeddings, labels, labels).backward())[2]
    matrix = 4 * anchors * keys
    assert 0 < peaks["cpu"] < matrix / 8
    assert peaks["reference"] > matrix  # it may, which shows that the measurement would see it
