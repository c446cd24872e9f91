"""The Triton backend: kernels that compile on first use, without nvcc."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re

import torch

from pixcontrast_ext.backends import device as devices

OLDEST = (3, 6)  # versions of Triton that are tested
# Assemblers before this one let other values into registers that a wgmma, which sm_90 alone has, still reads
# (triton-lang/triton#11781).
SAFE_ASSEMBLER = (13, 3)
ANY_ASSEMBLER = "PIXCONTRAST_TRITON_ANY_ASSEMBLER"
MAX_CHANNELS = 512  # of an InfoNCE row
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


def assembler(arch: int) -> str:
    """The version of the ptxas that Triton calls for an architecture; TRITON_PTXAS_PATH and its like count."""
    from triton.backends.nvidia import compiler

    return str(compiler.get_ptxas(arch).version)


@functools.cache
def _unsupported_device(index: int) -> str | None:
    major, minor = devices.gpu.capability(torch.device("cuda", index))
    if major < 8:
        return f"it needs a device of sm_80 or later, and this is sm_{major}{minor}"
    if major == 9 and os.environ.get(ANY_ASSEMBLER, "0") == "0":
        version = assembler(90)
        if tuple(map(int, version.split(".")[:2])) < SAFE_ASSEMBLER:
            return (
                f"on sm_90 it needs the ptxas of CUDA {'.'.join(map(str, SAFE_ASSEMBLER))} or later, and Triton"
                f" {importlib.metadata.version('triton')} calls that of {version}, which overwrites what a product in"
                " flight still reads; install triton 3.9 or later, or have TRITON_PTXAS_PATH name a newer ptxas"
                f" ({ANY_ASSEMBLER}=1 takes any)"
            )
    return None


def unsupported(
    op: str, dtype: torch.dtype | None, channels: int | None = None, device: torch.device | None = None
) -> str | None:
    """Why this backend cannot serve a call, or None if it can."""
    reason = _unavailable()
    if reason is not None:
        return reason
    reason, number = devices.gpu.unavailable(), devices.gpu.to_judge(device)
    if reason is None and number is not None:
        reason = _unsupported_device(number)
    if reason is not None:
        return reason
    if dtype is not None and dtype not in DTYPES:
        return f"{dtype} is not one of float32, float16, bfloat16"
    if op.startswith(("infonce", "mining")) and channels is not None and channels > MAX_CHANNELS:
        return f"its InfoNCE kernels take up to {MAX_CHANNELS} channels, got {channels}"
    return None


if _unavailable() is None:
    # The functions, not the modules of the same names.
    from pixcontrast_ext.backends.triton.enqueue import enqueue_collect, enqueue_write
    from pixcontrast_ext.backends.triton.gather import gather, gather_backward
    from pixcontrast_ext.backends.triton.infonce import (
        infonce_backward,
        infonce_forward,
        mined_backward,
        mined_forward,
        score_counts,
    )
    from pixcontrast_ext.backends.triton.sampling import hard_anchor_sampling

    __all__ = [
        "enqueue_collect",
        "enqueue_write",
        "gather",
        "gather_backward",
        "hard_anchor_sampling",
        "infonce_backward",
        "infonce_forward",
        "mined_backward",
        "mined_forward",
        "score_counts",
        "unsupported",
    ]
