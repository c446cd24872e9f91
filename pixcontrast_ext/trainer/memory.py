"""The most memory that training took."""

from __future__ import annotations

import ctypes
import gc
import math
from contextlib import suppress
from pathlib import Path

import torch


class PeakMemory:
    """Watches the most memory taken since it was made or restarted, by this process, not by those that load its data.

    On CUDA that is what torch's allocator gave out on `device`, on a CPU the process's resident memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known = True
        """False where the system does not let a process forget its earlier peak."""
        self.restart()

    def restart(self) -> None:
        """Forget what was taken so far."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError, AttributeError):  # glibc keeps what was freed, to use it again
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.known = False

    def mib(self) -> float:
        """The peak in MiB, NaN if it cannot be known."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if self.known:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**10
        return math.nan
