"""Records every call of a CUDA kernel that a set of small problems makes, for replay.py to repeat without torch.

The problems are ragged on purpose: no size is a multiple of a tile, a warp or a vector unless that is intended.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pixcontrast_ext import (
    MemoryBank,
    Mining,
    gather_embeddings,
    hard_anchor_sampling,
    infonce,
    score_thresholds,
)
from pixcontrast_ext.backends import cuda, native, splits
from pixcontrast_ext.backends import device as devices
from tools.emulated import Emulated

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Recorder(Emulated):
    """Records the memory before and after each call, storage by storage."""

    def __init__(self, kernels: Any) -> None:
        super().__init__(kernels)
        self.calls: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {}

    def launch(self, device: torch.device, start: Any, arguments: Any) -> None:
        (kernel,), (record, fields) = start.args, arguments
        fields = {name: getattr(record, name) for name in record.names()} | record.sizes() | fields
        storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
        call: dict[str, Any] = {"kernel": kernel, "scalars": {}, "pointers": {}}
        call["shared"] = os.environ.get("PXC_EMULATOR_SHARED", "")
        for name, value in native.arguments(kernel, device, None, fields).items():
            tensor = fields[name]
            if not isinstance(tensor, Tensor):
                call["scalars"][name] = value
            elif tensor.numel() == 0:
                call["scalars"][name] = (0, *value[1:])  # a null pointer of its dtype
            else:
                storage = tensor.untyped_storage()
                place, _ = storages.setdefault(storage.data_ptr(), (len(storages), storage))
                address, *kind = value
                call["pointers"][name] = (place, address - storage.data_ptr(), kind)
        index = len(self.calls)
        for place, storage in storages.values():
            self.arrays[f"{index}.{place}.before"] = _bytes_of(storage)
        super().launch(device, start, arguments)
        for place, storage in storages.values():
            self.arrays[f"{index}.{place}.after"] = _bytes_of(storage)
        call["storages"] = len(storages)
        self.calls.append(call)

    def save(self, path: Path) -> None:
        calls = np.frombuffer(json.dumps(self.calls).encode(), np.uint8)
        np.savez_compressed(path, calls=calls, **self.arrays)  # type: ignore[arg-type]  # for allow_pickle as well


def _bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy().copy()


# Problems


def _maps(batch: int, height: int, width: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (batch, height, width)
    labels = torch.randint(0, classes, shape)
    predictions = torch.where(torch.rand(shape) < 0.4, torch.randint(0, classes, shape), labels)
    labels[torch.rand(shape) < 0.2] = 255
    labels[torch.rand(shape) < 0.05] = classes + 3  # not a class: ignored
    return labels, predictions, torch.randint(-50, 50, shape, dtype=torch.int32)


def _layouts(embeddings: Tensor) -> list[Tensor]:
    """The same map contiguous, channels_last, and as part of a larger one."""
    inside = F.pad(embeddings, (1, 2, 3, 0))[..., 3:, 1:-2]
    return [embeddings, embeddings.to(memory_format=torch.channels_last), inside]


def _sampling() -> None:
    problems = [  # shape and classes; samples, views, min_pixels, hard_fraction
        ((2, 17, 23, 5), (64, 10, None, 0.5)),
        ((3, 8, 9, 6), (5, 3, 1, 0.5)),
        ((1, 33, 41, 3), (100, 100, 1, 0.8)),
        ((1, 1, 1, 1), (1, 1, 0, 0.5)),
        ((0, 3, 3, 2), (7, 2, None, 0.5)),
    ]
    for (batch, height, width, classes), (max_samples, max_views, min_pixels, hard_fraction) in problems:
        labels, predictions, priority = _maps(batch, height, width, classes)
        hard_anchor_sampling(
            labels,
            predictions,
            num_classes=classes,
            max_samples=max_samples,
            max_views=max_views,
            min_pixels=min_pixels,
            hard_fraction=hard_fraction,
            priority=priority,
            backend="cuda",
        )


def _gather() -> None:
    for dtype, channels in zip(DTYPES, (33, 70, 7), strict=True):
        for embeddings in _layouts(torch.randn(2, channels, 5, 7).to(dtype)):
            for normalize, count in ((True, 45), (False, 1), (True, 0)):
                indices = torch.randint(0, 70, (count,))
                indices[count // 2 :: 9] = 3  # one pixel several times
                indices[count // 3 :: 11] = 70  # no pixel
                leaf = embeddings.detach().requires_grad_()
                rows = gather_embeddings(leaf, indices, normalize=normalize, backend="cuda")
                rows.backward(torch.randn_like(rows))
    # More than 2^32 pixels in the memory of one row.
    width = 2**16 + 1
    embeddings = torch.randn(1, 2, 1, width).half().expand(width, 2, 1, width)
    indices = torch.tensor([width**2 - 1, width**2 - 77, 2**31 + 5, 3])
    gather_embeddings(embeddings, indices, backend="cuda")
    embeddings = torch.randn(1, 2, 40, 40, requires_grad=True)  # more rows than one block sorts
    rows = gather_embeddings(embeddings, torch.randint(0, 1600, (2050,)), backend="cuda")
    rows.backward(torch.randn_like(rows))


def _enqueue() -> None:
    slots = ((3, 7), (1, 4), (2, 0))  # for 2 regions and 6 pixels at a time
    for dtype, channels, (regions, pixels) in zip(DTYPES, (33, 16, 5), slots, strict=True):
        bank = MemoryBank(
            4, channels, region_slots=regions, pixel_slots=pixels, pixels_per_image=3, dtype=dtype
        )
        for normalize, embeddings in zip(
            (True, False, True), _layouts(torch.randn(2, channels, 11, 9).to(dtype)), strict=True
        ):
            bank.normalize = normalize
            labels, _, priority = _maps(2, 11, 9, 4)
            embeddings[0, :, 2, 3] = math.nan
            embeddings[1, :, 1] = 0
            bank.enqueue(embeddings, labels, priority=priority, backend="cuda")
    bank = MemoryBank(3, 4, region_slots=0, pixel_slots=50, pixels_per_image=40)
    labels, _, priority = _maps(1, 37, 31, 3)
    bank.enqueue(torch.randn(1, 4, 37, 31), labels, priority=priority, backend="cuda")
    # Several stages of a chunk, copied by 16 and by 4 bytes, in strips of 32 and of 128 pixels.
    for dtype, channels, height, shared in zip(
        DTYPES, (400, 64, 360), (9, 18, 9), ("100", "228", "100"), strict=True
    ):
        os.environ["PXC_EMULATOR_SHARED"] = shared
        bank = MemoryBank(3, channels, region_slots=3, pixel_slots=6, pixels_per_image=2, dtype=dtype)
        labels, _, priority = _maps(1, height, 10, 3)
        for embeddings in _layouts(torch.randn(1, channels, height, 10).to(dtype)):
            bank.enqueue(embeddings, labels, priority=priority, backend="cuda")


def _rows(count: int, channels: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, labels = F.normalize(torch.randn(count, channels), dim=1), torch.randint(0, classes, (count,))
    labels[torch.rand(count) < 0.1] = -1
    rows[labels < 0] = math.nan  # padding may hold anything
    return rows.to(dtype), labels


def _infonce(precision: str) -> None:
    shapes = [
        (1, 1, 1, 1),
        (37, 150, 33, 3),
        (70, 9, 8, 2),
        (5, 0, 6, 2),
        (0, 5, 6, 2),
        (3, 130, 65, 5),
        (40, 30, 8, 30),
    ]
    if precision == "highest":
        shapes.append((9, 70, 260, 2))
    for dtype, (anchors, keys, channels, classes) in itertools.product(DTYPES, shapes):
        if precision != "highest" and dtype != torch.float32:
            continue
        anchor_rows, anchor_labels = _rows(anchors, channels, classes, dtype)
        key_rows, key_labels = _rows(keys, channels, classes, dtype)
        # Tiles of one class, and a class that most parts of the positives never see.
        if anchors in (37, 70):
            key_labels[10:][key_labels[10:] == 1] = 0
            key_labels, order = key_labels.sort()
            key_rows = key_rows[order]
        infonce(anchor_rows, anchor_labels, key_rows, key_labels, temperature=0.1, backend="cuda")
        anchor_rows.requires_grad_(), key_rows.requires_grad_()
        losses = functools.partial(
            infonce, temperature=0.1, exclude_self=anchors % 2 == 1, reduction="none", backend="cuda"
        )
        for rows, labels in ((key_rows, key_labels), (anchor_rows, anchor_labels)):
            loss = losses(anchor_rows, anchor_labels, rows, labels)
            loss.backward(torch.randn_like(loss))
        for gradient in (anchor_rows.grad, key_rows.grad):  # a NaN would stay NaN whatever a fault does
            assert gradient is not None
            assert gradient.isfinite().all()


def _infonce_of_more_anchors_than_one_block_sorts() -> None:
    anchor_rows, anchor_labels = _rows(1030, 8, 3, torch.float16)
    key_rows, key_labels = _rows(20, 8, 3, torch.float16)
    key_rows.requires_grad_()
    infonce(anchor_rows, anchor_labels, key_rows, key_labels, temperature=0.1, backend="cuda").backward()


def _infonce_of_many_splits() -> None:
    """Enough splits that the finish shares them among teams of threads, and more channels than a team adds at once."""
    anchor_rows, anchor_labels = _rows(3, 260, 2, torch.float16)
    key_rows, key_labels = _rows(2100, 260, 2, torch.float16)
    anchor_labels[:2] = torch.arange(2)
    anchor_rows = anchor_rows.nan_to_num().requires_grad_()
    infonce(anchor_rows, anchor_labels, key_rows, key_labels, temperature=0.1, backend="cuda")


def _infonce_of_usual_widths() -> None:
    """The widths that have tiles of their own, on a large and a small device, for few anchors and more.

    Some tiles of keys hold one class, some two; some lack labels, some reach past the last key. The fp32 rows of 128
    channels have norms too large for the usual planes.
    """
    widths = (
        *((channels, "228", 40) for channels in (64, 128, 256, 512)),
        *((channels, "100", 40) for channels in (256, 512)),
        (256, "228", 70),
    )
    for dtype, (channels, shared, anchors) in itertools.product(DTYPES, widths):
        if dtype == torch.float32 and channels == 512:
            continue
        os.environ["PXC_EMULATOR_SHARED"] = shared
        anchor_rows, anchor_labels = _rows(anchors, channels, 3, dtype)
        key_rows, key_labels = _rows(400 if anchors > 64 else 230, channels, 3, dtype)
        key_rows, key_labels = key_rows.nan_to_num(), torch.where(key_labels < 0, 0, key_labels).sort().values
        key_labels[70:75] = -1
        if dtype == torch.float32 and channels == 128:
            key_rows *= 1e3
        anchor_rows.requires_grad_()
        infonce(anchor_rows, anchor_labels, key_rows, key_labels, temperature=0.1, backend="cuda")


def _mining(precision: str) -> None:
    """Histograms, and the loss of the pairs that they leave: of drawn keys, of all, in the batch, with every gradient.

    The widths have tiles of their own; on the small device there is no room for the histograms beside the largest.
    """
    ragged, wide = [(37, 150, 33, "100")], [(9, 70, 256, "100"), (70, 90, 256, "228")]
    problems = {
        torch.float32: [*ragged, *wide, (6, 0, 8, "100"), (0, 6, 8, "100")]
        if precision == "highest"
        else ragged,
        torch.float16: [*ragged, (5, 40, 300, "100")] if precision == "highest" else [],
        torch.bfloat16: [*ragged, *wide] if precision == "highest" else [],
    }
    for dtype, (anchors, keys, channels, shared) in (
        (dtype, problem) for dtype, some in problems.items() for problem in some
    ):
        os.environ["PXC_EMULATOR_SHARED"] = shared
        anchor_rows, anchor_labels = _rows(anchors, channels, 3, dtype)
        key_rows, key_labels = _rows(keys, channels, 3, dtype)
        # Products are multiples of 2^-8, so that many lie on the edge of a bin; a quarter lies in the middle.
        anchor_rows, key_rows = ((rows * 16).round() / 16 for rows in (anchor_rows, key_rows))
        for rows in (anchor_rows, key_rows):
            rows[::2, -1], rows[1::2, -1] = 2**-4.5, 0
        negatives = key_rows[: keys // 2].clone(), key_labels[: keys // 2].clone()
        if dtype == torch.float32:  # planes of each side take a power of two of their own
            anchor_rows, key_rows = anchor_rows * 2**10, key_rows * 2**-10
            negatives[0].mul_(2**-10)
            negatives[0][:1] *= 2**12
            negatives[1][:1] = 1
        negatives = negatives[0].nan_to_num(), negatives[1]
        anchor_rows.requires_grad_(), key_rows.requires_grad_()
        mining = Mining("semi-hard", fraction=0.3)
        for rows, labels, others, exclude_self in (
            (key_rows, key_labels, negatives, False),
            (key_rows, key_labels, None, True),
            (anchor_rows, anchor_labels, None, True),
        ):
            sides = anchor_rows, anchor_labels, rows, labels
            kept = score_thresholds(
                *sides, mining, negatives=others, exclude_self=exclude_self, backend="cuda"
            )
            loss = infonce(
                *sides,
                temperature=0.1,
                exclude_self=exclude_self,
                reduction="none",
                negatives=others,
                **kept._asdict(),
                backend="cuda",
            )
            loss.backward(torch.randn_like(loss))


def record(path: Path, kernels: Any) -> int:
    """Solves the problems with emulated kernels of the CUDA backend; returns the number of calls."""
    torch.manual_seed(20210118)
    recorder = Recorder(kernels)
    before = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN and the largest integers
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(devices, "gpu", recorder)
            patch.setenv("PXC_EMULATOR_SHARED", "100")  # some problems change it
            _sampling()
            _gather()
            _enqueue()
            os.environ["PXC_EMULATOR_SHARED"] = "100"
            for precision in ("highest", "high"):
                torch.set_float32_matmul_precision(precision)
                _infonce(precision)
                _mining(precision)
                os.environ["PXC_EMULATOR_SHARED"] = "100"
            _infonce_of_more_anchors_than_one_block_sorts()
            with pytest.MonkeyPatch.context() as of_splits:
                of_splits.setattr(splits, "choose", lambda rows, columns, *_: columns)
                _infonce_of_many_splits()
            # Uncached, because the device changes; and with one block, which then walks over several tiles.
            cut = cuda._cut.__wrapped__
            patch.setattr(cuda, "_cut", lambda *how: (cut(*how)[0], 1))
            _infonce_of_usual_widths()
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(False)
    recorder.save(path)
    return len(recorder.calls)
