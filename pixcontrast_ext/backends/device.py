"""What the backends for a GPU ask of the devices whose memory they take."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from pixcontrast_ext.backends import native


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


class Gpu:
    """CUDA devices, as torch knows them.

    A stand-in for them may be assigned to `gpu`: the backends ask nobody else about devices and streams.
    """

    type = "cuda"  # of the tensors that lie there

    @functools.cached_property
    def kernels(self) -> Any:
        """The compiled CUDA kernels; None where the module was built without."""
        return getattr(native._C, "cuda", None)

    def unavailable(self) -> str | None:
        """Why there is no device at all."""
        return None if torch.cuda.is_available() else "torch finds no CUDA device"

    def to_judge(self, device: torch.device | None) -> int | None:
        """The number of a device, the current one if None, or None before CUDA is started.

        A call with CUDA tensors has started it. To ask before would start it, and later forks could not use it.
        """
        if not torch.cuda.is_initialized():
            return None
        named = None if device is None else device.index
        return torch.cuda.current_device() if named is None else named

    def capability(self, device: torch.device) -> tuple[int, int]:
        """The compute capability of its multiprocessors."""
        return torch.cuda.get_device_capability(device)

    def multiprocessors(self, device: torch.device) -> int:
        """How many it has."""
        return int(_properties(device).multi_processor_count)

    def current(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Makes it the device that CUDA's runtime works on."""
        here = torch.cuda.current_device() == device.index
        return contextlib.nullcontext() if here else torch.cuda.device(device)

    def number_and_stream(self, device: torch.device) -> tuple[int, int]:
        """As CUDA's runtime takes them: the number of the device, and the address of its current stream."""
        return device.index, torch.cuda.current_stream(device).cuda_stream

    def captures(self) -> bool:
        """Whether launches become part of a CUDA graph instead of running."""
        return torch.cuda.is_current_stream_capturing()

    def launch(self, device: torch.device, start: Callable[..., None], arguments: Any) -> None:
        """Call start(device, arguments), which enqueues a kernel for tensors among the arguments that lie there."""
        with self.current(device):
            start(device, arguments)


gpu = Gpu()
