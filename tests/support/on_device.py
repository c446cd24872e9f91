"""Runs the kernels for a GPU on the device for tests whose tensors lie on the CPU.

The backend tests compare backends on one set of tensors. With a GPU, their backends `cuda` and `triton` go through
here: every launch takes copies of the tensors' whole storages to the device, and brings all of them back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext import backends
from pixcontrast_ext.backends import native
from pixcontrast_ext.backends import triton as triton_backend
from pixcontrast_ext.backends.triton import launch

_launch_cuda, _launch_triton = native.launch_cuda, launch.launch


def _with_copies(start: Callable[[torch.device, Callable[[Any], Any]], None]) -> None:
    """start(device, moved), where moved(argument) is the argument with a tensor's copy on the device."""
    gpu = torch.device("cuda", torch.cuda.current_device())
    storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):  # a record
            return type(value)(*map(moved, value))
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

    start(gpu, moved)
    torch.cuda.synchronize(gpu)
    for storage, copy in storages.values():
        storage.copy_(copy)


def launch_cuda(kernel: str, device: torch.device, **fields: Any) -> None:
    """As `native.launch_cuda`, for tensors on the CPU or on the device."""
    if device.type == "cuda":
        return _launch_cuda(kernel, device, **fields)
    _with_copies(
        lambda gpu, moved: _launch_cuda(kernel, gpu, **{name: moved(value) for name, value in fields.items()})
    )


def launch_triton(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """As `triton.launch.launch`, for tensors on the CPU or on the device."""
    if any(tensor.device.type == "cuda" for tensor in launch.tensors_of(arguments)):
        return _launch_triton(kernel, grid, *arguments, **options)
    _with_copies(lambda _, moved: _launch_triton(kernel, grid, *map(moved, arguments), **options))


def capability(device: torch.device) -> tuple[int, int]:
    """Of the device that the copies go to."""
    return torch.cuda.get_device_capability()


def serve() -> None:
    """Has `cuda` and `triton` take tensors on the CPU so."""
    native.launch_cuda = launch_cuda
    launch.launch, launch.capability = launch_triton, capability
    native.cuda_device_type = "cpu"
    backends.DEVICES["cuda"] = backends.DEVICES["triton"] = ("cpu",)
    triton_backend.INTERPRETED = True
