"""The network of `test_tap.py`, and the program that torchrun starts there. Argument: the folder for the states."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pixcontrast_ext import ProjectionHead, WithEmbeddings

STEPS, RANKS = 3, 2


class Segmenter(nn.Module):
    """A network that returns its logits alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh())
        self.classifier = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1))
        self.unused = nn.Conv2d(1, 1, 1)
        self.fails, self.checkpointed = False, ""

    def forward(self, images: Tensor) -> Tensor:
        if self.checkpointed == "all":
            logits: Tensor = checkpoint(self._run, images, use_reentrant=False)
        elif self.checkpointed == "body":
            logits = self.classifier(checkpoint(self.body, images, use_reentrant=False))
        else:
            logits = self._run(images)
        if self.fails:
            raise ArithmeticError
        return logits

    def _run(self, images: Tensor) -> Tensor:
        return self.classifier(self.body(images))


def train(model: nn.Module, share: slice) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        images = torch.randn(2 * RANKS, 3, 8, 8, generator=torch.Generator().manual_seed(step))[share]
        logits, embeddings = model(images)
        optimizer.zero_grad()
        (logits.square().mean() + embeddings.square().mean()).backward()
        optimizer.step()


def make() -> WithEmbeddings:
    torch.manual_seed(0)
    network = Segmenter()
    network.unused = None  # DistributedDataParallel wants a gradient of every weight
    return WithEmbeddings(network, "classifier.1", ProjectionHead(6, 5, "linear"))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = make()
    train(DistributedDataParallel(model), slice(2 * rank, 2 * rank + 2))
    torch.save(model.state_dict(), folder / f"rank{rank}.pt")
    sharded, mesh = make(), init_device_mesh("cpu", (RANKS,))
    for part in (sharded.network, sharded.head, sharded):
        fully_shard(part, mesh=mesh)
    train(sharded, slice(2 * rank, 2 * rank + 2))
    sharded.network(torch.randn(1, 3, 8, 8))  # inference needs the network alone
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(state, folder / "sharded.pt")
        alone = make()
        train(alone, slice(None))
        torch.save(alone.state_dict(), folder / "together.pt")
    dist.barrier()
    dist.destroy_process_group()
