"""Triton's example mining: ranges in units of planes, sides of their own, and a shift that did not serve."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pixcontrast_ext import Mining, score_thresholds
from pixcontrast_ext.backends import device as devices
from tests.support.backends import BACKENDS
from tests.support.checks import error

if "triton" not in BACKENDS:
    pytest.skip("PIXCONTRAST_TEST_BACKENDS leaves triton out", allow_module_level=True)

ARITHMETIC = ["bf16", "fp16", "high", "highest"]
# Of gradients, which 16-bit weights make; all else is fp32.
BARS = {"bf16": 4e-3, "fp16": 1e-3, "high": 1e-3, "highest": 2e-6}


@pytest.fixture(params=ARITHMETIC)
def arithmetic(request: pytest.FixtureRequest) -> Iterator[str]:
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, "tf32" if request.param == "high" else "ieee"
    yield request.param
    setting.fp32_precision = before


def rows_of(count: int, channels: int, arithmetic: str, size: float = 1.0) -> Tensor:
    """Of few bits, so that products add up exactly in any order, and scores are equal to thresholds."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arithmetic, torch.float32)
    return (torch.randint(-2, 3, (count, channels)) * (size / 4)).to(dtype)


def labels_of(count: int) -> Tensor:
    return torch.randint(-1, 4, (count,), dtype=torch.int32)


def some_score(rows: Tensor, others: Tensor) -> Tensor:
    """One of each row's scores, of which others are equal to it."""
    scores = rows.float() @ others.float().T
    return scores.gather(1, torch.randint(0, scores.shape[1], (scores.shape[0], 1)))[:, 0].contiguous()


def distance(found: Tensor, expected: Tensor) -> float:
    return error(found, expected) if expected.numel() else 0.0


def compare(op: str, arguments: tuple[Any, ...], bar: float) -> tuple[Tensor, ...]:
    """Against the reference, in fp64 but for the thresholds; integers have to be equal. Returns what that found."""

    def exact(argument: Any) -> Any:
        return argument.double() if isinstance(argument, Tensor) and argument.dim() == 2 else argument

    call = getattr(torch.ops.pixcontrast, op)
    found, expected = call(*arguments, "triton"), call(*map(exact, arguments), "reference")
    for ours, right in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
        assert ours.shape == right.shape
        if ours.dtype == torch.int32:
            assert torch.equal(ours, right)
            continue
        finite = right.isfinite()
        torch.testing.assert_close(ours[~finite].double(), right[~finite], equal_nan=True)
        assert distance(ours[finite], right[finite]) <= (bar if ours.dim() == 2 else 2e-6)
    return expected


def compare_backward(
    sides: tuple[Tensor, ...], terms: tuple[Tensor, ...], kept: tuple[Tensor, ...], bar: float, *settings: Any
) -> None:
    """Of the keys, or of anchors that are the keys; terms are fp64 for the reference."""
    op = "mining_backward_keys" if len(sides) == 4 else "mining_backward_symmetric"
    call = getattr(torch.ops.pixcontrast, op)
    found = call(*sides, *(term.float() for term in terms), *kept, *settings, "triton")
    exact = (side.double() if side.dim() == 2 else side for side in sides)
    expected = call(*exact, *(term.double() for term in terms), *kept, *settings, "reference")
    assert distance(found, expected) <= bar


# Sizes of anchors, keys and negatives, which take planes of other powers of two; all scores stay below 2^7.
SIZES = [(1.0, 1.0, 1.0), (2.0**-11, 2.0**9, 2.0**12)]


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize(
    ("a", "k", "m", "channels", "sizes"),
    [(150, 300, 700, 20, SIZES[0]), (37, 90, 130, 300, SIZES[1]), (20, 40, 70, 100, SIZES[1])],
)
def test_pairs_at_a_threshold(monkeypatch, poison, arithmetic, major, a, k, m, channels, sizes):
    """A negative there takes part, a positive does not; in counts, sums and both gradients."""
    monkeypatch.setattr(devices.gpu, "capability", lambda device: (major, 0))
    bar, nowhere = BARS[arithmetic], torch.full((a,), torch.inf)
    counts_of_rows = zip((a, k, m), sizes, strict=True)
    anchors, keys, negatives = (rows_of(n, channels, arithmetic, size) for n, size in counts_of_rows)
    labels, key_labels, negative_labels = labels_of(a), labels_of(k).sort().values, labels_of(m)
    kept = some_score(anchors, negatives), some_score(anchors, keys)
    sides = anchors, labels, keys, key_labels, negatives, negative_labels
    counts = compare("mining_counts", (*sides, True), 0)
    assert all(count.any() for count in counts)
    outputs = compare("mining_forward", (*sides, *kept, 1.0, True, True), bar)
    terms = outputs[1], outputs[2], torch.rand(a) / outputs[3].clamp(min=1)
    assert 0 < outputs[3].sum() < counts[1].sum()
    compare_backward(sides[:4], terms, (nowhere, kept[1]), bar, 1.0, True)
    compare_backward((*sides[:2], *sides[4:]), terms, (kept[0], -nowhere), bar, 1.0, False)


def test_a_positive_that_only_some_programs_keep(monkeypatch, poison):
    """Each program adds up the chunks of a score in an order of its own, so its last bit may fall beside the threshold.

    Whatever they keep, nothing is read that none has written. The thresholds are scores, and numbers next to them.
    """
    monkeypatch.setattr(devices.gpu, "capability", lambda device: (8, 0))
    anchors, keys = (torch.randn(10, 500).div(25).bfloat16() for _ in range(2))
    labels = torch.arange(10, dtype=torch.int32)  # each has one positive
    scores = (anchors.float() * keys.float()).sum(1)
    for offset in (-1, 0, 1):
        kept = -torch.full((10,), torch.inf), (scores.view(torch.int32) + offset).view(torch.float32)
        _, _, _, pos_count, anchor_grad = torch.ops.pixcontrast.mining_forward(
            anchors, labels, keys, labels, keys, labels, *kept, 1.0, False, True, "triton"
        )
        assert anchor_grad.isfinite().all()
        assert not anchor_grad[pos_count == 0].any()


@pytest.mark.parametrize("channels", [20, 300])
@pytest.mark.parametrize("others", ["keys", "anchors", "copies of the anchors"])
def test_negatives_that_are_other_rows_already(poison, arithmetic, others, channels):
    """What is the same memory is prepared once."""
    anchors, labels, bar = rows_of(90, channels, arithmetic), labels_of(90), BARS[arithmetic]
    every = (rows_of(200, channels, arithmetic), labels_of(200)) if others == "keys" else (anchors, labels)
    negatives = (anchors.clone(), labels.clone()) if "copies" in others else every
    kept = some_score(anchors, negatives[0]), some_score(anchors, every[0])
    sides = anchors, labels, *every, *negatives
    compare("mining_counts", (*sides, True), 0)
    outputs = compare("mining_forward", (*sides, *kept, 1.0, True, True), bar)
    terms = outputs[1], outputs[2], torch.rand(90) / outputs[3].clamp(min=1)
    if others == "keys":
        compare_backward(sides[:4], terms, kept, bar, 1.0, True)
    else:  # the ranges of a pair's anchors differ
        compare_backward(sides[:2], terms, kept, bar, 1.0, True)


def test_nan_takes_part_whatever_the_range(arithmetic):
    """In the sums of each anchor that meets it and of no other; it is counted as the farthest."""
    anchors, keys, negatives = (rows_of(n, 20, arithmetic) for n in (30, 50, 80))
    labels, key_labels, negative_labels = labels_of(30), labels_of(50), labels_of(80)
    for rows, row_labels, wanted in (
        (anchors, labels, 0),
        (keys, key_labels, 1),
        (negatives, negative_labels, 2),
    ):
        rows[int((row_labels == wanted).nonzero()[0])] = math.nan
    for nothing in (False, True):
        kept = torch.full((30,), 1e30 if nothing else 0.0), torch.full((30,), -1e30 if nothing else 0.0)
        sides = anchors, labels, keys, key_labels, negatives, negative_labels
        compare("mining_counts", (*sides, False), 0)
        loss, neg_lse, *_ = compare("mining_forward", (*sides, *kept, 1.0, False, False), 1.0)
        for sums in (loss, neg_lse):
            assert 0 < sums.isnan().sum() < 30


@pytest.mark.parametrize("arithmetic", ["fp16", "highest"], indirect=True)
@pytest.mark.parametrize("channels", [64, 300])
@pytest.mark.parametrize("kept_from", [-1.0, 1.5, 3.0])
def test_a_shift_that_did_not_serve_is_mended(arithmetic, channels, kept_from):
    """One negative, which the sample misses, scores far above all others; it may be the only one, or none is kept."""
    count, one = (800, 700) if channels == 64 else (450, 330)
    anchors, negatives = torch.zeros(40, channels), torch.zeros(count, channels)
    anchors[:, 0] = negatives[:, 0] = 1
    negatives[:, 1:] = torch.randint(-2, 3, (count, channels - 1)) / 16
    negatives[one, 0] = 2
    keys = rows_of(50, channels, arithmetic)
    anchors, negatives = anchors.to(keys.dtype), negatives.to(keys.dtype)
    labels = torch.arange(40, dtype=torch.int32) % 3
    sides = anchors, labels, keys, labels_of(50), negatives, torch.arange(count, dtype=torch.int32) % 4
    kept = torch.full((40,), kept_from), torch.full((40,), math.inf)
    _, neg_lse, *_ = compare("mining_forward", (*sides, *kept, 0.011, False, True), BARS[arithmetic])
    assert (neg_lse == -math.inf).all() == (kept_from == 3)


@pytest.mark.parametrize("empty", ["anchors", "keys", "negatives"])
def test_nothing_of_a_kind(poison, arithmetic, empty):
    sizes = {"anchors": 9, "keys": 20, "negatives": 30} | {empty: 0}
    sides = [each for n in sizes.values() for each in (rows_of(n, 20, arithmetic), labels_of(n))]
    kept = torch.zeros(sizes["anchors"]), torch.zeros(sizes["anchors"])
    compare("mining_counts", (*sides, True), 0)
    compare("mining_forward", (*sides, *kept, 1.0, True, True), BARS[arithmetic])
    ones = (torch.ones(sizes["anchors"]),) * 3
    compare_backward(tuple(sides[:4]), ones, kept, BARS[arithmetic], 1.0, True)


def test_rows_that_are_too_wide():
    rows, labels = torch.zeros(4, 513), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="InfoNCE kernels take up to 512 channels, got 513"):
        score_thresholds(rows, labels, rows, labels, Mining(), backend="triton")
