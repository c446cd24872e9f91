"""`hard_anchor_sampling` against the rules as loops."""

from __future__ import annotations

import math

import pytest
import torch

from pixcontrast_ext import hard_anchor_sampling
from pixcontrast_ext.ops.sampling import share_of
from tests.support.backends import BACKENDS
from tests.support.checks import check_sampling
from tests.support.inputs import draw_maps


def draw(*size, wrong=0.4, priorities=1000, seed=0, **settings):
    """Labels, predictions and priorities; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return draw_maps(*size, wrong=wrong, priorities=priorities, generator=generator, **settings)[1:]


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((3, 17, 23, 5), dict(max_samples=64, max_views=10)),
        ((2, 8, 9, 6), dict(max_samples=5, max_views=3, min_pixels=1)),  # fewer samples than pairs
        # More samples than there are pixels of a class.
        ((4, 16, 31, 19), dict(max_samples=1024, max_views=100, min_pixels=1)),
        ((1, 5, 7, 3), dict(max_samples=100, max_views=100, min_pixels=1)),  # more samples than pixels
        ((1, 1, 1, 1), dict(max_samples=1, max_views=1, min_pixels=0)),
        ((2, 13, 11, 2), dict(max_samples=1, max_views=1, min_pixels=1)),
    ],
)
@pytest.mark.parametrize("priorities", [3, 2**31 - 1])  # many ties, hardly any
def test_chooses_what_the_rules_say(backend, poison, shape, settings, priorities):
    *size, classes = shape
    ignored = 0.2 if size[1] > 1 else 0.0
    maps = draw(*size, classes, ignored=ignored, priorities=priorities)
    assert check_sampling(*maps, backend, num_classes=classes, **settings) > 0


def test_all_hard_and_all_easy(backend):
    labels, _, priority = draw(2, 9, 9, 3)
    for predictions in (labels.clone(), torch.full_like(labels, 77)):
        assert (
            check_sampling(
                labels,
                predictions,
                priority,
                backend,
                num_classes=3,
                max_samples=30,
                max_views=8,
                min_pixels=1,
            )
            == 30
        )


def test_half_are_hard_where_both_kinds_suffice(backend):
    labels = torch.zeros(1, 20, 20, dtype=torch.int64)
    predictions = torch.zeros_like(labels)
    predictions[:, :10] = 1
    sample = hard_anchor_sampling(
        labels, predictions, num_classes=2, max_samples=50, max_views=50, backend=backend
    )
    hard = predictions.flatten()[sample.indices] != sample.labels
    assert hard.sum() == 25
    assert hard[:25].all()


@pytest.mark.parametrize("fraction", [0, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.99, 1])
def test_any_share_of_the_anchors_may_be_hard(backend, poison, fraction):
    maps = draw(3, 17, 23, 5)
    settings = dict(num_classes=5, max_samples=150, max_views=10, min_pixels=1, hard_fraction=fraction)
    assert check_sampling(*maps, backend, **settings) > 0


def test_share_of_the_hard_is_to_the_pixel(backend):
    """Of 10 there are 3 at 0.3, which in fp64 is a little less."""
    labels = torch.zeros(1, 20, 20, dtype=torch.int64)
    predictions = torch.zeros_like(labels)
    predictions[:, :10] = 1
    for take in (7, 10, 100):
        for fraction, hard in ((0, 0), (0.1, take // 10), (0.3, 3 * take // 10), (0.5, take // 2), (1, take)):
            sample = hard_anchor_sampling(
                labels,
                predictions,
                num_classes=1,
                max_samples=take,
                max_views=take,
                hard_fraction=fraction,
                backend=backend,
            )
            assert (predictions.flatten()[sample.indices] != sample.labels).sum() == hard, (take, fraction)


def test_half_is_what_it_was():
    """The integer that stands for 0.5 gives take // 2, and the largest take does not overflow."""
    for take in (0, 1, 2, 3, 99, 100, 2**31 - 1):
        assert take * share_of(0.5) >> 24 == take // 2
    assert (2**31 - 1) * share_of(1.0) < 2**63
    assert [share_of(value) for value in (0, 1, 1e-9)] == [0, 2**24, 1]


def test_authors_rule_needs_more_pixels_than_views(backend):
    labels = torch.full((1, 4, 4), 255)
    labels.view(-1)[:10] = 0
    empty = hard_anchor_sampling(labels, labels, num_classes=1, max_samples=20, max_views=10, backend=backend)
    labels.view(-1)[10] = 0
    full = hard_anchor_sampling(labels, labels, num_classes=1, max_samples=20, max_views=10, backend=backend)
    assert (empty.count, full.count) == (0, 10)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
)
@pytest.mark.parametrize("ignore_index", [-100, 3, 100])
def test_any_integer_dtype_and_ignore_index(backend, dtype, ignore_index):
    if ignore_index < 0 and not dtype.is_signed:
        ignore_index = 101
    labels, predictions, priority = draw(2, 7, 9, 5)
    labels[labels == 255] = ignore_index  # if that is 3, the pixels of class 3 are ignored too
    check_sampling(
        labels.to(dtype), predictions.to(dtype), priority, backend,
        num_classes=5, max_samples=40, max_views=6, min_pixels=1, ignore_index=ignore_index,
    )  # fmt: skip


def test_non_contiguous_maps(backend):
    labels, predictions, priority = draw(3, 14, 10, 4)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (labels, predictions, priority)]
    assert not transposed[0].is_contiguous()
    check_sampling(*transposed, backend, num_classes=4, max_samples=40, max_views=6, min_pixels=1)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty_maps(backend, poison, shape):
    labels = torch.zeros(shape, dtype=torch.int64)
    sample = hard_anchor_sampling(labels, labels, num_classes=3, max_samples=7, backend=backend)
    assert sample.indices.tolist() == [0] * 7
    assert sample.labels.tolist() == [-1] * 7
    assert sample.count == 0


def test_seed_and_generator_govern_the_choice(backend):
    labels, predictions, _ = draw(2, 16, 16, 3)
    arguments = dict(num_classes=3, max_samples=30, max_views=5, backend=backend)
    torch.manual_seed(5)
    first = hard_anchor_sampling(labels, predictions, **arguments)
    torch.manual_seed(5)
    again = hard_anchor_sampling(labels, predictions, **arguments)
    other = hard_anchor_sampling(labels, predictions, **arguments)
    own = hard_anchor_sampling(labels, predictions, generator=torch.Generator().manual_seed(5), **arguments)
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.indices, own.indices)
    assert not torch.equal(first.indices, other.indices)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads):
    maps = draw(5, 40, 30, 19)
    before = torch.get_num_threads()
    arguments = dict(num_classes=19, max_samples=300, max_views=9, priority=maps[2])
    expected = hard_anchor_sampling(*maps[:2], backend="reference", **arguments)
    try:
        torch.set_num_threads(threads)
        for _ in range(20):
            found = hard_anchor_sampling(*maps[:2], backend="cpu", **arguments)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(labels=torch.rand(2, 4, 4)), TypeError, "labels must be an integer tensor, got torch.float32"),
        (dict(labels=[[[0]]]), TypeError, "labels must be an integer tensor, got list"),
        (dict(labels=torch.zeros(2, 4, 4, dtype=torch.bool)), TypeError, "labels must be an integer tensor"),
        (
            dict(labels=torch.zeros(4, 4, dtype=torch.int64)),
            ValueError,
            r"labels must have shape \[B, H, W\], got \(4, 4\)",
        ),
        (
            dict(predictions=torch.zeros(2, 4, 5, dtype=torch.int64)),
            ValueError,
            r"\(2, 4, 4\), got \(2, 4, 5\)",
        ),
        (dict(predictions=torch.rand(2, 4, 4)), TypeError, "predictions must be an integer tensor"),
        (
            dict(priority=torch.zeros(2, 4, 4, dtype=torch.int64)),
            TypeError,
            "priority must be int32, got torch.int64",
        ),
        (
            dict(priority=torch.zeros(2, 4, 3, dtype=torch.int32)),
            ValueError,
            r"priority must have shape \(2, 4, 4\)",
        ),
        (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (dict(max_samples=0), ValueError, "max_samples must be at least 1, got 0"),
        (dict(max_views=-3), ValueError, "max_views must be at least 1, got -3"),
        (dict(min_pixels=-1), ValueError, "min_pixels must be at least 0, got -1"),
        (dict(max_samples=2.5), TypeError, "max_samples must be an int, got 2.5"),
        (dict(hard_fraction=1.5), ValueError, r"hard_fraction must be in \[0, 1\], got 1.5"),
        (dict(hard_fraction=math.nan), ValueError, r"hard_fraction must be in \[0, 1\], got nan"),
        (dict(hard_fraction="half"), TypeError, "hard_fraction must be a number, got 'half'"),
        (dict(backend="gpu"), ValueError, "names the backend 'gpu', expected one of"),
    ],
)
def test_bad_input(backend, change, error, message):
    maps = torch.zeros(2, 4, 4, dtype=torch.int64)
    arguments = dict(labels=maps, predictions=maps, num_classes=3, backend=backend) | change
    with pytest.raises(error, match=message):
        hard_anchor_sampling(**arguments)


def test_bad_label_is_named_with_its_place(careful_backend):
    labels = torch.zeros(2, 4, 5, dtype=torch.int64)
    labels[1, 2, 3] = 19
    labels[1, 3, 3] = 20
    with pytest.raises(
        ValueError, match=r"labels\[1, 2, 3\] is 19, expected 0 <= label < num_classes=19 or ignore_index=255"
    ):
        hard_anchor_sampling(labels, labels, num_classes=19, backend=careful_backend)
    for value in (-1, 9):
        labels = torch.full((2, 4, 4), value)
        with pytest.raises(
            ValueError, match=rf"labels\[0, 0, 0\] is {value}, expected 0 <= label < num_classes=3"
        ):
            hard_anchor_sampling(labels, labels, num_classes=3, backend=careful_backend)


@pytest.mark.parametrize("value", [-1, -(2**63), 5, 2**31, 2**63 - 1])
def test_bad_label_is_ignored_on_a_gpu(gpu_backend, poison, value):
    labels, predictions, priority = draw(2, 13, 17, 5)
    bad = torch.where(labels == 255, value, labels)
    settings = dict(num_classes=5, max_samples=40, max_views=6)
    expected = hard_anchor_sampling(labels, predictions, priority=priority, backend="reference", **settings)
    found = hard_anchor_sampling(bad, predictions, priority=priority, backend=gpu_backend, **settings)
    assert expected.count > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif("cuda" not in BACKENDS, reason="PIXCONTRAST_TEST_BACKENDS leaves cuda out")
def test_cuda_names_what_does_not_fit_a_sort_key():
    maps = draw(1, 5, 6, 3)
    settings = dict(max_samples=9, max_views=3, priority=maps[2], backend="cuda")
    with pytest.raises(ValueError, match="up to 2097151 classes, got num_classes=2097152"):
        hard_anchor_sampling(*maps[:2], num_classes=2**21, **settings)
