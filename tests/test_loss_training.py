"""The losses in a trainer: warm-up, validation, random numbers, activation checkpointing, warnings, convergence."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext import MemoryBank, PixelContrastCrossEntropyLoss, PixelContrastLoss, ProjectionHead
from pixcontrast_ext.ops import watch
from tests.support.losses import bank_of, batch


@pytest.mark.parametrize("training", [True, False])
def test_warming_up_leaves_no_trace(quick_backend, training):
    """It takes a step, but leaves bank, warm-up, modes, random numbers and the caller's tensors unchanged."""
    bank = MemoryBank(3, 5, region_slots=4, pixel_slots=9, process_group=None)
    generator = torch.Generator().manual_seed(3)
    settings = dict(warmup_steps=2, bank=bank, generator=generator, backend=quick_backend)
    criterion = PixelContrastLoss(3, max_samples=30, max_views=9, min_pixels=1, **settings)
    embeddings = torch.randn(2, 5, 8, 9, requires_grad=True)
    labels = torch.randint(0, 3, (2, 8, 9))
    criterion(embeddings, labels, labels)
    criterion.train(training)
    before = copy.deepcopy(criterion.state_dict())
    states = generator.get_state(), torch.get_rng_state(), criterion._watch.batches
    with torch.no_grad():
        criterion.warm_up(embeddings, labels, labels)
        confidence = torch.full(labels.shape, 0.5)
        steering = dict(hard=labels > 0, confidence=confidence, keys_from=(embeddings.detach(), labels))
        criterion.warm_up(embeddings, labels, **steering)
    assert embeddings.grad is None
    assert (criterion.training, bank.training) == (training, training)
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert criterion._watch.batches == states[2]
    for name, buffer in criterion.state_dict().items():
        assert torch.equal(buffer, before[name]), name
    summed = PixelContrastCrossEntropyLoss(3, bank=bank, backend=quick_backend)
    summed.warm_up(torch.randn(2, 3, 4, 5), embeddings, labels, **steering)
    with pytest.raises(ValueError, match="do not fit"):
        criterion.warm_up(embeddings, labels[:1], labels)
    for name, buffer in criterion.state_dict().items():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("left_out", [dict(warmup_steps=2), dict(weight=0.0)])
def test_what_is_left_out_gives_a_gradient_of_zero_and_lets_no_nan_through(quick_backend, left_out):
    """DistributedDataParallel demands a gradient for every weight of the head in every step."""
    embeddings, labels, logits = batch(ignored=0.0)
    with torch.no_grad():
        embeddings[:, 0] = math.nan
    for bank in (None, bank_of()):
        criterion = PixelContrastLoss(
            4, min_pixels=1, max_views=999, bank=bank, backend=quick_backend, **left_out
        )
        loss = criterion(embeddings, labels, logits)
        gradient = torch.autograd.grad(loss, embeddings)[0]
        assert loss == 0
        assert (gradient == 0).all()


def test_weight_and_warm_up_serve_any_segmentation_loss(quick_backend):
    embeddings, labels, logits = batch()
    plain = PixelContrastLoss(4, min_pixels=1, backend=quick_backend)
    criterion = PixelContrastLoss(4, weight=0.25, warmup_steps=2, min_pixels=1, backend=quick_backend)
    found = []
    for _ in range(4):
        torch.manual_seed(5)
        found.append(criterion(embeddings, labels, logits).item())
    torch.manual_seed(5)
    assert found == [0, 0, *[pytest.approx(0.25 * plain(embeddings, labels, logits).item())] * 2]
    criterion.weight = 0.5
    torch.manual_seed(5)
    assert criterion(embeddings, labels, logits).item() == pytest.approx(2 * found[-1])


def test_validation_without_gradients_changes_nothing(quick_backend):
    """Even without eval(), since most trainers do not think of a loss function as having a mode."""
    embeddings, labels, logits = batch()
    criterion = PixelContrastCrossEntropyLoss(
        4, warmup_steps=5, min_pixels=1, bank=bank_of(), backend=quick_backend
    )
    criterion(logits, embeddings, labels)
    before = copy.deepcopy(criterion.state_dict())
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            criterion(logits, embeddings, labels)
    criterion.eval()(logits, embeddings, labels)
    after = criterion.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before["contrast.step"] == 1


def test_warm_up_counts_calls_that_train():
    """With gradient accumulation each micro-batch counts as one, as the docstring says."""
    embeddings, labels, logits = batch()
    criterion = PixelContrastLoss(4, warmup_steps=3, min_pixels=1)
    parameter = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for _ in range(2):
        for _ in range(2):
            criterion(embeddings * parameter, labels, logits).backward()
        optimizer.step()
    assert criterion.step == 3


def test_a_generator_of_its_own_leaves_torchs_alone(quick_backend):
    embeddings, labels, logits = batch()

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        criterion = PixelContrastLoss(
            4, min_pixels=1, max_views=3, bank=bank_of(), generator=generator, backend=quick_backend
        )
        before = torch.get_rng_state()
        losses = [criterion(embeddings, labels, logits) for _ in range(3)]
        assert torch.equal(torch.get_rng_state(), before)
        return criterion, torch.stack(losses)

    (criterion, first), (_, again), (_, other) = run(1), run(1), run(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    copies = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    expected = criterion(embeddings, labels, logits)
    for copied in copies:
        assert torch.equal(copied(embeddings, labels, logits), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_right_or_refused(quick_backend, reentrant):
    from torch.utils.checkpoint import checkpoint

    embeddings, labels, logits = batch()
    plain, recomputed = (
        PixelContrastLoss(4, min_pixels=1, max_views=3, backend=quick_backend) for _ in range(2)
    )
    gradients = []
    for call in (plain, lambda *maps: checkpoint(recomputed, *maps, use_reentrant=reentrant)):
        torch.manual_seed(3)
        embeddings.grad = None
        call(embeddings, labels, logits).backward()
        gradients.append(embeddings.grad)
    assert torch.equal(*gradients)
    assert gradients[0].any()
    for settings in (dict(bank=bank_of()), dict(generator=torch.Generator()), dict(warmup_steps=1)):
        criterion = PixelContrastLoss(4, min_pixels=1, backend=quick_backend, **settings)
        criterion(embeddings, labels, logits)
        loss = checkpoint(criterion, embeddings, labels, logits, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match=r"recomputed within a backward.*Keep the loss outside"):
            loss.backward()


@pytest.fixture
def few_batches(monkeypatch):
    """The watch ends after few batches, so that an interpreter reaches its end."""
    monkeypatch.setattr(watch, "BATCHES", 4)
    monkeypatch.setattr(watch, "OCCURS", 5)


@pytest.mark.parametrize("often", [False, True])
def test_a_class_that_hardly_yields_an_anchor_is_named_once(quick_backend, few_batches, often):
    embeddings = torch.randn(11, 5, 8, 8, requires_grad=True)
    labels = torch.zeros(11, 8, 8, dtype=torch.int64)
    labels[:, 4:] = 1
    labels[:, 0, :3] = 2  # three pixels in every image, and enough in one, or in two, of eleven
    labels[: 2 if often else 1, 1, 0] = 2
    labels[0, 0, 3] = 3  # in four images of four batches
    labels[:, 7, 7] = 255
    criterion = PixelContrastLoss(4, min_pixels=4, warmup_steps=99, backend=quick_backend)
    with torch.inference_mode():  # the watch ignores validation
        for _ in range(5):
            criterion(embeddings, labels, labels)

    def seven_batches():
        for _ in range(7):
            criterion(embeddings, labels, labels)

    if often:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            seven_batches()
        return
    with pytest.warns(UserWarning, match="in almost none of the images") as caught:
        seven_batches()
    (message,) = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert "of the first 4 batches that they occurred in: 2 (in 4 of 44). A class" in message
    assert "at least min_pixels=4 pixels in an image, at the embeddings' size of 8 x 8" in message


def test_a_class_that_yields_anchors_is_not_named(quick_backend, few_batches):
    embeddings, labels, logits = batch()
    criterion = PixelContrastLoss(4, min_pixels=1, backend=quick_backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for step in range(6):
            criterion(embeddings, labels, logits)
            if step == 2:
                criterion = copy.deepcopy(criterion)
    assert criterion._watch.done


def test_small_model_learns_to_separate_classes():
    """Convergence: embeddings of one class end up closer to each other than to those of other classes."""
    scene = torch.randint(0, 3, (4, 16, 16))
    image = F.one_hot(scene, 3).permute(0, 3, 1, 2).float() + 0.5 * torch.randn(4, 3, 16, 16)
    head = ProjectionHead(3, 8)
    criterion = PixelContrastLoss(3, min_pixels=1, bank=bank_of(3, 8))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = criterion(head(image), scene, torch.zeros_like(scene))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == 0  # the bank is empty
    assert sum(losses[-5:]) < 0.8 * sum(losses[1:6])
    rows = F.normalize(head(image).permute(0, 2, 3, 1).reshape(-1, 8), dim=1)
    similarity, same = rows @ rows.T, scene.view(-1, 1) == scene.view(1, -1)
    assert similarity[same].mean() > similarity[~same].mean() + 0.5
