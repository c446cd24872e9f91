"""Calls the kernels of csrc/emulator/primitives.cu by name, in any of their builds.

    python -m tools.emulator.primitives LIBRARY FAULT ...

runs the faults of its race_kernel, one after another.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


class Primitives:
    """`run(name, pointers, numbers)`; an exception of the library becomes a RuntimeError."""

    def __init__(self, library: Path):
        self._run = ctypes.CDLL(str(library)).run_primitive
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = [
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_int,
            ctypes.c_uint64,
        ]

    def run(self, name: str, pointers: list[int], numbers: tuple[int, ...] = (), stream: int = 0) -> None:
        message = self._run(
            name.encode(),
            (ctypes.c_void_p * max(len(pointers), 1))(*pointers),
            (ctypes.c_int64 * max(len(numbers), 1))(*numbers),
            0,
            stream,
        )
        if message:
            raise RuntimeError(message.decode())


def exact_buffer(size: int) -> int:
    """Address of `size` zeroed bytes in an allocation of their own, whose bounds a sanitizer knows."""
    libc = ctypes.CDLL(None)
    libc.calloc.restype = ctypes.c_void_p
    libc.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    address: int = libc.calloc(1, size)
    return address


if __name__ == "__main__":
    primitives = Primitives(Path(sys.argv[1]))
    for fault in sys.argv[2:]:
        print(f"fault {fault}", file=sys.stderr, flush=True)
        primitives.run("race", [exact_buffer(65 * 4)], (int(fault),))
