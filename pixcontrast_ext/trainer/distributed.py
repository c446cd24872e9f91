"""The ranks of a run: one process alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from pixcontrast_ext.trainer.files import held


@dataclass(frozen=True)
class Ranks:
    """This process among the `world` processes of the run, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over the ranks."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the ranks."""
        if self.world > 1:
            dist.all_reduce(counts)
        return counts

    def copy_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every rank the first rank's values of `tensors`."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def hold(self, folder: Path) -> Iterator[None]:
        """Keep other processes out of a folder, as `held` by the first rank; what that raises, all of them raise."""
        with ExitStack() as stack:
            refused: list[OSError | None] = [None]
            if self.is_first:
                try:
                    stack.enter_context(held(folder))
                except OSError as error:
                    refused = [error]
            if self.world > 1:
                dist.broadcast_object_list(refused, src=0, device=self.device)
            if refused[0] is not None:
                raise refused[0]
            yield


@contextmanager
def join_ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the process group that torchrun announces in the environment (nccl on CUDA, gloo on CPU), if any.

    Raises ValueError for a device that is neither "auto", "cpu" nor "cuda", or is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device is {device!r}, must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda', but this machine has no CUDA device that torch can use")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(place)
    joins = world > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if use_cuda else "gloo")
    try:
        yield Ranks(rank, world, place)
    finally:
        if joins:
            dist.destroy_process_group()
