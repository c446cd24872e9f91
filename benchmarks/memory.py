"""The peak memory of a call, beyond its outputs.

On a CPU that is the growth of the process's resident memory, so it is measured in a process of its own whose
allocators give memory back as soon as it is free: `python -m benchmarks.memory OP SHAPE DTYPE METHOD ...` prints
bytes by method as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

MIB = 2**20


def available_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as memory:
        for line in memory:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def resident_bytes(name: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def tensors_in(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def host_peak(call: Callable[[], object]) -> int:
    gc.collect()
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")  # resets VmHWM
    before = resident_bytes("VmRSS")
    outputs = call()
    peak = resident_bytes("VmHWM")
    return peak - before - sum(output.nbytes for output in tensors_in(outputs))


def device_peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return peak - before - sum(output.nbytes for output in tensors_in(outputs))


def host_peaks_apart(
    op: str, shape: str, dtype: str, methods: list[str], say: Callable[[str], None] = lambda text: None
) -> dict[str, int]:
    """Bytes by method, measured in a process that knows nothing else. Nothing if that process fails."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MKL_DISABLE_FAST_MM": "1",
    }
    command = [sys.executable, "-m", "benchmarks.memory", op, shape, dtype, *methods]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        say(f"memory: the process of {op} {shape} {dtype} ended with {done.returncode}")
        return {}
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def main() -> None:
    from . import OPS, load

    op, shape, dtype, *names = sys.argv[1:]
    assert op in OPS
    module = load(op)
    case = module.case(module.SHAPE.parse(shape), dtype, "cpu", list(module.BACKENDS["cpu"]))
    peaks = {}
    for name in names:
        candidate = case.candidates[name]
        call = candidate.build().longest()
        if candidate.needs_bytes < 2**30:
            call()  # loads code, starts threads and fills caches: megabytes that are not the call's
        peaks[name] = host_peak(call)
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
