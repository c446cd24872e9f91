"""Puts the emulator and Triton's interpreter in a GPU's place: `cuda` and `triton` then serve tensors on the CPU.

As a program, it runs a module with these in place:

    TRITON_INTERPRET=1 python -m tools.emulated benchmarks gather --shapes quick

Triton reads that variable when it is imported, which importing torch may do.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Collection
from typing import Any

import torch

from pixcontrast_ext import available_backends
from pixcontrast_ext.backends import device as devices
from tools.emulator import build


class Emulated(devices.Gpu):
    """Treats CPU tensors as those of a Hopper with few multiprocessors, so that small problems have several splits."""

    type = "cpu"

    def __init__(self, kernels: Any = None) -> None:
        self.kernels = kernels  # None: there are only Triton's

    def unavailable(self) -> None:
        return None

    def to_judge(self, device: torch.device | None) -> None:
        return None

    def capability(self, device: torch.device) -> tuple[int, int]:
        return 9, 0

    def multiprocessors(self, device: torch.device) -> int:
        return 4

    def current(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def number_and_stream(self, device: torch.device) -> tuple[int, int]:
        return 0, 0

    def captures(self) -> bool:
        return False


def serve(names: Collection[str], variant: str = "plain") -> None:
    """Makes the named ones of `cuda` and `triton` serve CPU tensors; `variant` names a build of the emulator."""
    devices.gpu = Emulated(build.load(build.build(variant)).cuda if "cuda" in names else None)
    if "triton" in names and available_backends()["triton"] is None:
        from tools import interpreter

        interpreter.hasten()


if __name__ == "__main__":
    serve(("cuda", "triton"))
    if sys.argv[1] == "benchmarks":
        from benchmarks import OPS, load

        for op in OPS:
            if op != "network_step":  # it needs the trainer's packages
                load(op).BACKENDS["cpu"] = ("cuda", "triton")
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
