"""Does an installation work? `python smoke.py`, with nothing of this repository on the path.

The CPU kernels beside the reference, and three steps of the criterion with a bank. Prints the versions and the OpenMP
runtimes of the process; any failure is an exception.
"""

from __future__ import annotations

from pathlib import Path

import torch

import pixcontrast_ext
from pixcontrast_ext.backends import native


def gradient(backend: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    anchors = torch.nn.functional.normalize(torch.randn(50, 24, generator=generator), dim=1).requires_grad_()
    keys = torch.nn.functional.normalize(torch.randn(300, 24, generator=generator), dim=1)
    of_anchors, of_keys = (torch.arange(size, dtype=torch.int32) % 3 for size in (50, 300))
    pixcontrast_ext.infonce(anchors, of_anchors, keys, of_keys, temperature=0.1, backend=backend).backward()
    assert anchors.grad is not None
    return anchors.grad


def train() -> None:
    bank = pixcontrast_ext.MemoryBank(3, 8, region_slots=4, pixel_slots=4)
    criterion = pixcontrast_ext.PixelContrastCrossEntropyLoss(3, bank=bank, min_pixels=1, backend="cpu")
    for _ in range(3):
        embeddings = torch.randn(2, 8, 6, 6, requires_grad=True)
        loss = criterion(torch.randn(2, 3, 6, 6), embeddings, torch.randint(3, (2, 6, 6)))
        loss.backward()
        assert loss.isfinite()
    assert embeddings.grad is not None
    assert embeddings.grad.any()  # not in the first step, whose bank is empty


def main() -> None:
    of_sources = Path(__file__).resolve().parents[1] / "pixcontrast_ext"
    assert Path(pixcontrast_ext.__file__).resolve().parent != of_sources, (
        "this is the source tree, not an installation"
    )
    assert native.unavailable is None, native.unavailable
    torch.testing.assert_close(gradient("cpu"), gradient("reference"), rtol=1e-4, atol=1e-6)
    train()
    print(f"pixcontrast_ext {pixcontrast_ext.__version__}, torch {torch.__version__}")
    libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    runtimes = [path for path in libraries if any(name in path for name in ("libgomp", "libiomp", "libomp"))]
    print("openmp", *runtimes)
    assert len(runtimes) <= 1, (
        "two OpenMP runtimes: each has threads of its own, which wait for those of the other"
    )


if __name__ == "__main__":
    main()
