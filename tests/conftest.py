"""What the tests share: the backends that run here, and tensors that no kernel may read or leave unwritten
carelessly.

The backends for a GPU take CPU tensors: the kernels of `cuda` run in the emulator, those of `triton` in Triton's
interpreter, or, with PIXCONTRAST_TEST_CUDA=device, both on a GPU that gets copies of the tensors.
PIXCONTRAST_TEST_BACKENDS names those to test; a comma between two. PIXCONTRAST_TEST_SHARE=4 runs a quarter of the
combinations of each test, where all take too long.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

ON_DEVICE = os.environ.get("PIXCONTRAST_TEST_CUDA") == "device"
BACKENDS = os.environ.get("PIXCONTRAST_TEST_BACKENDS", "reference,cpu,cuda,triton").split(",")
EMULATOR = os.environ.get("PIXCONTRAST_TEST_EMULATOR", "plain")  # a variant of tools/emulator/build.py
SHARE = int(os.environ.get("PIXCONTRAST_TEST_SHARE", "1"))
GPU_BACKENDS = [name for name in BACKENDS if name in ("cuda", "triton")]
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes, which import torch
if not ON_DEVICE:  # Triton looks once, when its own library is imported, which importing torch may do
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

import on_device
from pixcontrast_ext import backends
from pixcontrast_ext.backends import native
from pixcontrast_ext.backends import triton as triton_backend
from pixcontrast_ext.backends.triton import launch
from tools import emulated


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def parameters(item: pytest.Item) -> dict[str, object]:
    return getattr(getattr(item, "callspec", None), "params", {})


def outside_of_the_share(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """All but one in SHARE of the combinations of each test and backend, whose names draw them: the same every time."""
    groups: dict[tuple[str, object], list[pytest.Item]] = {}
    for item in items:
        groups.setdefault((item.nodeid.partition("[")[0], parameters(item).get("backend")), []).append(item)
    for group in groups.values():
        drawn = sorted(group, key=lambda item: zlib.crc32(item.nodeid.encode()))
        yield from drawn[-(-len(group) // SHARE) :]


@pytest.hookimpl(trylast=True)  # of those that -k has left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The kernels for a GPU have no instruction set of the processor to go through."""
    sets = native._C.instruction_sets() if native._C else []
    left_out = {
        item
        for item in items
        if parameters(item).get("backend") in ("cuda", "triton")
        and parameters(item).get("instruction_set") in sets[1:]
    }
    left_out |= set(outside_of_the_share([item for item in items if item not in left_out]))
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def cuda_on_cpu_tensors() -> None:
    if not ON_DEVICE:
        return emulated.serve(BACKENDS, EMULATOR)
    assert torch.cuda.is_available(), "PIXCONTRAST_TEST_CUDA=device, and torch finds no CUDA device"
    native.launch_cuda = on_device.launch_cuda
    launch.launch, launch.capability = on_device.launch_triton, on_device.capability
    native.cuda_device_type = "cpu"
    backends.DEVICES["cuda"] = backends.DEVICES["triton"] = ("cpu",)
    triton_backend.INTERPRETED = True


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name in BACKENDS if name != "triton" or ON_DEVICE])
def quick_backend(request: pytest.FixtureRequest) -> str:
    """For what a loss or a bank does whatever the backend: an interpreted step takes seconds."""
    return request.param


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name in GPU_BACKENDS if name == "cuda"])
def cuda_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["reference", "cpu"])
def careful_backend(request: pytest.FixtureRequest) -> str:
    """One that looks at labels and indices first, and refuses bad ones. Kernels for a GPU take them for ignored."""
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
