"""Every kernel of a backend once over small, ragged shapes on the device: what compute-sanitizer is run over.

With --one-forward it is one forward at the paper's size instead: what a profiler is run over.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from pixcontrast_ext import MemoryBank, gather_embeddings, hard_anchor_sampling, infonce

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def contrast(a: int, k: int, d: int, dtype: torch.dtype, device: str, backend: str) -> None:
    anchors, keys = (torch.randn(n, d, device=device, dtype=dtype, requires_grad=True) for n in (a, k))
    anchor_labels, key_labels = (torch.randint(-1, 4, (n,), device=device) for n in (a, k))
    infonce(
        anchors, anchor_labels, keys, key_labels, temperature=1.0, exclude_self=True, backend=backend
    ).backward()
    infonce(
        anchors, anchor_labels, anchors, anchor_labels, temperature=1.0, exclude_self=True, backend=backend
    ).backward()
    with torch.no_grad():
        infonce(anchors, anchor_labels, keys, key_labels, temperature=1.0, backend=backend)


def maps(channels: int, dtype: torch.dtype, device: str, layout: torch.memory_format, backend: str) -> None:
    embeddings = torch.randn(2, channels, 37, 41, device=device, dtype=dtype).to(memory_format=layout)
    embeddings.requires_grad_()
    labels, predictions = (torch.randint(0, 5, (2, 37, 41), device=device) for _ in range(2))
    sample = hard_anchor_sampling(
        labels, predictions, num_classes=5, max_samples=70, max_views=9, backend=backend
    )
    gather_embeddings(embeddings, sample.indices, backend=backend).float().square().sum().backward()
    bank = MemoryBank(5, channels, region_slots=3, pixel_slots=17, process_group=None).to(device)
    for _ in range(2):
        bank.enqueue(embeddings.detach(), labels, backend=backend)


def main(backend: str, device: str = "cuda", dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    torch.manual_seed(0)
    for dtype in dtypes:
        for shape in ((70, 150, 65), (33, 90, 300), (1, 1, 8)):
            contrast(*shape, dtype, device, backend)
        for channels in (64, 128, 256, 512) if device == "cuda" else ():  # they have tiles of their own
            contrast(70, 150, channels, dtype, device, backend)
    torch.set_float32_matmul_precision("high")
    contrast(70, 150, 65, torch.float32, device, backend)
    torch.set_float32_matmul_precision("highest")
    for layout in (torch.contiguous_format, torch.channels_last):
        maps(65, torch.float32, device, layout, backend)
        maps(16, torch.bfloat16, device, layout, backend)


def one_forward(backend: str) -> None:
    """1,024 anchors against a full bank of Cityscapes, bf16, with the gradient."""
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
        main(
            arguments.backend, "cpu", DTYPES[:1]
        )  # to see that it runs: the interpreter takes minutes for all
    else:
        (one_forward if arguments.one_forward else main)(arguments.backend)
        torch.cuda.synchronize()
