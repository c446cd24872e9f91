"""torch.compile, opcheck, and the other demands that torch makes on an op."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from pixcontrast_ext import (
    MemoryBank,
    PixelContrastCrossEntropyLoss,
    PixelContrastLoss,
    ProjectionHead,
    infonce,
)
from tests.support.backends import BACKENDS
from tests.support.op_cases import cases

MAPS = torch.randn(2, 8, 6, 6)


@pytest.mark.parametrize("op", cases("cpu"))
def test_opcheck(backend, op):
    torch.library.opcheck(getattr(torch.ops.pixcontrast, op).default, cases(backend)[op])


def test_every_op_is_checked():
    """All but the ops that speak to the host."""
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("pixcontrast::")}
    assert names == set(cases("cpu")) | {
        "draw_priority",
        "enqueue_write_all_ranks",
        "watch_classes",
    }


def test_fakes_agree_with_the_ops(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for op, arguments in cases(backend).items():
        call = getattr(torch.ops.pixcontrast, op)
        real = call(*arguments)
        with FakeTensorMode() as mode:
            fake = call(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        real, fake = (x if isinstance(x, (tuple, list)) else [x] for x in (real, fake))
        for a, b in zip(real, fake, strict=True):
            if a is not None:
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), op


def training_steps(criterion, compiled, steps=5):
    """Losses, gradients and bank of a few steps from the same state."""
    torch.manual_seed(0)
    head = ProjectionHead(6, 8)
    run = torch.compile(criterion, fullgraph=True, backend=compiled) if compiled else criterion
    results = []
    for step in range(steps):
        torch.manual_seed(step)
        features, logits = torch.randn(2, 6, 9, 7), torch.randn(2, 4, 9, 7, requires_grad=True)
        labels = torch.randint(0, 4, (2, 18, 21))
        labels[:, :3] = 255
        embeddings = head(features)
        torch.manual_seed(100 + step)
        loss = run(logits, embeddings, labels)
        grads = torch.autograd.grad(loss, [logits, *head.parameters()], allow_unused=True)
        results.append((loss.detach(), *(g for g in grads if g is not None)))
    return results


@pytest.mark.parametrize("with_bank", [True, False])
def test_compiled_criterion_is_the_eager_one(with_bank):
    """One graph holds the whole criterion and serves both the warm-up and the steps after it."""

    def criterion():
        bank = MemoryBank(4, 8, region_slots=3, pixel_slots=7, pixels_per_image=2) if with_bank else None
        return PixelContrastCrossEntropyLoss(
            4, bank=bank, warmup_steps=3, min_pixels=1, max_views=5, max_samples=40
        )

    torch._dynamo.reset()
    eager, compiled = criterion(), criterion()
    counter = CompileCounterWithBackend("aot_eager")
    expected, found = training_steps(eager, None), training_steps(compiled, counter)
    for a, b in zip(expected, found, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    for (name, a), b in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert counter.frame_count == 1


SIZES = [(5, 12, 12), (3, 12, 12), (2, 12, 12), (5, 9, 15), (3, 7, 5), (6, 14, 8)]


def test_one_compiled_criterion_takes_any_size(quick_backend):
    check_any_size(quick_backend, with_bank=True, training=True, dynamic=None)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="PIXCONTRAST_TEST_BACKENDS leaves cpu out")
@pytest.mark.parametrize(
    ("with_bank", "training", "dynamic"),
    [(True, True, True), (True, False, None), (False, True, None), (False, False, True)],
)
def test_one_compiled_criterion_takes_any_size_in_any_mode(with_bank, training, dynamic):
    check_any_size("cpu", with_bank, training, dynamic)


def check_any_size(backend, with_bank, training, dynamic):
    """Changing sizes recompile the criterion at most twice, when torch first sees a size change.

    Three batch sizes and then three map sizes, across the end of a warm-up, with a generator of its own.
    """

    def criterion():
        bank = MemoryBank(4, 8, region_slots=3, pixel_slots=7, pixels_per_image=2) if with_bank else None
        generator = torch.Generator().manual_seed(1)
        made = PixelContrastCrossEntropyLoss(
            4,
            bank=bank,
            warmup_steps=2,
            min_pixels=1,
            max_views=5,
            max_samples=40,
            generator=generator,
            backend=backend,
        )
        made.contrast.step.fill_(0 if training else 2)
        if bank is not None:
            bank.enqueue(MAPS, torch.arange(72).view(2, 6, 6) % 4, generator=generator)
        return made.train(training)

    torch._dynamo.reset()
    eager, compiled = criterion(), criterion()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter, dynamic=dynamic)
    losses = []
    for batch, height, width in SIZES:
        labels = torch.randint(0, 4, (batch, 2 * height, 3 * width))
        maps = torch.randn(batch, 4, height, width), torch.randn(batch, 8, height, width)
        results = []
        for call in (eager, run):
            logits, embeddings = (each.clone().requires_grad_() for each in maps)
            loss, parts = call(logits, embeddings, labels, return_parts=True)
            results.append((loss.detach(), *torch.autograd.grad(loss, (logits, embeddings)), *parts.values()))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        losses.append(parts["contrast"].item())
    assert losses[2:] > [0] * 4
    assert (losses[:2] == [0, 0]) == training
    for (name, a), b in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert counter.frame_count <= 3


def test_rows_that_are_anchors_and_keys_may_have_two_tensors_of_labels():
    torch._dynamo.reset()
    rows, labels = torch.randn(12, 8), torch.arange(12) % 3
    some = torch.where(torch.arange(12) < 9, labels, -1)
    compiled = torch.compile(infonce, fullgraph=True, backend="aot_eager")
    found = []
    for call in (infonce, compiled):
        leaf = rows.clone().requires_grad_()
        loss = call(leaf, labels, leaf, some, temperature=0.1)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("order", ["checkpoint of compiled", "compiled checkpoint"])
def test_a_compiled_loss_with_a_bank_refuses_to_be_recomputed(order):
    """Recomputing made the gradient wrong by a third, and enqueued the batch twice."""
    torch._dynamo.reset()
    criterion = PixelContrastLoss(4, min_pixels=1, bank=MemoryBank(4, 8, region_slots=9, pixel_slots=9))
    labels = torch.arange(72).view(2, 6, 6) % 4
    criterion.bank.enqueue(MAPS, labels)
    if order == "compiled checkpoint":
        call = torch.compile(
            lambda *maps: checkpoint(criterion, *maps, use_reentrant=False), backend="aot_eager"
        )
    else:
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        call = lambda *maps: checkpoint(compiled, *maps, use_reentrant=False)  # noqa: E731
    loss = call(MAPS.clone().requires_grad_(), labels, labels)
    with pytest.raises(RuntimeError, match="recomputed within a backward"):
        loss.backward()


def test_inductor():
    torch._dynamo.reset()
    criterion = PixelContrastLoss(4, bank=MemoryBank(4, 8, region_slots=3, pixel_slots=7), min_pixels=1)
    compiled = torch.compile(criterion, fullgraph=True)
    labels = torch.randint(0, 4, (2, 9, 7))
    for _ in range(2):
        embeddings = torch.randn(2, 8, 9, 7, requires_grad=True)
        loss = compiled(embeddings, labels, labels)
        loss.backward()
    assert loss > 0
    assert embeddings.grad.abs().sum() > 0
    assert (criterion.bank.region_fill == 3).all()
