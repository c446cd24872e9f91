"""`gather_embeddings` and its gradient against indexing in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pixcontrast_ext import gather_embeddings
from tests.support.checks import TOLERANCE
from tests.support.inputs import LAYOUTS


def truth(embeddings, indices, normalize=True):
    rows = embeddings.double().permute(0, 2, 3, 1).reshape(-1, embeddings.shape[1])[indices]
    return F.normalize(rows, dim=1, eps=1e-300) if normalize else rows


def embed(shape, layout, dtype):
    embeddings = LAYOUTS[layout](torch.randn(shape).to(dtype))
    assert tuple(embeddings.shape) == shape
    return embeddings


def test_subnormal_numbers_count_where_fp32_ones_are_flushed():
    """fp16 ones are ordinary numbers; threads that had begun before the flag read them, and the others 0."""
    embeddings = torch.full((1, 33, 16, 8), 3e-5, dtype=torch.float16)
    embeddings[0, 0] = -6e-8
    gather_embeddings(embeddings, torch.arange(128), normalize=False, backend="cpu")  # starts the threads
    if not torch.set_flush_denormal(True):
        pytest.skip("the processor cannot flush")
    try:
        rows = gather_embeddings(embeddings, torch.arange(128), normalize=False, backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(rows, embeddings[0].flatten(1).T)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(3, 33, 7, 11), (1, 1, 1, 1), (2, 256, 5, 3), (2, 16, 1, 9)])
def test_rows_and_gradient(backend, poison, shape, layout, dtype, normalize):
    embeddings = embed(shape, layout, dtype).requires_grad_()
    pixels = shape[0] * shape[2] * shape[3]
    indices = torch.randint(0, pixels, (2 * pixels + 3,))  # repeats add up
    weights = torch.randn(len(indices), shape[1]).to(dtype)
    rows = gather_embeddings(embeddings, indices, normalize=normalize, backend=backend)
    rows.backward(weights)

    exact = embeddings.detach().double().requires_grad_()
    expected = truth(exact, indices, normalize)
    expected.backward(weights.double())
    assert rows.dtype == dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(rows.double(), expected, rtol=0, atol=scale * TOLERANCE[dtype])
    scale = exact.grad.abs().max().item()
    # A sum of rows, rounded at every step.
    torch.testing.assert_close(
        embeddings.grad.double(), exact.grad, rtol=0, atol=scale * 4 * TOLERANCE[dtype] + 1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_another_dtype(backend, dtype, rows_dtype):
    embeddings = torch.randn(2, 24, 5, 6).to(dtype).requires_grad_()
    indices = torch.arange(0, 60, 7)
    rows = gather_embeddings(embeddings, indices, dtype=rows_dtype, backend=backend)
    assert rows.dtype == rows_dtype
    # Normalised in fp32 and rounded once: not twice through the map's dtype.
    torch.testing.assert_close(
        rows, truth(embeddings, indices).to(rows_dtype), rtol=0, atol=torch.finfo(rows_dtype).eps / 2
    )
    rows.float().sum().backward()
    assert embeddings.grad.dtype == dtype
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_repeats_add_up_in_float32(backend, dtype):
    """4096 ones add up to 4096; a bf16 sum would stop at 256."""
    embeddings = torch.randn(1, 3, 2, 2).to(dtype).requires_grad_()
    indices = torch.zeros(4096, dtype=torch.int64)
    gather_embeddings(embeddings, indices, normalize=False, backend=backend).sum().backward()
    assert (embeddings.grad[:, :, 0, 0] == 4096).all()
    assert embeddings.grad.sum() == 3 * 4096


@pytest.mark.parametrize("rows", [1024, 1025, 5000])
def test_rows_of_a_pixel_add_up_in_their_order(backend, poison, rows):
    """Rows are sorted in tiles of 1024; a sum in any other order would have other bits."""
    embeddings = torch.randn(2, 3, 9, 20).requires_grad_()
    indices = torch.randint(0, 360, (rows,))
    weights = torch.randn(rows, 3) * 10.0 ** torch.randint(-3, 4, (rows, 1))
    gather_embeddings(embeddings, indices, normalize=False, backend=backend).backward(weights)
    expected = torch.zeros(2, 9, 20, 3)
    for index, weight in zip(indices.tolist(), weights, strict=True):
        expected.view(360, 3)[index] += weight
    assert torch.equal(embeddings.grad, expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_has_the_layout_of_the_map(backend, layout):
    embeddings = embed((2, 8, 4, 5), layout, torch.float32).requires_grad_()
    gather_embeddings(embeddings, torch.arange(9), backend=backend).sum().backward()
    assert embeddings.grad.stride() == embeddings.stride()


def test_gradient_of_an_expanded_map(backend):
    embeddings = torch.randn(1, 6, 1, 1, requires_grad=True)
    expanded = embeddings.expand(2, 6, 3, 4)
    indices = torch.arange(24)
    weights = torch.randn(24, 6)
    gather_embeddings(expanded, indices, backend=backend).backward(weights)
    exact = embeddings.detach().double().requires_grad_()
    truth(exact.expand(2, 6, 3, 4), indices).backward(weights.double())
    torch.testing.assert_close(embeddings.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_gradcheck_in_double():
    embeddings = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([0, 23, 7, 7, 11])
    for normalize in (True, False):
        assert torch.autograd.gradcheck(
            lambda e, n=normalize: gather_embeddings(e, indices, normalize=n, backend="reference"), embeddings
        )


def test_zero_norm_gives_zero_row_and_zero_gradient(backend):
    embeddings = torch.randn(1, 4, 2, 2)
    embeddings[:, :, 0, 1] = 0
    embeddings.requires_grad_()
    rows = gather_embeddings(embeddings, torch.tensor([1, 2]), backend=backend)
    rows.sum().backward()
    assert (rows[0] == 0).all()
    assert rows[1].norm().item() == pytest.approx(1)
    assert (embeddings.grad[:, :, 0, 1] == 0).all()
    assert (embeddings.grad[:, :, 1, 0] != 0).any()


def test_norms_do_not_overflow_in_half_precision(backend):
    embeddings = torch.full((1, 64, 1, 1), 30000.0, dtype=torch.float16)
    rows = gather_embeddings(embeddings, torch.tensor([0]), backend=backend)
    torch.testing.assert_close(rows, torch.full((1, 64), 0.125, dtype=torch.float16))


def test_norm_beyond_float32_gives_zero(backend):
    embeddings = torch.full((1, 4, 1, 1), 1e25, requires_grad=True)
    rows = gather_embeddings(embeddings, torch.tensor([0]), backend=backend)
    rows.sum().backward()
    assert (rows == 0).all()
    assert (embeddings.grad == 0).all()


def test_nan_reaches_the_row_but_not_through_rows_without_gradient(backend):
    embeddings = torch.randn(1, 4, 2, 2)
    embeddings[:, 2, 0, 0] = float("nan")
    embeddings.requires_grad_()
    rows = gather_embeddings(embeddings, torch.tensor([0, 3]), backend=backend)
    assert rows[0].isnan().all()
    assert rows[1].isfinite().all()
    rows.backward(torch.tensor([[0.0], [1.0]]).expand(2, 4))
    assert embeddings.grad.isfinite().all()
    assert embeddings.grad[:, :, 1, 1].abs().sum() > 0


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3)])
def test_empty_map_gives_zero_rows(backend, poison, shape):
    embeddings = torch.zeros(shape, requires_grad=True)
    rows = gather_embeddings(embeddings, torch.zeros(6, dtype=torch.int64), backend=backend)
    rows.sum().backward()
    assert (rows == 0).all()
    assert embeddings.grad.shape == shape


def test_no_rows(backend, poison):
    embeddings = torch.randn(2, 5, 3, 3, requires_grad=True)
    rows = gather_embeddings(embeddings, torch.zeros(0, dtype=torch.int64), backend=backend)
    rows.sum().backward()
    assert rows.shape == (0, 5)
    assert (embeddings.grad == 0).all()


def test_non_contiguous_cotangent_and_indices(backend):
    embeddings = torch.randn(2, 6, 4, 4, requires_grad=True)
    indices = torch.arange(32).view(16, 2)[:, 1]
    weights = torch.randn(6, 16)
    rows = gather_embeddings(embeddings, indices, backend=backend)
    (found,) = torch.autograd.grad(rows, embeddings, weights.T)
    exact = embeddings.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(truth(exact, indices), exact, weights.T.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_repeats_bit_for_bit_at_any_thread_count():
    embeddings = torch.randn(4, 65, 20, 21, requires_grad=True)
    indices = torch.randint(0, 4 * 420, (500,))
    weights = torch.randn(500, 65)
    before, results = torch.get_num_threads(), []
    try:
        for threads in [1, 2, 3] * 10:
            torch.set_num_threads(threads)
            rows = gather_embeddings(embeddings, indices, backend="cpu")
            results.append((rows.detach(), *torch.autograd.grad(rows, embeddings, weights)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for found in results for a, b in zip(found, results[0], strict=True))


def test_differentiating_twice_is_refused(backend):
    embeddings = torch.randn(1, 3, 2, 2, requires_grad=True)
    rows = gather_embeddings(embeddings, torch.arange(4), backend=backend)
    (grad,) = torch.autograd.grad(rows.sum(), embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        (grad.square().sum() + embeddings.sum()).backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(embeddings=torch.zeros(1, 2, 3, 4, dtype=torch.int64)),
            TypeError,
            "embeddings must be a floating-point",
        ),
        (dict(embeddings=torch.zeros(2, 3, 4)), ValueError, r"\[B, D, H, W\] with D >= 1, got \(2, 3, 4\)"),
        (dict(embeddings=torch.zeros(2, 0, 3, 4)), ValueError, r"got \(2, 0, 3, 4\)"),
        (
            dict(indices=torch.zeros(3, dtype=torch.int32)),
            TypeError,
            "indices must be int64, got torch.int32",
        ),
        (
            dict(indices=torch.zeros(3, 1, dtype=torch.int64)),
            ValueError,
            r"indices must have shape \[A\], got \(3, 1\)",
        ),
        (
            dict(indices=torch.zeros(3, dtype=torch.int64, device="meta")),
            ValueError,
            "indices must be on cpu, got meta",
        ),
        (dict(indices=[0]), TypeError, "indices must be int64, got list"),
        (dict(dtype=torch.int32), TypeError, "dtype must be floating point, got torch.int32"),
    ],
)
def test_bad_input(backend, change, error, message):
    arguments = dict(
        embeddings=torch.zeros(2, 5, 3, 4), indices=torch.zeros(3, dtype=torch.int64), backend=backend
    )
    with pytest.raises(error, match=message):
        gather_embeddings(**(arguments | change))


@pytest.mark.parametrize(("indices", "place"), [([0, 24], 1), ([-1], 0)])
def test_bad_index_is_named_with_its_place(careful_backend, indices, place):
    message = rf"indices\[{place}\] is {indices[place]}, expected 0 <= index < B\*H\*W=24"
    with pytest.raises(ValueError, match=message):
        gather_embeddings(torch.zeros(2, 5, 3, 4), torch.tensor(indices), backend=careful_backend)


@pytest.mark.parametrize("normalize", [True, False])
def test_bad_index_is_a_zero_row_on_a_gpu(gpu_backend, poison, normalize):
    embeddings = torch.randn(2, 5, 3, 4, requires_grad=True)
    indices = torch.tensor([3, 24, -1, 23, 2**62, -(2**63), 3])
    good = (indices >= 0) & (indices < 24)
    settings = dict(normalize=normalize)
    rows = gather_embeddings(embeddings, indices, backend=gpu_backend, **settings)
    expected = gather_embeddings(embeddings, indices[good], backend="reference", **settings)
    torch.testing.assert_close(rows[good], expected)
    assert (rows[~good] == 0).all()
    weights = torch.randn(7, 5)
    (grad,) = torch.autograd.grad(rows, embeddings, weights)
    (expected_grad,) = torch.autograd.grad(expected, embeddings, weights[good])
    torch.testing.assert_close(grad, expected_grad)


def test_more_than_2_31_elements():
    """A map of 2^32 elements that takes no memory: 64-bit offsets or a crash."""
    embeddings = torch.randn(1, 1, 1, 2**16).expand(2**11, 32, 1, 2**16)
    last = 2**11 * 2**16 - 1
    rows = gather_embeddings(embeddings, torch.tensor([last, last - 1, 5]), normalize=False, backend="cpu")
    assert torch.equal(rows, embeddings[0, 0, 0, [-1, -2, 5]][:, None].expand(3, 32))
