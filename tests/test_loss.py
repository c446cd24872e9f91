"""`PixelContrastLoss` and `ProjectionHead`: one call of the loss, at any size and dtype, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from pixcontrast_ext import (
    MemoryBank,
    Mining,
    PixelContrastLoss,
    ProjectionHead,
    backends,
    gather_embeddings,
    hard_anchor_sampling,
    infonce,
)
from pixcontrast_ext.backends import device as devices
from pixcontrast_ext.maps import resize_nearest
from tests.support.losses import bank_of, batch

# Sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_nearest_is_the_rule_of_interpolate(dtype):
    """Many pairs of sizes, including those where the exact quotient would round differently from torch's fp32."""
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


def test_labels_and_logits_of_another_size_are_picked(quick_backend):
    embeddings, labels, _ = batch(labels_size=(55, 40))
    logits = torch.randn(2, 4, 28, 18)
    criterion = PixelContrastLoss(4, min_pixels=1, max_samples=256, backend=quick_backend)
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


def test_base_temperature_scales(quick_backend):
    embeddings, labels, logits = batch()
    losses = []
    for base in (None, 0.05):
        torch.manual_seed(0)
        criterion = PixelContrastLoss(
            4, temperature=0.2, base_temperature=base, min_pixels=1, max_samples=256, backend=quick_backend
        )
        losses.append(criterion(embeddings, labels, logits))
    torch.testing.assert_close(losses[1], 4 * losses[0])


def test_enqueues_after_the_loss_and_in_training_only(quick_backend):
    embeddings, labels, logits = batch()
    criterion = PixelContrastLoss(4, min_pixels=1, max_samples=256, bank=bank_of(), backend=quick_backend)
    # The bank is still empty, and the batch is not contrasted with itself.
    assert criterion(embeddings, labels, logits) == 0
    filled = criterion.bank.region_fill.clone()
    assert (filled == 2).all()
    assert criterion.eval()(embeddings, labels, logits) > 0
    assert torch.equal(criterion.bank.region_fill, filled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bank_dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_of_map_and_bank(backend, dtype, bank_dtype):
    embeddings, labels, logits = batch()
    exact = PixelContrastLoss(
        4, min_pixels=1, max_samples=256, bank=None if bank_dtype is None else bank_of()
    )
    criterion = PixelContrastLoss(
        4,
        min_pixels=1,
        max_samples=256,
        bank=None if bank_dtype is None else bank_of(dtype=bank_dtype),
        backend=backend,
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


@pytest.mark.parametrize("mining", [None, Mining("semi-hard", 20, 10, fraction=0.5)])
def test_autocast_takes_the_products_in_its_dtype(quick_backend, mining):
    """To the bit what a bank of that dtype gives; what is enqueued keeps the bank's own."""
    embeddings, labels, logits = batch()
    losses, gradients, banks = [], [], []
    for enabled, dtype in ((True, torch.float32), (False, torch.bfloat16), (False, torch.float32)):
        bank = bank_of()
        generator = torch.Generator().manual_seed(2)
        bank.enqueue(embeddings.detach().flip(0), labels, generator=generator)
        criterion = PixelContrastLoss(
            4,
            min_pixels=1,
            max_samples=256,
            bank=bank.to(dtype),
            mining=mining,
            generator=generator,
            backend=quick_backend,
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(criterion(embeddings, labels, logits))
        gradients += torch.autograd.grad(losses[-1], embeddings)
        banks.append(bank.keys)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(banks[0], banks[2])
    assert losses[0].dtype == gradients[0].dtype == banks[0].dtype == torch.float32
    assert losses[0] != losses[2]
    torch.testing.assert_close(losses[0], losses[2], rtol=2e-2, atol=0)


def test_autocast_in_the_batch(quick_backend):
    embeddings, labels, logits = batch()
    criterion = PixelContrastLoss(4, min_pixels=1, backend=quick_backend)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion(embeddings, labels, logits)
    torch.manual_seed(3)
    sample = hard_anchor_sampling(labels, logits.argmax(1), num_classes=4, min_pixels=1)
    rows = gather_embeddings(embeddings, sample.indices, dtype=torch.bfloat16, backend=quick_backend)
    expected = infonce(
        rows, sample.labels, rows, sample.labels,
        temperature=0.1, exclude_self=True, backend=quick_backend,
    )  # fmt: skip
    assert torch.equal(found, expected)


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
    """The loss normalises the map, so scaling the map does not change it."""
    embeddings, labels, logits = batch()
    losses = []
    for scale in (1.0, 1e-6, 1e6):
        torch.manual_seed(0)
        losses.append(
            PixelContrastLoss(4, min_pixels=1, max_samples=256, backend=backend)(
                embeddings * scale, labels, logits
            )
        )
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_backward_after_the_bank_was_written(quick_backend):
    """The order of a training step: loss, enqueue, backward."""
    embeddings, labels, logits = batch()
    gradients = []
    for training in (True, False):
        criterion = PixelContrastLoss(
            4,
            min_pixels=1,
            max_samples=256,
            bank=bank_of(region_slots=1, pixel_slots=1),
            backend=quick_backend,
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
        (dict(temperature="0.1"), TypeError, "temperature must be an int or a float, got '0.1'"),
        (dict(max_samples=0), ValueError, "max_samples must be at least 1, got 0"),
        (dict(max_samples=2**31), ValueError, "max_samples must be at most 2147483647, got 2147483648"),
        (dict(num_classes=2**32), ValueError, "num_classes must be at most 2147483647, got 4294967296"),
        (
            dict(max_views=2**63 - 1),
            ValueError,
            "max_views must be at most 9223372036854775806, got 9223372036854775807",
        ),
        (dict(min_pixels=2**70), ValueError, "min_pixels must be at most 9223372036854775806, got 1180"),
        (dict(ignore_index=2**70), ValueError, "ignore_index must be from -9223372036854775806 to 92"),
        (dict(max_views=0), ValueError, "max_views must be at least 1, got 0"),
        (dict(min_pixels=-1), ValueError, "min_pixels must be at least 0, got -1"),
        (dict(bank=bank_of(5)), ValueError, "the bank has 5 classes, the loss 4"),
        (
            dict(bank=torch.nn.Identity()),
            TypeError,
            "bank must be a MemoryBank, or a dict of its settings, got Identity",
        ),
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_bank", [False, True])
def test_default_dtype_does_not_matter(backend, dtype, with_bank):
    embeddings, labels, logits = batch()
    losses = []
    for default in (torch.float32, dtype):
        bank = bank_of(dtype=torch.float32) if with_bank else None
        criterion = PixelContrastLoss(4, min_pixels=1, max_samples=256, bank=bank, backend=backend)
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
    criterion = PixelContrastLoss(
        4, min_pixels=1, max_samples=256, bank=bank_of(channels=13), backend=backend
    )
    with pytest.raises(
        ValueError, match=r"embeddings \(2, 12, 14, 9\) do not fit the bank, which is 13 wide"
    ):
        criterion(embeddings, labels, logits)


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
    """Even if the dtype cannot hold the number of classes itself."""
    embeddings, labels, _ = batch(ignored=0.0)
    predictions = torch.zeros_like(labels)
    criterion = PixelContrastLoss(num_classes, min_pixels=1, max_samples=256, ignore_index=-100)
    losses = []
    for kind in (torch.int64, dtype):
        torch.manual_seed(0)
        losses.append(criterion(embeddings, labels.to(kind), predictions))
    assert torch.equal(*losses)
    assert losses[0] > 0


@pytest.mark.parametrize("value", [4, -1])
def test_bad_label_is_named_with_its_place(careful_backend, value):
    arguments = torch.zeros(2, 12, 5, 5), torch.full((2, 5, 5), value), torch.zeros(2, 5, 5).long()
    message = rf"labels\[0, 0, 0\] is {value}, expected 0 <= label < num_classes=4"
    with pytest.raises(ValueError, match=message):
        PixelContrastLoss(4, backend=careful_backend)(*arguments)


def test_bad_label_of_a_larger_map_is_named_with_its_place_in_the_smaller_one():
    labels, loss = torch.zeros(1, 8, 8).long(), PixelContrastLoss(4, min_pixels=1)
    labels[0, 6, 6] = 77
    with pytest.raises(
        ValueError, match=r"labels, resized to 4x4, \[0, 3, 3\] is 77, expected 0 <= label < num_cl"
    ):
        loss(torch.randn(1, 12, 4, 4), labels, torch.zeros(1, 4, 4).long())
    with FakeTensorMode():  # whose values nobody knows
        assert (
            loss(torch.randn(1, 12, 4, 4), torch.zeros(1, 8, 8).long(), torch.zeros(1, 4, 4).long()).shape
            == ()
        )


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


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu", "reference"])
def test_without_weight_no_backend_is_asked(monkeypatch, backend):
    """Nothing is contrasted and, without a bank, nothing is enqueued."""
    monkeypatch.setattr(devices, "gpu", devices.Gpu())
    embeddings, labels = torch.randn(2, 4, 5, 5, requires_grad=True), torch.zeros(2, 5, 5, dtype=torch.int64)
    loss = PixelContrastLoss(3, weight=0, backend=backend)(embeddings, labels, labels)
    loss.backward()
    assert loss == 0
    assert not embeddings.grad.any()
    bank = MemoryBank(3, 4, dtype=torch.float64)
    in_validation = PixelContrastLoss(3, weight=0, backend=backend, bank=bank).eval()
    assert in_validation(embeddings, labels, labels) == 0


def test_rows_too_wide_to_contrast_leave_the_rest_to_the_first_backend(monkeypatch):
    """If only InfoNCE has to fall back, sampling, gather and bank keep the first backend."""
    asked = []
    resolve = backends.resolve
    monkeypatch.setattr(
        backends,
        "resolve",
        lambda requested, op, *what: asked.append((op, resolve(requested, op, *what))) or asked[-1][1],
    )
    embeddings, labels = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.zeros(2, 5, 5, dtype=torch.int64)
    bank = MemoryBank(3, 4, region_slots=2, pixel_slots=2)
    PixelContrastLoss(3, min_pixels=1, max_samples=256, bank=bank)(embeddings, labels, labels)
    assert asked == [("enqueue_collect", "reference"), ("infonce", "cpu")]
