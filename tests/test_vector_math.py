"""The exponentials and logarithms of the CPU kernels, called through the kernels, against fp64."""

from __future__ import annotations

import math

import torch

from pixcontrast_ext.backends import native


def negatives(scores, *, shift=0.0, labels=None):
    """exp2(score - shift) and its sum, for one row."""
    weights, total = scores.clone()[None], torch.zeros(1)
    native.launch(
        "infonce_negatives", scores=weights, num_rows=1, num_keys=scores.shape[0],
        anchor_labels=torch.zeros(1, dtype=torch.int32), key_labels=labels, neg_min=None, scale=1.0,
        shift=torch.tensor([shift]), sum=total, output=None, channels=1, threads=1,
    )  # fmt: skip
    return weights[0], total[0]


def positives(scores, neg_lse):
    """softplus(neg_lse - score) and its sigmoid, in log2 units, one score per row."""
    n = scores.shape[0]
    sigma = scores.clone()[:, None]
    loss, weight, count = torch.zeros(n).double(), torch.zeros(n).double(), torch.zeros(n, dtype=torch.int64)
    native.launch(
        "infonce_positives", scores=sigma, num_rows=n, num_keys=1, shift=torch.zeros(n), sum_log2=neg_lse,
        anchor_index=None, key_index=None, pos_max=None, scale=1.0, loss_sum=loss, pos_weight_sum=weight,
        pos_counts=count, threads=1,
    )  # fmt: skip
    assert (count == 1).all()
    assert torch.equal(weight.nan_to_num(), sigma[:, 0].double().nan_to_num())
    return loss, sigma[:, 0]


def test_exp2_is_within_two_ulp(instruction_set):
    scores = torch.cat([torch.linspace(-126, 8, 1_000_003), torch.rand(100_000) - 0.5])
    exact = torch.exp2(scores.double())
    ulp = torch.finfo(torch.float32).eps * exact
    assert ((negatives(scores)[0].double() - exact).abs() / ulp).max() < 2
    for n in (1, 15, 16, 17, 512):
        _, total = negatives(scores[-n:])
        assert abs(total.item() / exact[-n:].sum().item() - 1) < 3e-7


def test_exp2_at_the_ends(instruction_set):
    scores = torch.tensor([0.0, -math.inf, -127.0, -1e30, -126.0, math.nan, -0.0])
    weights, _ = negatives(scores)
    assert weights[[0, 1, 2, 3, 6]].tolist() == [1, 0, 0, 0, 1]
    assert weights[4] == 2.0**-126
    assert weights[5].isnan()


def test_shift_follows_the_maximum(instruction_set):
    """From a start so far below that every exponential would overflow."""
    scores = torch.tensor([300.0, 299.0, 1.0])
    weights, total = negatives(scores, shift=-200.0)
    assert weights.tolist() == [1.0, 0.5, 0.0]
    assert total == 1.5


def test_softplus_and_sigmoid(instruction_set):
    u = torch.cat([torch.linspace(-120, 120, 100_001), torch.linspace(-1, 1, 10_001)])
    loss, sigma = positives(torch.zeros_like(u), u)
    exact_u = u.double() * math.log(2)
    softplus = torch.logaddexp(exact_u, torch.zeros_like(exact_u))
    small = exact_u < -30  # where log(1 + e) is e
    softplus[small] = exact_u[small].exp()
    assert (loss / softplus - 1).abs().max() < 6e-7
    assert (sigma.double() / torch.sigmoid(exact_u) - 1).abs().max() < 6e-7


def test_softplus_and_sigmoid_at_the_ends(instruction_set):
    u = torch.tensor([-math.inf, math.inf, math.nan])
    loss, sigma = positives(torch.zeros(3), u)
    assert (loss[0], sigma[0]) == (0, 0)
    assert (loss[1], sigma[1]) == (math.inf, 1)
    assert loss[2].isnan()
    assert sigma[2].isnan()


def test_half_precision_is_widened_exactly(instruction_set):
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1)
        wide = torch.empty(2**16, 1)
        native.launch(
            "widen", source=every, indices=None, num_rows=2**16, channels=1,
            rows=wide, threads=1,
        )  # fmt: skip
        assert torch.equal(wide.nan_to_num(nan=12345.0), every.float().nan_to_num(nan=12345.0))
