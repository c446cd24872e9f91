"""Calls the kernels of primitives.cu by name, in any build of theirs."""

from __future__ import annotations

import ctypes
from pathlib import Path


class Primitives:
    """`run(name, pointers, numbers)`; what the library throws becomes a RuntimeError."""

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
