"""The CUDA C++ backend: it allocates outputs and scratch, and enqueues the kernels of csrc/cuda/.

Nothing here waits for the device. What cannot be known without a look at the data (labels that are no class, indices
outside of the map) is treated as ignored by the kernels, never used as an index.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext.backends import native, schedule

MAX_CHANNELS = 512  # of an InfoNCE row
MAX_CLASSES = 2**21 - 1  # a sort key has 22 bits for (class, hard or easy), all ones for neither
MAX_PIXELS = 2**31 - 1  # of an image
OLDEST_DRIVERS = {13: "580", 12: "525"}  # that run what a toolkit of that major version built
SORT_TILE = 1024  # keys that a block sorts, kTileKeys in sort.cuh; of pixels, a chunk


def _old_driver(compiler: str) -> str:
    """Why the runtime does not start, and what to do; `compiler` is `native._C.compiler`."""
    toolkit = re.search(r"nvcc (\d+)[.\d]*", compiler)
    major = int(toolkit[1]) if toolkit else 0
    advice = f"driver {OLDEST_DRIVERS.get(major, 'of its time')} or later: update it"
    if major - 1 in OLDEST_DRIVERS:
        advice += f", or build with CUDA {major - 1}, which needs {OLDEST_DRIVERS[major - 1]}"
    return f"the module's CUDA runtime ({toolkit[0] if toolkit else compiler}) needs {advice}"


@functools.cache
def _unsupported_device(index: int) -> str | None:
    """Why the compiled kernels do not run on a device."""
    problem: str = native.cuda_kernels.runtime_problem()
    if "InsufficientDriver" in problem:
        return _old_driver(native._C.compiler)
    if problem:
        return f"the CUDA runtime in the module does not start: {problem}"
    major, minor = torch.cuda.get_device_capability(index)
    built = native._C.cuda_archs.split()
    machine_code = [int(name.removeprefix("sm_")) for name in built if name.startswith("sm_")]
    portable = [int(name.removeprefix("compute_")) for name in built if name.startswith("compute_")]
    if any(code // 10 == major and code % 10 <= minor for code in machine_code):
        return None
    if any(code <= 10 * major + minor for code in portable):
        return None
    return f"it was compiled for {' '.join(built)}, and the device is sm_{major}{minor}"


def unsupported(
    op: str, dtype: torch.dtype | None, channels: int | None = None, device: torch.device | None = None
) -> str | None:
    """Why this backend cannot serve a call, or None if it can."""
    if dtype is not None and dtype not in native.DTYPE_CODES:
        return f"{dtype} is not one of float32, float16, bfloat16"
    if op.startswith("infonce") and channels is not None and channels > MAX_CHANNELS:
        return f"its InfoNCE kernels take up to {MAX_CHANNELS} channels, got {channels}"
    if native.unavailable:
        return native.unavailable
    if native.cuda_kernels is None:
        return "this build has no CUDA kernels: nvcc was not found when it was made, or PIXCONTRAST_CUDA=0"
    if native.cuda_device_type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        # A call with CUDA tensors has started CUDA. Asking before would, and later forks could not use it.
        reason = _unsupported_device(schedule.device_index(device)) if torch.cuda.is_initialized() else None
        if reason is not None:
            return reason
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
    chunks = -(-pixels // SORT_TILE)
    return {
        "pool_keys": labels.new_empty(batch, chunks, SORT_TILE),
        "pool_starts": labels.new_empty(batch, chunks, kinds * num_classes + 1, dtype=torch.int32),
    }


def _sort_keys(count: int, device: torch.device) -> Tensor | None:
    """Scratch for more keys than one block sorts."""
    if count <= SORT_TILE:
        return None
    return torch.empty(-(-count // SORT_TILE), SORT_TILE, dtype=torch.int64, device=device)


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
        row_pixels=torch.empty_like(indices),
        sorted_pixels=torch.empty_like(indices),
        sorted_rows=torch.empty_like(indices),
        sort_keys=_sort_keys(indices.shape[0], indices.device),
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


@functools.lru_cache(maxsize=4096)
def _cut(
    device: torch.device, of: str, dtype: int, full_float32: bool, channels: int, *counts: int
) -> tuple[Any, int]:
    """The tile of an InfoNCE pass on a device, and how many blocks run at a time: of the "negatives" or the
    "positives", where it depends on how many anchors and keys there are, or of the "backward".
    """
    tile_of = getattr(native.cuda_kernels, f"infonce_{of}_tile")
    if device.type == "cpu":  # emulated: enough for several splits of small problems
        return tile_of(0, dtype, full_float32, channels, *counts), 8
    with torch.cuda.device(device):  # the module's runtime makes it the current one
        tile = tile_of(device.index, dtype, full_float32, channels, *counts)
    # None at a time is for the launch to refuse, which says why.
    return tile, torch.cuda.get_device_properties(device).multi_processor_count * max(1, tile.resident)


PLANE_CHANNELS = 64  # a plane of an fp32 row is a multiple of them
PLANE_BLOCKS = 1024  # that split the rows of one side, at most


def _aligned(rows: Tensor) -> Tensor:
    """Rows of 16-bit numbers in 16-byte or 4-byte units as they lie; of others, and of those between two units, a copy.

    Rows of an odd number of channels are padded with zeros to a multiple of 8. Such a copy of a bank is made at every
    call.
    """
    row_bytes = rows.shape[1] * rows.element_size()
    if row_bytes % 4:
        return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8))
    unit = 4 if row_bytes % 16 else 16
    return rows if rows.data_ptr() % unit == 0 else rows.clone()


def _rows(anchors: Tensor, keys: Tensor | None, full_float32: bool) -> dict[str, Any]:
    """The fields of rows and how they are multiplied: 16-bit ones as they are, fp32 ones as planes of fp16."""
    dtype = native.DTYPE_CODES[anchors.dtype]
    score_scale = anchors.new_empty((), dtype=torch.float32)
    fields: dict[str, Any] = dict(rows_dtype=dtype, full_float32=full_float32, score_scale=score_scale)
    if anchors.dtype != torch.float32:
        anchors = _aligned(anchors)
        fields |= dict(
            anchors=anchors, keys=None if keys is None else _aligned(keys), channels=anchors.shape[1]
        )
        return fields | dict(anchor_planes=None, key_planes=None, peaks=None, plane_blocks=0, unscale=None)
    channels = -(-anchors.shape[1] // PLANE_CHANNELS) * PLANE_CHANNELS
    longest = max(anchors.shape[0], 0 if keys is None else keys.shape[0])
    blocks = max(1, min(PLANE_BLOCKS, -(-longest // 8)))

    def planes_of(rows: Tensor) -> Tensor:
        return rows.new_empty(rows.shape[0], 2 if full_float32 else 1, channels, dtype=torch.float16)

    return fields | dict(
        anchors=anchors,
        keys=keys,
        channels=channels,
        anchor_planes=planes_of(anchors),
        key_planes=None if keys is None else planes_of(keys),
        peaks=anchors.new_empty(2, blocks),
        plane_blocks=blocks,
        unscale=anchors.new_empty(2),
    )


def infonce_forward(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int32
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int32
    temperature: float,
    exclude_self: bool,
    loss: Tensor,  # [A] float32, out
    neg_lse: Tensor,  # [A] float32, out
    pos_weight: Tensor,  # [A] float32, out
    pos_count: Tensor,  # [A] int32, out
    anchor_grad: Tensor | None,  # [A, D] float32, out
) -> None:
    (num_anchors, channels), num_keys = anchors.shape, keys.shape[0]
    in_batch = (keys.data_ptr(), num_keys) == (anchors.data_ptr(), num_anchors) and (
        key_labels.data_ptr() == anchor_labels.data_ptr()
    )
    full_float32 = schedule.full_float32(anchors.dtype)
    # A null pointer says "in batch"; no keys at all have a pointer as well.
    rows = _rows(anchors, None if in_batch else keys if num_keys else anchors[:1], full_float32)
    how = (rows["rows_dtype"], full_float32, rows["channels"], num_anchors, num_keys)
    tile, slots = _cut(anchors.device, "negatives", *how)
    row_tiles, key_tiles = -(-num_anchors // tile.rows), -(-num_keys // tile.columns)
    splits = schedule.splits(row_tiles, key_tiles, slots, tile.columns)
    positives_tile, positive_blocks = _cut(anchors.device, "positives", *how)
    assert positives_tile.piece == tile.piece, "both passes know labels by the same pieces"
    part_channels = -(-rows["channels"] // PLANE_CHANNELS) * PLANE_CHANNELS

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return anchors.new_empty(shape, dtype=dtype)

    with_grad = anchor_grad is not None
    native.launch_cuda(
        "infonce_forward",
        anchors.device,
        **rows,
        temperature=temperature,
        exclude_self=exclude_self,
        splits=splits,
        anchor_labels=anchor_labels,
        num_anchors=num_anchors,
        order=scratch(num_anchors, dtype=torch.int32),
        sorted_labels=scratch(num_anchors, dtype=torch.int32),
        sort_keys=_sort_keys(num_anchors, anchors.device),
        key_labels=None if in_batch else key_labels,
        num_keys=num_keys,
        label_ranges=scratch(-(-num_keys // tile.piece), 2, dtype=torch.int32),
        shift_parts=scratch(splits, num_anchors),
        sum_parts=scratch(splits, num_anchors),
        negative_parts=scratch(splits, num_anchors, part_channels) if with_grad else None,
        fewest_splits=schedule.fewest_splits(key_tiles, tile.columns),
        positive_blocks=min(positive_blocks, num_anchors * splits),
        positive_splits=scratch(dtype=torch.int32),
        loss_parts=scratch(splits, num_anchors),
        pos_weight_parts=scratch(splits, num_anchors),
        pos_count_parts=scratch(splits, num_anchors, dtype=torch.int32),
        positive_parts=scratch(splits, num_anchors, part_channels) if with_grad else None,
        part_channels=part_channels,
        loss=loss,
        neg_lse=neg_lse,
        pos_weight=pos_weight,
        pos_count=pos_count,
        anchor_grad=anchor_grad,
        grad_channels=channels,
    )


def _infonce_backward(
    anchors: Tensor,
    anchor_labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor | None,
    neg_lse: Tensor,
    pos_weight: Tensor,
    grad_scale: Tensor,
    temperature: float,
    exclude_self: bool,
    grad: Tensor,
) -> None:
    num_anchors, num_rows = anchors.shape[0], grad.shape[0]
    full_float32 = schedule.full_float32(anchors.dtype)
    rows = _rows(anchors, None if keys is None else keys if num_rows else anchors[:1], full_float32)
    tile, slots = _cut(anchors.device, "backward", rows["rows_dtype"], full_float32, rows["channels"])
    anchor_tiles = -(-num_anchors // tile.columns)
    splits = schedule.splits(-(-num_rows // tile.rows), anchor_tiles, slots, tile.columns)
    peak = None
    if anchors.dtype != torch.bfloat16 and num_anchors:
        # Of the weights of anchors that have a part in it; from below, for a log-sum-exp that is of other keys.
        weights = grad_scale.abs() * pos_weight.clamp(min=2**-10)
        peak = torch.where(pos_weight > 0, weights, 0).amax()
    native.launch_cuda(
        "infonce_backward",
        anchors.device,
        **rows,
        temperature=temperature,
        exclude_self=exclude_self,
        splits=splits,
        anchor_labels=anchor_labels,
        num_anchors=num_anchors,
        order=anchors.new_empty(num_anchors, dtype=torch.int32),
        sorted_labels=anchors.new_empty(num_anchors, dtype=torch.int32),
        sort_keys=_sort_keys(num_anchors, anchors.device),
        key_labels=key_labels,
        num_keys=num_rows,
        neg_lse=neg_lse,
        pos_weight=pos_weight,
        grad_scale=grad_scale,
        peak=peak,
        coefficients=anchors.new_empty(num_anchors, 4, dtype=torch.float32),
        label_ranges=anchors.new_empty(anchor_tiles, 2, dtype=torch.int32),
        grad_parts=grad.new_empty(splits, *grad.shape) if splits > 1 else None,
        grad=grad,
        grad_channels=grad.shape[1],
    )


def infonce_backward_keys(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A] int32
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K] int32
    neg_lse: Tensor,  # [A] float32
    pos_weight: Tensor,  # [A] float32
    grad_scale: Tensor,  # [A] float32, g / |P|
    temperature: float,
    exclude_self: bool,
    key_grad: Tensor,  # [K, D] float32, out
) -> None:
    _infonce_backward(
        anchors,
        anchor_labels,
        keys,
        key_labels,
        neg_lse,
        pos_weight,
        grad_scale,
        temperature,
        exclude_self,
        key_grad,
    )


def infonce_backward_symmetric(
    anchors: Tensor,  # [A, D], the keys as well
    anchor_labels: Tensor,  # [A] int32
    neg_lse: Tensor,  # [A] float32
    pos_weight: Tensor,  # [A] float32
    grad_scale: Tensor,  # [A] float32, g / |P|
    temperature: float,
    exclude_self: bool,
    anchor_grad: Tensor,  # [A, D] float32, out
) -> None:
    _infonce_backward(
        anchors,
        anchor_labels,
        None,
        None,
        neg_lse,
        pos_weight,
        grad_scale,
        temperature,
        exclude_self,
        anchor_grad,
    )
