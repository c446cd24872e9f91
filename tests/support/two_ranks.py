"""A small network with head and criterion inside, which two trainers train through the warm-up on two ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pixcontrast_ext import MemoryBank, PixelContrastCrossEntropyLoss, ProjectionHead
from tools import processes

RANKS, STEPS, BATCH, WARMUP_STEPS = 2, 20, 2, 3
CLASSES, WIDTH, PIXELS = 3, 8, 8
IMAGES = RANKS * STEPS * BATCH


class Images(Dataset):
    """Each image has two classes, one per half, and so adds two regions to the bank."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        labels = torch.full((PIXELS, PIXELS), index % CLASSES)
        labels[:, PIXELS // 2 :] = (index + 1) % CLASSES
        noise = 0.1 * torch.randn(3, PIXELS, PIXELS, generator=generator)
        return {"images": labels / CLASSES + noise, "labels": labels}


class Network(nn.Module):
    """The module a trainer gets: whatever is trained or saved is a submodule. The bank never fills up."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, WIDTH, kernel_size=3, padding=1), nn.ReLU())
        self.classifier = nn.Conv2d(WIDTH, CLASSES, kernel_size=1)
        self.head = ProjectionHead(WIDTH, WIDTH)
        self.criterion = PixelContrastCrossEntropyLoss(
            CLASSES,
            warmup_steps=WARMUP_STEPS,
            min_pixels=1,
            bank=MemoryBank(
                CLASSES, WIDTH, region_slots=2 * IMAGES, pixel_slots=2 * IMAGES, pixels_per_image=1
            ),
        )

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        logits = self.classifier(features)
        return self.criterion(logits, self.head(features), labels), logits


def save(network: Network, folder: str, rank: int) -> None:
    state = {**network.state_dict(), "count": network.criterion.step}
    torch.save(state, Path(folder) / f"rank{rank}.pt")


def run(folder: Path, *command: object) -> None:
    """Runs a script to the end."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # a script imports what the tests import
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = processes.run([sys.executable, *command], one_stream=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]


def check(folder: Path) -> None:
    """Both ranks end with the same head, bank and count, and the bank has seen the images of both."""
    first, second = (torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS))
    assert first.keys() == second.keys()
    for name, value in first.items():
        if "running_" not in name:  # batch norm's statistics stay on their rank until the next step
            assert torch.equal(value, second[name]), name
    assert first["count"] == WARMUP_STEPS
    (regions,) = (value for name, value in first.items() if name.endswith("bank.region_fill"))
    assert regions.sum() == 2 * IMAGES
    torch.manual_seed(0)
    initial = Network().state_dict()
    trained = {name.removeprefix("network."): value for name, value in first.items()}
    for name in ("head.project.0.weight", "head.project.3.weight"):  # the contrast trained it
        assert not torch.equal(trained[name], initial[name]), name
