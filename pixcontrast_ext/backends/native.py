"""The seam to the compiled module: everything that crosses it is checked and turned into pointers here.

Kernels get raw pointers, so the memory-safety checks are the seam's whole duty: device and contiguity here, the dtype
of every field in the compiled module. What a user may pass is checked earlier, in `ops/`.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch  # first: its OpenMP runtime then serves the compiled module too
from torch import Tensor

from pixcontrast_ext.backends.calls import Call


def _reason_missing(error: ImportError) -> str:
    tree = Path(__file__).parents[2]
    in_sources = (tree / "setup.py").is_file() and (tree / "csrc").is_dir()
    if in_sources and importlib.util.find_spec("pixcontrast_ext._C") is None:
        return (
            f"{tree} is a source tree without the compiled module, and hides an installed package: "
            "run from another folder, or `pip install -e .` there"
        )
    return f"the compiled module is missing or does not load: {error}"


try:
    from pixcontrast_ext import _C as _C
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _C = None  # type: ignore[assignment]
    unavailable: str | None = _reason_missing(error)
else:
    unavailable = None

BadValue: type[ValueError] = ValueError if _C is None else _C.BadValue

# What the compiled module calls the dtypes.
DTYPE_CODES = {
    dtype: code
    for code, dtype in enumerate(
        (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64)
    )
}
DTYPES = tuple(DTYPE_CODES)[:3]  # of rows and maps, that its kernels take

_STRIDED_FIELDS = ("embeddings", "grad_embeddings")  # any layout; sizes and strides cross as well

_CPU = torch.device("cpu")
INSTRUCTION_SET_VARIABLE = "PIXCONTRAST_CPU_ISA"

# Why the environment's choice of an instruction set cannot be had. Calls raise it, so that importing works and
# `pixcontrast_ext.info` can tell.
wrong_instruction_set: str | None = None
if _C is not None and os.environ.get(INSTRUCTION_SET_VARIABLE):
    try:
        _C.select_instruction_set(os.environ[INSTRUCTION_SET_VARIABLE])
    except ValueError as error:
        wrong_instruction_set = f"{INSTRUCTION_SET_VARIABLE}: {error}"


def arguments(kernel: str, device: torch.device, call: Call | None, fields: dict[str, Any]) -> dict[str, Any]:
    """What the compiled module takes: the fields of a call, unless `fields` has others, and these.

    A tensor becomes (address, dtype), a map has its sizes and strides as well.

    Raises:
        ValueError: a tensor that is not on `device`, or, but for maps, not contiguous.
    """
    crossing: dict[str, Any] = {}
    if call is not None:
        for name in call.names():
            crossing[name] = getattr(call, name)
        crossing.update(call.sizes())
    crossing.update(fields)
    for name, value in crossing.items():
        if isinstance(value, Tensor):
            strided = name in _STRIDED_FIELDS
            if value.device != device or not (strided or value.is_contiguous()):
                raise ValueError(
                    f"{kernel}: {name} must be a contiguous tensor on {device}, "
                    f"got shape {tuple(value.shape)}, strides {value.stride()}, on {value.device}"
                )
            pointer = value.data_ptr(), DTYPE_CODES.get(value.dtype, -1)
            crossing[name] = (*pointer, value.shape, value.stride()) if strided else pointer
    return crossing


def launch(kernel: str, call: Call | None = None, **fields: Any) -> None:
    """Call a CPU kernel with the fields of a call, and others."""
    # `fields` keeps the tensors alive until the kernel is done: for scratch memory it is the only owner.
    getattr(_C, kernel)(**arguments(kernel, _CPU, call, fields))


def has_fused() -> bool:
    """Whether the instruction set has the fused kernels of InfoNCE, which make the products as well."""
    return bool(_C.has_fused())
