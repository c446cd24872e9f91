"""What is Triton's own: the interpreter's roundings, masks at the end of memory, the versions and devices it serves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from conftest import BACKENDS, ON_DEVICE
from pixcontrast_ext import MemoryBank, backends, gather_embeddings, hard_anchor_sampling, infonce
from pixcontrast_ext.backends import triton as triton_backend
from pixcontrast_ext.backends.triton import infonce as infonce_kernels
from pixcontrast_ext.backends.triton import launch, numerics

ROOT = Path(__file__).parents[1]
if "triton" not in BACKENDS:
    pytest.skip("PIXCONTRAST_TEST_BACKENDS leaves triton out", allow_module_level=True)


def guard(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "tests/triton_guard.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )


@pytest.mark.skipif(ON_DEVICE, reason="it interprets, which make test does")
def test_nothing_is_touched_behind_the_end_of_a_tensor():
    done = guard()
    assert (done.returncode, done.stdout) == (0, "no overrun\n"), done.stderr[-3000:]


@pytest.mark.skipif(ON_DEVICE, reason="it interprets, which make test does")
def test_touching_what_lies_behind_a_tensor_is_seen():
    assert guard("--overrun").returncode == -signal.SIGSEGV


@triton.jit
def round_kernel(values, rounded, tf32, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(values + i, mask=i < count, other=0.0)
    tl.store(rounded + i, numerics.rounded_to(value, rounded.dtype.element_ty), mask=i < count)
    tl.store(tf32 + i, numerics.rounded_to_tf32(value), mask=i < count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stores_round_to_nearest_even(dtype):
    special = [
        0.0,
        -0.0,
        1.0,
        float("inf"),
        -float("inf"),
        float("nan"),
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-11,
        3e38,
    ]
    values = torch.cat([torch.tensor(special), torch.randn(900) * 10 ** torch.empty(900).uniform_(-6, 4)])
    rounded, tf32 = torch.empty_like(values, dtype=dtype), torch.empty_like(values)
    launch.launch(round_kernel, (1,), values, rounded, tf32, len(values), BLOCK=1024)
    torch.testing.assert_close(rounded, values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_tf32_rounds_to_nearest():
    values = torch.cat([torch.tensor([1 + 2**-11, 1 + 2**-12, -(1 + 3 * 2**-11), 0.0]), torch.randn(1000)])
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # what a GPU makes
    values = torch.cat([values, torch.tensor([float("inf")]), nan])
    rounded, tf32 = torch.empty_like(values), torch.empty_like(values)
    launch.launch(round_kernel, (1,), values, rounded, tf32, len(values), BLOCK=2048)
    exponent = values.abs().double().clamp(1e-30, 1e38).log2().floor()
    step = 2.0 ** (exponent - 10)
    nearest = (
        (values.double().abs() / step + 0.5).floor() * step * values.double().sign()
    )  # ties away from zero
    assert torch.equal(tf32[:-2].double(), nearest[:-2])
    assert tf32[-2] == float("inf") and tf32[-1].isnan()


@pytest.mark.parametrize(
    ("version", "reason"), [("3.5.1", "needs triton 3.6 or later, and 3.5.1"), (None, "not installed")]
)
def test_versions_that_do_not_serve(monkeypatch, version, reason):
    def found(name: str) -> str:
        if version is None:
            raise triton_backend.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(triton_backend.importlib.metadata, "version", found)
    triton_backend._unavailable.cache_clear()
    try:
        assert reason in backends.available_backends()["triton"]
    finally:
        monkeypatch.undo()
        triton_backend._unavailable.cache_clear()


def test_an_old_device_is_named(monkeypatch):
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    triton_backend._unsupported_device.cache_clear()
    try:
        assert (
            backends.available_backends()["triton"]
            == "it needs a device of sm_80 or later, and this is sm_75"
        )
    finally:
        triton_backend._unsupported_device.cache_clear()


@pytest.mark.parametrize("batch", [1, 3])
def test_launches_do_not_depend_on_the_data(monkeypatch, batch):
    """Nor on its size; sampling and enqueueing take six at most."""
    counts: dict[str, int] = {}
    make = launch.launch

    def counted(op: str, call: Callable[[], Any]) -> Any:
        def count(*arguments: Any, **options: Any) -> None:
            counts[op] = counts.get(op, 0) + 1
            make(*arguments, **options)

        monkeypatch.setattr(launch, "launch", count)
        return call()

    embeddings = torch.randn(batch, 5, 9, 8, requires_grad=True)
    labels = torch.randint(0, 3, (batch, 9, 8))
    bank = MemoryBank(3, 5, region_slots=2, pixel_slots=9, process_group=None)
    settings = dict(num_classes=3, max_samples=30, max_views=9, min_pixels=1, backend="triton")
    sample = counted("sampling", lambda: hard_anchor_sampling(labels, labels, **settings))
    anchors = counted("gather", lambda: gather_embeddings(embeddings, sample.indices, backend="triton"))
    counted("enqueue", lambda: bank.enqueue(embeddings.detach(), labels, backend="triton"))
    contrast = dict(temperature=0.1, backend="triton")
    loss = counted("infonce", lambda: infonce(anchors, sample.labels, *bank.flat(), **contrast))
    counted("backward", loss.backward)
    assert counts == {"sampling": 5, "gather": 1, "enqueue": 6, "infonce": 7, "backward": 3}


@pytest.mark.parametrize("arithmetic", sorted(infonce_kernels._TILES))
def test_tiles_of_the_positives_divide_those_of_the_plan(arithmetic):
    assert max(infonce_kernels._TILES[arithmetic]) == triton_backend.MAX_CHANNELS
    for tiles in infonce_kernels._TILES[arithmetic].values():
        assert tiles.negatives.rows % tiles.positives.rows == 0
        assert tiles.negatives.columns % tiles.positives.columns == 0


@pytest.mark.parametrize("channels", [50, 128, 200, 512])
@pytest.mark.parametrize("arithmetic", ["bf16", "fp16", "tf32", "tf32x3"])
@pytest.mark.parametrize("major", [8, 9])
def test_every_tile_computes_the_same(monkeypatch, poison, major, arithmetic, channels):
    """Loss and gradients against fp64, with the tiles of each device."""
    monkeypatch.setattr(launch, "capability", lambda device: (major, 0))
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
    before, setting.fp32_precision = setting.fp32_precision, "tf32" if arithmetic == "tf32" else "ieee"
    try:
        found = gradients("triton", rows)
    finally:
        setting.fp32_precision = before
    expected = gradients("reference", [x.double() for x in rows])
    bars = {
        torch.float32: 2e-6,
        torch.float16: 1.5e-3,
        torch.bfloat16: 4e-3,
    }  # rounding of a gradient to its dtype too
    bar = 1e-3 if arithmetic == "tf32" else bars[dtype]
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.double() - exact).norm() <= bar * exact.norm()


def test_tiny_pixels_have_a_direction(gpu_backend):
    """Squares of this norm are subnormal, or 0."""
    embeddings = torch.zeros(1, 4, 1, 2)
    embeddings[0, :, 0, 0] = 1e-20
    rows = gather_embeddings(embeddings, torch.tensor([0, 1]), backend=gpu_backend)
    torch.testing.assert_close(rows, torch.tensor([[0.5] * 4, [0.0] * 4]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_a_temperature_beyond_float32(temperature):
    rows, labels = torch.randn(9, 4), torch.arange(9) % 3
    loss, expected = (
        infonce(rows, labels, rows.clone(), labels, temperature=temperature, backend=name)
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(loss, expected)
