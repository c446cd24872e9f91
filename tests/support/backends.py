"""Which backends run here, and how much of each test, as the environment says. It imports no torch.

The GPU backends take CPU tensors: the kernels of `cuda` run in the emulator and those of `triton` in Triton's
interpreter, or, with PIXCONTRAST_TEST_CUDA=device, both on a GPU that gets copies of the tensors.
PIXCONTRAST_TEST_BACKENDS names the backends to test, separated by commas. PIXCONTRAST_TEST_SHARE=4 runs a quarter of
the combinations of each test, where all of them take too long.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest

ON_DEVICE = os.environ.get("PIXCONTRAST_TEST_CUDA") == "device"
BACKENDS = os.environ.get("PIXCONTRAST_TEST_BACKENDS", "reference,cpu,cuda,triton").split(",")
GPU_BACKENDS = [name for name in BACKENDS if name in ("cuda", "triton")]
EMULATOR = os.environ.get("PIXCONTRAST_TEST_EMULATOR", "plain")  # a variant of tools/emulator/build.py
SHARE = int(os.environ.get("PIXCONTRAST_TEST_SHARE", "1"))


def parameters(item: pytest.Item) -> dict[str, object]:
    return getattr(getattr(item, "callspec", None), "params", {})


def backends_of(item: pytest.Item) -> list[object]:
    """Those that a test is given."""
    return [value for name, value in parameters(item).items() if name.endswith("backend")]


def outside_of_the_share(items: list[pytest.Item], share: int) -> Iterator[pytest.Item]:
    """All but one in `share` of the combinations of each test and backend, drawn by a fixed hash of their names."""
    groups: dict[tuple[object, ...], list[pytest.Item]] = {}
    for item in items:
        groups.setdefault((item.nodeid.partition("[")[0], *backends_of(item)), []).append(item)
    for group in groups.values():
        drawn = sorted(group, key=lambda item: zlib.crc32(item.nodeid.encode()))
        yield from drawn[-(-len(group) // share) :]
