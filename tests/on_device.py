"""Runs the CUDA kernels on the device for tests whose tensors lie on the CPU.

The backend tests compare backends on one set of tensors. With a GPU, their `cuda` backend goes through here: every
launch takes copies of the tensors' whole storages to the device, and brings all of them back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext.backends import native

_launch_on_device = native.launch_cuda


def launch_cuda(kernel: str, device: torch.device, **fields: Any) -> None:
    """As `native.launch_cuda`, for tensors on the CPU or on the device."""
    if device.type == "cuda":
        return _launch_on_device(kernel, device, **fields)
    gpu = torch.device("cuda", torch.cuda.current_device())
    storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage.nbytes() == 0:
            return value.to(gpu)
        if storage.data_ptr() not in storages:
            copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device=gpu).untyped_storage()
            copy.copy_(storage)
            storages[storage.data_ptr()] = storage, copy
        _, copy = storages[storage.data_ptr()]
        return torch.empty(0, dtype=value.dtype, device=gpu).set_(
            copy, value.storage_offset(), value.shape, value.stride()
        )

    _launch_on_device(kernel, gpu, **{name: moved(value) for name, value in fields.items()})
    torch.cuda.synchronize(gpu)
    for storage, copy in storages.values():
        storage.copy_(copy)
