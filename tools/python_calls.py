"""Counts the Python calls of the package in a training step on the CPU: `python -m tools.python_calls [--all]`.

Besides its kernels, most of a step's cost is calls. `--all` names the functions. The count depends on the instruction
set: without AVX-512, InfoNCE's products are torch's, and every tile takes calls of its own.
"""

from __future__ import annotations

import collections
import sys
from types import FrameType

import torch

from pixcontrast_ext import MemoryBank, PixelContrastCrossEntropyLoss
from pixcontrast_ext.backends import native

WARM_UP = 60  # steps; by then the watch for silent classes has ended


def counted() -> collections.Counter[str]:
    """The calls of one step, by function."""
    torch.manual_seed(0)
    embeddings = torch.randn(2, 16, 32, 32, requires_grad=True)
    logits = torch.randn(2, 5, 16, 16, requires_grad=True)
    labels = torch.randint(0, 5, (2, 64, 64))
    bank = MemoryBank(5, 16, region_slots=50, pixel_slots=50)
    criterion = PixelContrastCrossEntropyLoss(5, bank=bank, max_samples=128, min_pixels=1)
    calls: collections.Counter[str] = collections.Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        module = str(frame.f_globals.get("__name__", ""))
        if event == "call" and module.startswith("pixcontrast_ext"):
            calls[f"{module}.{frame.f_code.co_name}"] += 1

    for step in range(WARM_UP + 1):
        sys.setprofile(count if step == WARM_UP else None)
        loss = criterion(logits, embeddings, labels)
        loss.backward()
        sys.setprofile(None)
    return calls


def main() -> None:
    calls = counted()
    print(f"{sum(calls.values())} calls with {native._C.instruction_set()}")
    if "--all" in sys.argv[1:]:
        for name, count in calls.most_common():
            print(f"{count:4d}  {name}")


if __name__ == "__main__":
    main()
