"""The Triton backend: kernels that compile on first use, without nvcc."""

from __future__ import annotations

import functools
import importlib.metadata
import re

import torch

OLDEST = (3, 6)  # versions of Triton that are tested
MAX_CHANNELS = 512  # of an InfoNCE row
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = False  # set by tests: the kernels take CPU tensors


@functools.cache
def _unavailable() -> str | None:
    """Why Triton cannot be used at all."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "the triton package is not installed"
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST:
        return f"it needs triton {OLDEST[0]}.{OLDEST[1]} or later, and {version} is installed"
    return None


@functools.cache
def _unsupported_device(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"it needs a device of sm_80 or later, and this is sm_{major}{minor}"


def unsupported(op: str, dtype: torch.dtype | None, channels: int | None = None) -> str | None:
    """Why this backend cannot serve a call, or None if it can."""
    reason = _unavailable()
    if reason is not None:
        return reason
    if not INTERPRETED:
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        # A call with CUDA tensors has started CUDA. Asking before would, and later forks could not use it.
        reason = _unsupported_device(torch.cuda.current_device()) if torch.cuda.is_initialized() else None
        if reason is not None:
            return reason
    if dtype is not None and dtype not in DTYPES:
        return f"{dtype} is not one of float32, float16, bfloat16"
    if op.startswith("infonce") and channels is not None and channels > MAX_CHANNELS:
        return f"its InfoNCE kernels take up to {MAX_CHANNELS} channels, got {channels}"
    return None


if _unavailable() is None:
    # The functions, not the modules of the same names.
    from pixcontrast_ext.backends.triton.enqueue import enqueue_collect, enqueue_write
    from pixcontrast_ext.backends.triton.gather import gather, gather_backward
    from pixcontrast_ext.backends.triton.infonce import (
        infonce_backward_keys,
        infonce_backward_symmetric,
        infonce_forward,
    )
    from pixcontrast_ext.backends.triton.sampling import hard_anchor_sampling

    __all__ = [
        "enqueue_collect",
        "enqueue_write",
        "gather",
        "gather_backward",
        "hard_anchor_sampling",
        "infonce_backward_keys",
        "infonce_backward_symmetric",
        "infonce_forward",
        "unsupported",
    ]
