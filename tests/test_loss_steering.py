"""Steering the sampling from the losses: purity, hard pixels, confidence, what the bank is filled from, ranks."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from pixcontrast_ext import (
    MemoryBank,
    PixelContrastCrossEntropyLoss,
    PixelContrastLoss,
    gather_embeddings,
    hard_anchor_sampling,
    infonce,
)
from pixcontrast_ext.maps import pick_labels, resize_nearest
from pixcontrast_ext.ops.sampling import part_of_samples
from tests.support import oracle
from tests.support.losses import bank_of, batch


def settings_of(backend, **settings):
    return dict(num_classes=4, max_samples=50, max_views=7, min_pixels=1, backend=backend) | settings


def state(bank):
    return {name: buffer.clone() for name, buffer in bank.named_buffers()}


def assert_same_state(a, b):
    for name, buffer in state(a).items():
        assert torch.equal(buffer, state(b)[name]), name


def filled(backend=None, **settings):
    bank = bank_of(**settings)
    generator = torch.Generator().manual_seed(5)
    maps = torch.randn(2, 12, 6, 6, generator=generator), torch.randint(0, 4, (2, 6, 6), generator=generator)
    bank.enqueue(*maps, generator=generator, backend=backend)
    return bank


# Purity


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((12, 8), (3, 4)),  # integer factors
        ((12, 9), (12, 3)),
        ((13, 9), (4, 4)),  # ragged: cells overlap
        ((12, 9), (4, 2)),
        ((5, 7), (8, 9)),  # a grid finer than the labels
        ((9, 9), (1, 1)),
        ((1, 17), (1, 5)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_purity_is_that_of_loops(size, grid, dtype):
    labels = torch.randint(0, 3, (2, *size)).to(dtype)
    for layout in (labels, labels.transpose(1, 2).contiguous().transpose(1, 2)):
        nearest = resize_nearest(layout, grid).long()
        shares = oracle.purity(labels, grid, nearest)
        for least in (0.25, 1 / 3, 0.5, 0.75, 1.0):
            found = pick_labels(layout, grid, least, 255)
            exact = Fraction(least).limit_denominator(100)
            pure = torch.tensor(
                [[[share >= exact for share in row] for row in image] for image in shares]
            ).view(nearest.shape)
            assert found.dtype == torch.int64
            assert torch.equal(found, torch.where(pure, nearest, 255)), least
        assert torch.equal(pick_labels(layout, grid, 0.0, 255), nearest)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2)])
def test_purity_is_to_the_label(grid):
    """A share written as a fraction is reached by just so many labels, integer factor or not."""
    for size in (9, 10, 49, 99):
        width = size * grid[1] + (grid[1] - 1)  # the middle label belongs to both cells
        under = -(-width // grid[1])
        for same in range(1, under):
            labels = torch.ones(1, 1, width, dtype=torch.int64)
            labels[..., :same] = 0
            assert pick_labels(labels, grid, same / under, 255)[0, 0, 0] == 0, (size, same)
            assert pick_labels(labels, grid, (same + 0.5) / under, 255)[0, 0, 0] == 255, (size, same)


@pytest.mark.parametrize("labels_size", [(28, 18), (31, 20)])
def test_only_pure_cells_are_anchors_and_keys(backend, labels_size):
    embeddings, labels, logits = batch(labels_size=labels_size, ignored=0.1)
    labels[:, :12] = 2
    losses, banks = [], [filled(), filled()]
    pure = pick_labels(labels, (14, 9), 0.7, 255)
    assert 0 < (pure == 255).sum() < (pure != 255).sum() * 4
    for bank, purity, maps in ((banks[0], 0.7, labels), (banks[1], 0.0, pure)):
        criterion = PixelContrastLoss(**settings_of(backend, bank=bank, min_purity=purity))
        torch.manual_seed(2)
        losses.append(criterion(embeddings, maps, logits))
    assert torch.equal(*losses)
    assert losses[0] > 0
    assert_same_state(*banks)


def test_bank_takes_only_pure_cells(quick_backend):
    embeddings, labels = torch.randn(2, 12, 7, 5), torch.randint(0, 2, (2, 16, 11))
    banks = [bank_of(), bank_of()]
    priority = torch.randint(99, (2, 7, 5), dtype=torch.int32)
    banks[0].enqueue(embeddings, labels, min_purity=0.6, priority=priority, backend=quick_backend)
    pure = pick_labels(labels, (7, 5), 0.6, 255)
    banks[1].enqueue(embeddings, pure, priority=priority, backend=quick_backend)
    assert_same_state(*banks)
    assert 0 < (pure == 255).sum() < pure.numel()
    with pytest.raises(ValueError, match=r"min_purity must be in \[0, 1\], got 2"):
        banks[0].enqueue(embeddings, labels, min_purity=2)
    with pytest.raises(ValueError, match=r"labels \(1, 16, 11\) do not fit embeddings \(2, 12, 7, 5\)"):
        banks[0].enqueue(embeddings, labels[:1], min_purity=0.6)
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 7, 5\), got \(2, 16, 11\)"):
        banks[0].enqueue(embeddings, labels)
    assert_same_state(*banks)


# The loss


def by_hand(criterion, embeddings, labels, predictions, backend, confidence=None, **given):
    """Loss per anchor, |P| > 0 and the anchors, for maps of one size; draws as the loss does."""
    sample = hard_anchor_sampling(
        labels, predictions, num_classes=4, max_samples=50, max_views=7, min_pixels=1, confidence=confidence,
        backend=backend, **given,
    )  # fmt: skip
    anchors = gather_embeddings(embeddings, sample.indices, backend=backend)
    keys, key_labels = (x.clone() for x in criterion.bank.flat())
    loss = infonce(
        anchors, sample.labels, keys, key_labels, temperature=0.1, reduction="none", backend=backend
    )
    has_positive = (sample.labels >= 0) & torch.isin(sample.labels, key_labels)
    return loss, has_positive, sample


def test_with_defaults_it_is_what_it_was(quick_backend):
    """To the bit: half of the anchors hard, and the plain mean over those that have a positive."""
    embeddings, labels, logits = batch()
    criterion = PixelContrastLoss(**settings_of(quick_backend, bank=filled())).eval()
    torch.manual_seed(3)
    found = criterion(embeddings, labels, logits)
    torch.manual_seed(3)
    loss, has_positive, sample = by_hand(criterion, embeddings, labels, logits.argmax(1), quick_backend)
    assert torch.equal(found, loss.sum() / has_positive.sum())
    torch.manual_seed(3)
    priority = torch.randint(2**31 - 1, labels.shape, dtype=torch.int32)
    indices, _ = oracle.sampling(labels, logits.argmax(1), priority, 4, 50, 7, 1, 255)
    assert sample.indices[: len(indices)].tolist() == indices


@pytest.mark.parametrize("given", [dict(hard_fraction=0.9), dict(hard_fraction=0), dict(anchors="random")])
def test_settings_reach_the_sampling(quick_backend, given):
    embeddings, labels, logits = batch()
    criterion = PixelContrastLoss(**settings_of(quick_backend, bank=filled(), **given)).eval()
    torch.manual_seed(3)
    found = criterion(embeddings, labels, logits)
    torch.manual_seed(3)
    loss, has_positive, _ = by_hand(criterion, embeddings, labels, logits.argmax(1), quick_backend, **given)
    assert torch.equal(found, loss.sum() / has_positive.sum())
    if "hard_fraction" in given:
        plain = PixelContrastLoss(**settings_of(quick_backend, bank=filled())).eval()
        torch.manual_seed(3)
        assert plain(embeddings, labels, logits) != found
        plain.hard_fraction = given["hard_fraction"]
        torch.manual_seed(3)
        assert torch.equal(plain(embeddings, labels, logits), found)
        with pytest.raises(ValueError, match=r"hard_fraction must be in \[0, 1\], got -1"):
            plain.hard_fraction = -1


def test_hard_and_confidence_reach_the_sampling_and_the_mean(quick_backend):
    """Maps of another size are picked at the nearest pixel; the mean is weighted by the confidence of the anchors."""
    embeddings, labels, _ = batch()
    hard, confidence = torch.rand(2, 28, 30) < 0.3, torch.rand(2, 21, 9)
    confidence[torch.rand(confidence.shape) < 0.3] = 0
    criterion = PixelContrastLoss(**settings_of(quick_backend, bank=filled())).eval()
    torch.manual_seed(3)
    found = criterion(embeddings, labels, None, hard=hard, confidence=confidence.requires_grad_())
    torch.manual_seed(3)
    at = resize_nearest(confidence.detach(), (14, 9))
    loss, has_positive, sample = by_hand(
        criterion, embeddings, labels, None, quick_backend, confidence=at, hard=resize_nearest(hard, (14, 9))
    )
    weights = at.flatten()[sample.indices] * has_positive
    torch.testing.assert_close(found, (loss * weights).sum() / weights.sum())
    assert (weights > 0).sum() > 20
    found.backward()
    assert confidence.grad is None
    used = embeddings.grad.abs().sum(1).flatten() > 0
    assert set(used.nonzero().flatten().tolist()) <= set(sample.indices.tolist())


def test_confidence_steers_the_bank(quick_backend):
    embeddings, labels, logits = batch()
    confidence = torch.rand(2, 14, 9)
    confidence[:, :7] = 0
    criterion = PixelContrastLoss(**settings_of(quick_backend, bank=bank_of()))
    torch.manual_seed(3)
    criterion(embeddings, labels, logits, confidence=confidence)
    bank = bank_of()
    torch.manual_seed(3)
    torch.randint(2**31 - 1, labels.shape, dtype=torch.int32)  # of the anchors
    bank.enqueue(embeddings, labels, confidence=confidence, backend=quick_backend)
    assert_same_state(criterion.bank, bank)
    below = bank_of(pixels_per_image=99, pixel_slots=60)
    below.enqueue(embeddings[:, :, 7:], labels[:, 7:])
    everywhere = bank_of(pixels_per_image=99, pixel_slots=60)
    everywhere.enqueue(embeddings, labels, confidence=confidence, backend=quick_backend)
    torch.testing.assert_close(everywhere.keys, below.keys)
    with pytest.raises(ValueError, match=r"confidence must have shape \(2, 14, 9\), got \(2, 7, 9\)"):
        bank.enqueue(embeddings, labels, confidence=confidence[:, 7:])


@pytest.mark.parametrize("size", [(0, 12, 5, 5), (2, 12, 0, 5), (2, 12, 5, 5)])
def test_nothing_to_draw_is_a_differentiable_zero(backend, poison, size):
    embeddings = torch.randn(size, requires_grad=True)
    labels = torch.randint(0, 4, (size[0], *size[2:]))
    for bank in (None, filled()):
        criterion = PixelContrastLoss(**settings_of(backend, bank=bank, min_purity=0.5))
        loss = criterion(embeddings, labels, None, hard=labels == 0, confidence=torch.zeros(labels.shape))
        (gradient,) = torch.autograd.grad(loss, embeddings)
        assert loss == 0
        assert not gradient.any()


# keys_from


def test_bank_is_filled_from_a_teacher(quick_backend):
    """Of another batch and size, whose gradient nobody wants; the loss itself is that of the batch."""
    embeddings, labels, logits = batch()
    teacher = torch.randn(3, 12, 5, 8, requires_grad=True)
    their_labels, confidence = torch.randint(0, 4, (3, 11, 24)), torch.rand(3, 10, 8)
    confidence[:, 5:] = 0
    losses = []
    for keys_from in (None, (teacher, their_labels), [teacher, their_labels, confidence]):
        criterion = PixelContrastLoss(**settings_of(quick_backend, bank=filled(), min_purity=0.4))
        torch.manual_seed(3)
        losses.append(criterion(embeddings, labels, logits, keys_from=keys_from))
        if keys_from is not None:
            torch.manual_seed(3)
            torch.randint(2**31 - 1, labels.shape, dtype=torch.int32)
            bank, steered = filled(), {}
            picked = pick_labels(their_labels, (5, 8), 0.4, 255)
            if len(keys_from) == 3:
                steered = dict(confidence=resize_nearest(confidence, (5, 8)))
            bank.enqueue(teacher, picked, backend=quick_backend, **steered)
            assert_same_state(criterion.bank, bank)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    losses[2].backward()
    assert teacher.grad is None
    assert embeddings.grad.any()


def test_confidence_of_the_batch_is_not_that_of_the_teacher():
    embeddings, labels, logits = batch()
    banks = []
    for confidence in (None, torch.rand(2, 14, 9)):
        criterion = PixelContrastLoss(**settings_of("reference", bank=bank_of()))
        torch.manual_seed(3)
        criterion(embeddings, labels, logits, confidence=confidence, keys_from=(embeddings + 1, labels))
        banks.append(criterion.bank)
    assert_same_state(*banks)


# Ranks


@pytest.mark.parametrize(("ranks", "parts"), [(1, [50]), (3, [17, 17, 16]), (50, [1] * 50)])
def test_anchors_are_divided_by_the_ranks(monkeypatch, ranks, parts):
    embeddings, labels, logits = batch(size=(2, 12, 30, 30))
    criterion = PixelContrastLoss(**settings_of("reference", max_samples_over="ranks", max_views=50)).eval()
    found = [criterion(embeddings, labels, logits, return_parts=True)[1]["anchors"].item()]
    assert 40 < found[0] <= 50  # without a process group
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shares.append(part_of_samples(50))
    assert shares == parts
    assert sum(shares) == 50
    monkeypatch.setattr(dist, "get_world_size", lambda: 51)
    with pytest.raises(ValueError, match="max_samples=50 over 51 ranks leaves some of them none"):
        criterion(embeddings, labels, logits)
    per_rank = PixelContrastLoss(**settings_of("reference", max_views=50)).eval()
    assert per_rank(embeddings, labels, logits, return_parts=True)[1]["anchors"] == found[0]


# torch.compile


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_holds_it_all_at_any_size(dynamic):
    """Maps of the labels' size, at integer factors and ragged ones; torch may compile anew when sizes first change."""
    sizes = [(2, 24, 27), (3, 36, 18), (2, 25, 31), (4, 31, 23)]

    def criterion():
        return PixelContrastCrossEntropyLoss(
            **settings_of("cpu", min_purity=0.4, hard_fraction=0.7, max_samples_over="ranks"),
            bank=filled(backend="cpu"),
            generator=torch.Generator().manual_seed(1),
        )

    torch._dynamo.reset()
    eager, compiled = criterion(), criterion()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter, dynamic=dynamic)
    for images, height, width in sizes:
        labels = torch.randint(0, 2, (images, height, width))
        steered = dict(hard=torch.rand(labels.shape) < 0.5, confidence=torch.rand(labels.shape))
        maps = torch.randn(images, 4, 12, 9), torch.randn(images, 12, 12, 9)
        keys_from = torch.randn(images, 12, 6, 7), labels, steered["confidence"]
        results = []
        for call in (eager, run):
            logits, embeddings = (each.clone().requires_grad_() for each in maps)
            loss = call(logits, embeddings, labels, keys_from=keys_from, **steered)
            results.append((loss.detach(), *torch.autograd.grad(loss, (logits, embeddings))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert_same_state(eager.bank, compiled.bank)
    assert counter.frame_count <= 4


# The criterion, and what is refused


def test_criterion_hands_it_all_on(quick_backend):
    embeddings, labels, logits = batch(labels_size=(28, 18))
    given = dict(hard_fraction=0.8, min_purity=0.3, max_samples_over="ranks")
    steered = dict(
        hard=torch.rand(labels.shape) < 0.3,
        confidence=torch.rand(labels.shape),
        keys_from=(torch.randn(1, 12, 4, 4), torch.randint(0, 4, (1, 4, 4))),
    )
    criterion = PixelContrastCrossEntropyLoss(
        **settings_of(quick_backend, **given), weight=0.5, bank=filled()
    )
    torch.manual_seed(3)
    found, parts = criterion(logits, embeddings, labels, return_parts=True, **steered)
    contrast = PixelContrastLoss(**settings_of(quick_backend, **given), bank=filled())
    torch.manual_seed(3)
    assert torch.equal(parts["contrast"], contrast(embeddings, labels, logits, **steered).detach())
    assert torch.equal(found, parts["cross_entropy"] + 0.5 * parts["contrast"])
    assert_same_state(criterion.bank, contrast.bank)
    random = PixelContrastCrossEntropyLoss(**settings_of(quick_backend, anchors="random"), bank=filled())
    assert random.contrast.anchors == "random"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(hard_fraction=1.1), ValueError, r"hard_fraction must be in \[0, 1\], got 1.1"),
        (dict(hard_fraction=None), TypeError, "hard_fraction must be a number, got None"),
        (dict(min_purity=-0.1), ValueError, r"min_purity must be in \[0, 1\], got -0.1"),
        (dict(min_purity=math.nan), ValueError, r"min_purity must be in \[0, 1\], got nan"),
        (dict(anchors="all"), ValueError, "anchors must be 'hard' or 'random', got 'all'"),
        (
            dict(max_samples_over="world"),
            ValueError,
            "max_samples_over must be 'rank' or 'ranks', got 'world'",
        ),
    ],
)
@pytest.mark.parametrize("kind", [PixelContrastLoss, PixelContrastCrossEntropyLoss])
def test_bad_settings(kind, settings, error, message):
    with pytest.raises(error, match=message):
        kind(4, **settings)


MAP, LABELS = torch.zeros(2, 12, 5, 5), torch.zeros(2, 5, 5).long()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(predictions=None), TypeError, "predictions must be a tensor, got NoneType"),
        (dict(hard=LABELS), TypeError, "hard must be a bool tensor, got torch.int64"),
        (dict(hard=LABELS[:1] > 0), ValueError, r"hard \(1, 5, 5\) do not fit embeddings \(2, 12, 5, 5\)"),
        (dict(confidence=LABELS), TypeError, "confidence must be a floating-point tensor, got torch.int64"),
        (dict(confidence=MAP), ValueError, r"confidence \(2, 12, 5, 5\) do not fit embeddings"),
        (dict(confidence=MAP[:, 0] - 1), ValueError, r"confidence\[0, 0, 0\] is -1.0, expected 0 <="),
        (dict(keys_from=MAP), TypeError, r"keys_from must be \(embeddings, labels\) or .*, got Tensor"),
        (dict(keys_from=(MAP,)), TypeError, r"keys_from must be \(embeddings, labels\) or .*, got 1"),
        (
            dict(keys_from=(MAP, torch.full_like(LABELS, 9))),
            ValueError,
            r"labels of keys_from\[0, 0, 0\] is 9, expected 0 <= label < num_classes=4",
        ),
        (dict(keys_from=(MAP[:, :7], LABELS)), ValueError, "embeddings of keys_from must be 12 wide"),
        (dict(keys_from=(MAP, LABELS[:1])), ValueError, r"labels of keys_from \(1, 5, 5\) do not fit"),
        (dict(keys_from=(MAP, MAP[:, 0])), TypeError, "labels of keys_from must be an integer tensor"),
        (
            dict(keys_from=(MAP, LABELS, MAP[:, 0] - 1)),
            ValueError,
            r"confidence of keys_from\[0, 0, 0\] is -1.0",
        ),
    ],
)
def test_bad_input_changes_nothing(quick_backend, change, error, message):
    criterion = PixelContrastLoss(4, bank=filled(), backend=quick_backend)
    arguments = dict(embeddings=MAP, labels=LABELS, predictions=LABELS) | change
    with pytest.raises(error, match=message):
        criterion(**arguments)
    assert_same_state(criterion.bank, filled())


def test_keys_need_a_bank():
    with pytest.raises(ValueError, match="keys_from fills a bank, and the loss has none"):
        PixelContrastLoss(4)(MAP, LABELS, LABELS, keys_from=(MAP, LABELS))


def test_nobody_looks_at_predictions_that_decide_nothing():
    maps = dict(embeddings=MAP, labels=LABELS)
    random = PixelContrastLoss(4, anchors="random", bank=MemoryBank(4, 12))
    for predictions in (None, torch.zeros(2, 3, 5, 5)):
        assert random(**maps, predictions=predictions) == 0
