"""`PixelContrastCrossEntropyLoss`: cross-entropy and contrast in one sum, its warm-up, its state and its parts."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext import PixelContrastCrossEntropyLoss, PixelContrastLoss, ProjectionHead
from tests.support.losses import bank_of, batch


def test_a_compiled_criterion_can_be_pickled():
    criterion = PixelContrastCrossEntropyLoss(4, bank=bank_of())
    criterion.compile()
    assert pickle.loads(pickle.dumps(criterion)).state_dict().keys() == criterion.state_dict().keys()


def test_is_cross_entropy_plus_weighted_contrast(quick_backend):
    embeddings, labels, logits = batch(labels_size=(28, 27))
    criterion = PixelContrastCrossEntropyLoss(
        4, weight=0.3, min_pixels=1, max_samples=256, backend=quick_backend
    )
    torch.manual_seed(2)
    found = criterion(logits, embeddings, labels)
    torch.manual_seed(2)
    contrast = PixelContrastLoss(4, min_pixels=1, max_samples=256, backend=quick_backend)(
        embeddings, labels, logits
    )
    upsampled = F.interpolate(logits, size=(28, 27), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(upsampled, labels, ignore_index=255) + 0.3 * contrast
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x, (logits, embeddings)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ignore_index", [255, 2, -100])
def test_class_weights_and_ignore_index(ignore_index):
    _, labels, logits = batch()
    labels[labels == 255] = ignore_index
    weights = torch.tensor([1.0, 0.5, 3.0, 0.1])
    criterion = PixelContrastCrossEntropyLoss(4, weight=0.0, class_weights=weights, ignore_index=ignore_index)
    expected = F.cross_entropy(logits, labels, weight=weights, ignore_index=ignore_index)
    torch.testing.assert_close(criterion(logits, torch.randn(2, 12, 14, 9), labels), expected)


def test_sums_and_class_weights_of_any_dtype():
    """The sum over the pixels is past the range of fp16."""
    labels = torch.randint(0, 4, (2, 256, 256))
    logits, weights = torch.randn(2, 4, 64, 64), torch.tensor([1.0, 0.5, 3.0, 0.1])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for weights_dtype in (torch.float32, torch.float64):
            criterion = PixelContrastCrossEntropyLoss(4, weight=0.0, class_weights=weights.to(weights_dtype))
            found = criterion(logits.to(dtype), torch.randn(2, 12, 64, 64), labels)
            upsampled = F.interpolate(logits.to(dtype), size=(256, 256), mode="bilinear")
            expected = F.cross_entropy(upsampled.double(), labels, weight=weights.double())
            assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_warm_up_does_not_compute_the_contrast_while_the_bank_fills(quick_backend):
    embeddings, labels, logits = batch()
    criterion = PixelContrastCrossEntropyLoss(
        4, warmup_steps=2, min_pixels=1, max_samples=256, bank=bank_of(), backend=quick_backend
    )
    poisoned = embeddings.detach().clone()
    poisoned[0, 0, 0, 0] = math.nan  # 0 * NaN would be NaN
    entropy = F.cross_entropy(logits, labels, ignore_index=255)
    for step in (1, 2):
        torch.testing.assert_close(criterion(logits, poisoned, labels), entropy)
        assert criterion.step == step
        assert criterion.bank.region_fill.sum() > 0
    assert criterion(logits, embeddings, labels) > entropy
    assert criterion.step == 2


def test_warm_up_counts_training_steps_only_and_survives_a_checkpoint(quick_backend):
    embeddings, labels, logits = batch()
    entropy = F.cross_entropy(logits, labels, ignore_index=255)
    criterion = PixelContrastCrossEntropyLoss(
        4, warmup_steps=2, min_pixels=1, max_samples=256, bank=bank_of(), backend=quick_backend
    )
    criterion(logits, embeddings, labels)
    torch.testing.assert_close(criterion.eval()(logits, embeddings, labels), entropy)  # as in training
    resumed = PixelContrastCrossEntropyLoss(
        4, warmup_steps=2, min_pixels=1, max_samples=256, bank=bank_of(), backend=quick_backend
    )
    resumed.load_state_dict(criterion.state_dict())
    copied = copy.deepcopy(criterion).train()
    pickled = pickle.loads(pickle.dumps(criterion)).train()
    for other in (resumed, copied, pickled):
        assert other.step == 1
        torch.testing.assert_close(other(logits, embeddings, labels), entropy)
        assert other(logits, embeddings, labels) > entropy
        assert other.step == 2
    assert criterion.step == 1


def test_all_ignored_is_a_differentiable_zero(quick_backend):
    embeddings, labels, logits = batch()
    labels.fill_(255)
    loss = PixelContrastCrossEntropyLoss(4, bank=bank_of(), backend=quick_backend)(logits, embeddings, labels)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()
    assert (embeddings.grad == 0).all()


def test_empty_batch(backend):
    criterion = PixelContrastCrossEntropyLoss(4, bank=bank_of(), backend=backend)
    logits, embeddings = (
        torch.zeros(0, 4, 5, 5, requires_grad=True),
        torch.zeros(0, 12, 5, 5, requires_grad=True),
    )
    loss = criterion(logits, embeddings, torch.zeros(0, 20, 20, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == logits.shape
    assert embeddings.grad.shape == embeddings.shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.uint16])
def test_any_integer_labels(quick_backend, dtype):
    embeddings, labels, logits = batch()
    losses = []
    for kind in (torch.int64, dtype):
        torch.manual_seed(0)
        criterion = PixelContrastCrossEntropyLoss(4, min_pixels=1, max_samples=256, backend=quick_backend)
        losses.append(criterion(logits, embeddings, labels.to(kind)))
    assert torch.equal(*losses)


def test_bf16_autocast(quick_backend):
    embeddings, labels, logits = batch()
    head = ProjectionHead(12, 12)
    criterion = PixelContrastCrossEntropyLoss(
        4, min_pixels=1, max_samples=256, bank=bank_of(), backend=quick_backend
    )
    criterion(logits, embeddings, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = head(embeddings)
        loss = criterion(logits.bfloat16(), projected, labels)
    loss.backward()
    assert projected.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(weight=-0.1), "weight must be finite and not negative, got -0.1"),
        (dict(weight=math.nan), "weight must be finite and not negative, got nan"),
        (dict(warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
        (dict(class_weights=torch.ones(3)), r"class_weights must have shape \(4,\), got \(3,\)"),
        (
            dict(class_weights=torch.tensor([1.0, -1.0, 1.0, 1.0])),
            r"class_weights\[1\] is -1.0, expected 0 <= weight < inf",
        ),
        (dict(class_weights=torch.ones(4, requires_grad=True)), "class_weights must not require a gradient"),
        (dict(temperature=-1), "temperature must be positive and finite, got -1"),
        (dict(num_classes=1), "num_classes must be at least 2, got 1"),
    ],
)
def test_bad_settings_of_the_sum(settings, message):
    with pytest.raises(ValueError, match=message):
        PixelContrastCrossEntropyLoss(**{"num_classes": 4, **settings})


@pytest.mark.parametrize(
    ("classes", "ignore_index", "warns"),
    [(256, 255, True), (255, 255, False), (256, -1, False), (256, 0, False)],
)
def test_a_class_that_the_default_ignores_is_told(classes, ignore_index, warns):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        bank = dict(embed_dim=4, region_slots=1, pixel_slots=1)
        PixelContrastCrossEntropyLoss(classes, ignore_index=ignore_index, bank=bank)
    messages = [str(each.message) for each in told if "ignore_index" in str(each.message)]
    assert len(messages) == warns
    assert all(message.startswith("class 255 of 256 is left out") for message in messages)


@pytest.mark.parametrize("value", [4, -1, 300])
def test_bad_label_is_named_even_where_no_embedding_is(backend, value):
    """The bad label is at full resolution, between the pixels that the embeddings pick."""
    embeddings, labels, logits = batch(labels_size=(28, 18), ignored=0.0)
    labels[1, 3, 5] = value
    with pytest.raises(
        ValueError, match=rf"labels\[1, 3, 5\] is {value}, expected 0 <= label < num_classes=4"
    ):
        PixelContrastCrossEntropyLoss(4, backend=backend)(logits, embeddings, labels)


def test_logits_that_do_not_fit(backend):
    embeddings, labels, logits = batch()
    for wrong, message in (
        (logits[:, :3], r"logits must have shape \[B, 4, h, w\], got"),
        (logits[0], r"logits must have shape \[B, 4, h, w\], got"),
        (logits[:1], r"logits \(1, .* do not fit embeddings \(2, .* the same batch"),
    ):
        with pytest.raises(ValueError, match=message):
            PixelContrastCrossEntropyLoss(4, backend=backend)(wrong, embeddings, labels)


def test_state_dict_holds_bank_and_step():
    criterion = PixelContrastCrossEntropyLoss(4, bank=bank_of(), warmup_steps=3)
    assert set(criterion.state_dict()) == {"contrast.step"} | {
        f"contrast.bank.{name}" for name, _ in criterion.bank.named_buffers()
    }


def test_parts_add_up_and_are_detached(quick_backend):
    embeddings, labels, logits = batch()
    criterion = PixelContrastCrossEntropyLoss(
        4,
        weight=0.3,
        warmup_steps=1,
        min_pixels=1,
        max_samples=256,
        max_views=3,
        bank=bank_of(),
        backend=quick_backend,
    )
    for step in range(2):
        loss, parts = criterion(logits, embeddings, labels, return_parts=True)
        assert set(parts) == {"cross_entropy", "contrast", "anchors", "bank_fill"}
        assert not any(part.requires_grad or part.dim() for part in parts.values())
        torch.testing.assert_close(loss.detach(), parts["cross_entropy"] + 0.3 * parts["contrast"])
        assert parts["anchors"] == (24 if step else 0)
        assert (parts["contrast"] > 0) == bool(step)
        filled = (criterion.bank.key_labels >= 0).float().mean()
        torch.testing.assert_close(parts["bank_fill"], filled)
    loss, parts = criterion.contrast(embeddings, labels, logits, return_parts=True)
    torch.testing.assert_close(loss.detach(), 0.3 * parts["contrast"])
    assert set(PixelContrastLoss(4)(embeddings, labels, logits, return_parts=True)[1]) == {
        "contrast",
        "anchors",
    }


def test_weight_may_be_changed_within_its_limits():
    criterion = PixelContrastCrossEntropyLoss(4)
    criterion.weight, criterion.warmup_steps = 2, 7
    assert criterion.contrast.weight == 2
    assert criterion.contrast.warmup_steps == 7
    with pytest.raises(ValueError, match="weight must be finite and not negative, got -3"):
        criterion.weight = -3
    for loss in (criterion, criterion.contrast):
        with pytest.raises(ValueError, match="warmup_steps must be at least 0, got -1"):
            loss.warmup_steps = -1
        with pytest.raises(TypeError, match=r"warmup_steps must be an int, got 2\.5"):
            loss.warmup_steps = 2.5
    with pytest.raises(TypeError, match=r"weight, .* must be a number \(class_weights are .*, got Tensor"):
        PixelContrastLoss(4, weight=torch.tensor(0.1))


def test_both_losses_have_the_same_options():
    """They are spelt out, so that a type checker finds a misspelt one and the error names the class called."""
    contrast, both = (
        inspect.signature(loss).parameters for loss in (PixelContrastLoss, PixelContrastCrossEntropyLoss)
    )
    assert set(both) == {*contrast, "class_weights", "align_corners"}
    assert all(both[name].default == contrast[name].default for name in contrast if name != "weight")
    with pytest.raises(TypeError, match=r"PixelContrastCrossEntropyLoss.*'temprature'"):
        PixelContrastCrossEntropyLoss(4, temprature=0.1)


@pytest.mark.parametrize("align_corners", [False, True])
def test_logits_are_upsampled_with_aligned_corners_if_told(align_corners):
    embeddings, _, logits = batch()
    labels = torch.randint(0, 4, (2, 33, 20))
    criterion = PixelContrastCrossEntropyLoss(4, weight=0.0, align_corners=align_corners)
    upsampled = F.interpolate(logits, (33, 20), mode="bilinear", align_corners=align_corners)
    found = criterion(logits, embeddings, labels)
    assert found.item() == pytest.approx(F.cross_entropy(upsampled, labels).item(), rel=1e-6)
