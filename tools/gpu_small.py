"""Runs every kernel of a backend once over small, ragged shapes on the device, for compute-sanitizer.

With --one-forward it runs a single forward at the paper's size instead, for a profiler.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pixcontrast_ext import (
    MemoryBank,
    Mining,
    draw_keys,
    gather_embeddings,
    hard_anchor_sampling,
    infonce,
    score_thresholds,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = ((70, 150, 65), (33, 90, 300), (1, 1, 8))
PIXELS = (37, 41)


Placed = Callable[[Tensor], Tensor]


def as_they_are(tensor: Tensor) -> Tensor:
    return tensor


def rows(a: int, k: int, d: int, dtype: torch.dtype, device: str, placed: Placed) -> tuple[Tensor, ...]:
    """Anchors and their labels, keys and their labels."""
    anchors, keys = (placed(torch.randn(n, d, device=device).to(dtype)).requires_grad_() for n in (a, k))
    anchor_labels, key_labels = (
        placed(torch.randint(-1, 4, (n,), device=device, dtype=torch.int32)) for n in (a, k)
    )
    return anchors, anchor_labels, keys, key_labels


def contrast(
    a: int,
    k: int,
    d: int,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    placed: Placed = as_they_are,
) -> None:
    """The loss of `a` anchors, with `k` keys and among themselves; `placed` moves each tensor where it is wanted."""
    anchors, labels, keys, key_labels = rows(a, k, d, dtype, device, placed)
    loss = partial(infonce, temperature=1.0, exclude_self=True, backend=backend)
    loss(anchors, labels, keys, key_labels).backward()
    loss(anchors, labels, anchors, labels).backward()
    mining = Mining("semi-hard", negatives=9, positives=2, fraction=0.2)
    for others in ((keys, key_labels), (anchors, labels)):
        drawn = draw_keys(*others, mining)
        both = anchors, labels, others[0], drawn.positive_labels
        kept = score_thresholds(
            *both, mining, negatives=drawn.negatives, exclude_self=True, backend=backend
        )._asdict()
        loss(*both, negatives=drawn.negatives, **kept).backward()
    loss(anchors, labels, anchors, labels, neg_min=labels - 0.1, pos_max=labels + 0.1).backward()


def loss_alone(a: int, k: int, d: int, dtype: torch.dtype, backend: str, device: str) -> None:
    with torch.no_grad():
        infonce(*rows(a, k, d, dtype, device, as_they_are), temperature=1.0, backend=backend)


def maps(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    layout: torch.memory_format = torch.contiguous_format,
    placed: Placed = as_they_are,
) -> None:
    """Sampling, gathering and a bank, for embeddings of shape [B, D, H, W]."""
    embeddings = torch.randn(shape, device=device).to(dtype).to(memory_format=layout)
    embeddings = placed(embeddings).requires_grad_()
    batch, channels, height, width = shape
    labels, predictions = (
        placed(torch.randint(0, 5, (batch, height, width), device=device)) for _ in range(2)
    )
    priority = placed(torch.randint(2**31 - 1, labels.shape, dtype=torch.int32, device=device))
    sample = hard_anchor_sampling(
        labels, predictions, num_classes=5, max_samples=70, max_views=9, priority=priority, backend=backend
    )
    gather_embeddings(embeddings, sample.indices, backend=backend).float().square().sum().backward()
    bank = MemoryBank(5, channels, region_slots=3, pixel_slots=17, process_group=None).to(device)
    for name, buffer in list(bank.named_buffers()):
        setattr(bank, name, placed(buffer))
    for _ in range(2):
        bank.enqueue(embeddings.detach(), labels, priority=priority, backend=backend)


def main(
    backend: str,
    device: str = "cuda",
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    rows: tuple[tuple[int, int, int], ...] = ROWS,
    pixels: tuple[int, int] = PIXELS,
) -> None:
    torch.manual_seed(0)
    for dtype in dtypes:
        for shape in rows:
            contrast(*shape, dtype, backend, device)
            loss_alone(*shape, dtype, backend, device)
        for channels in (64, 128, 256, 512) if device == "cuda" else ():  # widths with tiles of their own
            contrast(70, 150, channels, dtype, backend, device)
            loss_alone(70, 150, channels, dtype, backend, device)
    torch.set_float32_matmul_precision("high")
    contrast(*rows[0], torch.float32, backend, device)
    loss_alone(*rows[0], torch.float32, backend, device)
    torch.set_float32_matmul_precision("highest")
    for layout in (torch.contiguous_format, torch.channels_last):
        maps((2, 65, *pixels), torch.float32, backend, device, layout)
        maps((2, 16, *pixels), torch.bfloat16, backend, device, layout)


def one_forward(backend: str) -> None:
    """1,024 anchors against a full bank for Cityscapes, in bf16, with the gradient."""
    anchors, keys = (
        F.normalize(torch.randn(n, 256, device="cuda"), dim=1).bfloat16() for n in (1024, 190_000)
    )
    labels = torch.arange(1024, device="cuda") % 19
    key_labels = torch.arange(19, device="cuda").repeat_interleave(10_000)
    infonce(anchors.requires_grad_(), labels, keys, key_labels, temperature=0.1, backend=backend)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=("cuda", "triton"))
    parser.add_argument("--one-forward", action="store_true")
    parser.add_argument("--emulated", action="store_true", help="without a device")
    arguments = parser.parse_args()
    if arguments.emulated:
        from tools import emulated

        emulated.serve((arguments.backend,))
        # A check that it runs: the interpreter would take minutes for all that a device gets.
        main(arguments.backend, "cpu", DTYPES[:1], rows=((5, 9, 65),), pixels=(5, 7))
    else:
        (one_forward if arguments.one_forward else main)(arguments.backend)
        torch.cuda.synchronize()
