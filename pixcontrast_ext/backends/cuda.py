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
MAX_CLASSES = 2**21 - 1  # a sort key has 22 bits for (class, hard or easy), all ones for neither
MAX_PIXELS = 2**31 - 1  # of an image
CHUNK = 1024  # pixels that a block sorts, kChunk in pools.cuh


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


def _pools(labels: Tensor, num_classes: int, kinds: int) -> dict[str, Tensor]:
    """Scratch for the pixels of each image, sorted into `kinds` pools per class."""
    batch, pixels = labels.shape[0], labels.shape[1] * labels.shape[2]
    if num_classes > MAX_CLASSES:
        raise ValueError(f"the CUDA backend takes up to {MAX_CLASSES} classes, got num_classes={num_classes}")
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"the CUDA backend takes up to {MAX_PIXELS} pixels an image, got {tuple(labels.shape)}"
        )
    chunks = -(-pixels // CHUNK)
    return {
        "pool_keys": labels.new_empty(batch, chunks, CHUNK),
        "pool_starts": labels.new_empty(batch, chunks, kinds * num_classes + 1, dtype=torch.int32),
    }


def hard_anchor_sampling(
    labels: Tensor,  # [B, H, W] int64
    predictions: Tensor,  # [B, H, W] int64
    priority: Tensor,  # [B, H, W] int32
    num_classes: int,
    max_samples: int,
    max_views: int,
    min_pixels: int,
    ignore_index: int,
    indices: Tensor,  # [max_samples] int64, out
    anchor_labels: Tensor,  # [max_samples] int32, out
    count: Tensor,  # [] int32, out
) -> None:
    batch = labels.shape[0]
    native.launch_cuda(
        "sampling",
        labels.device,
        labels=labels,
        predictions=predictions,
        priority=priority,
        batch=batch,
        pixels=labels.shape[1] * labels.shape[2],
        num_classes=num_classes,
        max_samples=max_samples,
        max_views=max_views,
        min_pixels=min_pixels,
        ignore_index=ignore_index,
        **_pools(labels, num_classes, kinds=2),
        pair_keys=labels.new_empty(num_classes, batch),
        pool_keep=labels.new_empty(num_classes, batch, 2, dtype=torch.int32),
        pool_rows=labels.new_empty(num_classes, batch, 2, dtype=torch.int32),
        indices=indices,
        anchor_labels=anchor_labels,
        count=count,
    )


def gather(
    embeddings: Tensor,  # [B, D, H, W]
    indices: Tensor,  # [A] int64
    normalize: bool,
    rows: Tensor,  # [A, D], out
    inv_norm: Tensor,  # [A] float32, out
) -> None:
    native.launch_cuda(
        "gather",
        embeddings.device,
        **native.map_fields(embeddings),
        indices=indices,
        num_rows=indices.shape[0],
        normalize=normalize,
        rows_dtype=native.DTYPE_CODES[rows.dtype],
        rows=rows,
        inv_norm=inv_norm,
    )


def gather_backward(
    grad_rows: Tensor,  # [A, D]
    embeddings: Tensor,  # [B, D, H, W]
    indices: Tensor,  # [A] int64
    inv_norm: Tensor,  # [A] float32
    normalize: bool,
    grad_embeddings: Tensor,  # [B, D, H, W] dense, out
) -> None:
    strides = grad_embeddings.stride()
    native.launch_cuda(
        "gather_backward",
        embeddings.device,
        **native.map_fields(embeddings),
        indices=indices,
        num_rows=indices.shape[0],
        normalize=normalize,
        rows_dtype=native.DTYPE_CODES[grad_rows.dtype],
        grad_rows=grad_rows,
        inv_norm=inv_norm,
        wide=torch.empty_like(grad_rows, dtype=torch.float32),
        sorted_indices=torch.empty_like(indices),
        sorted_rows=torch.empty_like(indices),
        grad_map=grad_embeddings,
        grad_stride_batch=strides[0],
        grad_stride_channel=strides[1],
        grad_stride_row=strides[2],
        grad_stride_column=strides[3],
    )


def enqueue_collect(
    embeddings: Tensor,  # [B, D, H, W]
    labels: Tensor,  # [B, H, W] int64
    priority: Tensor,  # [B, H, W] int32
    num_classes: int,
    pixels_per_image: int,
    ignore_index: int,
    normalize: bool,
    rows: Tensor,  # [B, C, 1 + k, D], out
    row_labels: Tensor,  # [B, C, 1 + k] int32, out
) -> None:
    batch, channels = embeddings.shape[:2]
    pools = _pools(labels, num_classes, kinds=1)
    chunks = pools["pool_keys"].shape[1]
    native.launch_cuda(
        "collect",
        embeddings.device,
        **native.map_fields(embeddings),
        labels=labels,
        priority=priority,
        num_classes=num_classes,
        pixels_per_image=pixels_per_image,
        ignore_index=ignore_index,
        normalize=normalize,
        **pools,
        chunk_sums=rows.new_empty(batch, chunks, num_classes, channels, dtype=torch.float32),
        sums=rows.new_empty(batch, num_classes, channels, dtype=torch.float64),
        chosen_pixels=labels.new_empty(batch, num_classes, pixels_per_image),
        rows_dtype=native.DTYPE_CODES[rows.dtype],
        rows=rows,
        row_labels=row_labels,
    )


def enqueue_write(
    rows: Tensor,  # [N, C, 1 + k, D], dtype of the keys
    row_labels: Tensor,  # [N, C, 1 + k] int32
    keys: Tensor,  # [C, R + P, D], in and out
    key_labels: Tensor,  # [C, R + P] int32, in and out
    region_ptr: Tensor,  # [C] int64, in and out, and so the next three
    region_fill: Tensor,
    pixel_ptr: Tensor,
    pixel_fill: Tensor,
    region_slots: int,
) -> None:
    if rows.dtype != keys.dtype or rows.shape[1:2] + rows.shape[3:] != keys.shape[:1] + keys.shape[2:]:
        raise ValueError(
            f"rows {tuple(rows.shape)} of {rows.dtype} do not fit keys {tuple(keys.shape)} of {keys.dtype}"
        )
    native.launch_cuda(
        "write",
        keys.device,
        rows=rows,
        row_labels=row_labels,
        batch=rows.shape[0],
        num_classes=keys.shape[0],
        pixels_per_image=rows.shape[2] - 1,
        row_bytes=rows.shape[3] * rows.element_size(),
        region_slots=region_slots,
        pixel_slots=keys.shape[1] - region_slots,
        keys=keys,
        key_labels=key_labels,
        region_ptr=region_ptr,
        region_fill=region_fill,
        pixel_ptr=pixel_ptr,
        pixel_fill=pixel_fill,
    )
