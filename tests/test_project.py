"""Losses with a `head`: what they project, and that it comes to the same as projecting whole maps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from pixcontrast_ext import (
    MemoryBank,
    Mining,
    PixelContrastCrossEntropyLoss,
    PixelContrastLoss,
    ProjectionHead,
    hard_anchor_sampling,
)
from tests.support.losses import bank_of, batch

CHANNELS, WIDTH = 6, 12  # of features and of embeddings, which is that of `bank_of`


def head_of(kind="linear"):
    head = ProjectionHead(CHANNELS, WIDTH, kind)
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return head


def maps(images=2, size=(14, 9)):
    features, labels, logits = batch((images, CHANNELS, *size))
    features = features.detach()
    return features, labels, logits.detach()


def losses_of(head, *, bank=True, **settings):
    """The same loss twice: of embeddings, and with the head, a copy of it."""
    settings = dict(min_pixels=1, max_samples=50, max_views=7) | settings
    made = []
    for own in (None, copy.deepcopy(head)):
        generator = torch.Generator().manual_seed(5)
        filled = bank_of() if bank else None
        if filled is not None:
            filled.enqueue(
                torch.randn(2, WIDTH, 6, 6, generator=torch.Generator().manual_seed(1)),
                torch.arange(72).view(2, 6, 6) % 4,
                generator=torch.Generator().manual_seed(2),
            )
        made.append(PixelContrastLoss(4, bank=filled, generator=generator, head=own, **settings))
    return made


def step(loss, head, features, labels, logits, **steering):
    """Loss, gradients of features and head, and bank, of a call on embeddings or, where it has a head, on features."""
    features = features.clone().requires_grad_()
    given = features if loss.head is not None else head(features)
    value = loss(given, labels, logits, **steering)
    weights = list((head if loss.head is None else loss.head).parameters())
    grads = torch.autograd.grad(value, [features, *weights])
    bank = [] if loss.bank is None else [buffer.clone() for buffer in loss.bank.buffers()]
    return [value.detach(), *grads], bank


class Seen(nn.Module):
    """A linear head that keeps what it was given."""

    def __init__(self, head=None):
        super().__init__()
        self.head, self.maps = head or head_of(), []

    def forward(self, features):
        self.maps.append(features.detach())
        return self.head(features)


# The same as projecting maps


@pytest.mark.parametrize(("kind", "bank"), [("linear", True), ("convmlp", True), ("linear", False)])
def test_equals_projecting_whole_maps(backend, poison, kind, bank):
    """With the pixels of both drawn alike, while every pixel of a class takes part in its region."""
    head = head_of(kind).eval()
    whole, used = losses_of(head, bank=bank, backend=backend, region_views=99)
    inputs = maps()
    (expected, bank_of_whole), (found, bank_of_used) = (step(loss, head, *inputs) for loss in (whole, used))
    assert expected[0] > 0
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    for a, b in zip(bank_of_whole, bank_of_used, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        dict(min_purity=0.6),
        dict(anchors="random", hard_fraction=0.2),
        dict(normalize=False),
        dict(mining=Mining("hardest", 20, 9)),  # which draws nothing
        dict(warmup_steps=1),
    ],
)
def test_settings_and_steering_hold_as_before(settings):
    features, labels, logits = maps()
    labels = labels.repeat_interleave(2, 1).roll(1, 1)
    steering = dict(hard=torch.rand(labels.shape) < 0.5, confidence=torch.rand(labels.shape))
    head = head_of()
    whole, used = losses_of(head, region_views=99, **settings) if settings.get("normalize", True) else (
        PixelContrastLoss(
            4, bank=bank_of(normalize=False), generator=torch.Generator().manual_seed(1), region_views=99,
            head=own, min_pixels=1, **settings,
        )
        for own in (None, copy.deepcopy(head))
    )  # fmt: skip
    for _ in range(2):
        (expected, bank_of_whole), (found, bank_of_used) = (
            step(loss, head, features, labels, logits, **steering) for loss in (whole, used)
        )
        for a, b in zip(expected + bank_of_whole, found + bank_of_used, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    assert found[0] > 0


@pytest.mark.parametrize(("bank_samples", "region_views", "drawn"), [(4096, 5, 5), (17, 64, 2)])
def test_regions_are_the_means_of_the_pixels_drawn(quick_backend, bank_samples, region_views, drawn):
    """Of eight pairs of image and class, 17 samples leave two for each."""
    features, labels, logits = maps()
    head, bank = head_of(), bank_of(pixels_per_image=3)
    loss = PixelContrastLoss(
        4, bank=bank, head=head, bank_samples=bank_samples, region_views=region_views, backend=quick_backend,
        generator=torch.Generator().manual_seed(9),
    )  # fmt: skip
    loss(features, labels, logits)
    generator = torch.Generator().manual_seed(9)
    _, priority = (
        torch.randint(2**31 - 1, labels.shape, dtype=torch.int32, generator=generator) for _ in range(2)
    )
    rows = F.normalize(head(features), dim=1).permute(0, 2, 3, 1).detach()
    for label in range(4):
        regions, pixels = [], []
        for image in range(2):
            of_class = (labels[image] == label).flatten().nonzero()[:, 0]
            rank = priority[image].flatten()[of_class].argsort()
            of_image = rows[image].reshape(-1, WIDTH)
            regions.append(F.normalize(of_image[of_class[rank[:drawn]]].mean(0), dim=0))
            pixels += of_image[of_class[rank[: min(3, drawn)]].sort().values]
        assert bank.region_fill[label] == 2
        assert bank.pixel_fill[label] == len(pixels)
        keys = bank.keys[label]
        torch.testing.assert_close(keys[:2], torch.stack(regions), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(keys[20 : 20 + len(pixels)], torch.stack(pixels), rtol=1e-5, atol=1e-6)


def test_many_images_of_many_classes(quick_backend):
    """More groups than a block has threads, of which most have no pixel."""
    features = torch.randn(7, CHANNELS, 3, 4)
    labels = torch.randint(0, 171, (7, 3, 4))
    head, banks = head_of(), []
    for own in (head, None):
        bank = MemoryBank(171, WIDTH, region_slots=9, pixel_slots=9)
        loss = PixelContrastLoss(
            171, bank=bank, head=own, bank_samples=1000, max_samples=9, backend=quick_backend,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        loss(features if own else head(features), labels, labels)
        banks.append(bank)
    for a, b in zip(*(bank.buffers() for bank in banks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert banks[0].pixel_fill.sum() == 84


# What passes the head


@pytest.mark.parametrize("ignored", [0.2, 0.995])
def test_rows_of_padding_repeat_the_others_in_turn(quick_backend, ignored):
    """So batch norm sees pixels with a label alone, and each about as often."""
    features, labels, logits = batch((2, CHANNELS, 30, 10), ignored=ignored)
    seen = Seen(head_of("convmlp"))
    norm, before = seen.head.project[1], copy.deepcopy(seen.head.project[:2])
    settings = dict(min_pixels=1, max_samples=20, max_views=3, generator=torch.Generator().manual_seed(4))
    loss = PixelContrastLoss(4, bank=bank_of(), head=seen, bank_samples=50, backend=quick_backend, **settings)
    loss(features, labels, logits)
    settings["generator"].manual_seed(4)
    anchors = hard_anchor_sampling(labels, logits.argmax(1), num_classes=4, **settings)
    settings |= dict(max_samples=50, max_views=64, anchors="random")
    drawn = hard_anchor_sampling(labels, None, num_classes=4, **settings)
    chosen = torch.cat([anchors.indices, drawn.indices])
    valid = torch.cat([anchors.labels, drawn.labels]) >= 0
    others, turn = chosen[valid].tolist(), 0
    assert 0 < len(others) < 70
    for row in range(70):
        if not valid[row]:
            chosen[row] = others[turn % len(others)]
            turn += 1
    rows = features.detach().permute(0, 2, 3, 1).reshape(-1, CHANNELS)[chosen].T[None, :, :, None]
    (given,) = seen.maps
    assert torch.equal(given, rows)
    before(rows)
    torch.testing.assert_close(norm.running_mean, before[1].running_mean)
    torch.testing.assert_close(norm.running_var, before[1].running_var)
    assert norm.num_batches_tracked == 1


def test_gradient_flows_through_the_anchors_alone(quick_backend):
    """Though with batch norm every row has a part in what becomes of the others."""
    features, labels, logits = batch((2, CHANNELS, 14, 9))
    settings = dict(min_pixels=1, max_samples=30, max_views=2)
    loss = PixelContrastLoss(
        4, bank=bank_of(), head=head_of("convmlp"), generator=torch.Generator().manual_seed(4),
        backend=quick_backend, **settings,
    )  # fmt: skip
    loss(features, labels, logits)
    loss._stream.generator.manual_seed(4)
    value = loss(features, labels, logits)
    value.backward()
    anchors = hard_anchor_sampling(
        labels, logits.argmax(1), num_classes=4, generator=torch.Generator().manual_seed(4), **settings
    )
    assert anchors.count == 16
    expected = torch.zeros(labels.numel(), dtype=torch.bool)
    expected[anchors.indices[:16]] = True
    assert torch.equal(features.grad.permute(0, 2, 3, 1).reshape(-1, CHANNELS).any(1), expected)
    assert all(weight.grad.any() for weight in loss.head.parameters())


@pytest.mark.parametrize("case", ["all ignored", "batch 0", "no pixels"])
@pytest.mark.parametrize("bank", [True, False])
def test_nothing_to_project_changes_no_statistic(backend, poison, case, bank):
    size = {"batch 0": (0, CHANNELS, 5, 5), "no pixels": (2, CHANNELS, 0, 5)}.get(case, (2, CHANNELS, 5, 5))
    features = torch.full(size, math.nan, requires_grad=True)  # which nobody may look at
    labels = torch.full((size[0], *size[2:]), 255)
    loss = PixelContrastLoss(
        4, max_samples=30, bank_samples=40, bank=bank_of() if bank else None, head=head_of("convmlp"),
        backend=backend,
    )  # fmt: skip
    before = copy.deepcopy(loss.state_dict())
    value = loss(features, labels, torch.zeros(size[0], 4, *size[2:]))
    value.backward()
    assert value == 0
    assert features.grad.shape == features.shape
    assert not features.grad.any()
    assert all((weight.grad == 0).all() for weight in loss.head.parameters())
    for name, buffer in loss.state_dict().items():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (dict(), 30 + 40),
        (dict(bank=None), 30),
        (dict(weight=0.0), 40),
        (dict(weight=0.0, bank=None), 30),
        (dict(weight=0.0, keys_from=True), 30),
        (dict(keys_from=True), 30),
        (dict(warmup_steps=2), 30 + 40),
    ],
)
def test_what_a_training_call_projects_gives_the_head_a_gradient(quick_backend, settings, count):
    """If only of 0: DistributedDataParallel demands one in every step."""
    features, labels, logits = batch((2, CHANNELS, 8, 9))
    settings = dict(bank=bank_of()) | settings
    teachers = (torch.randn(1, WIDTH, 4, 4), torch.arange(16).view(1, 4, 4) % 4)
    steering = dict(keys_from=teachers) if settings.pop("keys_from", False) else {}
    seen = Seen()
    loss = PixelContrastLoss(
        4, min_pixels=1, max_samples=30, bank_samples=40, head=seen, backend=quick_backend, **settings
    )
    value = loss(features, labels, logits, **steering)
    value.backward()
    assert [given.shape for given in seen.maps] == [(1, CHANNELS, count, 1)]
    assert features.grad is not None
    assert all(weight.grad is not None for weight in loss.head.parameters())
    if loss.bank is not None:
        assert (value, loss.bank.region_fill.sum()) == (0, 4 if steering else 8)
    if loss.warmup_steps:
        assert loss.step == 1


def test_validation_projects_the_anchors_and_leaves_no_trace(quick_backend):
    """Even with nobody calling eval(): batch norm's statistics are as much a state as the bank."""
    features, labels, logits = batch((2, CHANNELS, 8, 9))
    seen = Seen(head_of("convmlp"))
    loss = PixelContrastLoss(
        4, min_pixels=1, max_samples=30, bank=bank_of(), head=seen, backend=quick_backend
    )
    before = copy.deepcopy(loss.state_dict())
    with torch.no_grad():
        loss(features, labels, logits)
        loss.weight = 0.0
        loss(features, labels, logits)
    assert [given.shape[2] for given in seen.maps] == [30]
    for name, buffer in loss.state_dict().items():
        assert torch.equal(buffer, before[name]), name


def test_warming_up_leaves_no_trace_of_the_head(quick_backend):
    features, labels, logits = batch((2, CHANNELS, 8, 9))
    loss = PixelContrastLoss(4, min_pixels=1, bank=bank_of(), head=head_of("convmlp"), backend=quick_backend)
    loss(features, labels, logits)
    before = copy.deepcopy(loss.state_dict())
    loss.warm_up(features, labels, logits)
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(weight.grad is None for weight in loss.parameters())


class Waiting(TorchDispatchMode):
    """Refuses what a host would wait for a device with."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
        )
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(cuda_backend):
    """On the emulator, where the host may look at anything; `test_cuda_device.py` asks a device."""
    features, labels, logits = batch((2, CHANNELS, 8, 9))
    loss = PixelContrastLoss(4, min_pixels=1, bank=bank_of(), head=head_of("convmlp"), backend=cuda_backend)
    for _ in range(2):
        with Waiting():
            value = loss(features, labels, logits)
            value.backward()
    assert value > 0
    with pytest.raises(AssertionError), Waiting():
        bool(value > 0)


def test_two_calls_before_a_backward():
    """As with gradient accumulation: the second may write nothing that the first one's backward reads."""
    features, labels, logits = batch((2, CHANNELS, 8, 9))
    loss = PixelContrastLoss(4, min_pixels=1, bank=bank_of(), head=head_of("convmlp"))
    (loss(features, labels, logits) + loss(features, labels, logits)).backward()
    assert loss.head.project[1].num_batches_tracked == 2
    assert features.grad.any()


# In a trainer


def test_a_lazy_head_is_made_by_its_first_call():
    lazy = nn.Sequential(nn.LazyConv2d(WIDTH, 1), nn.LazyBatchNorm2d())
    loss = PixelContrastLoss(4, bank=bank_of(), head=lazy, min_pixels=1)
    with pytest.raises(
        ValueError, match=r"head\.1\.running_mean, .* are made in the head's first call: call the loss"
    ):
        loss.warm_up(*maps())
    for times in (1, 2):
        loss(*maps())
        assert lazy[1].num_batches_tracked == times
    assert lazy[0].in_channels == CHANNELS


def test_a_module_is_a_part_of_the_loss_and_a_function_is_not():
    features, labels, logits = batch((2, CHANNELS, 8, 9))
    owner = head_of("convmlp")
    part, apart = (
        PixelContrastCrossEntropyLoss(4, weight=1.0, min_pixels=1, bank=bank_of(), head=head)
        for head in (owner, lambda features: owner(features))
    )
    assert {f"contrast.head.{name}" for name in owner.state_dict()} < set(part.state_dict())
    assert not any("head" in name for name in apart.state_dict())
    assert list(part.parameters()) == list(owner.parameters())
    assert not list(apart.parameters())
    copied = copy.deepcopy(part)
    restored = PixelContrastCrossEntropyLoss(
        4, weight=1.0, min_pixels=1, bank=bank_of(), head=head_of("convmlp")
    )
    restored.load_state_dict(part.state_dict())
    for _ in range(2):
        values = []
        for criterion in (part, copied, restored):
            torch.manual_seed(1)
            values.append(criterion(logits, features, labels))
            values[-1].backward()
        assert values[0] == values[1] == values[2]
        for name, value in part.state_dict().items():
            assert torch.equal(value, copied.state_dict()[name]), name
            assert torch.equal(value, restored.state_dict()[name]), name
    assert values[0] > 0
    owner.zero_grad()
    value = apart(logits, features, labels)
    value.backward()
    assert all(weight.grad is not None for weight in owner.parameters())


def test_on_meta_and_then_somewhere():
    with torch.device("meta"):
        loss = PixelContrastLoss(4, min_pixels=1, bank=bank_of(), head=head_of())
    loss.to_empty(device="cpu")
    loss.head.load_state_dict(head_of().state_dict())
    features, labels, logits = batch((2, CHANNELS, 8, 9))
    assert loss(features, labels, logits) == 0
    assert loss(features, labels, logits) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(quick_backend, dtype):
    """The head's products and the contrast's are of its dtype; the bank, the gradients and the loss stay in fp32."""
    features, labels, logits = batch((2, CHANNELS, 8, 9))
    loss = PixelContrastLoss(4, min_pixels=1, bank=bank_of(), head=head_of(), backend=quick_backend)
    projected = []
    loss.head.register_forward_hook(lambda module, given, rows: projected.append(rows.dtype))
    for _ in range(2):
        with torch.autocast("cpu", dtype):
            value = loss(features, labels, logits)
    value.backward()
    assert projected == [dtype] * 2
    assert value > 0
    assert (value.dtype, loss.bank.keys.dtype, features.grad.dtype) == (torch.float32,) * 3
    assert all(weight.grad.any() for weight in loss.head.parameters())


SIZES = [(5, 12, 12), (3, 12, 12), (2, 9, 15), (6, 14, 8)]


@pytest.mark.parametrize(("kind", "sizes"), [("module", SIZES), ("function", SIZES[:1])])
def test_one_compiled_loss_takes_any_size(kind, sizes):
    def losses():
        torch.manual_seed(0)
        head = head_of("convmlp")
        loss = PixelContrastLoss(
            4, bank=bank_of(), warmup_steps=1, min_pixels=1, max_views=5, max_samples=40, bank_samples=60,
            head=head if kind == "module" else lambda features: head(features),
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        return loss, head

    torch._dynamo.reset()
    (eager, eager_head), (compiled, compiled_head) = losses(), losses()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter)
    for images, height, width in [*sizes, sizes[-1]]:
        labels = torch.randint(0, 4, (images, height, width))
        inputs, results = torch.randn(images, CHANNELS, height, width), []
        for call, head in ((eager, eager_head), (run, compiled_head)):
            features = inputs.clone().requires_grad_()
            value = call(features, labels, labels)
            grads = torch.autograd.grad(value, [features, *head.parameters()])
            results.append((value.detach(), *grads, *(buffer.clone() for buffer in head.buffers())))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert value > 0
    for (name, a), b in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert counter.frame_count <= min(3, len(sizes))


# What is refused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(head=3), TypeError, "head must be a module or another callable, got int"),
        (dict(bank_samples=0), ValueError, "bank_samples must be at least 1, got 0"),
        (dict(region_views=1.5), TypeError, "region_views must be an int, got 1.5"),
    ],
)
@pytest.mark.parametrize("made", [PixelContrastLoss, PixelContrastCrossEntropyLoss])
def test_bad_settings(made, settings, error, message):
    with pytest.raises(error, match=message):
        made(4, **settings)


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (lambda rows: rows, ValueError, "embeddings of the head must be 12 wide, got"),
        (lambda rows: rows[0], ValueError, r"head must give \[1, D, N, 1\] .*, got \(6, 14, 1\) of \(1, 6, 14, 1\)"),
        (lambda rows: rows[:, :, :5], ValueError, r"head must give .*, got \(1, 6, 5, 1\)"),
        (lambda rows: None, TypeError, "head must give a floating-point tensor, got NoneType"),
    ],
)  # fmt: skip
def test_a_bad_head(head, error, message):
    loss = PixelContrastLoss(4, bank=bank_of(), head=head, max_samples=5, bank_samples=9)
    with pytest.raises(error, match=message):
        loss(*maps())
    assert not loss.bank.region_fill.any()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Conv2d(6, 6, (1, 3), padding=(0, 1)),
        nn.GroupNorm(2, 6),
        nn.InstanceNorm2d(6),
        nn.AvgPool2d(3, 1, 1),
        nn.ConvTranspose2d(6, 6, 3, padding=1),
        nn.Conv2d(6, 6, 1, stride=2),
        nn.Conv2d(6, 6, 1, padding=1),
    ],
)
def test_a_head_that_reads_several_pixels_is_refused(layer):
    """Rows of pixels that lie anywhere are no neighbours, and no image of their own."""
    head = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), layer)
    with pytest.raises(ValueError, match=f"by itself, but its layer '2' is {layer._get_name()}"):
        PixelContrastLoss(4, bank=bank_of(), head=head)
    with pytest.raises(ValueError, match=f"but it is {layer._get_name()}"):
        PixelContrastLoss(4, bank=bank_of(), head=layer)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(embeddings=None), TypeError, "features must be a floating-point tensor, got NoneType"),
        (dict(embeddings=torch.zeros(2, 6, 5)), ValueError, r"features must have shape \[B, D, H, W\]"),
        (dict(labels=torch.zeros(3, 5, 5).long()), ValueError, r"labels .* do not fit features \(2, 6, 5, 5\)"),
        (dict(predictions=torch.zeros(2, 4, 5)), ValueError, r"logits .* do not fit features"),
        (dict(hard=torch.zeros(5, 5) > 0), ValueError, r"hard .* do not fit features"),
        (dict(confidence=torch.zeros(5, 5)), ValueError, r"confidence .* do not fit features"),
        (dict(keys_from=(torch.zeros(2, 6, 5, 5), torch.zeros(2, 5, 5).long())), ValueError, "must be 12 wide"),
    ],
)  # fmt: skip
def test_bad_input_is_told_of_features(change, error, message):
    seen = Seen()
    loss = PixelContrastLoss(4, bank=bank_of(), head=seen)
    labels = torch.zeros(2, 5, 5).long()
    given = dict(embeddings=torch.zeros(2, CHANNELS, 5, 5), labels=labels, predictions=labels) | change
    with pytest.raises(error, match=message):
        loss(**given)
    assert not seen.maps
