"""How accurate `infonce` is on every backend: loss and gradients against fp64, in all dtypes and precisions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext import Mining, draw_keys, infonce, score_thresholds
from pixcontrast_ext.backends import reference
from pixcontrast_ext.ops.infonce import BlockwiseInfoNCE
from tests.support.backends import GPU_BACKENDS
from tests.support.checks import error
from tests.support.contrast import exact, run, weight_rounding
from tests.support.inputs import BANK, BLOCKS, RANDOM, draw_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_log_sum_exp_of_fewer_keys(backend, dtype):
    """A log-sum-exp 3.9 lower makes the weights of the keys' gradient 49 times larger: in fp16 they overflowed."""
    anchors, anchor_labels, keys, key_labels = draw_rows(70, 150, 33, 3, dtype=dtype)
    labels = anchor_labels.int(), key_labels.int()
    _, lse, weight, count, _ = torch.ops.pixcontrast.infonce_forward(
        anchors, labels[0], keys, labels[1], 0.1, False, False, "reference"
    )
    terms = lse - 3.9, weight, 1.0 / count.clamp(min=1)
    of = {
        name: torch.ops.pixcontrast.infonce_backward_keys(
            rows[0], labels[0], rows[1], labels[1], *terms, 0.1, False, name
        )
        for name, rows in ((backend, (anchors, keys)), ("reference", (anchors.float(), keys.float())))
    }
    assert error(of[backend], of["reference"].double()) <= (4e-6 if dtype == torch.float32 else 1e-3)


# Ragged on purpose: no dimension is a multiple of a tile or of a vector.
SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 7, 2),
    (300, 2011, 65, 7),
    (130, 700, 33, 171),
    (1100, 700, 16, 19),
    (65, 513, 257, 1),
]


@pytest.mark.parametrize("order", [BANK, RANDOM, BLOCKS])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_accuracy(backend, poison, shape, exclude_self, order):
    inputs = draw_rows(*shape, order=order)
    weights = torch.randn(shape[0])
    settings = dict(temperature=0.07, exclude_self=exclude_self, weights=weights)
    found, expected = run(inputs, backend, **settings), exact(inputs, **settings)
    assert error(found[0], expected[0]) <= 1e-6
    assert error(found[1], expected[1]) <= 2e-6
    assert error(found[2], expected[2]) <= 2e-6


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("distance", [0.3, 0.1])
def test_fp32_gradients_where_the_losses_are_small(gpu_backend, poison, distance, in_batch):
    """Well-learnt classes have losses down to 1e-5, and weights as small must keep their digits."""
    centres, labels = F.normalize(torch.randn(10, 64), dim=1), torch.arange(40) % 10
    both = [
        F.normalize(centres[labels] + distance * F.normalize(torch.randn(40, 64), dim=1), dim=1)
        for _ in range(2)
    ]

    def run(dtype: torch.dtype, backend: str):
        rows = [x.to(dtype).requires_grad_() for x in both]
        keys = rows[0] if in_batch else rows[1]
        loss = infonce(
            rows[0], labels, keys, labels,
            temperature=0.05, exclude_self=in_batch, reduction="none", backend=backend,
        )  # fmt: skip
        loss.sum().backward()
        return loss.detach(), rows[0].grad, keys.grad

    expected = run(torch.float64, "reference")
    assert expected[0].mean() < 1e-2
    found, plain = run(torch.float32, gpu_backend), run(torch.float32, "reference")
    for a, b, c in zip(found, plain, expected, strict=True):
        assert error(a, c) <= max(4e-6, 2 * error(b, c))


@pytest.mark.parametrize("in_batch", [False, True])
def test_fp32_gradients_of_two_classes_far_apart(gpu_backend, poison, in_batch):
    """Opposite clusters have losses of 5e-8, of anchors far from a bound on their gradients."""
    labels = torch.arange(32) % 2
    rows = F.normalize(torch.randn(64), dim=0) * (1 - 2.0 * labels[:, None]) + 0.02 * torch.randn(32, 64)
    inputs = F.normalize(rows, dim=1), labels.int()
    found, expected = [], []
    for backend, into, dtype in ((gpu_backend, found, torch.float32), ("reference", expected, torch.float64)):
        anchors, keys = (inputs[0].to(dtype, copy=True).requires_grad_() for _ in range(2))
        others = anchors if in_batch else keys
        settings = dict(temperature=0.1, exclude_self=True, reduction="none", backend=backend)
        loss = infonce(anchors, inputs[1], others, inputs[1], **settings).sum()
        into += torch.autograd.grad(loss, (anchors,) if in_batch else (anchors, keys))
    for ours, truth in zip(found, expected, strict=True):
        assert error(ours, truth) <= 4e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [BANK, RANDOM])
def test_half_precision_accuracy(backend, instruction_set, poison, dtype, order):
    """Against fp64 on the same rounded inputs.

    Two errors are allowed: the gradient's last rounding, to the input's dtype, and the rounding of the weights where
    products are made in half precision.
    """
    inputs = draw_rows(300, 999, 65, 7, order=order, dtype=dtype)
    found, expected = run(inputs, backend), exact(inputs)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == found[2].dtype == dtype
    assert error(found[0], expected[0]) <= 1e-6
    key_rounding = 1e-3 if backend in GPU_BACKENDS else 1e-6
    roundings = (weight_rounding(backend, dtype), key_rounding)
    for grad, truth, rounding in zip(found[1:], expected[1:], roundings, strict=True):
        assert error(grad, truth) <= error(truth.to(dtype), truth) * 1.01 + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("loudest", [0, 2])
def test_gradients_of_keys_where_a_class_weighs_a_million_times_as_much(gpu_backend, poison, dtype, loudest):
    """fp16 weights are scaled by the largest, wherever it stands among more anchors than one block looks at."""
    inputs = draw_rows(1100, 90, 24, 3, dtype=dtype)
    weights = torch.where(inputs[1] == loudest, 4.0, 2.0**-18)
    found, expected = run(inputs, gpu_backend, weights=weights), exact(inputs, weights=weights)
    assert error(found[2], expected[2]) <= (4e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_before_rounding(backend, dtype):
    anchors, anchor_labels, keys, key_labels = draw_rows(200, 900, 64, 5, dtype=dtype)
    inputs = (anchors, anchor_labels.int(), keys, key_labels.int())
    *_, anchor_grad = torch.ops.pixcontrast.infonce_forward(*inputs, 0.1, False, True, backend)
    _, expected, _ = exact(inputs)
    bar = max(2e-6, weight_rounding(backend, dtype))
    assert anchor_grad.dtype == torch.float32
    assert error(anchor_grad, expected) <= bar


@pytest.mark.parametrize("temperature", [1e-3, 0.07, 1.0, 50.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_extreme_logits(backend, temperature, scale):
    """Logits up to 1e6, from embeddings far from unit norm: no overflow, and no error beyond that of fp32."""
    anchors, anchor_labels, keys, key_labels = draw_rows(40, 300, 24, 3)
    inputs = (anchors * scale, anchor_labels, keys * scale, key_labels)
    found, expected = run(inputs, backend, temperature=temperature), exact(inputs, temperature=temperature)
    logit = scale * scale / temperature
    assert all(x.isfinite().all() for x in found)
    assert error(found[0], expected[0]) <= 1e-6
    # The rounding error of a logit is the relative error of its exponential.
    assert error(found[1], expected[1]) <= 2e-6 + 1e-6 * logit
    assert error(found[2], expected[2]) <= 2e-6 + 1e-6 * logit


@pytest.mark.parametrize("temperature", [1e30, 1e300])
@pytest.mark.parametrize("in_batch", [False, True])
def test_a_temperature_beyond_float32(backend, instruction_set, temperature, in_batch):
    rows, labels = torch.randn(9, 4), torch.arange(9) % 3
    settings = dict(temperature=temperature, exclude_self=in_batch)
    losses = []
    for name in (backend, "reference"):
        anchors, keys = (rows.clone().requires_grad_() for _ in range(2))
        losses.append(
            infonce(anchors, labels, anchors if in_batch else keys, labels, **settings, backend=name)
        )
        losses[-1].backward()
        assert anchors.grad.abs().max() <= 1e-28
        assert in_batch or keys.grad.abs().max() <= 1e-28
    torch.testing.assert_close(*losses)


def test_in_batch_uses_symmetry(backend):
    for exclude_self in (True, False):
        anchors, anchor_labels, _, _ = draw_rows(261, 1, 40, 6)
        weights = torch.randn(261)
        shared = anchors.clone().requires_grad_()
        loss = infonce(
            shared, anchor_labels, shared, anchor_labels,
            temperature=0.1, exclude_self=exclude_self, reduction="none", backend=backend,
        )  # fmt: skip
        loss.backward(weights)
        truth = anchors.double().requires_grad_()
        expected, _ = reference.infonce_per_anchor(
            truth, anchor_labels, truth, anchor_labels, 0.1, exclude_self
        )
        expected.backward(weights.double())
        assert error(loss.detach(), expected.detach()) <= 1e-6
        assert error(shared.grad, truth.grad) <= 2e-6


def test_one_tensor_with_two_labellings_is_not_symmetric(backend):
    anchors, anchor_labels, _, key_labels = draw_rows(80, 80, 12, 4)
    shared, truth = anchors.clone().requires_grad_(), anchors.double().requires_grad_()
    infonce(
        shared, anchor_labels, shared, key_labels, temperature=0.1, reduction="none", backend=backend
    ).sum().backward()
    reference.infonce_per_anchor(truth, anchor_labels, truth, key_labels, 0.1, False)[0].sum().backward()
    assert error(shared.grad, truth.grad) <= 2e-6


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has one setting")
def test_a_precision_that_is_inherited_stays_inherited():
    """Putting back what it read as, the setting of the CPU's products no longer followed the one above it."""
    rows = torch.randn(20, 8, requires_grad=True)
    labels, of_cpu = torch.arange(20) % 3, torch.backends.mkldnn.matmul
    before = torch.backends.fp32_precision, of_cpu.fp32_precision
    try:
        torch.backends.fp32_precision, of_cpu.fp32_precision = "bf16", "none"
        infonce(rows.detach(), labels, rows, labels, temperature=0.1, backend="cpu").backward()
        assert of_cpu.fp32_precision == "bf16"
        torch.backends.fp32_precision = "ieee"
        assert of_cpu.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision, of_cpu.fp32_precision = before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_reaches_tensor_cores_only(backend, precision):
    """Tensor cores get operands rounded to nearest TF32 where the setting allows it; all else keeps fp32."""
    inputs = draw_rows(300, 1000, 64, 5)
    expected, before = exact(inputs), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        found = run(inputs, backend)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    if backend in GPU_BACKENDS and precision != "highest":
        assert error(found[0], expected[0]) <= 5e-5
        assert all(2e-6 < error(found[i], expected[i]) <= 1e-3 for i in (1, 2))
    else:
        assert error(found[0], expected[0]) <= 1e-6
        assert error(found[1], expected[1]) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_to_allow_tf32_is_understood(gpu_backend, dtype):
    """PyTorch has an old and a new setting, and refuses to read the old one after the new one was written."""
    inputs, setting = draw_rows(100, 400, 64, 5, dtype=dtype), torch.backends.cuda.matmul
    exactly, before = run(inputs, gpu_backend), setting.fp32_precision
    try:
        setting.fp32_precision = "tf32"
        found = run(inputs, gpu_backend)
    finally:
        setting.fp32_precision = before
    assert torch.equal(found[0], exactly[0]) == (dtype != torch.float32)
    torch.testing.assert_close(found[0], exactly[0], rtol=1e-3, atol=1e-4)


def as_dtype(inputs, dtype):
    anchors, anchor_labels, keys, key_labels = inputs
    return anchors.to(dtype), anchor_labels, keys.to(dtype), key_labels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_keys", [torch.float32, torch.bfloat16])
def test_autocast_reaches_the_products_and_not_the_logits(quick_backend, dtype, of_keys):
    """To the bit what rows of that dtype give: an fp32 loss. Gradients come back in the rows' own dtypes."""
    anchors, anchor_labels, keys, key_labels = draw_rows(100, 400, 64, 5)
    inputs = anchors, anchor_labels, keys.to(of_keys), key_labels
    with torch.autocast("cpu", dtype=dtype):
        found = run(inputs, quick_backend)
    expected = run(as_dtype(inputs, dtype), quick_backend)
    assert [each.dtype for each in found] == [torch.float32, torch.float32, of_keys]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))
    assert error(found[0], exact(as_dtype(inputs, dtype))[0]) <= 1e-6


def test_autocast_reaches_what_mining_ranks(quick_backend):
    """The thresholds, and the negatives drawn, are those of rows in its dtype; so is the loss between them."""
    rows = draw_rows(40, 300, 32, 5)
    mining, results = Mining("semi-hard", 60, 30, fraction=0.3), []
    for enabled, inputs in ((True, rows), (False, as_dtype(rows, torch.bfloat16))):
        anchors, anchor_labels, keys, key_labels = inputs
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            drawn = draw_keys(keys, key_labels, mining, generator=torch.Generator().manual_seed(1))
            given = anchors, anchor_labels, keys, drawn.positive_labels
            kept = score_thresholds(*given, mining, negatives=drawn.negatives, backend=quick_backend)
            loss = infonce(
                *given, temperature=0.1, negatives=drawn.negatives, **kept._asdict(), backend=quick_backend
            )
        results.append((*kept, loss))
    assert drawn.negatives is not None
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_autocast_is_seen_by_a_compiled_call():
    torch._dynamo.reset()
    inputs = draw_rows(30, 90, 16, 5)
    compiled = torch.compile(lambda *rows: infonce(*rows, temperature=0.1), fullgraph=True, backend="eager")
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = compiled(*inputs)
        assert torch.equal(found, infonce(*as_dtype(inputs, dtype), temperature=0.1))


def test_autocast_leaves_fp64_alone():
    inputs = draw_rows(30, 90, 16, 5, dtype=torch.float64)
    expected = run(inputs, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(inputs, "reference")
        with pytest.raises(TypeError, match=r"one dtype, got torch.float64 and torch.float32"):
            run((*inputs[:2], inputs[2].float(), inputs[3]), "reference")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_autocast_keeps_the_symmetric_path(quick_backend, monkeypatch):
    anchors, labels, _, _ = draw_rows(60, 1, 16, 5)
    anchors.requires_grad_()
    called, apply = [], BlockwiseInfoNCE.apply
    monkeypatch.setattr(
        BlockwiseInfoNCE,
        "apply",
        lambda rows, *rest: called.append((rows.dtype, rest[1])) or apply(rows, *rest),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        infonce(anchors, labels, anchors, labels, temperature=0.1, backend=quick_backend).backward()
    assert called == [(torch.bfloat16, None)]  # no keys
    assert anchors.grad.dtype == torch.float32
    assert anchors.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [64, 200])
def test_scores_beyond_all_room_for_a_shift(gpu_backend, dtype, channels):
    """fp32 scores of this size are 128 apart, so the weight of one may vanish entirely beside another's."""
    rows = torch.nn.functional.normalize(torch.randn(60, channels), dim=1).mul(1e4).to(dtype)
    labels = torch.arange(60) % 4
    found, expected = [], []
    for backend, into, kind in ((gpu_backend, found, dtype), ("reference", expected, torch.float64)):
        a = rows[:20].to(kind, copy=True).requires_grad_()
        loss = infonce(a, labels[:20], rows.to(kind, copy=True), labels, temperature=0.1, backend=backend)
        into += [loss.detach(), torch.autograd.grad(loss, a)[0]]
    for ours, truth in zip(found, expected, strict=True):
        assert error(ours, truth) <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [2.0**11, 2.0**12, 2.0**13])
def test_scores_that_are_few_numbers_apart(gpu_backend, dtype, size):
    """From 2^24 to 2^28 every 2nd to 16th is an fp32 number: a shift that lags behind by 8 has no room for a bias of 7.

    Scores, in log2, rise by 8 from time to time, however the tiles of keys are split.
    """
    anchors = torch.tensor([[2 * size, 1.0, 0.0], [2 * size, 0.5, 1.0]]).to(dtype)
    steps = torch.arange(2048) // 1024 * 8.0
    keys = torch.stack([torch.full_like(steps, size), steps, torch.zeros_like(steps)], dim=1)
    keys = torch.cat([keys, torch.tensor([[0.0, 0.0, 1.0]])]).to(dtype)
    labels = torch.zeros(2).int(), torch.cat([torch.ones(2048), torch.zeros(1)]).int()
    found, expected = [], []
    for backend, into, kind in ((gpu_backend, found, dtype), ("reference", expected, torch.float64)):
        rows = anchors.to(kind, copy=True).requires_grad_()
        loss = infonce(
            rows, labels[0], keys.to(kind), labels[1], temperature=math.log2(math.e), backend=backend
        )
        into += [loss.detach(), torch.autograd.grad(loss, rows)[0]]
    for ours, truth in zip(found, expected, strict=True):
        assert error(ours, truth) <= 2e-3


@pytest.mark.parametrize("size", [1e-20, 1e15])
def test_tiny_and_huge_rows(gpu_backend, size):
    rows, labels = torch.nn.functional.normalize(torch.randn(20, 8), dim=1), torch.arange(20) % 3
    loss, expected = (
        infonce(rows.to(dtype) * size, labels, rows.to(dtype) * size, labels, temperature=0.1, backend=name)
        for name, dtype in ((gpu_backend, torch.float32), ("reference", torch.float64))
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
