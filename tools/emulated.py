"""Puts the emulator and Triton's interpreter in a GPU's place: `cuda` and `triton` then serve tensors on the CPU.

As a program, it runs a module with them in place:

    TRITON_INTERPRET=1 python -m tools.emulated benchmarks gather --shapes quick

Triton looks for that variable when it is imported, which importing torch may do.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Collection

from pixcontrast_ext import available_backends, backends
from pixcontrast_ext.backends import native
from pixcontrast_ext.backends import triton as triton_backend
from tools.emulator import build


def serve(names: Collection[str], variant: str = "plain") -> None:
    """Has the named ones of `cuda` and `triton` take tensors on the CPU; `variant` is one of the emulator's builds."""
    if "cuda" in names:
        native.cuda_kernels = build.load(build.build(variant)).cuda
    native.cuda_device_type = "cpu"
    backends.DEVICES["cuda"] = backends.DEVICES["triton"] = ("cpu",)
    triton_backend.INTERPRETED = True
    if "triton" in names and available_backends()["triton"] is None:
        from tools import interpreter

        interpreter.patch_once_a_launch()


if __name__ == "__main__":
    serve(("cuda", "triton"))
    if sys.argv[1] == "benchmarks":
        from benchmarks import OPS, load

        for op in OPS:
            if op != "network_step":  # it needs the trainer's packages
                load(op).BACKENDS["cpu"] = ("cuda", "triton")
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
