"""`infonce`: the definition in loops, accuracy against fp64, memory and layouts, and what must not leak into a row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext import backends, infonce
from pixcontrast_ext.backends import cuda, native, reference, splits
from pixcontrast_ext.backends import device as devices
from pixcontrast_ext.backends.cpu import infonce as on_cpu
from tests.support import oracle
from tests.support.backends import GPU_BACKENDS, ON_DEVICE
from tests.support.checks import error
from tests.support.inputs import BANK, BLOCKS, RANDOM, draw_rows


def run(inputs, backend, *, temperature=0.1, exclude_self=False, weights=None):
    """Loss per anchor and both gradients."""
    anchors, anchor_labels, keys, key_labels = inputs
    anchors, keys = anchors.clone().requires_grad_(), keys.clone().requires_grad_()
    loss = infonce(
        anchors, anchor_labels, keys, key_labels,
        temperature=temperature, exclude_self=exclude_self, reduction="none", backend=backend,
    )  # fmt: skip
    loss.backward(torch.ones_like(loss) if weights is None else weights.to(loss.dtype))
    return loss.detach(), anchors.grad, keys.grad


def exact(inputs, *, temperature=0.1, exclude_self=False, weights=None):
    """The same in fp64, by autograd of eq. (1) to (3)."""
    anchors, anchor_labels, keys, key_labels = inputs
    anchors, keys = anchors.double().requires_grad_(), keys.double().requires_grad_()
    loss, _ = reference.infonce_per_anchor(
        anchors, anchor_labels, keys, key_labels, temperature, exclude_self
    )
    loss.backward(torch.ones_like(loss) if weights is None else weights.double())
    return loss.detach(), anchors.grad, keys.grad


def weight_rounding(backend, dtype):
    """What a backend that rounds the weights of its second product may add to the anchors' gradient."""
    if dtype == torch.float32:
        return 1e-6
    on_bf16_words = backend == "cpu" and native.fused_dtype(dtype) == torch.bfloat16
    return 1e-3 if on_bf16_words or backend in GPU_BACKENDS else 1e-6


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


# Accuracy


@pytest.mark.skipif("cuda" not in GPU_BACKENDS, reason="PIXCONTRAST_TEST_BACKENDS leaves cuda out")
@pytest.mark.skipif(ON_DEVICE, reason="a device rounds its sums as it does")
@pytest.mark.parametrize(
    ("dtype", "precision", "num_keys", "bar"),
    [(torch.bfloat16, "highest", 1_000_000, 1e-4), (torch.float32, "high", 300_000, 2.5e-4)],
)
def test_sums_that_are_cut_off_do_not_add_up_over_a_long_walk(monkeypatch, dtype, precision, num_keys, bar):
    """As 16,384 anchors share out the walk on an H100: one block alone would fall short by 6e-4 and 4e-4."""
    monkeypatch.setenv("PXC_EMULATOR_SUMS", "truncated")
    shares = splits.splits
    monkeypatch.setattr(
        splits, "splits", lambda rows, columns, slots, of_tile: shares(256, columns, 264, of_tile)
    )
    anchors, _, keys, _ = inputs = draw_rows(16, num_keys, 16, 1, dtype=dtype, unlabelled=0)
    inputs[3][100:] = 1
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        labels = [inputs[i].int() for i in (1, 3)]
        loss, *_, grad = torch.ops.pixcontrast.infonce_forward(
            anchors, labels[0], keys, labels[1], 1.0, False, True, "cuda"
        )
    finally:
        torch.set_float32_matmul_precision(before)
    exact_anchors = anchors.double().requires_grad_()
    expected, _ = reference.infonce_per_anchor(exact_anchors, inputs[1], keys.double(), inputs[3], 1.0, False)
    expected.sum().backward()
    assert error(loss, expected.detach()) <= 2e-6
    assert error(grad, exact_anchors.grad) <= bar


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_log_sum_exp_of_fewer_keys(backend, dtype):
    """One that is 3.9 lower makes weights of the keys' gradient 49 times as large: fp16 ones overflowed."""
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


@pytest.mark.skipif("cuda" not in GPU_BACKENDS, reason="PIXCONTRAST_TEST_BACKENDS leaves cuda out")
@pytest.mark.parametrize("count", [31, 32, 47, 128])
def test_teams_share_the_splits_of_an_anchor(poison, monkeypatch, count):
    """The finish has a team of threads for 16 splits each, 8 at most; 257 channels are more than a team's at a time."""
    monkeypatch.setattr(splits, "splits", lambda rows, columns, *_: min(count, columns))
    inputs = draw_rows(3, 9000, 257, 2, unlabelled=0)
    inputs[1][-1] = -1
    found = [run(inputs, "cuda")[1] for _ in range(2)]
    assert torch.equal(*found)
    assert not found[0][-1].any()
    assert error(found[0], exact(inputs)[1]) <= 1e-6


# Ragged on purpose: no dimension is a multiple of a tile or of a vector.
SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 7, 2),
    (300, 2011, 65, 7),
    (130, 1500, 33, 171),
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


def rows_of_kind(kind: str, a: int, k: int, d: int, classes: int):
    """fp32 rows that products find hard in different ways, and the temperature that goes with their lengths."""
    anchors, anchor_labels, keys, key_labels = draw_rows(a, k, d, classes)
    scale = 1.0
    if kind == "clustered":
        centres = F.normalize(torch.randn(classes + 1, d), dim=1)  # the last is of those without a label
        anchors = F.normalize(centres[anchor_labels] + 0.3 * anchors, dim=1)
        keys = F.normalize(centres[key_labels] + 0.3 * keys, dim=1)
    elif kind == "near-identical":
        one = F.normalize(torch.randn(1, d), dim=1)
        anchors, keys = (F.normalize(one + 1e-3 * rows, dim=1) for rows in (anchors, keys))
    elif kind == "badly scaled":
        anchors, keys = (rows * 10 ** (6 * torch.rand(len(rows), 1) - 4) for rows in (anchors, keys))
        scale = 1e4
    elif kind == "one channel":
        anchors, keys = (rows * torch.logspace(-6, 0, d) for rows in (anchors, keys))
    return (anchors, anchor_labels, keys, key_labels), 0.07 * scale


KINDS_OF_ROWS = ["random", "clustered", "near-identical", "badly scaled", "one channel"]


@pytest.mark.parametrize("sums", ["nearest", "truncated"])
@pytest.mark.parametrize("kind", KINDS_OF_ROWS)
def test_fp32_accuracy_of_all_kinds_of_rows(cuda_backend, poison, monkeypatch, kind, sums):
    """To the bars of all fp32, or, where the rows let nothing in fp32 be as exact, to what plain fp32 makes of them."""
    monkeypatch.setenv("PXC_EMULATOR_SUMS", sums)
    inputs, temperature = rows_of_kind(kind, 150, 1200, 200, 5)
    settings = dict(temperature=temperature, exclude_self=False, weights=torch.randn(150))
    found, expected = run(inputs, cuda_backend, **settings), exact(inputs, **settings)
    plain = run(inputs, "reference", **settings)
    # Clusters leave losses of 4e-3, of which the last digit of a score of 14 is a part of 1e-6.
    for index, bar in enumerate((2e-6 if kind == "clustered" else 1e-6, 2e-6, 2e-6)):
        assert error(found[index], expected[index]) <= max(bar, error(plain[index], expected[index]))


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("distance", [0.3, 0.1])
def test_fp32_gradients_where_the_losses_are_small(gpu_backend, poison, distance, in_batch):
    """Of classes that have been learnt, with losses down to 1e-5: weights as small keep their digits."""
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


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize(
    ("of_anchors", "of_keys"),
    [(0, 0), (6, 0), (7, 0), (-8, 0), (-9, -9), (0, -60), (-100, 0), (90, -30), (90, 30), (-140, 60)],
)
def test_fp32_rows_of_any_length(cuda_backend, poison, precision, of_anchors, of_keys):
    """A power of two on either side changes nothing but the temperature and the unit of the gradient."""
    anchors, anchor_labels, keys, key_labels = draw_rows(40, 90, 33, 3)
    anchors[:, 0] = 1.0  # the largest, so that the power of two is known
    expected = exact((anchors, anchor_labels, keys, key_labels), temperature=0.5, exclude_self=False)
    scales = math.ldexp(1.0, of_anchors), math.ldexp(1.0, of_keys)
    inputs = ((anchors.double() * scales[0]).float(), anchor_labels, keys * scales[1], key_labels)
    if of_anchors < -126:  # subnormal numbers have lost digits already
        expected = exact(inputs, temperature=0.5 * scales[0] * scales[1], exclude_self=False)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        loss, *_, grad = torch.ops.pixcontrast.infonce_forward(
            inputs[0], anchor_labels.int(), inputs[2], key_labels.int(), 0.5 * scales[0] * scales[1], False, True,
            cuda_backend,
        )  # fmt: skip
    finally:
        torch.set_float32_matmul_precision(before)
    assert error(loss, expected[0]) <= (1e-6 if precision == "highest" else 1e-4)
    if of_anchors >= -126:  # else fp32 does not hold it
        assert error(grad.double() * scales[0], expected[1]) <= (2e-6 if precision == "highest" else 1e-3)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 3e38])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_what_is_not_finite_stays_in_its_class_and_row(cuda_backend, poison, precision, bad):
    """Behind an ignored label it is as if it were not there; behind another, no row is taken for a finite one."""
    inputs = draw_rows(40, 90, 33, 3, unlabelled=0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        inputs[3][7] = -1
        expected = run(inputs, cuda_backend)
        inputs[2][7] = bad
        found = run(inputs, cuda_backend)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        if not math.isfinite(bad):
            inputs[0][3, 5] = bad
            loss = run(inputs, cuda_backend)[0]
            rest = torch.arange(40) != 3
            assert torch.equal(loss[rest], expected[0][rest])
            assert not 0 < loss[3] < 100
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", [(3, 5, 7, 2), (300, 2011, 65, 7), (65, 513, 257, 1)])
def test_every_instruction_set(instruction_set, poison, shape):
    for order in (BANK, RANDOM):
        inputs = draw_rows(*shape, order=order)
        found, expected = run(inputs, "cpu", exclude_self=True), exact(inputs, exclude_self=True)
        for index, bar in enumerate((1e-6, 2e-6, 2e-6)):
            assert error(found[index], expected[index]) <= bar


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [BANK, RANDOM])
def test_half_precision_accuracy(backend, instruction_set, poison, dtype, order):
    """Against fp64 on the same rounded inputs.

    Only the gradient's last rounding, to the input's dtype, may show, and, where products are made in half precision,
    the rounding of the weights of its sum.
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_before_rounding(backend, dtype):
    anchors, anchor_labels, keys, key_labels = draw_rows(200, 900, 64, 5, dtype=dtype)
    inputs = (anchors, anchor_labels.int(), keys, key_labels.int())
    *_, anchor_grad = torch.ops.pixcontrast.infonce_forward(*inputs, 0.1, False, True, backend)
    _, expected, _ = exact(inputs)
    bar = max(2e-6, weight_rounding(backend, dtype))
    assert anchor_grad.dtype == torch.float32
    assert error(anchor_grad, expected) <= bar


@pytest.mark.skipif("cuda" not in GPU_BACKENDS or ON_DEVICE, reason="it asks the emulated kernels")
@pytest.mark.parametrize("shared", [100, 164, 228])
def test_both_passes_know_labels_by_the_same_pieces(monkeypatch, shared):
    monkeypatch.setenv("PXC_EMULATOR_SHARED", str(shared))
    kernels = devices.gpu.kernels
    for dtype, full_float32 in ((0, False), (0, True), (1, True), (2, True)):
        for channels in range(64 if dtype == 0 else 8, 513, 64 if dtype == 0 else 8):
            for num_anchors in (64, 65):
                tiles = [
                    of(0, dtype, full_float32, channels, num_anchors, 1000)
                    for of in (kernels.infonce_negatives_tile, kernels.infonce_positives_tile)
                ]
                assert tiles[0].piece == tiles[1].piece
                assert all(tile.columns % tile.piece == 0 for tile in tiles)


@pytest.mark.skipif("cuda" not in GPU_BACKENDS, reason="PIXCONTRAST_TEST_BACKENDS leaves cuda out")
@pytest.mark.parametrize(
    ("dtype", "channels", "shared", "num_anchors", "tile_of_negatives"),
    [
        *(
            (dtype, *tile)
            for tile in (
                (64, 228, 70, (64, 64)),
                (128, 228, 70, (64, 64)),
                (128, 100, 70, (64, 64)),
                (256, 228, 140, (128, 128)),
                (256, 228, 60, (64, 64)),
                (256, 100, 70, (64, 32)),
                (512, 228, 70, (64, 64)),
                (512, 100, 70, (32, 16)),
                (248, 228, 70, (64, 32)),
            )
            for dtype in (torch.float16, torch.bfloat16)
        ),
        (torch.float32, 64, 228, 70, (64, 32)),
        (torch.float32, 128, 100, 70, (64, 32)),
        (torch.float32, 256, 228, 70, (64, 64)),
        (torch.float32, 256, 100, 70, (32, 16)),
        (torch.float32, 512, 228, 70, (16, 16)),
    ],
)
@pytest.mark.parametrize("order", [BANK, BLOCKS])
def test_tiles_of_every_width_and_device(
    monkeypatch, poison, dtype, channels, shared, num_anchors, tile_of_negatives, order
):
    """Pieces of a tile that are of one class, of several, without any label, and behind the last key."""
    monkeypatch.setenv("PXC_EMULATOR_SHARED", str(shared))
    # It is cached for one device; and one block at a time walks over several tiles.
    monkeypatch.setattr(cuda, "_cut", lambda *how, cut=cuda._cut.__wrapped__: (cut(*how)[0], 1))
    code = native.DTYPE_CODES[dtype]
    if not ON_DEVICE:
        tile = devices.gpu.kernels.infonce_negatives_tile(0, code, True, channels, num_anchors, 999)
        assert (tile.rows, tile.columns) == tile_of_negatives
    anchors, anchor_labels, keys, key_labels = draw_rows(
        num_anchors, 999, channels, 5, order=order, dtype=dtype
    )
    key_labels[64:96] = key_labels[160:224] = -1
    keys[key_labels < 0] = math.nan
    anchors[anchor_labels < 0] = math.nan
    for other, other_labels in ((keys, key_labels), (anchors, anchor_labels)):
        inputs = anchors, anchor_labels.int(), other, other_labels.int()
        clean = anchors.nan_to_num(), anchor_labels, other.nan_to_num(), other_labels
        loss, _, _, _, grad = torch.ops.pixcontrast.infonce_forward(
            *inputs, 0.1, other is anchors, True, "cuda"
        )
        expected, expected_grad, _ = exact(clean, exclude_self=other is anchors)
        if other is anchors:  # of the anchors as anchors only
            leaf = clean[0].double().requires_grad_()
            terms, _ = reference.infonce_per_anchor(leaf, clean[1], clean[2].double(), clean[3], 0.1, True)
            (expected_grad,) = torch.autograd.grad(terms.sum(), leaf)
        assert error(loss, expected) <= 1e-6
        assert error(grad, expected_grad) <= weight_rounding("cuda", dtype)


# Blocks of the fused kernels hold 12 anchors, panels 32 keys or channels, words 2 channels of bf16.
FUSED_SHAPES = [
    (1, 1, 3, 2), (5, 7, 31, 3), (13, 33, 33, 2), (100, 1000, 257, 5), (1030, 600, 48, 19), (60, 2500, 2, 7)
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", FUSED_SHAPES)
def test_own_products_of_every_instruction_set(instruction_set, poison, shape, dtype):
    """Ragged in every dimension; rows without a label hold NaN, which no masked lane may pick up."""
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


def test_rounded_weights_keep_what_keys_have_in_common():
    """Embeddings before training all point one way; the gradient is what is left when that cancels."""
    anchors, keys = (
        F.normalize(torch.randn(n, 64) + 10 * torch.ones(64), dim=1).bfloat16() for n in (60, 700)
    )
    inputs = anchors, torch.randint(0, 5, (60,)).int(), keys, torch.randint(0, 5, (700,)).int()
    found = torch.ops.pixcontrast.infonce_forward(*inputs, 0.1, False, True, "cpu")
    assert error(found[4], exact(inputs)[1]) <= 1e-3


def test_digits_do_not_fade_with_the_number_of_keys(instruction_set):
    """Keys of a class share a direction, so their sum grows: one chain of additions was off by 3e-6 here."""
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
    if native.fused_dtype(dtype) is None:
        pytest.skip(f"{instruction_set} leaves the products to torch")
    before, results = torch.get_num_threads(), []
    for order in (BANK, RANDOM):
        anchors, anchor_labels, keys, key_labels = draw_rows(150, 1700, 40, 4, order=order, dtype=dtype)
        arguments = (anchors, anchor_labels.int(), keys, key_labels.int(), 0.1, False, True, "cpu")
        try:
            for threads in (1, 2, 5, 40):
                torch.set_num_threads(threads)
                results.append(torch.ops.pixcontrast.infonce_forward(*arguments))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for other in results for a, b in zip(other, results[0], strict=True))
        results.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_own_products_hide_nothing(instruction_set, dtype, value):
    """A key that is not finite, first and last of the panels and tiles."""
    for at in (0, 31, 32, 511, 512, 1029):
        anchors, anchor_labels, keys, key_labels = draw_rows(30, 1030, 16, 5, dtype=dtype, unlabelled=0.0)
        keys[at, 15] = value
        settings = dict(temperature=0.1, reduction="none", backend="cpu")
        loss = infonce(anchors, anchor_labels, keys, key_labels, **settings)
        meets = anchors[:, 15] > 0 if value == math.inf else torch.ones(30, dtype=torch.bool)
        assert not loss[meets & (anchor_labels != key_labels[at])].isfinite().any()


@pytest.mark.parametrize("temperature", [1e-3, 0.07, 1.0, 50.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_extreme_logits(backend, temperature, scale):
    """Logits up to 1e6 with embeddings far from unit norm: no overflow, no lost digits beyond fp32's."""
    anchors, anchor_labels, keys, key_labels = draw_rows(40, 300, 24, 3)
    inputs = (anchors * scale, anchor_labels, keys * scale, key_labels)
    found, expected = run(inputs, backend, temperature=temperature), exact(inputs, temperature=temperature)
    logit = scale * scale / temperature
    assert all(x.isfinite().all() for x in found)
    assert error(found[0], expected[0]) <= 1e-6
    # the rounding of a logit is the relative error of its exponential
    assert error(found[1], expected[1]) <= 2e-6 + 1e-6 * logit
    assert error(found[2], expected[2]) <= 2e-6 + 1e-6 * logit


def test_in_batch_uses_symmetry(backend):
    for exclude_self in (True, False):
        anchors, anchor_labels, _, _ = draw_rows(397, 1, 40, 6)
        weights = torch.randn(397)
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


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_reaches_tensor_cores_only(backend, precision):
    """Where it allows TF32, rounded to nearest."""
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
    """PyTorch has an old and a new setting, and refuses to read the old one after a write to the new."""
    inputs, setting = draw_rows(100, 400, 64, 5, dtype=dtype), torch.backends.cuda.matmul
    exactly, before = run(inputs, gpu_backend), setting.fp32_precision
    try:
        setting.fp32_precision = "tf32"
        found = run(inputs, gpu_backend)
    finally:
        setting.fp32_precision = before
    assert torch.equal(found[0], exactly[0]) == (dtype != torch.float32)
    torch.testing.assert_close(found[0], exactly[0], rtol=1e-3, atol=1e-4)


def test_autocast_does_not_reach_the_logits(backend):
    inputs = draw_rows(100, 400, 64, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(inputs, backend)
    assert found[0].dtype == torch.float32
    assert error(found[0], exact(inputs)[0]) <= 1e-6


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
    inputs = draw_rows(200, 1500, 16, 5, order=order, unlabelled=0.3)
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
    anchors, anchor_labels, keys, key_labels = draw_rows(300, 500, 16, 4, unlabelled=0.3)
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
    """Alone in its tile: a maximum that passes over NaN finds no negative there."""
    anchors, anchor_labels, keys, key_labels = draw_rows(30, num_keys + 1, 16, 5, unlabelled=0.0)
    anchor_labels[:], key_labels[:], key_labels[-1] = 0, 0, 1
    keys[-1] = math.nan
    loss, grad, _ = run((anchors, anchor_labels, keys, key_labels), backend)
    assert loss.isnan().all()
    assert grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("labels", [[1, 1, 2], [0, 0, 1], [1, 1, 2, -1], [0, 0, 1, -1]])
def test_in_batch_padding_has_no_part_in_steep_gradients(backend, dtype, labels):
    """All negatives are far below 0, so what has a score of 0 for want of a label is far above them all."""
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
    anchors, anchor_labels, keys, key_labels = draw_rows(400, 900, 24, 9, order=BANK)
    expected = run((anchors, anchor_labels, keys, key_labels), backend)
    shuffle = torch.randperm(400)
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
    """A bank is overwritten between forward and backward."""
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
            key_labels=torch.arange(301).int() % 4, scale=3.0, shift=shift, sum=total, output=output, channels=9,
            threads=threads,
        )  # fmt: skip
        results.append((weights, shift, total, output))
    assert all(torch.equal(a, b) for found in results for a, b in zip(found, results[0], strict=True))


@pytest.mark.slow
def test_more_than_2_31_products():
    """A x K beyond 2^31, and K x D beyond it, on memory that is shared by all rows."""
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


# Tiles


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
        (dict(temperature="hot"), ValueError, "temperature must be positive and finite, got 'hot'"),
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
    assert negative == 0  # far below 0 is no class either


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
