"""`infonce`: the definition in loops, empty sets, memory and layouts, bad input, and what must not leak into a row.

Its accuracy is tested in `test_infonce_accuracy.py`, its CPU kernels in `test_infonce_cpu.py`, and its CUDA kernels in
`test_infonce_tiles.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext import backends, infonce
from pixcontrast_ext.backends import reference
from pixcontrast_ext.ops.infonce import mean_of
from tests.support import oracle
from tests.support.checks import error
from tests.support.contrast import run
from tests.support.inputs import BANK, BLOCKS, RANDOM, draw_rows

# The specification


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("shape", [(9, 13, 3, 3), (7, 7, 4, 2), (5, 6, 2, 1), (1, 1, 1, 1), (3, 0, 2, 2)])
def test_reference_is_the_definition(shape, exclude_self):
    anchors, anchor_labels, keys, key_labels = draw_rows(*shape, dtype=torch.float64)
    loss, count = reference.infonce_per_anchor(anchors, anchor_labels, keys, key_labels, 0.2, exclude_self)
    expected, expected_count = oracle.infonce(anchors, anchor_labels, keys, key_labels, 0.2, exclude_self)
    assert count.tolist() == expected_count
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("classes", [3, 1])
def test_gradcheck_in_double(classes, exclude_self):
    anchors, anchor_labels, keys, key_labels = draw_rows(6, 8, 3, classes, dtype=torch.float64)
    anchors.requires_grad_(), keys.requires_grad_()

    def by_autograd(a, k):
        return reference.infonce_per_anchor(a, anchor_labels, k, key_labels, 0.3, exclude_self)[0]

    def by_equations(a, k):
        settings = dict(temperature=0.3, exclude_self=exclude_self, reduction="none", backend="reference")
        return infonce(a, anchor_labels, k, key_labels, **settings)

    def in_batch(a):
        settings = dict(temperature=0.3, exclude_self=exclude_self, reduction="none", backend="reference")
        return infonce(a, anchor_labels, a, anchor_labels, **settings)

    assert torch.autograd.gradcheck(by_autograd, (anchors, keys))
    assert torch.autograd.gradcheck(by_equations, (anchors, keys))
    assert torch.autograd.gradcheck(in_batch, (anchors,))


# Reduction and empty sets


def test_mean_is_over_anchors_with_a_positive(backend):
    inputs = draw_rows(50, 60, 8, 30)
    loss, _, _ = run(inputs, backend)
    _, anchor_labels, _, key_labels = inputs
    has_positive = torch.tensor([y >= 0 and y in key_labels.tolist() for y in anchor_labels.tolist()])
    mean = infonce(*inputs, temperature=0.1, backend=backend)
    assert 0 < has_positive.sum() < 50
    torch.testing.assert_close(mean, loss[has_positive].mean())
    assert (loss[~has_positive] == 0).all()


@pytest.mark.parametrize(
    "labels",
    [
        ([-1, -1, -1], [0, 1]),  # no anchor
        ([0, 1, 2], [-1, -1]),  # no key
        ([0, 0, 1], [2, 2]),  # no positive
        ([], [0, 1]),
        ([0, 1, 2], []),
        ([], []),
    ],
)
def test_nothing_to_contrast_is_a_differentiable_zero(backend, poison, labels):
    anchor_labels, key_labels = (torch.tensor(x, dtype=torch.int64) for x in labels)
    anchors, keys = (torch.randn(len(x), 5, requires_grad=True) for x in labels)
    loss = infonce(anchors, anchor_labels, keys, key_labels, temperature=0.1, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert (anchors.grad == 0).all()
    assert (keys.grad == 0).all()


def test_one_class_only_has_loss_zero(backend, poison):
    """Without negatives every positive has probability 1."""
    anchors, keys = (torch.randn(n, 5, requires_grad=True) for n in (4, 700))
    labels = [torch.zeros(n, dtype=torch.int64) for n in (4, 700)]
    loss = infonce(anchors, labels[0], keys, labels[1], temperature=0.1, reduction="none", backend=backend)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (anchors.grad == 0).all()
    assert (keys.grad == 0).all()


def test_anchor_alone_with_itself_has_no_positive(backend):
    anchors = torch.randn(3, 4, requires_grad=True)
    labels = torch.tensor([0, 1, 2])
    loss = infonce(anchors, labels, anchors, labels, temperature=0.1, exclude_self=True, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert (anchors.grad == 0).all()


# What must not leak


@pytest.mark.parametrize("order", [BANK, RANDOM, BLOCKS])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_without_a_label_may_hold_anything(backend, order, value):
    inputs = draw_rows(130, 1030, 16, 5, order=order, unlabelled=0.3)
    expected = run(inputs, backend, exclude_self=True)
    anchors, anchor_labels, keys, key_labels = inputs
    anchors, keys = anchors.clone(), keys.clone()
    anchors[anchor_labels < 0] = value
    keys[key_labels < 0] = value
    found = run((anchors, anchor_labels, keys, key_labels), backend, exclude_self=True)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda m, i=index: f"output {i}: {m}")
    assert (found[1][anchor_labels < 0] == 0).all()
    assert (found[2][key_labels < 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_any_negative_label_is_none(backend, poison, dtype):
    anchors, anchor_labels, keys, key_labels = draw_rows(150, 300, 16, 4, unlabelled=0.3)
    expected = run((anchors, anchor_labels, keys, key_labels), backend)

    def scattered(labels):
        return torch.where(labels < 0, torch.randint(-128, 0, labels.shape), labels).to(dtype)

    found = run((anchors, scattered(anchor_labels), keys, scattered(key_labels)), backend)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_nan_propagates(backend):
    for side in (0, 2):
        inputs = draw_rows(30, 600, 16, 5, unlabelled=0.0)
        inputs[side][3, 2] = math.nan
        loss, _, _ = run(inputs, backend)
        assert loss[3 if side == 0 else slice(None)].isnan().all()


@pytest.mark.parametrize("num_keys", [1, 17, 33, 65, 97, 513])
def test_nan_propagates_from_the_last_negative(backend, num_keys):
    """A NaN alone in its tile: a maximum that ignores NaN would find no negative there."""
    anchors, anchor_labels, keys, key_labels = draw_rows(30, num_keys + 1, 16, 5, unlabelled=0.0)
    anchor_labels[:], key_labels[:], key_labels[-1] = 0, 0, 1
    keys[-1] = math.nan
    loss, grad, _ = run((anchors, anchor_labels, keys, key_labels), backend)
    assert loss.isnan().all()
    assert grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("labels", [[1, 1, 2], [0, 0, 1], [1, 1, 2, -1], [0, 0, 1, -1]])
def test_in_batch_padding_has_no_part_in_steep_gradients(backend, dtype, labels):
    """All negatives score far below 0, so padding that scores 0 because it has no label would be far above them."""
    angles = torch.tensor([0.0, 2.1, 4.2, 0.0])[: len(labels)]
    anchors = (8 * torch.stack([angles.cos(), angles.sin()], 1)).to(dtype).requires_grad_()
    labels = torch.tensor(labels)
    loss = infonce(
        anchors,
        labels,
        anchors,
        labels,
        temperature=0.07,
        exclude_self=True,
        reduction="none",
        backend=backend,
    )
    loss.sum().backward()
    truth = anchors.detach().double().requires_grad_()
    expected, _ = reference.infonce_per_anchor(truth, labels, truth, labels, 0.07, True)
    expected.sum().backward()
    assert error(loss.detach(), expected.detach()) <= 1e-5
    assert error(anchors.grad, truth.grad) <= (1e-4 if dtype == torch.float32 else 1e-2)


def test_inf_gives_no_finite_loss(backend):
    inputs = draw_rows(30, 600, 16, 5, unlabelled=0.0)
    inputs[0][3] = math.inf
    loss, _, _ = run(inputs, backend)
    assert not loss[3].isfinite()
    assert loss[4].isfinite()


# Memory and layout


def test_non_contiguous_inputs(backend):
    anchors, anchor_labels, keys, key_labels = draw_rows(60, 300, 24, 4)
    expected = run((anchors, anchor_labels, keys, key_labels), backend)
    strided = (
        anchors.T.contiguous().T,
        anchor_labels.repeat_interleave(2)[::2],
        F.pad(keys, (3, 2, 1, 0))[1:, 3:-2],
        key_labels.repeat_interleave(3)[::3],
    )
    assert not any(x.is_contiguous() for x in strided)
    for a, b in zip(run(strided, backend), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_anchors_in_any_order(backend):
    anchors, anchor_labels, keys, key_labels = draw_rows(200, 600, 24, 9, order=BANK)
    expected = run((anchors, anchor_labels, keys, key_labels), backend)
    shuffle = torch.randperm(200)
    found = run((anchors[shuffle], anchor_labels[shuffle], keys, key_labels), backend)
    torch.testing.assert_close(found[0], expected[0][shuffle])
    torch.testing.assert_close(found[1], expected[1][shuffle])


def test_no_gradient_is_computed_where_none_is_wanted(backend, monkeypatch):
    inputs = draw_rows(20, 50, 8, 3)
    asked = []
    module = backends.get(backend)
    forward = module.infonce_forward
    monkeypatch.setattr(
        module, "infonce_forward", lambda call: (asked.append(call.anchor_grad is not None), forward(call))
    )
    infonce(*inputs, temperature=0.1, backend=backend)
    inputs[0].requires_grad_()
    with torch.no_grad():
        infonce(*inputs, temperature=0.1, backend=backend)
    infonce(*inputs, temperature=0.1, backend=backend)
    assert asked == [False, False, True]


def test_nothing_saved_aliases_the_keys(backend):
    """A training step overwrites the bank between forward and backward."""
    anchors, anchor_labels, keys, key_labels = draw_rows(50, 200, 8, 4)
    gradients = []
    for overwrite in (False, True):
        anchors, bank = anchors.detach().clone().requires_grad_(), keys.clone()
        loss = infonce(anchors, anchor_labels, bank, key_labels, temperature=0.1, backend=backend)
        if overwrite:
            bank.fill_(math.nan)
        loss.backward()
        gradients.append(anchors.grad)
    assert torch.equal(*gradients)


# Bad input

_ROWS = torch.zeros(3, 4)


_LABELS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(anchors=_LABELS), TypeError, "anchors must be a floating-point tensor, got torch.int64"),
        (dict(anchors=[1.0]), TypeError, "anchors must be a floating-point tensor, got list"),
        (dict(keys=torch.zeros(3)), ValueError, r"keys must have shape \[rows, D\] with D >= 1, got \(3,\)"),
        (dict(keys=torch.zeros(3, 5)), ValueError, r"same width, got \(3, 4\) and \(3, 5\)"),
        (dict(keys=torch.zeros(3, 4).half()), TypeError, "one dtype, got torch.float32 and torch.float16"),
        (dict(keys=torch.zeros(3, 4, device="meta")), ValueError, "on one device, got cpu and meta"),
        (
            dict(anchor_labels=torch.zeros(3)),
            TypeError,
            "anchor_labels must be an integer tensor, got torch.float32",
        ),
        (dict(anchor_labels=_LABELS[:2]), ValueError, r"anchor_labels must have shape \(3,\), got \(2,\)"),
        (dict(key_labels=_LABELS[None]), ValueError, r"key_labels must have shape \(3,\), got \(1, 3\)"),
        (dict(temperature=0), ValueError, "temperature must be positive and finite, got 0"),
        (dict(temperature=-0.1), ValueError, "temperature must be positive and finite, got -0.1"),
        (dict(temperature=math.nan), ValueError, "temperature must be positive and finite, got nan"),
        (dict(temperature=math.inf), ValueError, "temperature must be positive and finite, got inf"),
        (dict(temperature="hot"), TypeError, "temperature must be an int or a float, got 'hot'"),
        (dict(reduction="sum"), ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
    ],
)
def test_bad_input(backend, change, kind, message):
    arguments = dict(
        anchors=_ROWS, anchor_labels=_LABELS, keys=_ROWS, key_labels=_LABELS, temperature=0.1, backend=backend
    )
    with pytest.raises(kind, match=message):
        infonce(**(arguments | change))


def test_a_gpu_takes_rows_of_up_to_512_channels(gpu_backend):
    rows, labels = torch.randn(4, 513), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="InfoNCE kernels take up to 512 channels, got 513"):
        infonce(rows, labels, rows, labels, temperature=0.1, backend=gpu_backend)
    loss = infonce(
        rows[:, :512], labels, rows[:, :512].clone(), labels, temperature=10.0, backend=gpu_backend
    )
    assert loss.isfinite()


def test_labels_beyond_int32_do_not_wrap(backend):
    huge = torch.tensor([0, 2**32, 1])
    with pytest.raises(ValueError, match="key_labels must fit int32, got 4294967296"):
        infonce(_ROWS, _LABELS, _ROWS.clone(), huge, temperature=0.1, backend=backend)
    negative = infonce(_ROWS, _LABELS, _ROWS.clone(), huge - 2**33, temperature=0.1, backend=backend)
    assert negative == 0  # a label far below 0 is not a class either


def test_a_label_below_minus_one_is_none(backend):
    """In any integer dtype; of anchors as of keys, and with a gradient."""
    anchors, anchor_labels, keys, key_labels = draw_rows(70, 300, 24, 4)
    anchor_labels[::5] = key_labels[::7] = -1
    odd = torch.tensor([-2, -100, -128])
    results = []
    for dtype in (None, torch.int32, torch.int8):
        rows = [x.clone().requires_grad_() for x in (anchors, keys)]
        labels = [anchor_labels, key_labels]
        if dtype is not None:
            labels = [torch.where(x < 0, odd[torch.arange(len(x)) % 3], x).to(dtype) for x in labels]
        loss = infonce(
            rows[0], labels[0], rows[1], labels[1], temperature=0.1, reduction="none", backend=backend
        )
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), rows)])
    for found in results[1:]:
        for ours, theirs in zip(found, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_double_needs_the_reference():
    rows = torch.zeros(3, 4, dtype=torch.float64)
    assert infonce(rows, _LABELS, rows.clone(), _LABELS, temperature=0.1).dtype == torch.float64
    with pytest.raises(
        ValueError, match=r"backend 'cpu' cannot serve infonce on cpu tensors of torch\.float64"
    ):
        infonce(rows, _LABELS, rows.clone(), _LABELS, temperature=0.1, backend="cpu")


def test_differentiating_twice_is_refused(backend):
    inputs = draw_rows(20, 50, 8, 3)
    anchors = inputs[0].requires_grad_()
    loss = infonce(*inputs, temperature=0.1, backend=backend)
    (grad,) = torch.autograd.grad(loss, anchors, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        (grad.square().sum() + anchors.sum()).backward()


def test_weighted_mean(backend):
    """Of the anchors that have a positive: the last has none, and its weight is in neither sum."""
    anchors, keys = (
        F.normalize(torch.randn(5, 8), dim=1).requires_grad_(),
        F.normalize(torch.randn(9, 8), dim=1),
    )
    labels = torch.tensor([0, 1, 2, 0, 7]), torch.arange(9) % 3
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 9.0])
    each = infonce(anchors, labels[0], keys, labels[1], temperature=0.1, reduction="none", backend=backend)
    found = infonce(
        anchors, labels[0], keys, labels[1], temperature=0.1, anchor_weights=weights, backend=backend
    )
    assert torch.allclose(found, (each[:4] * weights[:4]).sum() / 3.5)
    (grad,) = torch.autograd.grad(found, anchors)
    assert (grad.abs().sum(dim=1) > 0).tolist() == [True, False, True, True, False]
    nothing = infonce(
        anchors, labels[0], keys, labels[1], temperature=0.1, anchor_weights=weights * 0, backend=backend
    )
    assert nothing == 0


def test_an_anchor_of_no_weight_may_hold_anything(backend):
    anchors, keys = F.normalize(torch.randn(4, 8), dim=1), F.normalize(torch.randn(9, 8), dim=1)
    labels, weights = (torch.arange(4) % 2, torch.arange(9) % 3), torch.tensor([1.0, 0.0, 2.0, 1.0])

    def grad_of(anchors):
        anchors.requires_grad_()
        found = infonce(
            anchors, labels[0], keys, labels[1], temperature=0.1, anchor_weights=weights, backend=backend
        )
        return torch.autograd.grad(found, anchors)[0]

    expected = grad_of(anchors.clone())
    anchors[1] = math.nan
    assert torch.equal(grad_of(anchors), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-60, 1e-30, 1.0, 1e37, 1e60])
def test_the_scale_of_weights_does_not_matter(dtype, scale):
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=dtype) * scale
    if not weights.isfinite().all() or weights.amax() == 0:
        pytest.skip("it is beyond the dtype")
    each, positives = torch.tensor([1.0, 2.0, math.nan, 4.0], dtype=dtype), torch.tensor([1, 3, 2, 0])
    assert mean_of(each, positives, weights).item() == pytest.approx(2 / 1.5, rel=1e-6)


def test_weights_that_nobody_has_looked_at():
    """On a GPU and in a graph: what is no weight counts as none, and an infinite one alone."""
    each, positives = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3).int()
    for weights, expected in (
        ([math.nan, 1.0, 1.0], 3.0),
        ([-4.0, 1.0, 1.0], 3.0),
        ([1.0, math.inf, 1.0], 2.0),
        ([-1.0, 0.0, math.nan], 0.0),
    ):
        assert mean_of(each, positives, torch.tensor(weights)).item() == expected
    assert mean_of(each[:0], positives[:0], each[:0]).item() == 0


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.tensor([1.0, -0.5]), ValueError, r"anchor_weights\[1\] is -0.5, expected 0 <= weight < inf"),
        (torch.tensor([math.nan, 1.0]), ValueError, r"anchor_weights\[0\] is nan"),
        (torch.tensor([1.0]), ValueError, r"anchor_weights must have shape \(2,\), got \(1,\)"),
        (torch.tensor([1, 1]), TypeError, "anchor_weights must be a floating-point tensor, got torch.int64"),
        ([1.0, 1.0], TypeError, "anchor_weights must be a floating-point tensor, got list"),
    ],
)
def test_weights_that_are_none(weights, error, message):
    rows, labels = torch.eye(2), torch.tensor([0, 1])
    with pytest.raises(error, match=message):
        infonce(rows, labels, rows, labels, temperature=0.1, anchor_weights=weights)
    with pytest.raises(ValueError, match="anchor_weights weight the mean, got reduction='none'"):
        infonce(rows, labels, rows, labels, temperature=0.1, reduction="none", anchor_weights=torch.ones(2))
