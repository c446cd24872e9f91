"""Steering the sampling: hard pixels that are given, confidence, one pool for all anchors."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from pixcontrast_ext import hard_anchor_sampling
from pixcontrast_ext.ops.steering import weigh_priority
from tests.support import oracle
from tests.support.inputs import draw_maps

INT32 = torch.iinfo(torch.int32)


def draw(*size, seed=0, **settings):
    """Labels, predictions and priorities; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return draw_maps(*size, wrong=0.4, generator=generator, **settings)[1:]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# hard


def test_hard_replaces_mispredicted(backend, poison):
    labels, predictions, priority = draw(2, 13, 17, 5)
    settings = dict(
        num_classes=5, max_samples=60, max_views=9, min_pixels=1, priority=priority, backend=backend
    )
    expected = hard_anchor_sampling(labels, predictions, **settings)
    assert expected.count > 0
    for given in (None, predictions.flip(1)):
        assert same(hard_anchor_sampling(labels, given, hard=predictions != labels, **settings), expected)
    other = torch.rand(labels.shape) < 0.5
    found = hard_anchor_sampling(labels, None, hard=other, **settings)
    assert same(found, hard_anchor_sampling(labels, torch.where(other, 99, labels), **settings))
    assert not same(found, expected)


# anchors


def test_random_anchors_are_those_of_the_smallest_priority(backend):
    labels, predictions, priority = draw(2, 13, 17, 5)
    settings = dict(num_classes=5, max_samples=60, max_views=9, min_pixels=1, priority=priority)
    for given in (dict(), dict(hard=predictions != labels), dict(hard_fraction=1.0)):
        found = hard_anchor_sampling(
            labels, predictions, anchors="random", backend=backend, **given, **settings
        )
        assert same(
            found, hard_anchor_sampling(labels, None, anchors="random", backend="reference", **settings)
        )
    indices, classes = oracle.sampling(labels, labels, priority, 5, 60, 9, 1, 255)
    assert found.indices[: len(indices)].tolist() == indices
    assert found.labels[: len(indices)].tolist() == classes
    assert found.count == len(indices) > 0


# confidence

# Two of four pixels, with chances as those of a hat from which two lots are drawn.
WEIGHTS = (1.0, 2.0, 3.0, 6.0)
PAIRS = list(combinations(range(4), 2))
IMAGES = 20_000
CRITICAL = 35.89  # of chi-square with 5 degrees of freedom: a right sampler exceeds it once in 10^6 seeds


def chance(i, j):
    """Of drawing i and j, in either order."""
    a, b = (WEIGHTS[k] / sum(WEIGHTS) for k in (i, j))
    return a * b / (1 - a) + b * a / (1 - b)


@pytest.mark.parametrize("low", [0, INT32.min])  # priorities as we draw them, and over all of int32
@pytest.mark.parametrize("scale", [1.0, 1e-38, 2e37])  # denormal numbers, and large ones
def test_pixels_are_drawn_in_proportion_to_their_confidence(low, scale):
    """One image per draw; the chi-square of the pairs drawn. The seed is fixed, so this cannot fail by chance."""
    labels = torch.zeros(IMAGES, 2, 2, dtype=torch.int64)
    confidence = (
        (torch.tensor(WEIGHTS, dtype=torch.float64) * scale).float().view(1, 2, 2).expand(IMAGES, 2, 2)
    )
    priority = torch.randint(low, INT32.max, labels.shape, dtype=torch.int32)
    sample = hard_anchor_sampling(
        labels,
        labels,
        num_classes=1,
        max_samples=2 * IMAGES,
        max_views=2,
        min_pixels=1,
        confidence=confidence,
        priority=priority,
        backend="reference",
    )
    assert sample.count == 2 * IMAGES
    drawn = (sample.indices.view(IMAGES, 2) % 4).tolist()
    chi_square = 0.0
    for pair in PAIRS:
        expected = IMAGES * chance(*pair)
        chi_square += (sum(tuple(two) == pair for two in drawn) - expected) ** 2 / expected
    assert chi_square < CRITICAL
    assert sum(chance(*pair) for pair in PAIRS) == pytest.approx(1)


def test_equal_confidence_leaves_the_order_of_drawn_priorities():
    """Up to ties: a weighted priority has 22 bits of fraction, so neighbours may fall together, never change places."""
    priority = torch.randint(INT32.max, (1, 1, 100_000), dtype=torch.int32)
    priority[0, 0, :4] = torch.tensor([0, 1, INT32.max - 1, INT32.max])
    for weight in (torch.finfo(torch.float32).max, 1.0, 0.3, 1e-45):
        weighed = weigh_priority(priority, torch.full(priority.shape, weight))
        assert weighed.dtype == torch.int32
        in_order = weighed.flatten()[priority.flatten().sort(stable=True).indices]
        assert (in_order.diff() >= 0).all()
        assert (in_order.diff() == 0).float().mean() < 0.05
        assert in_order[0] > 0
        assert in_order[-1] < INT32.max


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_confidence_is_a_weighted_priority(backend, poison, dtype):
    """All backends select the same, for they get the same; loops are the truth."""
    labels, predictions, priority = draw(2, 13, 17, 5)
    confidence = torch.rand(labels.shape).to(dtype)
    confidence[torch.rand(labels.shape) < 0.3] = 0
    found = hard_anchor_sampling(
        labels,
        predictions,
        num_classes=5,
        max_samples=60,
        max_views=9,
        min_pixels=4,
        confidence=confidence.requires_grad_(),
        priority=priority,
        backend=backend,
    )
    times = weigh_priority(priority, confidence)
    drawn = torch.where(confidence > 0, labels, 255)
    indices, classes = oracle.sampling(drawn, predictions, times, 5, 60, 9, 4, 255)
    assert found.indices[: len(indices)].tolist() == indices
    assert found.labels[: len(indices)].tolist() == classes
    assert found.count == len(indices) > 0


def test_confidence_of_zero_is_never_drawn_and_does_not_count(backend):
    labels = torch.zeros(1, 4, 5, dtype=torch.int64)
    confidence = torch.zeros(1, 4, 5)
    confidence.view(-1)[3:10] = torch.rand(7) + 1e-3
    settings = dict(num_classes=1, max_samples=20, max_views=20, confidence=confidence, backend=backend)
    full = hard_anchor_sampling(labels, labels, min_pixels=7, **settings)
    assert full.indices[: full.count].tolist() == list(range(3, 10))
    assert hard_anchor_sampling(labels, labels, min_pixels=8, **settings).count == 0


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_bad_confidence_is_ignored_on_a_gpu(gpu_backend, monkeypatch, value):
    """Where nobody may wait to look at it."""
    monkeypatch.setattr("pixcontrast_ext.ops.checks.check_weights", lambda *_: None)
    labels, predictions, priority = draw(2, 9, 9, 3)
    confidence = torch.rand(labels.shape)
    bad = torch.rand(labels.shape) < 0.3
    settings = dict(
        num_classes=3, max_samples=30, max_views=9, min_pixels=1, priority=priority, backend=gpu_backend
    )
    found = hard_anchor_sampling(
        labels, predictions, confidence=confidence.masked_fill(bad, value), **settings
    )
    assert same(
        found,
        hard_anchor_sampling(labels, predictions, confidence=confidence.masked_fill(bad, 0), **settings),
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(predictions=None), TypeError, "predictions must be an integer tensor, got NoneType"),
        (dict(anchors="easy"), ValueError, "anchors must be 'hard' or 'random', got 'easy'"),
        (dict(hard=torch.zeros(2, 4, 4)), TypeError, "hard must be a bool tensor, got torch.float32"),
        (dict(hard=[True]), TypeError, "hard must be a bool tensor, got list"),
        (
            dict(hard=torch.zeros(2, 4, 5, dtype=torch.bool)),
            ValueError,
            r"hard must have shape \(2, 4, 4\), got \(2, 4, 5\)",
        ),
        (
            dict(hard=torch.zeros(2, 4, 4, dtype=torch.bool, device="meta")),
            ValueError,
            "hard must be on cpu, got meta",
        ),
        (
            dict(confidence=torch.ones(2, 4, 4).long()),
            TypeError,
            "confidence must be a floating-point tensor, got torch.int64",
        ),
        (
            dict(confidence=torch.ones(2, 4)),
            ValueError,
            r"confidence must have shape \(2, 4, 4\), got \(2, 4\)",
        ),
        (
            dict(confidence=torch.ones(2, 4, 4, device="meta")),
            ValueError,
            "confidence must be on cpu, got meta",
        ),
    ],
)
def test_bad_input(backend, change, error, message):
    maps = torch.zeros(2, 4, 4, dtype=torch.int64)
    arguments = dict(labels=maps, predictions=maps, num_classes=3, backend=backend) | change
    with pytest.raises(error, match=message):
        hard_anchor_sampling(**arguments)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_bad_confidence_is_named_with_its_place(value):
    labels, confidence = torch.zeros(2, 4, 5, dtype=torch.int64), torch.ones(2, 4, 5)
    confidence[1, 2, 3] = value
    message = rf"confidence\[1, 2, 3\] is {value}, expected 0 <= weight < inf"
    with pytest.raises(ValueError, match=message):
        hard_anchor_sampling(labels, labels, num_classes=1, confidence=confidence)
