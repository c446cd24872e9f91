"""The CUDA kernels of `infonce`: tiles of every width and device, splits of the keys, and difficult fp32 rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext.backends import cuda, native, reference, splits
from pixcontrast_ext.backends import device as devices
from tests.support.backends import GPU_BACKENDS, ON_DEVICE
from tests.support.checks import error
from tests.support.contrast import exact, run, weight_rounding
from tests.support.inputs import BANK, BLOCKS, draw_rows


@pytest.mark.skipif("cuda" not in GPU_BACKENDS, reason="PIXCONTRAST_TEST_BACKENDS leaves cuda out")
@pytest.mark.skipif(ON_DEVICE, reason="a device rounds its sums as it does")
@pytest.mark.parametrize(
    ("dtype", "precision", "num_keys", "bar"),
    [(torch.bfloat16, "highest", 400_000, 1e-4), (torch.float32, "high", 300_000, 2.5e-4)],
)
def test_sums_that_are_cut_off_do_not_add_up_over_a_long_walk(monkeypatch, dtype, precision, num_keys, bar):
    """With the splits of 16,384 anchors on an H100; a single block would fall short by 2.4e-4 and 4e-4."""
    monkeypatch.setenv("PXC_EMULATOR_SUMS", "truncated")
    shares = splits.choose
    monkeypatch.setattr(
        splits, "choose", lambda rows, columns, slots, of_tile: shares(256, columns, 264, of_tile)
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


@pytest.mark.skipif("cuda" not in GPU_BACKENDS, reason="PIXCONTRAST_TEST_BACKENDS leaves cuda out")
@pytest.mark.parametrize("count", [31, 32, 47, 128])
def test_teams_share_the_splits_of_an_anchor(poison, monkeypatch, count):
    """The finish has up to 8 teams of threads, one per 16 splits; 257 channels are more than a team adds at once."""
    monkeypatch.setattr(splits, "choose", lambda rows, columns, *_: min(count, columns))
    inputs = draw_rows(3, 9000, 257, 2, unlabelled=0)
    inputs[1][-1] = -1
    found = [run(inputs, "cuda")[1] for _ in range(2)]
    assert torch.equal(*found)
    assert not found[0][-1].any()
    assert error(found[0], exact(inputs)[1]) <= 1e-6


def rows_of_kind(kind: str, a: int, k: int, d: int, classes: int):
    """fp32 rows that are difficult in different ways, and a temperature that suits their lengths."""
    anchors, anchor_labels, keys, key_labels = draw_rows(a, k, d, classes)
    scale = 1.0
    if kind == "clustered":
        centres = F.normalize(torch.randn(classes + 1, d), dim=1)  # the last is for rows without a label
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
    """The error meets the usual fp32 bars, or that of plain fp32 where the rows allow no fp32 result to meet them."""
    monkeypatch.setenv("PXC_EMULATOR_SUMS", sums)
    inputs, temperature = rows_of_kind(kind, 150, 1200, 200, 5)
    settings = dict(temperature=temperature, exclude_self=False, weights=torch.randn(150))
    found, expected = run(inputs, cuda_backend, **settings), exact(inputs, **settings)
    plain = run(inputs, "reference", **settings)
    # Clusters leave losses of 4e-3, so the last bit of a score of 14 is a relative error of 1e-6.
    for index, bar in enumerate((2e-6 if kind == "clustered" else 1e-6, 2e-6, 2e-6)):
        assert error(found[index], expected[index]) <= max(bar, error(plain[index], expected[index]))


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize(
    ("of_anchors", "of_keys"),
    [(0, 0), (6, 0), (7, 0), (-8, 0), (-9, -9), (0, -60), (-100, 0), (90, -30), (90, 30), (-140, 60)],
)
def test_fp32_rows_of_any_length(cuda_backend, poison, precision, of_anchors, of_keys):
    """A power of two on either side changes only the temperature and the scale of the gradient."""
    anchors, anchor_labels, keys, key_labels = draw_rows(40, 90, 33, 3)
    anchors[:, 0] = 1.0  # the largest value, so the power of two is known
    expected = exact((anchors, anchor_labels, keys, key_labels), temperature=0.5, exclude_self=False)
    scales = math.ldexp(1.0, of_anchors), math.ldexp(1.0, of_keys)
    inputs = ((anchors.double() * scales[0]).float(), anchor_labels, keys * scales[1], key_labels)
    if of_anchors < -126:  # subnormal inputs have already lost digits
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
    if of_anchors >= -126:  # below that fp32 cannot hold it
        assert error(grad.double() * scales[0], expected[1]) <= (2e-6 if precision == "highest" else 1e-3)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 3e38])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_what_is_not_finite_stays_in_its_class_and_row(cuda_backend, poison, precision, bad):
    """A bad row with an ignored label changes nothing; with any other label it never gives a finite, wrong loss."""
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


@pytest.mark.skipif("cuda" not in GPU_BACKENDS or ON_DEVICE, reason="it asks the emulated kernels")
@pytest.mark.parametrize("shared", [100, 164, 228])
def test_both_passes_know_labels_by_the_same_pieces(monkeypatch, shared):
    monkeypatch.setenv("PXC_EMULATOR_SHARED", str(shared))
    kernels = devices.gpu.kernels
    for dtype, full_float32 in ((0, False), (0, True), (1, True), (2, True)):
        for channels in range(64 if dtype == 0 else 8, 513, 64 if dtype == 0 else 8):
            for num_anchors in (64, 65):
                how = 0, dtype, full_float32, channels
                tiles = [
                    kernels.infonce_negatives_tile(*how, num_anchors, 1000),
                    kernels.infonce_positives_tile(*how),
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
    """Tiles with pieces of one class, of several, without any label, and past the last key."""
    monkeypatch.setenv("PXC_EMULATOR_SHARED", str(shared))
    # Uncached, because the device changes; and with one block, which then walks over several tiles.
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
        if other is anchors:  # the forward's gradient is that of the anchors as anchors only
            leaf = clean[0].double().requires_grad_()
            terms, _ = reference.infonce_per_anchor(leaf, clean[1], clean[2].double(), clean[3], 0.1, True)
            (expected_grad,) = torch.autograd.grad(terms.sum(), leaf)
        assert error(loss, expected) <= 1e-6
        assert error(grad, expected_grad) <= weight_rounding("cuda", dtype)
