"""The CUDA C++ backend: it allocates outputs and scratch, and enqueues the kernels of csrc/cuda/.

Nothing here waits for the device. What cannot be known without a look at the data (labels that are no class, indices
outside of the map) is treated as ignored by the kernels, never used as an index.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pixcontrast_ext.backends import native

MAX_CHANNELS = 512  # of an InfoNCE row


@functools.cache
def _unsupported_device(index: int) -> str | None:
    """Why the compiled kernels do not run on a device."""
    major, minor = torch.cuda.get_device_capability(index)
    built = native._C.cuda_archs.split()
    machine_code = [int(name.removeprefix("sm_")) for name in built if name.startswith("sm_")]
    portable = [int(name.removeprefix("compute_")) for name in built if name.startswith("compute_")]
    if any(code // 10 == major and code % 10 <= minor for code in machine_code):
        return None
    if any(code <= 10 * major + minor for code in portable):
        return None
    return f"it was compiled for {' '.join(built)}, and the device is sm_{major}{minor}"


def unsupported(op: str, dtype: torch.dtype | None, channels: int | None = None) -> str | None:
    """Why this backend cannot serve a call, or None if it can."""
    if native.unavailable:
        return native.unavailable
    if native.cuda_kernels is None:
        return "this build has no CUDA kernels: nvcc was not found when it was made, or PIXCONTRAST_CUDA=0"
    if native.cuda_device_type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        reason = _unsupported_device(torch.cuda.current_device())
        if reason is not None:
            return reason
    if dtype is not None and dtype not in native.DTYPE_CODES:
        return f"{dtype} is not one of float32, float16, bfloat16"
    if op == "infonce" and channels is not None and channels > MAX_CHANNELS:
        return f"its InfoNCE kernels take up to {MAX_CHANNELS} channels, got {channels}"
    return None
