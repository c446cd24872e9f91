"""`PixelContrastLoss`, `PixelContrastCrossEntropyLoss` and `ProjectionHead`, in steps such as a trainer makes."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext import (
    MemoryBank,
    PixelContrastCrossEntropyLoss,
    PixelContrastLoss,
    ProjectionHead,
    gather_embeddings,
    hard_anchor_sampling,
    infonce,
)
from pixcontrast_ext.maps import resize_nearest
from pixcontrast_ext.ops import watch


def batch(size=(2, 12, 14, 9), classes=4, labels_size=None, ignored=0.2):
    count, _, height, width = size
    embeddings = torch.randn(size, requires_grad=True)
    labels = torch.randint(0, classes, (count, *(labels_size or (height, width))))
    labels[torch.rand(labels.shape) < ignored] = 255
    logits = torch.randn(count, classes, height, width, requires_grad=True)
    return embeddings, labels, logits


def bank_of(classes=4, channels=12, **settings):
    return MemoryBank(classes, channels, **(dict(region_slots=20, pixel_slots=30) | settings))


# Sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_nearest_is_the_rule_of_interpolate(dtype):
    """Many pairs of sizes, among them those where the exact quotient would round another way than torch's fp32."""
    sizes = [(a, b) for a in range(1, 71) for b in range(1, 71)] + [
        (1023, 257),
        (4099, 777),
        (719, 90),
        (97, 1500),
    ]
    for size, target in sizes:
        heights, widths = torch.arange(size)[:, None].expand(size, 3), torch.arange(size).expand(3, size)
        for positions, wanted in ((heights, (target, 2)), (widths, (2, target))):
            at = resize_nearest(positions, wanted)
            values = (positions % 251).to(dtype)
            expected = F.interpolate(values[None, None], size=wanted, mode="nearest")[0, 0]
            assert torch.equal((at % 251).to(dtype), expected), (size, target)


def test_labels_and_logits_of_another_size_are_picked(backend):
    embeddings, labels, _ = batch(labels_size=(55, 40))
    logits = torch.randn(2, 4, 28, 18)
    criterion = PixelContrastLoss(4, min_pixels=1, backend=backend)
    torch.manual_seed(1)
    found = criterion(embeddings, labels, logits)
    at = lambda x: F.interpolate(x.float(), size=(14, 9), mode="nearest")  # noqa: E731
    torch.manual_seed(1)
    expected = criterion(embeddings, at(labels[:, None])[:, 0].long(), at(logits).argmax(1))
    assert torch.equal(found, expected)
    assert found > 0


# PixelContrastLoss


@pytest.mark.parametrize("with_bank", [False, True])
def test_is_its_three_ops(backend, with_bank):
    embeddings, labels, logits = batch()
    bank = bank_of() if with_bank else None
    if bank is not None:
        bank.enqueue(torch.randn(2, 12, 6, 6), torch.randint(0, 4, (2, 6, 6)))
        keys, key_labels = (x.clone() for x in bank.flat())
    criterion = PixelContrastLoss(4, temperature=0.2, max_samples=50, max_views=7, bank=bank, backend=backend)
    torch.manual_seed(3)
    found = criterion(embeddings, labels, logits)
    torch.manual_seed(3)
    sample = hard_anchor_sampling(
        labels, logits.argmax(1), num_classes=4, max_samples=50, max_views=7, backend="reference"
    )
    anchors = gather_embeddings(embeddings, sample.indices, backend="reference")
    if bank is None:
        keys, key_labels = anchors, sample.labels
    settings = dict(temperature=0.2, exclude_self=bank is None, backend="reference")
    expected = infonce(anchors, sample.labels, keys, key_labels, **settings)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x, embeddings) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
    assert sample.count > 0
    assert found > 0


def test_base_temperature_scales(backend):
    embeddings, labels, logits = batch()
    losses = []
    for base in (None, 0.05):
        torch.manual_seed(0)
        criterion = PixelContrastLoss(
            4, temperature=0.2, base_temperature=base, min_pixels=1, backend=backend
        )
        losses.append(criterion(embeddings, labels, logits))
    torch.testing.assert_close(losses[1], 4 * losses[0])


def test_enqueues_after_the_loss_and_in_training_only(quick_backend):
    embeddings, labels, logits = batch()
    criterion = PixelContrastLoss(4, min_pixels=1, bank=bank_of(), backend=quick_backend)
    # With an empty bank: the batch is not contrasted with itself.
    assert criterion(embeddings, labels, logits) == 0
    filled = criterion.bank.region_fill.clone()
    assert (filled == 2).all()
    assert criterion.eval()(embeddings, labels, logits) > 0
    assert torch.equal(criterion.bank.region_fill, filled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bank_dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_of_map_and_bank(backend, dtype, bank_dtype):
    embeddings, labels, logits = batch()
    exact = PixelContrastLoss(4, min_pixels=1, bank=None if bank_dtype is None else bank_of())
    criterion = PixelContrastLoss(
        4, min_pixels=1, bank=None if bank_dtype is None else bank_of(dtype=bank_dtype), backend=backend
    )
    losses = []
    for module, maps in ((exact, embeddings), (criterion, embeddings.detach().to(dtype).requires_grad_())):
        torch.manual_seed(4)
        module(maps, labels, logits)
        losses.append(module(maps, labels, logits))
        losses[-1].backward()
    assert losses[1].dtype == torch.float32
    assert maps.grad.dtype == dtype
    assert maps.grad.abs().sum() > 0
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    "case", ["all ignored", "too few pixels", "one class", "batch 0", "no pixels", "empty bank", "one pixel"]
)
@pytest.mark.parametrize("with_bank", [False, True])
def test_nothing_to_contrast_is_a_differentiable_zero(backend, poison, case, with_bank):
    size = {"batch 0": (0, 12, 5, 5), "no pixels": (2, 12, 0, 5), "one pixel": (1, 12, 1, 1)}.get(
        case, (2, 12, 5, 5)
    )
    embeddings = torch.randn(size, requires_grad=True)
    labels = torch.randint(0, 4, (size[0], *size[2:]))
    if case == "all ignored":
        labels.fill_(255)
    elif case == "one class":
        labels.zero_()
    logits = torch.randn(size[0], 4, *size[2:])
    criterion = PixelContrastLoss(
        4,
        min_pixels=None if case == "too few pixels" else 1,
        bank=bank_of() if with_bank else None,
        backend=backend,
    )
    if case in ("empty bank", "one class") or not with_bank:
        criterion.eval()
    if case == "empty bank" and not with_bank:
        labels.fill_(255)
    loss = criterion(embeddings, labels, logits)
    loss.backward()
    assert loss.item() == 0
    assert embeddings.grad.shape == embeddings.shape
    assert (embeddings.grad == 0).all()


def test_nan_propagates_into_the_loss_and_not_into_the_bank(backend):
    embeddings, labels, logits = batch(ignored=0.0)
    criterion = PixelContrastLoss(4, min_pixels=1, max_views=1000, bank=bank_of(), backend=backend)
    criterion(embeddings, labels, logits)
    with torch.no_grad():
        embeddings[0, 3, 2, 2] = math.nan
    assert criterion(embeddings, labels, logits).isnan()
    assert criterion.bank.keys.isfinite().all()


def test_unnormalised_maps_of_any_scale(backend):
    """Normalised inside: a scale of the map does not change the loss."""
    embeddings, labels, logits = batch()
    losses = []
    for scale in (1.0, 1e-6, 1e6):
        torch.manual_seed(0)
        losses.append(PixelContrastLoss(4, min_pixels=1, backend=backend)(embeddings * scale, labels, logits))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_backward_after_the_bank_was_written(backend):
    """The order of a training step: loss, enqueue, backward."""
    embeddings, labels, logits = batch()
    gradients = []
    for training in (True, False):
        criterion = PixelContrastLoss(
            4, min_pixels=1, bank=bank_of(region_slots=1, pixel_slots=1), backend=backend
        )
        torch.manual_seed(7)
        criterion.bank.enqueue(torch.randn(2, 12, 9, 9), torch.randint(0, 4, (2, 9, 9)))
        loss = criterion.train(training)(embeddings, labels, logits)
        gradients.append(torch.autograd.grad(loss, embeddings)[0])
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (dict(temperature=0.0), ValueError, "temperature must be positive and finite, got 0.0"),
        (dict(temperature=math.nan), ValueError, "temperature must be positive and finite, got nan"),
        (dict(base_temperature=-1), ValueError, "base_temperature must be positive and finite, got -1"),
        (dict(max_samples=0), ValueError, "max_samples must be at least 1, got 0"),
        (dict(max_views=0), ValueError, "max_views must be at least 1, got 0"),
        (dict(min_pixels=-1), ValueError, "min_pixels must be at least 0, got -1"),
        (dict(bank=bank_of(5)), ValueError, "the bank has 5 classes, the loss 4"),
        (dict(bank=torch.nn.Identity()), TypeError, "bank must be a MemoryBank, got Identity"),
        (dict(ignore_index=1.5), TypeError, "ignore_index must be an int, got 1.5"),
        (dict(bank=bank_of(ignore_index=0)), ValueError, "the bank ignores label 0, the loss 255"),
        (
            dict(bank=bank_of(normalize=False)),
            ValueError,
            "the bank has normalize=False, the loss normalize=True",
        ),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        PixelContrastLoss(**(dict(num_classes=4) | settings))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(embeddings=torch.zeros(2, 12, 5)), ValueError, r"embeddings must have shape \[B, D, H, W\]"),
        (
            dict(embeddings=torch.zeros(2, 12, 5, 5).long()),
            TypeError,
            "embeddings must be a floating-point tensor",
        ),
        (dict(labels=torch.zeros(2, 5, 5)), TypeError, "labels must be an integer tensor, got torch.float32"),
        (
            dict(labels=torch.zeros(3, 5, 5).long()),
            ValueError,
            r"labels \(3, 5, 5\) do not fit embeddings \(2, 12, 5,",
        ),
        (dict(labels=torch.zeros(2, 1, 5, 5).long()), ValueError, "expected 3 dimensions and the same batch"),
        (
            dict(predictions=torch.zeros(2, 3, 5, 5)),
            ValueError,
            r"num_classes=4 channels, got \(2, 3, 5, 5\)",
        ),
        (dict(predictions=torch.zeros(2, 5, 5)), ValueError, r"logits \(2, 5, 5\) do not fit"),
        (dict(predictions=torch.zeros(1, 5, 5).long()), ValueError, r"predictions \(1, 5, 5\) do not fit"),
        (
            dict(predictions=torch.zeros(2, 5, 5).bool()),
            TypeError,
            "integers or floating-point logits, got torch.bool",
        ),
        (
            dict(labels=torch.zeros(2, 5, 5, device="meta").long()),
            ValueError,
            "labels must be on cpu, got meta",
        ),
    ],
)
def test_bad_input(backend, change, error, message):
    arguments = dict(
        embeddings=torch.zeros(2, 12, 5, 5),
        labels=torch.zeros(2, 5, 5).long(),
        predictions=torch.zeros(2, 5, 5).long(),
    )
    with pytest.raises(error, match=message):
        PixelContrastLoss(4, backend=backend)(**(arguments | change))


def test_map_without_pixels(backend):
    embeddings = torch.zeros(1, 12, 0, 0, requires_grad=True)
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    loss = PixelContrastLoss(4, bank=bank_of(), backend=backend)(embeddings, labels, labels)
    loss.backward()
    assert loss.item() == 0
    assert embeddings.grad.shape == embeddings.shape


def test_a_compiled_criterion_can_be_pickled():
    criterion = PixelContrastCrossEntropyLoss(4, bank=bank_of())
    criterion.compile()
    assert pickle.loads(pickle.dumps(criterion)).state_dict().keys() == criterion.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_bank", [False, True])
def test_default_dtype_does_not_matter(backend, dtype, with_bank):
    embeddings, labels, logits = batch()
    losses = []
    for default in (torch.float32, dtype):
        bank = bank_of(dtype=torch.float32) if with_bank else None
        criterion = PixelContrastLoss(4, min_pixels=1, bank=bank, backend=backend)
        torch.set_default_dtype(default)
        try:
            for seed in (0, 1):
                torch.manual_seed(seed)
                loss = criterion(embeddings, labels, logits)
            losses.append((loss, *torch.autograd.grad(loss, embeddings)))
        finally:
            torch.set_default_dtype(torch.float32)
    assert losses[0][0] > 0
    for expected, found in zip(*losses, strict=True):
        assert torch.equal(expected, found)


def test_bank_of_another_width_is_named(backend):
    embeddings, labels, logits = batch()
    criterion = PixelContrastLoss(4, min_pixels=1, bank=bank_of(channels=13), backend=backend)
    with pytest.raises(
        ValueError, match=r"embeddings \(2, 12, 14, 9\) do not fit the bank, which is 13 wide"
    ):
        criterion(embeddings, labels, logits)


# PixelContrastCrossEntropyLoss


def test_is_cross_entropy_plus_weighted_contrast(backend):
    embeddings, labels, logits = batch(labels_size=(28, 27))
    criterion = PixelContrastCrossEntropyLoss(4, weight=0.3, min_pixels=1, backend=backend)
    torch.manual_seed(2)
    found = criterion(logits, embeddings, labels)
    torch.manual_seed(2)
    contrast = PixelContrastLoss(4, min_pixels=1, backend=backend)(embeddings, labels, logits)
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


def test_warm_up_does_not_compute_the_contrast_while_the_bank_fills(backend):
    embeddings, labels, logits = batch()
    criterion = PixelContrastCrossEntropyLoss(
        4, warmup_steps=2, min_pixels=1, bank=bank_of(), backend=backend
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


@pytest.mark.parametrize("training", [True, False])
def test_warming_up_leaves_no_trace(quick_backend, training):
    """It takes a step; bank, warm-up, modes, random numbers and the caller's tensors do not show it."""
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
    assert embeddings.grad is None
    assert (criterion.training, bank.training) == (training, training)
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert criterion._watch.batches == states[2]
    for name, buffer in criterion.state_dict().items():
        assert torch.equal(buffer, before[name]), name
    summed = PixelContrastCrossEntropyLoss(3, bank=bank, backend=quick_backend)
    summed.warm_up(torch.randn(2, 3, 4, 5), embeddings, labels)
    with pytest.raises(ValueError, match="do not fit"):
        criterion.warm_up(embeddings, labels[:1], labels)
    for name, buffer in criterion.state_dict().items():
        assert torch.equal(buffer, before[name]), name


def test_warm_up_counts_training_steps_only_and_survives_a_checkpoint(quick_backend):
    embeddings, labels, logits = batch()
    entropy = F.cross_entropy(logits, labels, ignore_index=255)
    criterion = PixelContrastCrossEntropyLoss(
        4, warmup_steps=2, min_pixels=1, bank=bank_of(), backend=quick_backend
    )
    criterion(logits, embeddings, labels)
    torch.testing.assert_close(criterion.eval()(logits, embeddings, labels), entropy)  # validated as trained
    resumed = PixelContrastCrossEntropyLoss(
        4, warmup_steps=2, min_pixels=1, bank=bank_of(), backend=quick_backend
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


def test_all_ignored_is_a_differentiable_zero(backend):
    embeddings, labels, logits = batch()
    labels.fill_(255)
    loss = PixelContrastCrossEntropyLoss(4, bank=bank_of(), backend=backend)(logits, embeddings, labels)
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


INTEGERS = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("num_classes", [256, 128])
def test_any_integer_labels_that_hold_the_classes(dtype, num_classes):
    """Also where the number of classes itself is beyond the dtype."""
    embeddings, labels, _ = batch(ignored=0.0)
    predictions = torch.zeros_like(labels)
    criterion = PixelContrastLoss(num_classes, min_pixels=1, ignore_index=-100)
    losses = []
    for kind in (torch.int64, dtype):
        torch.manual_seed(0)
        losses.append(criterion(embeddings, labels.to(kind), predictions))
    assert torch.equal(*losses)
    assert losses[0] > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.uint16])
def test_any_integer_labels(backend, dtype):
    embeddings, labels, logits = batch()
    losses = []
    for kind in (torch.int64, dtype):
        torch.manual_seed(0)
        criterion = PixelContrastCrossEntropyLoss(4, min_pixels=1, backend=backend)
        losses.append(criterion(logits, embeddings, labels.to(kind)))
    assert torch.equal(*losses)


def test_bf16_autocast(backend):
    embeddings, labels, logits = batch()
    head = ProjectionHead(12, 12)
    criterion = PixelContrastCrossEntropyLoss(4, min_pixels=1, bank=bank_of(), backend=backend)
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
        (dict(temperature=-1), "temperature must be positive and finite, got -1"),
    ],
)
def test_bad_settings_of_the_sum(settings, message):
    with pytest.raises(ValueError, match=message):
        PixelContrastCrossEntropyLoss(4, **settings)


@pytest.mark.parametrize("value", [4, -1])
def test_bad_label_is_named_with_its_place(careful_backend, value):
    arguments = torch.zeros(2, 12, 5, 5), torch.full((2, 5, 5), value), torch.zeros(2, 5, 5).long()
    message = rf"labels\[0, 0, 0\] is {value}, expected 0 <= label < num_classes=4"
    with pytest.raises(ValueError, match=message):
        PixelContrastLoss(4, backend=careful_backend)(*arguments)


@pytest.mark.parametrize("value", [4, -1, 300])
def test_bad_label_is_named_even_where_no_embedding_is(backend, value):
    """At full resolution, between the pixels that the embeddings pick."""
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


# What a trainer does with them


def train_step(criterion, embeddings, labels, logits):
    criterion(embeddings, labels, logits).backward()
    return embeddings.grad


@pytest.mark.parametrize("left_out", [dict(warmup_steps=2), dict(weight=0.0)])
def test_what_is_left_out_gives_a_gradient_of_zero_and_lets_no_nan_through(backend, left_out):
    """DistributedDataParallel demands one for every weight of the head, in every step."""
    embeddings, labels, logits = batch(ignored=0.0)
    with torch.no_grad():
        embeddings[:, 0] = math.nan
    for bank in (None, bank_of()):
        criterion = PixelContrastLoss(4, min_pixels=1, max_views=999, bank=bank, backend=backend, **left_out)
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


def test_parts_add_up_and_are_detached(quick_backend):
    embeddings, labels, logits = batch()
    criterion = PixelContrastCrossEntropyLoss(
        4, weight=0.3, warmup_steps=1, min_pixels=1, max_views=3, bank=bank_of(), backend=quick_backend
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


def test_validation_without_gradients_changes_nothing(quick_backend):
    """Whether or not somebody calls eval(): a loss function has no mode in most trainers' mind."""
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
    """With gradient accumulation each micro-batch is one; the docstring says so."""
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
    """Are looked at, so that an interpreter gets to the end."""
    monkeypatch.setattr(watch, "BATCHES", 4)
    monkeypatch.setattr(watch, "OCCURS", 3)


def test_a_class_that_never_yields_an_anchor_is_named_once(quick_backend, few_batches):
    embeddings = torch.randn(2, 5, 8, 8, requires_grad=True)
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    labels[:, 4:] = 1
    labels[0, 0, :3] = 2  # three pixels in every batch
    criterion = PixelContrastLoss(4, min_pixels=4, warmup_steps=99, backend=quick_backend)
    with torch.inference_mode():  # validation is not looked at
        for _ in range(5):
            criterion(embeddings, labels, labels)

    def seven_batches():
        for _ in range(7):
            criterion(embeddings, labels, labels)

    with pytest.warns(UserWarning, match="never gave an anchor") as caught:
        seven_batches()
    (message,) = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert "in the first 4 batches and never gave an anchor: 2 (in 4)." in message
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


def test_weight_may_be_changed_within_its_limits():
    criterion = PixelContrastCrossEntropyLoss(4)
    criterion.weight, criterion.warmup_steps = 2, 7
    assert criterion.contrast.weight == 2
    assert criterion.contrast.warmup_steps == 7
    with pytest.raises(ValueError, match="weight must be finite and not negative, got -3"):
        criterion.weight = -3
    with pytest.raises(TypeError, match="weight must be a number, got Tensor"):
        PixelContrastLoss(4, weight=torch.tensor(0.1))


def test_both_losses_have_the_same_options():
    """Spelt out, so that a misspelt one is found by a type checker, and named by the class that was called."""
    contrast, both = (
        inspect.signature(loss).parameters for loss in (PixelContrastLoss, PixelContrastCrossEntropyLoss)
    )
    assert set(both) == {*contrast, "class_weights"}
    assert all(both[name].default == contrast[name].default for name in contrast if name != "weight")
    with pytest.raises(TypeError, match=r"PixelContrastCrossEntropyLoss.*'temprature'"):
        PixelContrastCrossEntropyLoss(4, temprature=0.1)


# ProjectionHead


@pytest.mark.parametrize(
    ("kind", "parameters"), [("convmlp", 7 * 7 + 2 * 7 + 7 * 5 + 5), ("linear", 7 * 5 + 5)]
)
def test_projection_head(kind, parameters):
    head = ProjectionHead(7, 5, kind)
    assert head(torch.randn(2, 7, 3, 4)).shape == (2, 5, 3, 4)
    assert sum(p.numel() for p in head.parameters()) == parameters


def test_projection_head_bad_settings():
    with pytest.raises(ValueError, match="kind must be 'convmlp' or 'linear', got 'mlp'"):
        ProjectionHead(7, 5, "mlp")
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        ProjectionHead(0)


def test_small_model_learns_to_separate_classes():
    """Convergence: embeddings of one class end up closer to each other than to those of others."""
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
    assert losses[0] == 0  # an empty bank
    assert sum(losses[-5:]) < 0.8 * sum(losses[1:6])
    rows = F.normalize(head(image).permute(0, 2, 3, 1).reshape(-1, 8), dim=1)
    similarity, same = rows @ rows.T, scene.view(-1, 1) == scene.view(1, -1)
    assert similarity[same].mean() > similarity[~same].mean() + 0.5
