"""Triton's InfoNCE: its tiles, the order of visits, the shift it guesses before the walk, and its sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from pixcontrast_ext import infonce
from pixcontrast_ext.backends import device as devices
from pixcontrast_ext.backends import triton as triton_backend
from pixcontrast_ext.backends.triton import launch, sort
from pixcontrast_ext.backends.triton.infonce import plan, prepare, tiles
from tests.support.backends import BACKENDS, ON_DEVICE, SHARE

if "triton" not in BACKENDS:
    pytest.skip("PIXCONTRAST_TEST_BACKENDS leaves triton out", allow_module_level=True)


@pytest.mark.parametrize("kind", sorted(tiles.TILES))
def test_tiles_fit_each_other(kind):
    """The positives share the negatives' label ranges and prepared rows, so tiles must divide each other."""
    assert max(tiles.TILES[kind]) == triton_backend.MAX_CHANNELS
    for passes in tiles.TILES[kind].values():
        assert passes.negatives.columns % passes.positives.columns == 0
        assert passes.negatives.chunk % passes.positives.chunk == 0
        for tile in passes:
            assert tiles.PADDING % tile.rows == tiles.PADDING % tile.columns == 0


@pytest.mark.parametrize("channels", [50, 128, 200, 384, 512])  # 384: three chunks of 128, padded to four
@pytest.mark.parametrize("arithmetic", ["bf16", "fp16", "high", "highest"])
@pytest.mark.parametrize("major", [8, 9])
def test_every_tile_computes_the_same(monkeypatch, poison, major, arithmetic, channels):
    """Loss and gradients against fp64, with the tiles of each device."""
    monkeypatch.setattr(devices.gpu, "capability", lambda device: (major, 0))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arithmetic, torch.float32)
    rows = [torch.nn.functional.normalize(torch.randn(n, channels), dim=1).to(dtype) for n in (37, 70)]
    anchor_labels, key_labels = (torch.randint(-1, 4, (n,), dtype=torch.int32) for n in (37, 70))
    key_labels = key_labels.sort().values

    def gradients(backend: str, rows: list[Tensor]) -> list[Tensor]:
        anchors, keys = (x.clone().requires_grad_() for x in rows)
        settings = dict(temperature=0.1, exclude_self=True, backend=backend)
        loss = infonce(anchors, anchor_labels, keys, key_labels, **settings)
        in_batch = infonce(anchors, anchor_labels, anchors, anchor_labels, **settings)
        found = torch.autograd.grad(loss, (anchors, keys))
        return [loss.detach(), *found, in_batch.detach(), *torch.autograd.grad(in_batch, anchors)]

    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, "tf32" if arithmetic == "high" else "ieee"
    try:
        found = gradients("triton", rows)
    finally:
        setting.fp32_precision = before
    expected = gradients("reference", [x.double() for x in rows])
    # Includes the rounding of a gradient to its dtype.
    bars = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 4e-3}
    bar = 1e-3 if arithmetic == "high" else bars[dtype]
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.double() - exact).norm() <= bar * exact.norm()


# The order of visits


@pytest.mark.parametrize("count", [1, 300, 2048, 2049, 5000])
def test_anchors_are_sorted_by_label(count):
    labels = torch.tensor([-2, -1, 0, 1, 5, 2**31 - 1], dtype=torch.int32)[torch.randint(0, 6, (count,))]
    found, sorted_labels = sort.sort(labels)
    expected = torch.sort(torch.where(labels < 0, 2**31, labels.long()), stable=True).indices
    assert torch.equal(found.long(), expected)
    assert torch.equal(sorted_labels, labels[expected])


def visits(anchors: int, keys: int, classes: int) -> tuple[float, int]:
    """The largest share of the key tiles that a tile of one class visits, and how many such tiles there are."""
    rows = torch.zeros(anchors, 256, dtype=torch.bfloat16)
    negatives, positives, _ = tiles.passes(rows)
    anchor_labels = torch.randint(0, classes, (anchors,), dtype=torch.int32)
    key_labels = torch.arange(classes, dtype=torch.int32).repeat_interleave(keys // classes)
    ranges = key_labels.new_empty(3, -(-len(key_labels) // negatives.columns))
    sides, _, _ = prepare.prepare(rows, anchor_labels, (rows, key_labels), negatives, ranges)
    found = plan.plan_of(sides.anchor_labels, ranges, positives.rows, 264, 1, 132)
    count = int(found.counts[0])
    labels = sides.anchor_labels[found.class_tiles[:count].long()]
    met = (ranges[0] <= labels[:, None]) & (ranges[1] >= labels[:, None])
    span = torch.stack([row.nonzero().max() - row.nonzero().min() + 1 for row in met])
    assert torch.equal(span, met.sum(1))  # the visited tiles are contiguous
    assert sum(tensor.numel() for tensor in found) <= anchors + 6 * ranges.shape[1] + 5  # linear
    return float(span.max()) / ranges.shape[1], count


def test_positives_visit_their_own_class_only():
    share, count = visits(1024, 190_000, 19)
    assert share <= 0.06
    assert count <= 2 * 19
    share, count = visits(100, 190_000, 19)
    assert share <= 0.06
    assert count <= 19
    share, _ = visits(1024, 150 * 2000, 150)
    assert share <= 0.008


# A shift chosen before the walk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("above", [20.0, 130.0, 1000.0])
@pytest.mark.parametrize("channels", [64, 300])
def test_a_shift_that_did_not_serve_is_mended(dtype, above, channels):
    """One key, which the sample misses, scores `above` powers of two above all others.

    At 300 channels several programs each add up their own channels. None may take a sum that another program has
    already mended for one whose shift was good enough.
    """
    count, one = (800, 700) if channels == 64 else (450, 330)
    anchors = torch.zeros(40, channels)
    anchors[:, 0] = 1
    keys = torch.zeros(count, channels)
    keys[:, 0], keys[:, 1:] = 1.0, torch.randn(count, channels - 1) * 0.1
    keys[one, 0] = 2.0
    temperature = 1.4427 / above
    anchor_labels, key_labels = (
        torch.arange(40, dtype=torch.int32) % 3,
        torch.arange(count, dtype=torch.int32) % 4,
    )
    found, expected = [], []
    for backend, into, rows in (("triton", found, dtype), ("reference", expected, torch.float64)):
        a, k = (x.to(dtype).to(rows).requires_grad_() for x in (anchors, keys))
        loss = infonce(a, anchor_labels, k, key_labels, temperature=temperature, backend=backend)
        into += [loss.detach(), *torch.autograd.grad(loss, (a, k))]
    bar = 1e-5 if dtype == torch.float32 else 1e-2  # all 16-bit weights err alike
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.double() - exact).norm() <= bar * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_shift_far_above_the_rest_loses_nothing(dtype):
    """One key that the sample sees scores 23 powers of two above all others, which make up half of the sum.

    The others' weights are nearly equal, about 2^-8. The two 16-bit parts of a weight together err by up to 2^-25,
    which is 2^-17 of it.
    """
    keys = torch.nn.functional.normalize(torch.cat([torch.ones(8192, 1), torch.randn(8192, 31)], 1), dim=1)
    anchors = torch.zeros(2, 32)
    anchors[:, 0] = 1
    keys[0] = anchors[0]
    keys[1:, 0] = 0.2
    labels, key_labels = torch.tensor([0, 0]), torch.ones(8192, dtype=torch.int64)
    key_labels[-5:] = 0

    def gradient(backend: str, kind: torch.dtype) -> Tensor:
        a = anchors.to(dtype).to(kind).requires_grad_()
        loss = infonce(a, labels, keys.to(dtype).to(kind), key_labels, temperature=0.05, backend=backend)
        return torch.autograd.grad(loss, a)[0].double()

    exact = gradient("reference", torch.float64)
    bar = 2**-17 if dtype == torch.float32 else 1e-3
    assert (gradient("triton", dtype) - exact).norm() <= bar * exact.norm()


def test_programs_beside_each_other_divide_by_their_own_sums():
    """With 300 channels each adds up the scores in its own order, which shows in scores of this size."""
    rows = torch.nn.functional.normalize(torch.randn(300, 300), dim=1) * 100
    labels = torch.arange(300) % 4
    gradients = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        a = rows[:40].to(dtype, copy=True).requires_grad_()
        loss = infonce(a, labels[:40], rows.to(dtype, copy=True), labels, temperature=0.1, backend=backend)
        gradients.append(torch.autograd.grad(loss, a)[0].double())
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("upstream", [float("nan"), 1e30])
def test_anchors_without_a_label_do_not_scale_the_gradient(in_batch, upstream):
    """fp16 weights are scaled by the largest one, which must not come from an anchor without a label."""
    rows = torch.nn.functional.normalize(torch.randn(40, 16), dim=1)
    labels = torch.arange(40, dtype=torch.int32) % 5 - 1
    weight = torch.where(labels < 0, upstream, torch.rand(40) + 0.5)
    gradients = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        a = rows.to(dtype, copy=True).requires_grad_()
        k = a if in_batch else rows.to(dtype, copy=True).requires_grad_()
        settings = dict(temperature=0.1, exclude_self=True, reduction="none", backend=backend)
        loss = infonce(a, labels, k, labels, **settings)
        upstreams = weight if backend == "triton" else torch.where(labels < 0, 0.0, weight)
        gradients.append(torch.autograd.grad(loss, k, upstreams.to(dtype))[0].double())
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


def test_the_largest_label_is_one():
    labels = torch.tensor([2**31 - 1, -1, 3, 2**31 - 1, -1, 3] * 4, dtype=torch.int32)
    rows = torch.nn.functional.normalize(torch.randn(24, 8), dim=1)
    found, expected = [], []
    for backend, into, dtype in (("triton", found, torch.float32), ("reference", expected, torch.float64)):
        for in_batch in (False, True):
            a = rows.to(dtype, copy=True).requires_grad_()
            k = a if in_batch else rows.to(dtype, copy=True).requires_grad_()
            loss = infonce(a, labels, k, labels, exclude_self=True, temperature=0.1, backend=backend)
            into += [loss.detach(), *torch.autograd.grad(loss, (a,) if in_batch else (a, k))]
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_no_anchors_give_keys_no_gradient(poison):
    keys = torch.randn(9, 8, requires_grad=True)
    loss = infonce(
        torch.randn(0, 8),
        torch.zeros(0).long(),
        keys,
        torch.zeros(9).long(),
        temperature=0.1,
        backend="triton",
    )
    assert torch.autograd.grad(loss, keys)[0].abs().max() == 0


def test_sums_tell_whether_a_shift_served(monkeypatch):
    """The second launch of the negatives leaves alone the sums that the first got right."""
    before = launch.start
    changed = []

    def watched(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        if kernel.fn.__name__ != "infonce_fwd_negatives_kernel" or not arguments[7]:
            return before(kernel, grid, *arguments, **options)
        parts = next(argument for argument in arguments if hasattr(argument, "away"))
        again, totals = int(parts.again.sum()), parts.sum.clone()
        before(kernel, grid, *arguments, **options)
        changed.append(again + int((totals != parts.sum).sum()))

    monkeypatch.setattr(launch, "start", watched)
    rows = torch.nn.functional.normalize(torch.randn(3000, 32), dim=1)
    labels = torch.arange(3000, dtype=torch.int32) % 5
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        infonce(rows[:64].to(dtype), labels[:64], rows.to(dtype), labels, temperature=0.1, backend="triton")
    assert changed == [0, 0, 0]
    # Some programs meet no negative while others do; then anchors have none at all.
    halves = (torch.arange(512) >= 256).int()
    for theirs in (halves, halves * 0):
        infonce(rows[:64], labels[:64] * 0, rows[:512], theirs, temperature=0.1, backend="triton")
        assert changed.pop() == 0
    far = rows.clone()
    far[1500] *= 40
    infonce(rows[:64].half(), labels[:64], far.half(), labels, temperature=0.1, backend="triton")
    assert changed[3] > 0


# What tensor cores do to sums


def truncating_dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
    """A product as tensor cores sum it: 16 terms at a time, added exactly, and the sum truncated to fp32."""
    total = d.data
    for k in range(0, a.data.shape[1], 16):
        terms = a.data[:, k : k + 16].astype(np.float64) @ b.data[k : k + 16].astype(np.float64)
        exact = total + terms
        total = exact.astype(np.float32)
        over = np.abs(total.astype(np.float64)) > np.abs(exact)
        total = np.where(over, np.nextafter(total, np.float32(0)), total)
    return interpreter.TensorHandle(total, d.dtype.scalar)


def rows_of(kind: str, count: int, channels: int) -> Tensor:
    rows = torch.randn(count, channels)
    if kind == "clustered":
        rows = 0.3 * rows + torch.randn(7, channels)[torch.arange(count) * 7 // count]
    elif kind == "near-identical":
        rows = 0.05 * rows + 1
    rows = torch.nn.functional.normalize(rows, dim=1)
    return rows * 3e4 if kind == "badly scaled" else rows


@pytest.mark.skipif(ON_DEVICE, reason="it replaces the interpreter's products")
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("random", 20_000),
        ("near-identical", 20_000),
        ("badly scaled", 20_000),
        ("clustered", 190_000 if SHARE == 1 else 20_000),
    ],
)
def test_fp32_keeps_its_accuracy_where_sums_are_cut_off(monkeypatch, kind, keys):
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", truncating_dot)
    scale = 3e4**2 if kind == "badly scaled" else 1.0
    anchors, bank = rows_of(kind, 48, 64), rows_of(kind, keys, 64)
    labels, key_labels = torch.arange(48) * 7 // 48, torch.arange(keys) * 7 // keys

    def solved(backend: str, dtype: torch.dtype) -> list[Tensor]:
        a = anchors.to(dtype).requires_grad_()
        loss = infonce(a, labels, bank.to(dtype), key_labels, temperature=0.1 * scale, backend=backend)
        return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, a))]

    exact = solved("reference", torch.float64)
    # For rows that are nearly alike, the gradient is a difference of sums that nearly cancel, where plain fp32 is less
    # accurate.
    plain = solved("reference", torch.float32)
    for ours, fp32, right, bar in zip(
        solved("triton", torch.float32), plain, exact, (1e-6, 2e-6), strict=True
    ):
        assert (ours - right).norm() <= max(bar * right.norm(), (fp32 - right).norm())
