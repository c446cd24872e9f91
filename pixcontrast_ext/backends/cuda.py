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

from pixcontrast_ext.backends import device as devices
from pixcontrast_ext.backends import native, precision, splits
from pixcontrast_ext.backends.calls import (
    Call,
    Collect,
    Gather,
    GatherBackward,
    InfonceBackward,
    InfonceForward,
    MinedBackward,
    MinedForward,
    Sampling,
    ScoreCounts,
    Write,
    same,
)

MAX_PIXELS = 2**31 - 1  # of an image
OLDEST_DRIVERS = {13: "580", 12: "525"}  # that run what a toolkit of that major version built


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
    problem: str = devices.gpu.kernels.runtime_problem()
    if "InsufficientDriver" in problem:
        return _old_driver(native._C.compiler)
    if problem:
        return f"the CUDA runtime in the module does not start: {problem}"
    major, minor = devices.gpu.capability(torch.device("cuda", index))
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
    if dtype is not None and dtype not in native.DTYPES:
        return f"{dtype} is not one of float32, float16, bfloat16"
    if native.unavailable:
        return native.unavailable
    if devices.gpu.kernels is None:
        return "this build has no CUDA kernels: nvcc was not found when it was made, or PIXCONTRAST_CUDA=0"
    if (
        op.startswith(("infonce", "mining"))
        and channels is not None
        and channels > devices.gpu.kernels.MAX_CHANNELS
    ):
        return f"its InfoNCE kernels take up to {devices.gpu.kernels.MAX_CHANNELS} channels, got {channels}"
    reason, number = devices.gpu.unavailable(), devices.gpu.to_judge(device)
    return reason if reason or number is None else _unsupported_device(number)


def launch(kernel: str, call: Call, **fields: Any) -> None:
    """Enqueue a kernel with the fields of a call, and others, on the current stream of its tensors' device.

    Scratch memory may be dropped after the call: torch's allocator reuses it in the order of the stream.
    """
    devices.gpu.launch(call.device, functools.partial(_start, kernel), (call, fields))


def _start(kernel: str, device: torch.device, arguments: tuple[Call, dict[str, Any]]) -> None:
    number, stream = devices.gpu.number_and_stream(device)
    crossing = native.arguments(kernel, device, *arguments)
    getattr(devices.gpu.kernels, kernel)(device=number, stream=stream, **crossing)


def _pools(labels: Tensor, num_classes: int, kinds: int) -> dict[str, Tensor]:
    """Scratch for the pixels of each image, sorted into `kinds` pools per class."""
    batch, pixels = labels.shape[0], labels.shape[1] * labels.shape[2]
    most = devices.gpu.kernels.MAX_CLASSES
    if num_classes > most:
        raise ValueError(f"the CUDA backend takes up to {most} classes, got num_classes={num_classes}")
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"the CUDA backend takes up to {MAX_PIXELS} pixels an image, got {tuple(labels.shape)}"
        )
    chunk = devices.gpu.kernels.SORT_TILE
    chunks = -(-pixels // chunk)
    return {
        "pool_keys": labels.new_empty(batch, chunks, chunk),
        "pool_starts": labels.new_empty(batch, chunks, kinds * num_classes + 1, dtype=torch.int32),
    }


def _sort_keys(count: int, device: torch.device) -> Tensor | None:
    """Scratch for more keys than one block sorts."""
    tile = devices.gpu.kernels.SORT_TILE
    return None if count <= tile else torch.empty(-(-count // tile), tile, dtype=torch.int64, device=device)


def hard_anchor_sampling(call: Sampling) -> None:
    labels, pairs = call.labels, (call.num_classes, call.labels.shape[0])
    launch(
        "sampling",
        call,
        **_pools(labels, call.num_classes, kinds=2),
        pair_keys=labels.new_empty(pairs),
        pool_keep=labels.new_empty(*pairs, 2, dtype=torch.int32),
        pool_rows=labels.new_empty(*pairs, 2, dtype=torch.int32),
    )


def gather(call: Gather) -> None:
    launch("gather", call)


def gather_backward(call: GatherBackward) -> None:
    indices = call.indices
    call.grad_embeddings.zero_()
    launch(
        "gather_backward",
        call,
        wide=torch.empty_like(call.grad_rows, dtype=torch.float32),
        row_pixels=torch.empty_like(indices),
        sorted_pixels=torch.empty_like(indices),
        sorted_rows=torch.empty_like(indices),
        sort_keys=_sort_keys(indices.shape[0], indices.device),
    )


def enqueue_collect(call: Collect) -> None:
    batch, channels = call.embeddings.shape[:2]
    pools = _pools(call.labels, call.num_classes, kinds=1)
    chunks = pools["pool_keys"].shape[1]
    of_classes = call.rows.new_empty
    launch(
        "collect",
        call,
        **pools,
        chunk_sums=of_classes(batch, chunks, call.num_classes, channels, dtype=torch.float32),
        sums=of_classes(batch, call.num_classes, channels, dtype=torch.float64),
        chosen_pixels=call.labels.new_empty(batch, call.num_classes, call.pixels_per_image),
    )


def enqueue_write(call: Write) -> None:
    launch("write", call)


@functools.lru_cache(maxsize=4096)
def _cut(
    device: torch.device, of: str, dtype: int, full_float32: bool, channels: int, *counts: int
) -> tuple[Any, int]:
    """The tile of an InfoNCE pass on a device, and how many blocks run at a time.

    "infonce_negatives" depends on `counts`, the numbers of anchors and keys.
    """
    tile_of = getattr(devices.gpu.kernels, f"{of}_tile")
    number, _ = devices.gpu.number_and_stream(device)
    with devices.gpu.current(device):  # the module's runtime makes it the current one
        tile = tile_of(number, dtype, full_float32, channels, *counts)
    # None at a time is for the launch to refuse, which says why.
    return tile, devices.gpu.multiprocessors(device) * max(1, tile.resident)


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


def _scalar(anchors: Tensor) -> Tensor:
    return anchors.new_empty((), dtype=torch.float32)


def _side(name: str, rows: Tensor, full_float32: bool) -> dict[str, Any]:
    """The fields of the anchors, the keys or the negatives: 16-bit rows as they are, fp32 ones as planes of fp16."""
    of_rows, of_planes, of_unscale = f"{name}s", f"{name}_planes", f"{name}_unscale"
    if rows.dtype != torch.float32:
        return {of_rows: _aligned(rows), of_planes: None, of_unscale: None}
    channels = -(-rows.shape[1] // PLANE_CHANNELS) * PLANE_CHANNELS
    planes = rows.new_empty(rows.shape[0], 2 if full_float32 else 1, channels, dtype=torch.float16)
    return {of_rows: rows, of_planes: planes, of_unscale: _scalar(rows)}


def _rows(anchors: Tensor, keys: Tensor | None, full_float32: bool, longest: int = 0) -> dict[str, Any]:
    """The fields of both sides; of keys that are the anchors all are null. `longest`: how many other rows there are."""
    fields = _side("anchor", anchors, full_float32)
    if keys is None:
        fields |= dict(keys=None, key_planes=None, key_unscale=None)
    else:
        fields |= _side("key", keys, full_float32)
        longest = max(longest, keys.shape[0])
    planes, blocks, peaks = fields["anchor_planes"], 0, None
    if planes is not None:
        blocks = max(1, min(PLANE_BLOCKS, -(-max(longest, anchors.shape[0]) // 8)))
        peaks = anchors.new_empty(2, blocks)
    return fields | dict(
        full_float32=full_float32,
        row_channels=anchors.shape[1],
        channels=(fields["anchors"] if planes is None else planes).shape[-1],
        score_scale=_scalar(anchors),
        peaks=peaks,
        plane_blocks=blocks,
    )


def _negatives(call: MinedForward | ScoreCounts, full_float32: bool) -> dict[str, Any]:
    """The fields of negatives that are other rows than the keys; of the keys themselves all are null."""
    names = ("negatives", "negative_planes", "negative_unscale", "negative_labels", "negative_scale")
    if same((call.negatives, call.negative_labels), (call.keys, call.key_labels)):
        return dict.fromkeys(names) | dict(num_negatives=0)
    count = call.negatives.shape[0]
    rows = call.negatives if count else call.anchors[:1]
    return _side("negative", rows, full_float32) | dict(
        negative_labels=call.negative_labels, negative_scale=_scalar(rows), num_negatives=count
    )


class _Contrast:
    """The fields that the forwards and the histograms share: rows, the order of the anchors, ranges of labels."""

    def __init__(self, call: InfonceForward | ScoreCounts) -> None:
        anchors, keys, in_batch = call.anchors, call.keys, call.in_batch
        self.device = anchors.device
        (self.num_anchors, self.channels), self.num_keys = anchors.shape, keys.shape[0]
        self.full_float32 = precision.full_float32(anchors.dtype)
        # A null pointer says "in batch"; no keys at all have a pointer as well.
        self.rows = _rows(
            anchors,
            None if in_batch else keys if self.num_keys else anchors[:1],
            self.full_float32,
            longest=call.negatives.shape[0] if isinstance(call, MinedForward | ScoreCounts) else 0,
        )
        self.how = native.DTYPE_CODES[anchors.dtype], self.full_float32, self.rows["channels"]
        self.fields = self.rows | dict(
            order=anchors.new_empty(self.num_anchors, dtype=torch.int32),
            sorted_labels=anchors.new_empty(self.num_anchors, dtype=torch.int32),
            sort_keys=_sort_keys(self.num_anchors, anchors.device),
            key_labels=None if in_batch else call.key_labels,
        )

    def shares(self, tile: Any, slots: int, num_columns: int) -> int:
        """How many blocks share a walk over so many keys."""
        row_tiles, column_tiles = -(-self.num_anchors // tile.rows), -(-num_columns // tile.columns)
        return splits.choose(row_tiles, column_tiles, slots, tile.columns)

    def ranges(self, tile: Any, num_columns: int) -> Tensor:
        """Scratch for the smallest and the largest label of every piece of the columns."""
        return torch.empty(-(-num_columns // tile.piece), 2, dtype=torch.int32, device=self.device)


def _forward(call: InfonceForward, of: _Contrast, passes: tuple[Any, Any], shares: int) -> dict[str, Any]:
    """The fields of a forward, mined or not, whose walks `shares` blocks share at most."""
    (tile, _), (positives_tile, positive_blocks) = passes
    assert positives_tile.piece == tile.piece, "both passes know labels by the same pieces"
    with_grad = call.anchor_grad is not None
    part_channels = -(-of.rows["channels"] // PLANE_CHANNELS) * PLANE_CHANNELS
    key_tiles = -(-of.num_keys // tile.columns)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=of.device)

    return of.fields | dict(
        splits=shares,
        label_ranges=of.ranges(tile, of.num_keys),
        shift_parts=scratch(shares, of.num_anchors),
        sum_parts=scratch(shares, of.num_anchors),
        negative_parts=scratch(shares, of.num_anchors, part_channels) if with_grad else None,
        fewest_splits=splits.fewest(key_tiles, tile.columns),
        positive_blocks=min(positive_blocks, of.num_anchors * shares),
        positive_splits=scratch(dtype=torch.int32),
        loss_parts=scratch(shares, of.num_anchors),
        pos_weight_parts=scratch(shares, of.num_anchors),
        pos_count_parts=scratch(shares, of.num_anchors, dtype=torch.int32),
        positive_parts=scratch(shares, of.num_anchors, part_channels) if with_grad else None,
        part_channels=part_channels,
    )


def infonce_forward(call: InfonceForward) -> None:
    of = _Contrast(call)
    negatives = _cut(of.device, "infonce_negatives", *of.how, of.num_anchors, of.num_keys)
    positives = _cut(of.device, "infonce_positives", *of.how)
    shares = of.shares(*negatives, of.num_keys)
    launch("infonce_forward", call, **_forward(call, of, (negatives, positives), shares))


def mined_forward(call: MinedForward) -> None:
    of = _Contrast(call)
    negatives, positives = (_cut(of.device, f"mined_{name}", *of.how) for name in ("negatives", "positives"))
    drawn = call.negatives.shape[0]
    # Either pass may have the longer walk, and scratch serves both.
    shares = max(of.shares(*negatives, drawn), of.shares(*negatives, of.num_keys))
    launch(
        "mined_forward",
        call,
        **_forward(call, of, (negatives, positives), shares),
        **_negatives(call, of.full_float32),
        negative_ranges=of.ranges(negatives[0], drawn),
    )


def score_counts(call: ScoreCounts) -> None:
    of = _Contrast(call)
    tile, slots = _cut(of.device, "score_counts", *of.how)
    call.neg_counts.zero_()
    call.pos_counts.zero_()
    drawn = call.negatives.shape[0]
    launch(
        "score_counts",
        call,
        **of.fields,
        **_negatives(call, of.full_float32),
        temperature=1.0,  # of no account
        label_ranges=of.ranges(tile, of.num_keys),
        negative_ranges=of.ranges(tile, drawn),
        splits=of.shares(tile, slots, drawn),
        positive_splits=of.shares(tile, slots, of.num_keys),
    )


def infonce_backward(call: InfonceBackward) -> None:
    launch("infonce_backward", call, **_backward(call, "infonce_backward"))


def mined_backward(call: MinedBackward) -> None:
    bounds = call.anchors.new_empty(call.anchors.shape[0], 2, dtype=torch.float32)
    launch("mined_backward", call, **_backward(call, "mined_backward"), bounds=bounds)


def _backward(call: InfonceBackward, kernel: str) -> dict[str, Any]:
    """The fields of a backward, mined or not."""
    anchors, grad = call.anchors, call.grad
    num_anchors, num_rows = anchors.shape[0], grad.shape[0]
    full_float32 = precision.full_float32(anchors.dtype)
    keys = anchors[:1] if call.keys is not None and num_rows == 0 else call.keys
    rows = _rows(anchors, keys, full_float32)
    how = (native.DTYPE_CODES[anchors.dtype], full_float32, rows["channels"])
    tile, slots = _cut(anchors.device, kernel, *how)
    anchor_tiles = -(-num_anchors // tile.columns)
    shares = splits.choose(-(-num_rows // tile.rows), anchor_tiles, slots, tile.columns)
    weight_peaks = None
    if anchors.dtype != torch.bfloat16:
        blocks = -(-num_anchors // devices.gpu.kernels.SORT_THREADS)
        weight_peaks = anchors.new_empty(blocks, dtype=torch.float32)
    return rows | dict(
        splits=shares,
        order=anchors.new_empty(num_anchors, dtype=torch.int32),
        sorted_labels=anchors.new_empty(num_anchors, dtype=torch.int32),
        sort_keys=_sort_keys(num_anchors, anchors.device),
        weight_peaks=weight_peaks,
        factors=anchors.new_empty(num_anchors, 4, dtype=torch.float32),
        label_ranges=anchors.new_empty(anchor_tiles, 2, dtype=torch.int32),
        grad_parts=grad.new_empty(shares, *grad.shape) if shares > 1 else None,
    )
