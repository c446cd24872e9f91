"""A small set for pytest-benchmark: every method that runs on a CPU, verified and then timed in its longest pass.

    pytest benchmarks --benchmark-autosave        # and after a change: --benchmark-compare

Groups hold the methods of one case. With --benchmark-disable each is verified and called once.
"""

from functools import cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from . import load
from .harness import Case, Method, Unavailable

SHAPES: dict[str, dict[str, tuple[str, ...]]] = {
    "infonce": {
        "A256-K1900-D256-C19": ("fp32",),
        "A256-D64-C5": ("bf16",),
        "A32-K380-D64-C19": ("fp32",),
    },
    "mining": {"A256-K1900-D64-C19": ("fp32",), "A256-D64-C5": ("bf16",)},
    "sampling": {"B4-D64-H64-W128-C19-A1024": ("fp32",)},
    "gather": {"B4-D64-H64-W128-C19-A1024": ("fp32", "bf16")},
    "enqueue": {"B4-D64-H64-W128-C19-A1024": ("fp32", "bf16")},
    "training_step": {"B4-D64-H64-W128-C19-A512-K9500": ("fp32",)},
    "network_step": {
        "B2-H96-W128-C11-A256-D64-K2200": ("fp32",),
        "B2-H64-W64-C11-A256-D64-K2200-N18": ("fp32",),
    },
}


@cache
def case(op: str, shape: str, dtype: str) -> Case:
    module = load(op)
    found: Case = module.case(module.SHAPE.parse(shape), dtype, "cpu", list(module.BACKENDS["cpu"]))
    return found


@cache
def verified(op: str, shape: str, dtype: str, name: str) -> Method:
    method = case(op, shape, dtype).candidates[name].build()
    errors = method.verify()
    wrong = {what: pair for what, pair in errors.items() if not pair[0] <= pair[1]}
    assert not wrong, f"{name}: (error, limit) {wrong}"
    return method


# An HRNet takes seconds to build, and the loss sees nothing of it but its feature map.
OF_HRNET = ("contrast off", "ours (cpu), used")
METHODS = [
    (op, shape, dtype, name)
    for op, shapes in SHAPES.items()
    for shape, dtypes in shapes.items()
    for dtype in dtypes
    for name in case(op, shape, dtype).candidates
    if "-N" not in shape or name in OF_HRNET
]


def test_an_hrnet_is_among_them() -> None:
    assert {name for _, shape, _, name in METHODS if "-N" in shape} == set(OF_HRNET)


@pytest.mark.parametrize(("op", "shape", "dtype", "name"), METHODS, ids=[" ".join(each) for each in METHODS])
def test_quick(benchmark: BenchmarkFixture, op: str, shape: str, dtype: str, name: str) -> None:
    of_case = case(op, shape, dtype)
    if of_case.candidates[name].needs_bytes > 2**32:
        pytest.skip(f"needs {of_case.candidates[name].needs_bytes / 2**30:.3g} GiB")
    try:
        method = verified(op, shape, dtype, name)
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = of_case.title
    outcome = benchmark.pedantic(method.longest(), rounds=5, warmup_rounds=1)  # type: ignore[no-untyped-call]
    assert outcome is not None or op == "enqueue"
