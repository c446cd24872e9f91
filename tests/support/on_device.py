"""Runs the GPU kernels on the device for tests whose tensors lie on the CPU.

The backend tests compare backends on one set of tensors. With a GPU, the backends `cuda` and `triton` go through this
module: every launch copies the tensors' whole storages to the device, and copies all of them back.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext.backends import device as devices


class Copying(devices.Gpu):
    """The current device, for tensors on the CPU as well as on it."""

    type = "cpu"

    @property
    def real(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def capability(self, device: torch.device) -> tuple[int, int]:
        return super().capability(self.real)

    def multiprocessors(self, device: torch.device) -> int:
        return super().multiprocessors(self.real)

    def current(self, device: torch.device) -> Any:
        return super().current(self.real)

    def number_and_stream(self, device: torch.device) -> tuple[int, int]:
        return super().number_and_stream(self.real)

    def launch(self, device: torch.device, start: Callable[..., None], arguments: Any) -> None:
        if device.type == "cuda":
            super().launch(device, start, arguments)
            return
        storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        super().launch(self.real, start, moved(arguments, self.real, storages))
        torch.cuda.synchronize(self.real)
        for storage, copied in storages.values():
            storage.copy_(copied)


def moved(
    value: Any, gpu: torch.device, storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]]
) -> Any:
    """`value` with copies of its tensors on the device; `storages` maps addresses to storages and their copies."""
    if isinstance(value, dict):
        return {name: moved(field, gpu, storages) for name, field in value.items()}
    if isinstance(value, tuple):
        fields = [moved(field, gpu, storages) for field in value]
        return type(value)(*fields) if hasattr(value, "_fields") else tuple(fields)
    if dataclasses.is_dataclass(value):
        value = copy.copy(value)
        for field in dataclasses.fields(value):
            setattr(value, field.name, moved(getattr(value, field.name), gpu, storages))
        return value
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    if storage.nbytes() == 0:
        return value.to(gpu)
    if storage.data_ptr() not in storages:
        copied = torch.empty(storage.nbytes(), dtype=torch.uint8, device=gpu).untyped_storage()
        copied.copy_(storage)
        storages[storage.data_ptr()] = storage, copied
    _, copied = storages[storage.data_ptr()]
    return torch.empty(0, dtype=value.dtype, device=gpu).set_(
        copied, value.storage_offset(), value.shape, value.stride()
    )


def serve() -> None:
    """Makes `cuda` and `triton` serve CPU tensors in this way."""
    devices.gpu = Copying()
