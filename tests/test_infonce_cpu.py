"""The CPU kernels of `infonce`: every instruction set, the fused forward, threads, tiles of keys."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext import infonce
from pixcontrast_ext.backends import native, reference
from pixcontrast_ext.backends.cpu import infonce as on_cpu
from tests.support.checks import error
from tests.support.contrast import exact, fused_dtype, run, weight_rounding
from tests.support.inputs import BANK, BLOCKS, RANDOM, draw_rows


@pytest.mark.parametrize("shape", [(3, 5, 7, 2), (300, 2011, 65, 7), (65, 513, 257, 1)])
def test_every_instruction_set(instruction_set, poison, shape):
    for order in (BANK, RANDOM):
        inputs = draw_rows(*shape, order=order)
        found, expected = run(inputs, "cpu", exclude_self=True), exact(inputs, exclude_self=True)
        for index, bar in enumerate((1e-6, 2e-6, 2e-6)):
            assert error(found[index], expected[index]) <= bar


# In the fused kernels a block has 12 anchors, a panel 32 keys or channels, a word 2 channels of bf16.
FUSED_SHAPES = [
    (1, 1, 3, 2), (5, 7, 31, 3), (13, 33, 33, 2), (100, 1000, 257, 5), (1030, 600, 48, 19), (60, 2500, 2, 7)
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", FUSED_SHAPES)
def test_own_products_of_every_instruction_set(instruction_set, poison, shape, dtype):
    """Ragged in every dimension. Rows without a label hold NaN, which must not leak through a masked lane."""
    for order, temperature, exclude_self in ((BANK, 0.07, False), (RANDOM, 1.0, True), (BLOCKS, 0.1, True)):
        inputs = draw_rows(*shape, order=order, dtype=dtype)
        anchors, anchor_labels, keys, key_labels = inputs
        loss, expected, _ = exact(inputs, temperature=temperature, exclude_self=exclude_self)
        anchors[anchor_labels < 0], keys[key_labels < 0] = math.nan, math.nan
        arguments = (anchors, anchor_labels.int(), keys, key_labels.int(), temperature, exclude_self)
        found = torch.ops.pixcontrast.infonce_forward(*arguments, True, "cpu")
        assert error(found[0], loss) <= 1e-6
        assert error(found[4], expected) <= 1e-6 + weight_rounding("cpu", dtype)
        without_gradient = torch.ops.pixcontrast.infonce_forward(*arguments, False, "cpu")
        assert all(torch.equal(a, b) for a, b in zip(found[:4], without_gradient[:4], strict=True))


def batch(size, channels, classes, *, dtype=torch.float32, order=RANDOM):
    """Anchors and their labels, some of them -1."""
    return draw_rows(size, 1, channels, classes, order=order, dtype=dtype)[:2]


def with_each_other(anchors, labels, exclude_self, mined=()):
    """Loss, log-sum-exp, S and |P| of anchors with each other, and their gradient for weights of 1 to 2."""
    labels, ops = labels.int(), torch.ops.pixcontrast
    op, negatives = ("mining", (anchors, labels)) if mined else ("infonce", ())
    forward = getattr(ops, f"{op}_forward")
    found = forward(anchors, labels, anchors, labels, *negatives, *mined, 0.1, exclude_self, False, "cpu")[:4]
    grad_scale = torch.linspace(1, 2, len(labels)) / found[3].clamp(min=1)
    backward = getattr(ops, f"{op}_backward_symmetric")
    grad = backward(anchors, labels, *found[1:3], grad_scale, *mined, 0.1, exclude_self, "cpu")
    return *found, grad


# A side of a symmetric tile has 64 anchors. One class, few, and more than there are anchors.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 5, 1), (63, 33, 2), (64, 32, 1), (65, 257, 3), (129, 2, 40), (333, 48, 7), (641, 31, 400)]
)
def test_anchors_with_each_other(instruction_set, poison, shape, dtype):
    for order, exclude_self in ((RANDOM, True), (BANK, False)):
        anchors, labels = batch(*shape, dtype=dtype, order=order)
        leaf = anchors.double().requires_grad_()
        loss, _ = reference.infonce_per_anchor(leaf, labels, leaf, labels, 0.1, exclude_self)
        (expected,) = torch.autograd.grad(loss, leaf, torch.linspace(1, 2, len(labels)).double())
        anchors[labels < 0] = math.nan
        found, *_, grad = with_each_other(anchors, labels, exclude_self)
        assert error(found, loss.detach()) <= 1e-6
        assert error(grad, expected) <= 2e-6 + weight_rounding("cpu", dtype)
        assert not grad[labels < 0].any()


def test_rounded_weights_keep_what_anchors_have_in_common():
    """As below, where the anchors are the keys."""
    anchors = F.normalize(torch.randn(300, 64) + 10 * torch.ones(64), dim=1).bfloat16()
    labels, leaf = torch.randint(0, 5, (300,)), anchors.double().requires_grad_()
    loss, _ = reference.infonce_per_anchor(leaf, labels, leaf, labels, 0.1, True)
    (expected,) = torch.autograd.grad(loss, leaf, torch.linspace(1, 2, 300).double())
    assert error(with_each_other(anchors, labels, True)[-1], expected) <= 1e-3


def test_rounded_weights_keep_what_keys_have_in_common():
    """Before training all embeddings point one way; the gradient is what remains once that direction cancels."""
    anchors, keys = (
        F.normalize(torch.randn(n, 64) + 10 * torch.ones(64), dim=1).bfloat16() for n in (60, 700)
    )
    inputs = anchors, torch.randint(0, 5, (60,)).int(), keys, torch.randint(0, 5, (700,)).int()
    found = torch.ops.pixcontrast.infonce_forward(*inputs, 0.1, False, True, "cpu")
    assert error(found[4], exact(inputs)[1]) <= 1e-3


def test_digits_do_not_fade_with_the_number_of_keys(instruction_set):
    """Keys of a class share a direction, so their sum grows; one chain of additions had an error of 3e-6 here."""
    anchor_labels, key_labels = torch.arange(12) // 4, torch.arange(150_000) // 50_000
    centres = torch.randn(3, 32)
    anchors, keys = (
        F.normalize(centres[labels] + torch.randn(len(labels), 32), dim=1)
        for labels in (anchor_labels, key_labels)
    )
    inputs = anchors, anchor_labels, keys, key_labels
    leaf = anchors.clone().requires_grad_()
    infonce(leaf, *inputs[1:], temperature=0.1, backend="cpu").backward()
    assert error(leaf.grad * len(anchors), exact(inputs)[1]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_products_do_not_depend_on_threads(instruction_set, dtype):
    if fused_dtype(dtype) is None:
        pytest.skip(f"{instruction_set} leaves the products to torch")
    before, results = torch.get_num_threads(), []
    for order in (BANK, RANDOM):
        anchors, anchor_labels, keys, key_labels = draw_rows(150, 1700, 40, 6, order=order, dtype=dtype)
        arguments = (anchors, anchor_labels.int(), keys, key_labels.int(), 0.1, False, True, "cpu")
        try:
            for threads in (
                1,
                2,
                3,
                5,
                40,
            ):  # with up to 4, and two classes for each, a class is one thread's work
                torch.set_num_threads(threads)
                results.append(torch.ops.pixcontrast.infonce_forward(*arguments))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for other in results for a, b in zip(other, results[0], strict=True))
        results.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mined", [False, True])
def test_anchors_with_each_other_do_not_depend_on_threads(instruction_set, dtype, mined):
    if not native.has_fused():
        pytest.skip(f"{instruction_set} leaves the products to torch")
    anchors, labels = batch(400, 40, 6, dtype=dtype)
    kept = (torch.full((400,), -0.05), torch.full((400,), 0.1)) if mined else ()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            results.append(with_each_other(anchors, labels, True, kept))
            sides = anchors, labels.int()
            results[-1] += torch.ops.pixcontrast.mining_counts(*sides, *sides, *sides, True, "cpu")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results for a, b in zip(other, results[0], strict=True))


def test_few_anchors_of_a_class_take_keys_as_they_lie(instruction_set):
    """Up to 16: the next one packs them."""
    for size in (1, 3, 4, 5, 16, 17):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            anchors, keys = draw_rows(size, 700, 37, 1, order=BANK, dtype=dtype)[::2]
            labels = torch.zeros(size, dtype=torch.int32), torch.randint(-1, 3, (700,), dtype=torch.int32)
            keys[labels[1] < 0] = math.nan
            found = torch.ops.pixcontrast.infonce_forward(
                anchors, labels[0], keys, labels[1], 0.1, False, True, "cpu"
            )
            some = labels[1] >= 0
            loss, expected, _ = exact((anchors, labels[0], keys[some], labels[1][some]))
            assert error(found[0], loss) <= 1e-6
            assert error(found[4], expected) <= 1e-6 + weight_rounding("cpu", dtype)


@pytest.mark.whole
def test_few_anchors_in_all_get_the_bits_of_many(instruction_set, poison):
    """Up to 96 anchors multiply fp32 keys as they lie, of tiles without a gap; more pack them first."""
    if fused_dtype(torch.float32) is None:
        pytest.skip(f"{instruction_set} leaves the products to torch")
    for size, classes, order in ((96, 3, BANK), (61, 2, BLOCKS), (96, 19, RANDOM), (17, 1, BANK)):
        anchors, anchor_labels, keys, key_labels = draw_rows(size, 1500, 64, classes, order=order)
        keys[key_labels < 0] = math.nan
        others = F.normalize(torch.randn(200, 64), dim=1)
        many = torch.cat([anchors, others]), torch.cat([anchor_labels, torch.full((200,), classes)])
        outcomes = []
        for rows, labels in ((anchors, anchor_labels), many):
            arguments = (rows, labels.int(), keys, key_labels.int(), 0.1, False, True, "cpu")
            outcomes.append(torch.ops.pixcontrast.infonce_forward(*arguments))
        assert all(torch.equal(few, all_[:size]) for few, all_ in zip(*outcomes, strict=True))


@pytest.mark.whole
def test_few_anchors_in_all_do_not_depend_on_threads(instruction_set):
    """From tile to tile an anchor may be another thread's, and of keys as they lie there is nothing to wait for."""
    if fused_dtype(torch.float32) is None:
        pytest.skip(f"{instruction_set} leaves the products to torch")
    anchors, labels, keys, key_labels = draw_rows(64, 20_000, 32, 19, order=BANK)
    arguments = anchors, labels.int(), keys, key_labels.int(), 0.1, False, True, "cpu"
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, *(2, 3, 4) * 4):
            torch.set_num_threads(threads)
            results.append(torch.ops.pixcontrast.infonce_forward(*arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("in_batch", [False, True])
def test_scores_beyond_all_room_for_a_shift(instruction_set, in_batch):
    """fp32 scores of this size are 128 apart: a product fused with the subtraction of a shift would be off by that."""
    rows = F.normalize(torch.randn(150, 64), dim=1) * 1e4
    labels = torch.arange(150, dtype=torch.int32) % 4
    anchors, anchor_labels = (rows, labels) if in_batch else (rows[:70].clone(), labels[:70].clone())
    found, expected = (
        infonce(
            anchors.to(kind), anchor_labels, anchors.to(kind) if in_batch else rows.to(kind), labels,
            temperature=0.1, reduction="none", exclude_self=in_batch, backend=backend,
        )
        for kind, backend in ((torch.float32, "cpu"), (torch.float64, "reference"))
    )  # fmt: skip
    assert error(found, expected) <= 2e-3
    huge = anchors / 1e4
    huge[3, 2] = 3e38
    loss = with_each_other(huge, anchor_labels, True)[0]
    expected, _ = reference.infonce_per_anchor(
        huge.double(), anchor_labels, huge.double(), anchor_labels, 0.1, True
    )
    finite = loss.isfinite()
    assert (expected > 3.4e38).any()
    assert not finite[expected > 3.4e38].any()
    torch.testing.assert_close(loss[finite].double(), expected[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 1e-6, 1e-12])
def test_equal_scores_are_equal_whatever_their_size(instruction_set, temperature):
    """A positive and n negatives that are one vector give ln(n + 1), however few digits a score has after the point.

    From 17 anchors on: of fewer, rows that are equal may be summed up in different orders.
    """
    if fused_dtype(torch.float32) is None:
        pytest.skip(f"{instruction_set} leaves the products to torch, where equal rows have unequal ones")
    anchors, key = F.normalize(torch.randn(64, 32), dim=1), F.normalize(torch.randn(1, 32), dim=1)
    for n in (1, 3, 100):
        labels = torch.zeros(64, dtype=torch.int32), (torch.arange(n + 1) > 0).int()
        settings = dict(temperature=temperature, reduction="none", backend="cpu")
        loss = infonce(anchors, labels[0], key.repeat(n + 1, 1), labels[1], **settings)
        torch.testing.assert_close(loss, torch.full((64,), math.log(n + 1)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_anchors_with_each_other_hide_nothing(instruction_set, value):
    """A non-finite anchor in the first and last places of panels and sides must show in the loss of all others."""
    for at in (0, 31, 32, 63, 64, 129):
        anchors, labels = batch(130, 16, 5)
        labels = labels.clamp(min=0)
        anchors[at, 15] = value
        found = with_each_other(anchors, labels, False)[0]
        meets = anchors[:, 15] > 0 if value == math.inf else torch.ones(130, dtype=torch.bool)
        assert not found[meets & (labels != labels[at])].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_own_products_hide_nothing(instruction_set, dtype, value):
    """A non-finite key in the first and last places of panels and tiles must show in the loss."""
    for at in (0, 31, 32, 511, 512, 1029):
        anchors, anchor_labels, keys, key_labels = draw_rows(30, 1030, 16, 5, dtype=dtype, unlabelled=0.0)
        keys[at, 15] = value
        settings = dict(temperature=0.1, reduction="none", backend="cpu")
        loss = infonce(anchors, anchor_labels, keys, key_labels, **settings)
        meets = anchors[:, 15] > 0 if value == math.inf else torch.ones(30, dtype=torch.bool)
        assert not loss[meets & (anchor_labels != key_labels[at])].isfinite().any()


def test_repeats_bit_for_bit(poison):
    for order, in_batch in ((BANK, False), (RANDOM, False), (RANDOM, True)):
        inputs = draw_rows(150, 700, 40, 7, order=order)
        if in_batch:
            inputs = (inputs[0], inputs[1], inputs[0], inputs[1])
        first = run(inputs, "cpu", exclude_self=in_batch)
        for _ in range(100):
            again = run(inputs, "cpu", exclude_self=in_batch)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_own_loops_do_not_depend_on_threads():
    scores = torch.randn(64, 301)
    results = []
    for threads in (1, 2, 5):
        weights, shift, total = scores.clone(), torch.full((64,), -math.inf), torch.zeros(64)
        torch.manual_seed(0)
        output = torch.randn(64, 9)
        native.launch(
            "infonce_negatives", scores=weights, num_rows=64, num_keys=301, anchor_labels=torch.arange(64).int() % 4,
            key_labels=torch.arange(301).int() % 4, neg_min=None, scale=3.0, shift=shift, sum=total, output=output,
            channels=9, threads=threads,
        )  # fmt: skip
        results.append((weights, shift, total, output))
    assert all(torch.equal(a, b) for found in results for a, b in zip(found, results[0], strict=True))


@pytest.mark.slow
def test_more_than_2_31_products():
    """Cuts so many keys into tiles that K x D exceeds 2^31."""
    keys = torch.zeros(1, 4).expand(2**29 + 5, 4)  # contiguous copies of it would take 8 GiB
    labels = torch.zeros(1, dtype=torch.int32).expand(2**29 + 5)
    assert keys.numel() > 2**31
    tiles, count = torch.empty(2**21, 3, dtype=torch.int64), torch.empty((), dtype=torch.int64)
    native.launch(
        "plan_tiles", key_labels=labels.contiguous(), num_keys=labels.shape[0], max_keys=512, tiles=tiles,
        capacity=tiles.shape[0], num_tiles=count,
    )  # fmt: skip
    assert tiles[: int(count), 1].sum() == labels.shape[0]
    assert tiles[int(count) - 1, 0] > 2**29 - 512
    last = tiles[int(count) - 1]
    assert last[0] + last[1] == labels.shape[0]


@pytest.mark.parametrize("order", [BANK, RANDOM, BLOCKS])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 5000])
def test_tiles_hold_every_labelled_key_once(order, size):
    _, _, keys, key_labels = draw_rows(1, size, 4, 6, order=order)
    tiles = on_cpu._Keys(keys, key_labels.int()).tiles
    seen = torch.zeros(size, dtype=torch.int64)
    for first, count, label in tiles:
        assert 0 < count <= on_cpu.BLOCK_K
        seen[first : first + count] += 1
        if label >= 0:
            assert (key_labels[first : first + count] == label).all()
    assert (seen[key_labels >= 0] == 1).all()
    assert (seen <= 1).all()
