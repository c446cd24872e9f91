"""What the ranks of a job collected for their banks, exchanged, so that all write the same rows in the same order.

Ranks first tell each other how many images they bring, over a group of their own for such words, which lives on the
host. So a batch may have any size on any rank, the device is not waited for, and no word can be taken for one of the
trainer's own collectives.
"""

from __future__ import annotations

import datetime
import weakref
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pixcontrast_ext import ops
from pixcontrast_ext.ops import handles

PATIENCE = datetime.timedelta(
    seconds=20
)  # with which a missing rank is waited for where debugging is asked for

_words: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def _group_for_words(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the same ranks and with the same time limit; all of them have to ask for it at once."""
    if group not in _words:
        settings: dict[str, Any] = {"backend": "gloo", "timeout": _time_limit(group)}
        if group != dist.group.WORLD:
            settings["use_local_synchronization"] = True  # the ranks outside of the group do not come here
        _words[group] = dist.new_group(dist.get_process_group_ranks(group), **settings)
    return _words[group]


def _time_limit(group: dist.ProcessGroup) -> datetime.timedelta | None:
    """How long the collectives of a group wait, None if it cannot be known."""
    for device in group._device_types:
        limit = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if isinstance(limit, datetime.timedelta):
            return limit
    return None


def _all_gather(rows: Tensor, world: int, group: dist.ProcessGroup) -> Tensor:
    gathered = rows.new_empty(world * rows.shape[0], *rows.shape[1:])
    # `all_gather_single` is its name from torch 2.13 on, where the other warns.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, rows.contiguous(), group=group)
    return gathered


class Exchange(handles.Handle):
    """The exchange of one bank: "default" for all ranks of an initialised job, a group, or None for none."""

    def __init__(self, process_group: dist.ProcessGroup | str | None) -> None:
        super().__init__()
        self.process_group = process_group
        self.calls = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:  # the copy of a bank shares its group
        return Exchange(self.process_group)

    def __reduce__(self) -> tuple[type[Exchange], tuple[str | None]]:
        if not (self.process_group is None or isinstance(self.process_group, str)):
            raise TypeError(
                "a bank with an explicit process group cannot be pickled; save its state_dict instead"
            )
        return Exchange, (self.process_group,)

    def group(self) -> dist.ProcessGroup | None:
        """The group to exchange with, or None if there is none or it has one rank."""
        if self.process_group is None or not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if isinstance(self.process_group, str) else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def gather(self, rows: Tensor, row_labels: Tensor) -> tuple[Tensor, Tensor]:
        """All ranks' candidates, in rank order.

        Args:
            rows: [N, C, 1 + k, D]; N and k may differ between the ranks.
            row_labels: [N, C, 1 + k].

        Raises:
            ValueError: on every rank, if their banks differ.
            RuntimeError: a rank does not come.
        """
        group = self.group()
        if group is None:
            return rows, row_labels
        shapes = self._shapes(rows, group)
        images, candidates = (max(shape[i] for shape in shapes) - rows.shape[i] for i in (0, 2))
        if images or candidates:  # ranks send alike: fill up with rows that nobody stores
            rows = F.pad(rows, (0, 0, 0, candidates, 0, 0, 0, images))
            row_labels = F.pad(row_labels, (0, candidates, 0, 0, 0, images), value=-1)
        return _all_gather(rows, len(shapes), group), _all_gather(row_labels, len(shapes), group)

    def _shapes(self, rows: Tensor, group: dist.ProcessGroup) -> list[list[int]]:
        """The shape of what each rank brings."""
        self.calls += 1
        own = torch.tensor([*rows.shape, rows.element_size()])
        try:
            words = _group_for_words(group)
            if dist.get_debug_level() != dist.DebugLevel.OFF:
                dist.monitored_barrier(words, timeout=PATIENCE, wait_all_ranks=True)
            of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
            dist.all_gather(of_ranks, own, group=words)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank(group)} waits in its call {self.calls} of MemoryBank.enqueue for ranks that do "
                "not come: every rank has to call the loss in training mode at every step, with labels that are all "
                "ignored if it has nothing to contrast. With TORCH_DISTRIBUTED_DEBUG=INFO the ranks that are missing "
                f"are named within {PATIENCE.seconds} seconds. {error}"
            ) from error
        shapes: list[list[int]] = torch.stack(of_ranks).tolist()
        banks = [(classes, width, size) for _, classes, _, width, size in shapes]
        if len(set(banks)) > 1:
            raise ValueError(
                "ranks must have the same banks; their (num_classes, embed_dim, bytes of an element) are "
                f"{', '.join(f'{bank} on rank {rank}' for rank, bank in enumerate(banks))}"
            )
        return shapes


def _exchange_and_write(rows: Tensor, row_labels: Tensor, *bank: Any) -> None:
    *state, region_slots, exchange, backend = bank
    rows, row_labels = handles.of(exchange, Exchange).gather(rows, row_labels)
    torch.ops.pixcontrast.enqueue_write(rows, row_labels, *state, region_slots, backend)


ops.register(
    "enqueue_write_all_ranks(Tensor rows, Tensor row_labels, Tensor(a!) keys, Tensor(b!) key_labels, "
    "Tensor(c!) region_ptr, Tensor(d!) region_fill, Tensor(e!) pixel_ptr, Tensor(f!) pixel_fill, int region_slots, "
    "int exchange, str backend) -> ()",
    _exchange_and_write,
)
