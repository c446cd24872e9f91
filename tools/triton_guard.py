"""Runs every Triton kernel in the interpreter on tensors that end where memory ends: `python -m tools.triton_guard`.

Right after the last element of each tensor, scratch memory included, comes a page that nobody may touch, so a load or
store without its mask kills the process. `--overrun` makes such a load, to prove it.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixcontrast_ext.backends import device as devices
from tools import interpreter
from tools.emulated import Emulated
from tools.gpu_small import contrast, maps

PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_empty = torch.empty


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor whose memory ends at a page that nobody may touch."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return _empty(shape, dtype=dtype)
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(address + pages * mmap.PAGESIZE), mmap.PAGESIZE, PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = pages * mmap.PAGESIZE - size
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def copied(tensor: Tensor) -> Tensor:
    return guarded(tuple(tensor.shape), tensor.dtype).copy_(tensor)


@contextlib.contextmanager
def guarded_memory() -> Iterator[None]:
    """Within it, tensors that the launchers allocate also end at such a page."""

    def new_empty(like: Tensor, *shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return guarded(tuple(sizes), dtype or like.dtype)

    def empty_like(like: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return guarded(tuple(like.shape), dtype or like.dtype)

    with (
        mock.patch.object(Tensor, "new_empty", new_empty),
        mock.patch.object(torch, "empty_like", empty_like),
    ):
        yield


@triton.jit  # type: ignore[untyped-decorator]
def overrun_kernel(values, total, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reads one more element than there is."""
    i = tl.arange(0, BLOCK)
    tl.store(total, tl.sum(tl.load(values + i, mask=i <= count, other=0.0), 0))


def main() -> None:
    devices.gpu = Emulated()
    interpreter.patch_once_a_launch()
    torch.manual_seed(0)
    if "--overrun" in sys.argv[1:]:
        overrun_kernel[(1,)](
            guarded((13,), torch.float32).zero_(), guarded((1,), torch.float32), 13, BLOCK=16
        )
        return
    with guarded_memory():
        # Masks depend on shapes. The 16-bit dtypes share their tiles, so each takes some of the shapes.
        for shape in ((70, 150, 65), (1, 1, 1), (33, 130, 64)):
            contrast(*shape, torch.float32, "triton", placed=copied)
        contrast(70, 150, 65, torch.float16, "triton", placed=copied)
        contrast(1, 1, 1, torch.bfloat16, "triton", placed=copied)
        contrast(33, 130, 64, torch.bfloat16, "triton", placed=copied)
        for size in ((2, 5, 17, 19), (1, 1, 1, 1), (3, 33, 16, 16)):
            maps(size, torch.float32, "triton", placed=copied)
        maps((2, 5, 17, 19), torch.bfloat16, "triton", placed=copied)
    print("no overrun")


if __name__ == "__main__":
    main()
