"""What only the Triton backend has: versions and devices served, launches, rounding, masks at the end of memory."""

from __future__ import annotations

import contextlib
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

from pixcontrast_ext import (
    MemoryBank,
    PixelContrastLoss,
    backends,
    gather_embeddings,
    hard_anchor_sampling,
    infonce,
)
from pixcontrast_ext.backends import device as devices
from pixcontrast_ext.backends import triton as triton_backend
from pixcontrast_ext.backends.triton import launch, numerics
from tests.support.backends import BACKENDS, ON_DEVICE

ROOT = Path(__file__).parents[1]


if "triton" not in BACKENDS:
    pytest.skip("PIXCONTRAST_TEST_BACKENDS leaves triton out", allow_module_level=True)


def guard(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.triton_guard", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(ON_DEVICE, reason="it interprets, which make test does")
def test_nothing_is_touched_behind_the_end_of_a_tensor():
    done = guard()
    assert (done.returncode, done.stdout) == (0, "no overrun\n"), done.stderr[-3000:]


@pytest.mark.skipif(ON_DEVICE, reason="it interprets, which make test does")
def test_touching_what_lies_behind_a_tensor_is_seen():
    assert guard("--overrun").returncode == -signal.SIGSEGV


@triton.jit
def round_kernel(values, rounded, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(values + i, mask=i < count, other=0.0)
    tl.store(rounded + i, numerics.rounded_to(value, rounded.dtype.element_ty), mask=i < count)


@triton.jit
def log1p_kernel(values, logarithms, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + i, mask=i < count, other=0.0)
    tl.store(logarithms + i, numerics.log1p(value), mask=i < count)


def test_log1p():
    values = torch.cat([torch.tensor([0.0, 1.0, 1e-38, 1e-8]), torch.rand(5000), torch.rand(5000) ** 20])
    found = torch.empty_like(values)
    launch.start(log1p_kernel, (10,), values, found, len(values), BLOCK=1024)
    torch.testing.assert_close(found.double(), values.double().log1p(), rtol=4e-7, atol=1e-44)


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
    rounded = torch.empty_like(values, dtype=dtype)
    launch.start(round_kernel, (1,), values, rounded, len(values), BLOCK=1024)
    torch.testing.assert_close(rounded, values.to(dtype), rtol=0, atol=0, equal_nan=True)


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
    monkeypatch.setattr(devices, "gpu", devices.Gpu())
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


def test_the_device_asked_is_the_one_of_the_tensors(monkeypatch):
    """The current device is too old, the other one is not."""
    monkeypatch.setattr(devices, "gpu", devices.Gpu())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    of = {0: (7, 5), 1: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of[device.index])
    triton_backend._unsupported_device.cache_clear()
    try:
        old, new = torch.device("cuda", 0), torch.device("cuda", 1)
        assert backends.resolve("triton", "gather_embeddings", new, torch.float32) == "triton"
        with pytest.raises(ValueError, match="needs a device of sm_80 or later, and this is sm_75"):
            backends.resolve("triton", "gather_embeddings", old, torch.float32)
    finally:
        triton_backend._unsupported_device.cache_clear()


@pytest.mark.parametrize(
    ("version", "anyway", "serves"),
    [("12.8", "", False), ("13.2", "", False), ("13.3", "", True), ("12.8", "1", True)],
)
def test_hopper_needs_a_safe_assembler(monkeypatch, version, anyway, serves):
    monkeypatch.setattr(triton_backend, "assembler", lambda arch: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setenv(triton_backend.ANY_ASSEMBLER, anyway or "0")
    triton_backend._unsupported_device.cache_clear()
    try:
        reason = triton_backend._unsupported_device(0)
    finally:
        triton_backend._unsupported_device.cache_clear()
    if serves:
        assert reason is None
    else:
        assert "CUDA 13.3" in reason
        assert version in reason
        assert "install triton 3.9" in reason


def test_the_assembler_is_the_one_that_triton_calls():
    """Triton 3.9 brings a safe assembler, 3.6 does not."""
    major, minor = map(int, triton_backend.assembler(90).split(".")[:2])
    newest = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    assert ((major, minor) >= triton_backend.SAFE_ASSEMBLER) == newest


class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    device = torch.device("cuda", 0)


def test_a_kernel_is_found_again_without_asking_triton(monkeypatch):
    """The launcher's key holds everything by which Triton tells kernels apart.

    That is dtypes, which addresses and numbers are multiples of 16, which numbers are 1 or beyond int32, and constants.
    The compiled kernel gets the same arguments, with the constants in its own order.
    """
    asked: list[Any] = []
    launched: list[Any] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: launched.append((grid, *arguments))

    class Kernel:
        arg_names = ("rows", "count", "WIDTH", "AGAIN")

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
            return lambda *arguments, **options: asked.append((grid, *arguments, options)) or Compiled()

    monkeypatch.setattr(devices, "gpu", devices.Gpu())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    kernel, rows = Kernel(), torch.zeros(64).as_subclass(OnGpu)

    class OnAnother(torch.Tensor):
        device = torch.device("cuda", 1)

    made_current: list[torch.device] = []
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: made_current.append(device) or contextlib.nullcontext()
    )

    def asks(first: Any, count: int, **options: Any) -> bool:
        before = len(asked), len(launched)
        launch.start(kernel, (3,), first, count, **options)
        return (len(asked), len(launched)) == (before[0] + 1, before[1])

    assert asks(rows, 7, AGAIN=False, WIDTH=4, num_warps=8)
    assert not asks(rows, 9, AGAIN=False, WIDTH=4, num_warps=8)
    (again,) = launched
    assert again[0] == (3, 1, 1)
    assert again[1] is rows
    assert again[2:] == (9, 4, False)
    assert not asks(rows[4:], 9, AGAIN=False, WIDTH=4, num_warps=8)
    for first, count, options in (
        (rows[1:], 7, {}),
        (rows.half(), 7, {}),
        ((rows, rows), 7, {}),
        ((rows, rows[1:]), 7, {}),
        (rows, 1, {}),
        (rows, 32, {}),
        (rows, 2**31 + 1, {}),
        (rows, 7, dict(AGAIN=True)),
        (rows, 7, dict(num_warps=4)),
        (rows.as_subclass(OnAnother), 7, {}),
    ):
        options = dict(AGAIN=False, WIDTH=4, num_warps=8) | options
        assert asks(first, count, **options), (first, count, options)
        assert not asks(first, count, **options)
    assert made_current == 2 * [OnAnother.device]


def test_a_cold_kernel_within_a_capture_says_what_to_do(monkeypatch):
    """Triton calls a hook before it compiles or loads a kernel, but not for one that is already loaded."""

    class Kernel:
        name = "pixcontrast_ext.backends.triton.gather.gather_kernel"

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: triton.knobs.runtime.jit_cache_hook(key="", repr="", fn=self)

    monkeypatch.setattr(devices, "gpu", devices.Gpu())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before, tensor = triton.knobs.runtime.jit_cache_hook, torch.zeros(1).as_subclass(OnGpu)
    with pytest.raises(RuntimeError, match=r"gather_kernel is not compiled yet.* run the step once before"):
        launch.start(Kernel(), (1,), tensor)
    assert triton.knobs.runtime.jit_cache_hook is before


@pytest.mark.parametrize("batch", [1, 3])
def test_launches_do_not_depend_on_the_data(monkeypatch, batch):
    """Launches do not depend on the batch size either; sampling and enqueueing take six at most."""
    counts: dict[str, int] = {}
    make = launch.start

    def counted(op: str, call: Callable[[], Any]) -> Any:
        def count(*arguments: Any, **options: Any) -> None:
            counts[op] = counts.get(op, 0) + 1
            make(*arguments, **options)

        monkeypatch.setattr(launch, "start", count)
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
    assert counts == {"sampling": 5, "gather": 1, "enqueue": 6, "infonce": 10, "backward": 3}


def test_warming_up_launches_what_a_step_behind_the_warm_up_does(monkeypatch):
    """It launches them with the same constants, so that nothing is left to compile."""
    bank = MemoryBank(3, 5, region_slots=2, pixel_slots=9, process_group=None)
    settings = dict(max_samples=30, max_views=9, min_pixels=1, backend="triton")
    criterion = PixelContrastLoss(3, bank=bank, warmup_steps=1, **settings)
    embeddings, labels = torch.randn(2, 5, 9, 8), torch.randint(0, 3, (2, 9, 8))
    launched: list[Any] = []
    make = launch.start

    def noted(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        types = [getattr(value, "dtype", type(value)) for value in arguments]
        launched.append((kernel.fn.__name__, str(types), str(options)))
        make(kernel, grid, *arguments, **options)

    monkeypatch.setattr(launch, "start", noted)
    criterion.warm_up(embeddings, labels, labels)
    compiled = set(launched)
    launched.clear()
    for _ in range(2):
        criterion(embeddings.clone().requires_grad_(), labels, labels).backward()
    assert launched
    assert set(launched) <= compiled


def test_tiny_pixels_have_a_direction(gpu_backend):
    """The squares of such small values are subnormal or 0."""
    embeddings = torch.zeros(1, 4, 1, 2)
    embeddings[0, :, 0, 0] = 1e-20
    rows = gather_embeddings(embeddings, torch.tensor([0, 1]), backend=gpu_backend)
    torch.testing.assert_close(rows, torch.tensor([[0.5] * 4, [0.0] * 4]), rtol=1e-2, atol=0)
