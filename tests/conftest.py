"""Fixtures that all tests share.

They provide the backends that run here, and fill new tensors with poison, so that a test notices a kernel that reads
memory nobody wrote, or leaves its output unwritten.
"""

from __future__ import annotations

import os

import pytest

pytest.register_assert_rewrite("tests.support")

from tests.support.backends import (
    BACKENDS,
    EMULATOR,
    GPU_BACKENDS,
    ON_DEVICE,
    SHARE,
    backends_of,
    outside_of_the_share,
    parameters,
)

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more would be processes that import torch
if not ON_DEVICE:  # Triton reads it once, when it is imported, which importing torch may do
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from pixcontrast_ext.backends import native
from tools import emulated


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "whole: all of its combinations are run, whatever the share")


@pytest.hookimpl(trylast=True)  # after -k has selected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only the cpu backend uses the processor's instruction sets: run the others with one; then apply the share."""
    sets = native._C.instruction_sets() if native._C else []
    left_out = {
        item
        for item in items
        if backends_of(item)
        and "cpu" not in backends_of(item)
        and parameters(item).get("instruction_set") in sets[1:]
    }
    shared = [item for item in items if item not in left_out and not item.get_closest_marker("whole")]
    left_out |= set(outside_of_the_share(shared, SHARE))
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def cuda_on_cpu_tensors() -> None:
    if not ON_DEVICE:
        emulated.serve(BACKENDS, EMULATOR)
        return
    assert torch.cuda.is_available(), "PIXCONTRAST_TEST_CUDA=device, and torch finds no CUDA device"
    from tests.support import on_device  # here: it needs Triton

    on_device.serve()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name in BACKENDS if name != "triton" or ON_DEVICE])
def quick_backend(request: pytest.FixtureRequest) -> str:
    """For behaviour of a loss or bank that no backend changes: without Triton, whose interpreted steps take seconds."""
    return request.param


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name in GPU_BACKENDS if name == "cuda"])
def cuda_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name in BACKENDS if name in ("reference", "cpu")])
def careful_backend(request: pytest.FixtureRequest) -> str:
    """A backend that checks labels and indices first and refuses bad ones; GPU kernels treat them as ignored."""
    return request.param


@pytest.fixture(params=native._C.instruction_sets() if native._C else [])
def instruction_set(request: pytest.FixtureRequest):
    """Every instruction set of the CPU kernels that this processor has, one after another."""
    before = native._C.instruction_set()
    native._C.select_instruction_set(request.param)
    yield request.param
    native._C.select_instruction_set(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20210118)


@pytest.fixture
def poison():
    """torch.empty gives NaN and the largest integers, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
