"""What the tests share: the backends that run here, and tensors that no kernel may read or leave unwritten
carelessly.
"""

from __future__ import annotations

import pytest
import torch

from pixcontrast_ext.backends import native


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
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
