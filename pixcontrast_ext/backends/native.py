"""The seam to the compiled module: everything that crosses it is checked and turned into pointers here.

Kernels get raw pointers, so the memory-safety checks (device, dtype, contiguity) are this file's whole duty;
what a user may pass is checked earlier, in `ops/`.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch  # first: its OpenMP runtime then serves the compiled module too
from torch import Tensor


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
    from pixcontrast_ext import _C
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _C = None  # type: ignore[assignment]
    unavailable: str | None = _reason_missing(error)
else:
    unavailable = None

BadValue: type[ValueError] = ValueError if _C is None else _C.BadValue

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# What the kernels take each field for. Fields that are not here hold rows of several dtypes; a code says which.
_INT64 = """labels predictions indices pool_keys anchor_index key_index row_index cursor found tiles num_tiles
pos_counts region_ptr region_fill pixel_ptr pixel_fill pair_keys row_pixels sorted_pixels
sorted_rows chosen_pixels sort_keys"""
_INT32 = """priority anchor_labels key_labels row_labels count pos_count pool_starts pool_keep pool_rows order
sorted_labels label_ranges positive_splits pos_count_parts"""
_FLOAT32 = """inv_norm wide weights scores shift sum weight_sum output neg_lse neg_scale pos_scale row_neg_lse
row_neg_scale row_pos_scale negatives positives loss pos_weight anchor_grad chunk_sums peaks unscale score_scale
shift_parts sum_parts negative_parts loss_parts pos_weight_parts positive_parts grad_scale peak coefficients
grad_parts grad"""
_FLOAT16 = "anchor_planes key_planes"
_FLOAT64 = "sums loss_sum pos_weight_sum"
_FIELD_DTYPES = {
    name: dtype
    for names, dtype in (
        (_INT64, torch.int64),
        (_INT32, torch.int32),
        (_FLOAT16, torch.float16),
        (_FLOAT32, torch.float32),
        (_FLOAT64, torch.float64),
    )
    for name in names.split()
}

_STRIDED_FIELDS = ("map", "grad_map")  # any layout; their strides are fields as well

INSTRUCTION_SET_VARIABLE = "PIXCONTRAST_CPU_ISA"

# Why the environment's choice of an instruction set cannot be had. Calls raise it, so that importing works and
# `pixcontrast_ext.info` can tell.
wrong_instruction_set: str | None = None
if _C is not None and os.environ.get(INSTRUCTION_SET_VARIABLE):
    try:
        _C.select_instruction_set(os.environ[INSTRUCTION_SET_VARIABLE])
    except ValueError as error:
        wrong_instruction_set = f"{INSTRUCTION_SET_VARIABLE}: {error}"


# The submodule of the CUDA kernels, and the type of the devices whose memory they take. The tests put the kernels
# compiled for an emulator here, which take CPU tensors.
cuda_kernels: Any = getattr(_C, "cuda", None)
cuda_device_type = "cuda"


def launch(kernel: str, **fields: Any) -> None:
    """Call a CPU kernel; tensors become pointers, the thread count is torch's.

    Every tensor must be a contiguous CPU tensor, except for `map` and `grad_map`, whose strides are passed as well.
    """
    # `fields` keeps the tensors alive until the kernel is done: for scratch memory it is the only owner.
    device = torch.device("cpu")
    arguments = {name: _argument(kernel, name, value, device) for name, value in fields.items()}
    getattr(_C, kernel)(**arguments)


def launch_cuda(kernel: str, device: torch.device, **fields: Any) -> None:
    """Enqueue a CUDA kernel on the current stream of `device`, where every tensor has to be.

    Scratch memory may be dropped after the call: torch's allocator reuses it in the order of the stream.
    """
    arguments = {name: _argument(kernel, name, value, device) for name, value in fields.items()}
    start = getattr(cuda_kernels, kernel)
    if device.type != "cuda":  # emulated
        start(device=0, stream=0, **arguments)
        return
    with torch.cuda.device(device):
        start(device=device.index, stream=torch.cuda.current_stream(device).cuda_stream, **arguments)


def _argument(kernel: str, name: str, value: Any, device: torch.device) -> Any:
    if value is None:
        return 0
    if not isinstance(value, Tensor):
        return value
    if value.device != device or not (name in _STRIDED_FIELDS or value.is_contiguous()):
        raise ValueError(
            f"{kernel}: {name} must be a contiguous tensor on {device}, "
            f"got shape {tuple(value.shape)}, strides {value.stride()}, on {value.device}"
        )
    expected = _FIELD_DTYPES.get(name)
    if value.dtype != expected if expected else value.dtype not in DTYPE_CODES:
        raise TypeError(f"{kernel}: {name} must be {expected or 'fp32, fp16 or bf16'}, got {value.dtype}")
    return value.data_ptr()


def threads() -> int:
    """How many threads a CPU kernel may use."""
    return torch.get_num_threads()


def fused_dtype(keys_dtype: torch.dtype) -> torch.dtype | None:
    """What the fused InfoNCE multiplies keys of this dtype in; None if the instruction set has no such kernel."""
    code = _C.fused_dtype(DTYPE_CODES[keys_dtype])
    return next((dtype for dtype, known in DTYPE_CODES.items() if known == code), None)


def fused_block_k() -> int:
    """How many keys a tile of the fused InfoNCE holds at most."""
    return _C.FUSED_BLOCK_K


def map_fields(embeddings: Tensor) -> dict[str, Any]:
    """The `EmbeddingMap` part of a struct, for a `[B, D, H, W]` tensor of any strides."""
    if embeddings.dim() != 4:
        raise ValueError(f"expected a [B, D, H, W] tensor, got {tuple(embeddings.shape)}")
    batch, channels, height, width = embeddings.shape
    stride_batch, stride_channel, stride_row, stride_column = embeddings.stride()
    return {
        "map": embeddings,
        "map_dtype": DTYPE_CODES[embeddings.dtype],
        "batch": batch,
        "channels": channels,
        "height": height,
        "width": width,
        "stride_batch": stride_batch,
        "stride_channel": stride_channel,
        "stride_row": stride_row,
        "stride_column": stride_column,
    }
