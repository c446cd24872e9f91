"""What the ranks of a job collected for their banks, exchanged, so that all write the same rows in the same order.

Ranks first tell each other the shapes of what they bring, over a control group on the host. So a batch may have any
size on any rank, the device is not waited for, and none of it can be taken for one of the trainer's own collectives.
"""

from __future__ import annotations

import datetime
import math
import os
import threading
import weakref
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pixcontrast_ext.ops import handles, library
from pixcontrast_ext.ops.signature import FLOATING

TIMEOUT_VARIABLE = "PIXCONTRAST_RANK_TIMEOUT"  # seconds


class _Control:
    """A gloo group of the ranks of another group.

    Made without `new_group`, which all ranks of the job would have to call, those outside of the group too.
    """

    _of: ClassVar[weakref.WeakKeyDictionary[dist.ProcessGroup, _Control]] = weakref.WeakKeyDictionary()
    _made: ClassVar[dict[str, int]] = {}

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        # A job may be ended and begun anew, with the same names in the same store.
        generation = self._made[group.group_name] = self._made.get(group.group_name, 0) + 1
        prefix = f"pixcontrast_ext/{group.group_name}/{generation}/"
        self.store = dist.distributed_c10d.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
        self.limit = _time_limit(group)
        self.group: Any = None  # a ProcessGroupGloo, once all ranks are there
        self.exchanges = 0  # of all banks together

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> _Control:
        if group not in cls._of:
            cls._of[group] = cls(group)
        return cls._of[group]

    def all_gather(self, numbers: Tensor, call: int) -> list[Tensor]:
        """The numbers of every rank, in a bank's call of this number.

        Raises:
            RuntimeError: a rank does not come: within the time limit of the group, or, naming it, within
                PIXCONTRAST_RANK_TIMEOUT.
        """
        self.exchanges += 1
        patience = _patience()
        try:
            if patience is not None:
                self._wait_for_all(patience)
            if self.group is None:
                self.group = dist.ProcessGroupGloo(self.store, self.rank, self.world, self.limit)
            gathered = [torch.empty_like(numbers) for _ in range(self.world)]
            self.group.allgather([gathered], [numbers]).wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} waits in its call {call} of MemoryBank.enqueue for ranks that do not come: every "
                "rank has to call the loss in training mode at every step, with labels that are all ignored if it has "
                f"nothing to contrast. {TIMEOUT_VARIABLE}=20 names those that are more than 20 seconds late. {error}"
            ) from error
        if patience is not None:  # nobody waits for it any longer
            self.store.delete_key(self._arrival_of(self.rank))
        return gathered

    def _arrival_of(self, rank: int) -> str:
        """What a rank sets in the store once it has come to this exchange."""
        return f"{self.exchanges}/{rank}"

    def _wait_for_all(self, patience: datetime.timedelta) -> None:
        self.store.set(self._arrival_of(self.rank), "here")
        keys = [self._arrival_of(rank) for rank in range(self.world)]
        try:
            self.store.wait(keys, patience)
        except RuntimeError:
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            seconds = patience.total_seconds()
            raise RuntimeError(f"Missing after {seconds:g} seconds: ranks {missing}.") from None


def _patience() -> datetime.timedelta | None:
    """That of PIXCONTRAST_RANK_TIMEOUT. Raises ValueError for what is no number of seconds."""
    told = os.environ.get(TIMEOUT_VARIABLE)
    if not told:
        return None
    try:
        seconds = float(told)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise ValueError(f"{TIMEOUT_VARIABLE} is {told!r}, must be a positive number of seconds, as 20")
    return datetime.timedelta(seconds=seconds)


def _time_limit(group: dist.ProcessGroup) -> datetime.timedelta:
    """How long the collectives of a group wait."""
    for device in group._device_types:
        limit = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if isinstance(limit, datetime.timedelta):
            return limit
    return datetime.timedelta(minutes=30)


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

    def gather(self, rows: Tensor, row_labels: Tensor, slots: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """All ranks' candidates, in rank order.

        Args:
            rows: [N, C, 1 + k, D]; N and k may differ between the ranks.
            row_labels: [N, C, 1 + k].
            slots: a class's region and pixel slots in the bank.

        Raises:
            ValueError: on every rank, if their banks differ in classes, width, dtype or slots.
            RuntimeError: a rank does not come.
        """
        group = self.group()
        if group is None:
            return rows, row_labels
        shapes = self._shapes(rows, slots, group)
        images, candidates = (max(shape[i] for shape in shapes) - rows.shape[i] for i in (0, 2))
        if images or candidates:  # ranks send alike: fill up with rows that nobody stores
            rows = F.pad(rows, (0, 0, 0, candidates, 0, 0, 0, images))
            row_labels = F.pad(row_labels, (0, candidates, 0, 0, 0, images), value=-1)
        return _all_gather(rows, len(shapes), group), _all_gather(row_labels, len(shapes), group)

    def _shapes(self, rows: Tensor, slots: tuple[int, int], group: dist.ProcessGroup) -> list[list[int]]:
        """The shape of what each rank brings."""
        self.calls += 1
        own = torch.tensor([*rows.shape, FLOATING.index(rows.dtype), *slots])
        of_ranks: list[list[int]] = torch.stack(_Control.of(group).all_gather(own, self.calls)).tolist()
        banks = [
            f"({classes}, {width}, {str(FLOATING[dtype]).removeprefix('torch.')}, {regions}, {pixels})"
            for _, classes, _, width, dtype, regions, pixels in of_ranks
        ]
        if len(set(banks)) > 1:
            raise ValueError(
                "ranks must have the same banks; their (num_classes, embed_dim, dtype, region_slots, pixel_slots) are "
                f"{', '.join(f'{bank} on rank {rank}' for rank, bank in enumerate(banks))}"
            )
        return [shape[:4] for shape in of_ranks]


def _exchange_and_write(rows: Tensor, row_labels: Tensor, *bank: Any) -> None:
    *state, region_slots, exchange, backend = bank
    slots = region_slots, state[0].shape[1] - region_slots
    rows, row_labels = handles.of(exchange, Exchange).gather(rows, row_labels, slots)
    torch.ops.pixcontrast.enqueue_write(rows, row_labels, *state, region_slots, backend)


library.register(
    "enqueue_write_all_ranks(Tensor rows, Tensor row_labels, Tensor(a!) keys, Tensor(b!) key_labels, "
    "Tensor(c!) region_ptr, Tensor(d!) region_fill, Tensor(e!) pixel_ptr, Tensor(f!) pixel_fill, int region_slots, "
    "int exchange, str backend) -> ()",
    _exchange_and_write,
)
