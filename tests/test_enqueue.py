"""`MemoryBank.enqueue` against rings of lists in fp64."""

from __future__ import annotations

import ctypes
import math
import mmap

import pytest
import torch

from pixcontrast_ext import MemoryBank
from pixcontrast_ext.ops import enqueue
from tests.support.backends import BACKENDS, GPU_BACKENDS
from tests.support.checks import TOLERANCE, check_bank, make_bank
from tests.support.inputs import LAYOUTS, draw_maps

BUFFERS = ("keys", "key_labels", "region_ptr", "region_fill", "pixel_ptr", "pixel_fill")


def draw(batch, channels, height, width, classes, **settings):
    """Embeddings, labels and priorities."""
    maps = draw_maps(batch, height, width, classes, channels=channels, **settings)
    return maps.embeddings, maps.labels, maps.priority


def rows_of(rings):
    return [len(rows) for kind in ("region", "pixel") for rows in rings.rows[kind]]


@pytest.mark.parametrize(
    ("shape", "slots", "k"),
    [
        ((3, 7, 9, 11, 4), (5, 13), 3),  # wraps
        ((2, 33, 5, 7, 3), (50, 90), 100),  # k exceeds the number of pixels
        ((4, 3, 8, 8, 2), (3, 5), 6),  # more rows in a batch than a ring holds
        ((2, 18, 4, 4, 19), (1, 1), 1),
        ((2, 5, 6, 6, 3), (0, 7), 2),
        ((2, 5, 6, 6, 3), (4, 0), 2),
        ((2, 5, 6, 6, 3), (0, 0), 2),
        ((2, 5, 6, 6, 3), (4, 7), 0),
        ((1, 3, 1, 1, 1), (2, 2), 4),
        ((2, 16, 4, 16, 2), (9, 9), 4),  # complete groups of sixteen pixels
    ],
)
@pytest.mark.parametrize("priorities", [2, 2**31 - 1])  # many ties, hardly any
def test_rings_hold_what_the_rules_say(backend, poison, shape, slots, k, priorities):
    *size, classes = shape
    bank, rings = make_bank(classes, size[1], *slots, k)
    for _ in range(4):
        batch = draw(*size, classes, ignored=0.2 if size[2] > 1 else 0.0, priorities=priorities)
        bank.enqueue(*batch[:2], priority=batch[2], backend=backend)
        rings.enqueue(*batch)
        check_bank(bank, rings)
    assert max(rows_of(rings)) >= 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("keys_dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 19, 7, 9), (2, 17, 4, 16)])
def test_layouts_and_dtypes(backend, poison, layout, dtype, keys_dtype, shape):
    bank, rings = make_bank(3, shape[1], 3, 7, 2, dtype=keys_dtype)
    for _ in range(2):
        embeddings, labels, priority = draw(*shape, 3)
        embeddings = LAYOUTS[layout](embeddings.to(dtype))
        labels, priority = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (labels, priority))
        bank.enqueue(embeddings, labels, priority=priority, backend=backend)
        rings.enqueue(embeddings, labels, priority)
    # Rows are normalised in fp32 and rounded once.
    check_bank(
        bank, rings, atol=1e-6 + (0 if keys_dtype == torch.float32 else torch.finfo(keys_dtype).eps / 2)
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_without_normalisation_means_and_rows_stay_as_they_are(backend, poison, dtype):
    bank, rings = make_bank(3, 21, 4, 9, 3, normalize=False, dtype=dtype)
    for _ in range(3):
        embeddings, labels, priority = draw(2, 21, 6, 7, 3)
        embeddings = (embeddings * 5).to(dtype)
        bank.enqueue(embeddings, labels, priority=priority, backend=backend)
        rings.enqueue(embeddings, labels, priority)
    check_bank(bank, rings, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_image(backend, normalize, layout):
    """More pixels than are summed at once, in long and in short runs of a class."""
    embeddings, labels, priority = draw(1, 3, 131, 257, 3, ignored=0.1)
    embeddings += torch.tensor([1.0, -2.0, 0.5])[:, None, None]
    labels[:, :60] = 1
    bank, rings = make_bank(3, 3, 2, 40, 30, normalize=normalize)
    bank.enqueue(LAYOUTS[layout](embeddings), labels, priority=priority, backend=backend)
    rings.enqueue(embeddings, labels, priority)
    check_bank(bank, rings)


@pytest.mark.skipif("cuda" not in GPU_BACKENDS, reason="PIXCONTRAST_TEST_BACKENDS leaves cuda out")
@pytest.mark.parametrize("shared", [100, 228])  # KB of shared memory on a multiprocessor
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset"])
@pytest.mark.parametrize(
    ("channels", "height", "width"),
    [
        (24, 24, 48),  # copied 16 bytes at a time, in two chunks
        (18, 22, 27),  # 4 bytes at a time
        (19, 23, 17),  # 4 bytes at a time in fp32, else element by element
        (300, 7, 12),  # strips of 32 to 128 pixels
        (1100, 9, 8),  # more channels than fit
    ],
)
def test_stages_of_every_kind(monkeypatch, poison, shared, dtype, layout, channels, height, width):
    monkeypatch.setenv("PXC_EMULATOR_SHARED", str(shared))
    bank, rings = make_bank(3, channels, 3, 7, 2)
    embeddings, labels, priority = draw(2, channels, height, width, 3)
    labels[1, 2:] = labels[1, 2, 0]
    embeddings = LAYOUTS[layout](embeddings.to(dtype))
    embeddings.permute(0, 2, 3, 1)[labels == 255] = math.nan
    bank.enqueue(embeddings, labels, priority=priority, backend="cuda")
    rings.enqueue(embeddings, labels, priority)
    check_bank(bank, rings)


def test_many_classes_in_every_sixteen_pixels(backend):
    """Classes come and go within a group, and each sum continues where it was left."""
    embeddings, labels, priority = draw(2, 5, 40, 33, 7, ignored=0.5)
    bank, rings = make_bank(7, 5, 4, 40, 5)
    bank.enqueue(embeddings, labels, priority=priority, backend=backend)
    rings.enqueue(embeddings, labels, priority)
    check_bank(bank, rings)


@pytest.mark.parametrize("shape", [(3, 20, 9, 11), (2, 33, 70, 64)])
@pytest.mark.parametrize("other", [name for name in BACKENDS if name != "reference"])
def test_backends_agree(other, shape):
    banks = {name: make_bank(5, shape[1], 4, 9, 4)[0] for name in ("reference", other)}
    for _ in range(3):
        embeddings, labels, priority = draw(*shape, 5, priorities=40)
        for name, bank in banks.items():
            bank.enqueue(embeddings, labels, priority=priority, backend=name)
    for name in BUFFERS[1:]:
        assert torch.equal(getattr(banks[other], name), getattr(banks["reference"], name))
    torch.testing.assert_close(banks[other].keys, banks["reference"].keys, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
)
@pytest.mark.parametrize("ignore_index", [-100, 3, 0, 100])
def test_any_integer_dtype_and_ignore_index(backend, dtype, ignore_index):
    if ignore_index < 0 and not dtype.is_signed:
        ignore_index = 101
    embeddings, labels, priority = draw(2, 6, 7, 9, 5)
    labels[labels == 255] = ignore_index  # if that is 0 or 3, the pixels of that class are ignored too
    bank, rings = make_bank(5, 6, 3, 8, 3, ignore_index=ignore_index)
    bank.enqueue(embeddings, labels.to(dtype), priority=priority, backend=backend)
    rings.enqueue(embeddings, labels, priority, ignore_index)
    check_bank(bank, rings)


# What is never stored


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("keys_dtype", TOLERANCE)
def test_a_bad_pixel_harms_its_own_class_in_its_own_image_only(backend, value, layout, normalize, keys_dtype):
    embeddings, labels, priority = draw(2, 18, 4, 8, 3, ignored=0.0)
    labels[0, 1] = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    embeddings[0, 3, 1, 1] = value  # of class 1, among sixteen pixels of all classes
    priority[0, 1, 1] = -(2**31)  # chosen first
    bank, rings = make_bank(3, 18, 9, 30, 5, normalize=normalize, dtype=keys_dtype)
    bank.enqueue(LAYOUTS[layout](embeddings), labels, priority=priority, backend=backend)
    rings.enqueue(embeddings, labels, priority)
    check_bank(bank, rings, rtol=torch.finfo(keys_dtype).eps, atol=1e-6)
    assert bank.region_fill.tolist() == [2, 1, 2]
    assert bank.pixel_fill.tolist() == [10, 9, 10]


def test_a_bad_pixel_without_a_class_harms_nothing(backend):
    embeddings, labels, priority = draw(2, 5, 4, 8, 3, ignored=0.3)
    embeddings.permute(0, 2, 3, 1)[labels == 255] = math.nan
    bank, rings = make_bank(3, 5, 9, 30, 5)
    bank.enqueue(embeddings, labels, priority=priority, backend=backend)
    rings.enqueue(embeddings, labels, priority)
    check_bank(bank, rings)
    assert bank.region_fill.tolist() == [2, 2, 2]


def test_zero_rows_are_not_stored(backend):
    """A class of zero vectors gives nothing; one of opposite vectors gives pixels, but no mean."""
    embeddings = torch.randn(1, 6, 2, 4)
    embeddings[:, :, 0, :2] = 0
    embeddings[:, :, 0, 3] = -embeddings[:, :, 0, 2]
    embeddings[:, :, 1, 0] = 0
    labels = torch.tensor([[[0, 0, 1, 1], [2, 2, 2, 2]]])
    priority = torch.arange(8, dtype=torch.int32).view(1, 2, 4)
    bank, rings = make_bank(3, 6, 2, 6, 4)
    for _ in range(2):
        bank.enqueue(embeddings, labels, priority=priority, backend=backend)
        rings.enqueue(embeddings, labels, priority)
    check_bank(bank, rings)
    assert bank.region_fill.tolist() == [0, 0, 2]
    assert bank.pixel_fill.tolist() == [0, 4, 6]


@pytest.mark.parametrize("channels", [2, 40, 256])
def test_opposite_pixels_far_apart_have_no_mean(backend, channels):
    """64 pixels apart, so that a lane that takes every so many pixels adds one to the other."""
    embeddings = torch.zeros(5, channels, 1, 65)
    embeddings[..., 0] = torch.randn(5, channels, 1)
    embeddings[..., 64] = -embeddings[..., 0]
    bank, _ = make_bank(1, channels, 9, 9, 2)
    priority = torch.arange(65, dtype=torch.int32).expand(5, 1, 65)
    bank.enqueue(embeddings, torch.zeros(5, 1, 65).long(), priority=priority, backend=backend)
    assert not bank.region_fill.any()


def test_refused_rows_leave_no_hole(backend):
    """Rows that are not stored do not advance the pointer, even in the middle of a ring."""
    bank, rings = make_bank(1, 4, 3, 5, 3)
    for step in range(6):
        embeddings, labels, priority = draw(3, 4, 2, 3, 1, ignored=0.0)
        embeddings[step % 3, :, step % 2, 1] = math.nan
        embeddings[(step + 1) % 3] = 0
        bank.enqueue(embeddings, labels, priority=priority, backend=backend)
        rings.enqueue(embeddings, labels, priority)
        check_bank(bank, rings)


def test_norms_do_not_overflow_in_half_precision(backend):
    embeddings = torch.full((1, 64, 1, 2), 30000.0, dtype=torch.float16)
    bank, rings = make_bank(1, 64, 2, 2, 2, dtype=torch.float16)
    batch = embeddings, torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 2, dtype=torch.int32)
    bank.enqueue(*batch[:2], priority=batch[2], backend=backend)
    rings.enqueue(*batch)
    check_bank(bank, rings)
    assert bank.pixel_fill == 2


def test_what_overflows_in_the_dtype_of_the_keys_is_not_stored(backend):
    embeddings = torch.ones(1, 4, 1, 4)
    embeddings[0, 2, 0] = torch.tensor([1e5, 1.0, 6e4, 1e5])  # the largest fp16 number is 65504
    labels = torch.tensor([[[0, 0, 1, 2]]])
    for dtype, regions, pixels in (
        (torch.float16, [1, 1, 0], [1, 1, 0]),
        (torch.bfloat16, [1, 1, 1], [2, 1, 1]),
    ):
        bank, _ = make_bank(3, 4, 2, 3, 3, dtype=dtype, normalize=False)
        bank.enqueue(embeddings, labels, backend=backend)
        assert bank.region_fill.tolist() == regions
        assert bank.pixel_fill.tolist() == pixels
        assert bank.keys.isfinite().all()
        assert ((bank.keys != 0).any(-1) == (bank.key_labels >= 0)).all()


# Nothing to store


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4), (2, 5, 4, 0)])
def test_empty_maps_change_nothing(backend, poison, shape):
    bank, rings = make_bank(3, 5, 4, 6, 2)
    first = draw(2, 5, 4, 4, 3)
    bank.enqueue(*first[:2], priority=first[2], backend=backend)
    rings.enqueue(*first)
    bank.enqueue(torch.randn(shape), torch.zeros(shape[0], *shape[2:], dtype=torch.int64), backend=backend)
    check_bank(bank, rings)


def test_ignored_pixels_change_nothing(backend, poison):
    bank, rings = make_bank(3, 5, 4, 6, 2)
    first = draw(2, 5, 4, 4, 3)
    for labels in (first[1], torch.full_like(first[1], 255)):
        bank.enqueue(first[0], labels, priority=first[2], backend=backend)
    rings.enqueue(*first)
    check_bank(bank, rings)


def test_one_class_of_many(backend, poison):
    embeddings, _, priority = draw(3, 5, 4, 4, 3)
    bank, rings = make_bank(19, 5, 4, 6, 2)
    batch = embeddings, torch.full((3, 4, 4), 18), priority
    bank.enqueue(*batch[:2], priority=priority, backend=backend)
    rings.enqueue(*batch)
    check_bank(bank, rings)
    assert bank.region_fill.tolist() == [0] * 18 + [3]


# Randomness and order


def test_seed_governs_the_choice(backend):
    embeddings, labels, _ = draw(2, 5, 16, 16, 2)
    banks = []
    for seed in (5, 5, 6):
        bank, _ = make_bank(2, 5, 4, 8, 3)
        torch.manual_seed(seed)
        bank.enqueue(embeddings, labels, backend=backend)
        banks.append(bank.keys)
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])


def test_pixels_are_drawn_from_the_whole_class(backend):
    """Over many draws, every pixel of the class is chosen and no pixel of another class is."""
    embeddings = torch.eye(16).view(1, 16, 4, 4).expand(10, 16, 4, 4)
    labels = (torch.arange(16) % 2).view(1, 4, 4).expand(10, 4, 4)
    bank, _ = make_bank(2, 16, 0, 200, 2)
    for _ in range(10):
        bank.enqueue(embeddings, labels, backend=backend)
    for c in range(2):
        turns = bank.keys[c].sum(0)
        assert (turns[1 - c :: 2] == 0).all()
        assert (turns[c::2] > 8).all()
        assert turns.sum() == 200


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset"])
def test_repeats_bit_for_bit_at_any_thread_count(layout):
    embeddings, labels, priority = draw(3, 37, 61, 83, 5)
    embeddings, before, results = LAYOUTS[layout](embeddings), torch.get_num_threads(), []
    try:
        for threads in [1, 2, 3] * 4:
            torch.set_num_threads(threads)
            bank, _ = make_bank(5, 37, 2, 7, 4)
            bank.enqueue(embeddings, labels, priority=priority, backend="cpu")
            results.append([getattr(bank, name) for name in BUFFERS])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for found in results for a, b in zip(found, results[0], strict=True))


def before_a_wall(tensor):
    """A copy that ends at a protected page: reading past its last byte kills the process."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    end = (size + page - 1) // page * page
    memory = mmap.mmap(-1, end + page)
    first = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(first + end), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=end - size).view(
        tensor.shape
    )
    return copy.copy_(tensor)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(7, 9), (4, 12), (1, 1)])
def test_nothing_beyond_the_end_is_touched(layout, dtype, size):
    embeddings, labels, priority = draw(2, 17, *size, 3, ignored=0.1)
    embeddings = embeddings.to(dtype)
    if layout == "channels_last":
        embeddings = before_a_wall(embeddings.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    else:
        embeddings = before_a_wall(embeddings)
    bank, rings = make_bank(3, 17, 3, 5, 2)
    bank.keys, bank.key_labels = before_a_wall(bank.keys), before_a_wall(bank.key_labels)
    for _ in range(3):
        bank.enqueue(embeddings, before_a_wall(labels), priority=before_a_wall(priority), backend="cpu")
        rings.enqueue(embeddings, labels, priority)
    check_bank(bank, rings)


def test_no_gradient_reaches_the_bank(backend):
    embeddings, labels, priority = draw(2, 5, 4, 4, 3)
    bank, rings = make_bank(3, 5, 4, 6, 2)
    bank.enqueue(embeddings.requires_grad_(), labels, priority=priority, backend=backend)
    assert not bank.keys.requires_grad
    assert embeddings.grad is None
    rings.enqueue(embeddings.detach(), labels, priority)
    check_bank(bank, rings)


def test_collected_rows_have_a_fixed_shape(backend, poison):
    """The rows that ranks exchange: a region and k pixels per class and image, or label -1 and zeros."""
    embeddings, labels, priority = draw(2, 5, 4, 4, 3)
    labels[1][labels[1] == 2] = 255
    rows, row_labels = enqueue.collect(
        embeddings, labels, num_classes=4, pixels_per_image=20, ignore_index=255, normalize=True,
        dtype=torch.bfloat16, priority=priority, backend=backend,
    )  # fmt: skip
    assert rows.shape == (2, 4, 21, 5)
    assert rows.dtype == torch.bfloat16
    assert row_labels.dtype == torch.int32
    for b in range(2):
        for c in range(4):
            n = int((labels[b] == c).sum())
            assert row_labels[b, c].tolist() == [c if i < n + (n > 0) else -1 for i in range(21)]
    assert ((rows != 0).any(-1) == (row_labels >= 0)).all()


# Bad input

_LABELS = torch.zeros(2, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(embeddings=torch.zeros(2, 5, 4, 4, dtype=torch.int64)),
            TypeError,
            "embeddings must be a floating-point",
        ),
        (dict(embeddings=[0.0]), TypeError, "embeddings must be a floating-point tensor, got list"),
        (dict(embeddings=torch.zeros(2, 5, 4)), ValueError, r"\[B, D, H, W\] with D >= 1, got \(2, 5, 4\)"),
        (
            dict(embeddings=torch.zeros(2, 6, 4, 4)),
            ValueError,
            r"embeddings must be 5 wide, got \(2, 6, 4, 4\)",
        ),
        (
            dict(embeddings=torch.zeros(2, 5, 4, 4, device="meta")),
            ValueError,
            "embeddings must be on the bank's device cpu, got meta",
        ),
        (dict(labels=torch.zeros(2, 4, 4)), TypeError, "labels must be an integer tensor, got torch.float32"),
        (
            dict(labels=torch.zeros(2, 4, 4, dtype=torch.bool)),
            TypeError,
            "must be an integer tensor, got torch.bool",
        ),
        (dict(labels=_LABELS[:1]), ValueError, r"labels must have shape \(2, 4, 4\), got \(1, 4, 4\)"),
        (dict(labels=_LABELS[:, :3]), ValueError, r"labels must have shape \(2, 4, 4\), got \(2, 3, 4\)"),
        (dict(labels=_LABELS.to("meta")), ValueError, "labels must be on cpu, got meta"),
        (dict(priority=_LABELS), TypeError, "priority must be int32, got torch.int64"),
        (
            dict(priority=torch.rand(2, 4, 4)),
            TypeError,
            "priority must be an integer tensor, got torch.float32",
        ),
        (
            dict(priority=_LABELS.int()[:, :, 1:]),
            ValueError,
            r"priority must have shape \(2, 4, 4\), got \(2, 4, 3\)",
        ),
        (dict(backend="gpu"), ValueError, "names the backend 'gpu', expected one of"),
    ],
)
def test_bad_input_changes_nothing(backend, change, error, message):
    bank, rings = make_bank(3, 5, 4, 6, 2)
    arguments = dict(embeddings=torch.zeros(2, 5, 4, 4), labels=_LABELS, backend=backend) | change
    with pytest.raises(error, match=message):
        bank.enqueue(**arguments)
    check_bank(bank, rings)


@pytest.mark.parametrize("value", [3, -1])
def test_bad_label_changes_nothing(careful_backend, value):
    bank, rings = make_bank(3, 5, 4, 6, 2)
    message = rf"labels\[0, 0, 0\] is {value}, expected 0 <= label < num_classes=3"
    with pytest.raises(ValueError, match=message):
        bank.enqueue(torch.zeros(2, 5, 4, 4), _LABELS + value, backend=careful_backend)
    check_bank(bank, rings)


@pytest.mark.parametrize("value", [-1, -(2**63), 3, 2**31, 2**63 - 1])
def test_bad_label_is_ignored_on_a_gpu(gpu_backend, poison, value):
    embeddings, labels, priority = draw(2, 5, 9, 7, 3)
    bank, rings = make_bank(3, 5, 4, 6, 2)
    bank.enqueue(
        embeddings, torch.where(labels == 255, value, labels), priority=priority, backend=gpu_backend
    )
    rings.enqueue(embeddings, labels, priority)
    check_bank(bank, rings)


def test_bad_label_is_named_with_its_place(careful_backend):
    labels = torch.zeros(2, 4, 5, dtype=torch.int64)
    labels[1, 2, 3] = 19
    labels[1, 3, 3] = 20
    with pytest.raises(
        ValueError, match=r"labels\[1, 2, 3\] is 19, expected 0 <= label < num_classes=19 or ignore_index=255"
    ):
        MemoryBank(19, 4, region_slots=2, pixel_slots=2).enqueue(
            torch.randn(2, 4, 4, 5), labels, backend=careful_backend
        )


def test_double_needs_the_reference():
    embeddings, labels, priority = draw(2, 5, 4, 4, 3)
    bank, rings = make_bank(3, 5, 4, 6, 2, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        bank.enqueue(embeddings.to(dtype), labels, priority=priority)
        rings.enqueue(embeddings.to(dtype), labels, priority)
        with pytest.raises(
            ValueError, match=r"backend 'cpu' cannot serve enqueue_collect on cpu tensors of torch\.float64"
        ):
            bank.enqueue(embeddings.to(dtype), labels, backend="cpu")
    check_bank(bank, rings)
