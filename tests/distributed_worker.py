"""What one rank does in `test_distributed.py`: scenarios in turn, the bank's state after each step saved to a file.

Arguments: the folder for the results, and a checkpoint to resume from.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pixcontrast_ext import MemoryBank, PixelContrastLoss, ProjectionHead

CLASSES, CHANNELS, PIXELS = 4, 6, (5, 7)
# Images of a rank in each step: all the same, one rank with fewer, one with none at all.
SIZES = [
    lambda rank: 2,
    lambda rank: 2,
    lambda rank: 2 - (rank == 0),
    lambda rank: 2 * (rank == 0),
    lambda rank: 1,
]
VOID = (1, 1)  # the rank and step whose labels are all ignored


def batch(rank, step, size=None):
    """What a rank gets at a step: embeddings, labels, priority."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    size = SIZES[step % len(SIZES)](rank) if size is None else size
    embeddings = torch.randn(size, CHANNELS, *PIXELS, generator=generator)
    labels = torch.randint(0, CLASSES, (size, *PIXELS), generator=generator)
    labels[labels == rank % CLASSES] = 255  # ranks see different classes
    if (rank, step) == VOID:
        labels.fill_(255)
    return embeddings, labels, torch.randint(0, 9, labels.shape, dtype=torch.int32, generator=generator)


def make_bank(**settings):
    return MemoryBank(CLASSES, CHANNELS, region_slots=9, pixel_slots=23, pixels_per_image=3, **settings)


def state(bank):
    return {name: value.clone() for name, value in bank.state_dict().items()}


def enqueue(bank, *maps):
    bank.enqueue(*maps[:2], priority=maps[2])
    return state(bank)


def steps(rank, **settings):
    bank = make_bank(**settings)
    return [enqueue(bank, *batch(rank, step)) for step in range(len(SIZES))]


def nothing_first(rank):
    """No rank has an image in the first exchange, which so cannot say how large one is."""
    bank = make_bank()
    return [enqueue(bank, *batch(rank, step, size)) for step, size in enumerate((0, 2, 0, 2))]


def resumed(rank, checkpoint):
    bank = make_bank()
    bank.load_state_dict(torch.load(checkpoint))
    return [enqueue(bank, *batch(rank, step)) for step in range(len(SIZES), 2 * len(SIZES))]


def too_large(rank):
    """The message, the bank after it, and after one more step."""
    bank = make_bank()
    enqueue(bank, *batch(rank, 0, 2))
    try:
        enqueue(bank, *batch(rank, 1, 3))
    except ValueError as error:
        return [str(error), state(bank), enqueue(bank, *batch(rank, 2, 2))]
    raise AssertionError("a larger batch was taken")


class Step(nn.Module):
    def __init__(self, head, loss):
        super().__init__()
        self.head, self.loss = head, loss

    def forward(self, features, labels):
        return self.loss(self.head(features), labels, labels * 0)


def training(rank, *, loss_in_ddp):
    """A training loop; each rank draws its own random numbers."""
    torch.manual_seed(0)
    head = ProjectionHead(CHANNELS, CHANNELS)
    loss = PixelContrastLoss(CLASSES, min_pixels=1, max_samples=64, bank=make_bank())
    step_module = (
        DistributedDataParallel(Step(head, loss))
        if loss_in_ddp
        else Step(DistributedDataParallel(head), loss)
    )
    optimizer = torch.optim.SGD(step_module.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    states = []
    for step in range(6):
        features, labels, _ = batch(rank, step, 1 if step == 5 and rank == 0 else 2)
        value = step_module(features, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        states.append(
            {**state(loss.bank), "loss": value.detach(), "weight": head.project[0].weight.detach().clone()}
        )
    return states


def main(out, checkpoint=None):
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    rank = dist.get_rank()
    pair = dist.new_group([0, 1])
    scenarios = {
        "steps": lambda: steps(rank),
        "alone": lambda: steps(rank, process_group=None),
        "pair": lambda: steps(rank, process_group=pair),
        "nothing_first": lambda: nothing_first(rank),
        "too_large": lambda: too_large(rank),
        "training": lambda: training(rank, loss_in_ddp=False),
        "training_in_ddp": lambda: training(rank, loss_in_ddp=True),
    }
    if checkpoint is not None:
        scenarios["resumed"] = lambda: resumed(rank, checkpoint)
    for name, scenario in scenarios.items():
        torch.save(scenario(), Path(out) / f"{name}.{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
