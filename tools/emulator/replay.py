"""Repeats the calls that record.py wrote down, in a process that may run under a sanitizer: it imports no torch.

    python -m tools.emulator.replay [--every N] FOLDER_OF_A_BUILD RECORDING [SCHEDULE ...]

Every buffer is an allocation of its own with exactly the size of the storage that it stands for. Each call must leave
in them, bit for bit, what the recorded call left. `--every 2` leaves out every other call of those that differ in
neither kernel, nor dtypes, nor pointers that are null, nor device.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tools.emulator.build import load

SCHEDULES = ("forward", "reverse", "20210118")

_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


def replay(kernels: ModuleType, call: dict[str, Any], arrays: Any, index: int) -> list[str]:
    """The pointer fields whose memory differs from the recording afterwards."""
    befores = [arrays[f"{index}.{i}.before"] for i in range(call["storages"])]
    buffers = [_libc.malloc(before.nbytes) for before in befores]
    try:
        for buffer, before in zip(buffers, befores, strict=True):
            ctypes.memmove(buffer, before.ctypes.data, before.nbytes)
        pointers = {
            name: (buffers[place] + offset, *kind) for name, (place, offset, kind) in call["pointers"].items()
        }
        getattr(kernels, call["kernel"])(device=0, stream=0, **call["scalars"], **pointers)
        differing = set()
        for place, buffer in enumerate(buffers):
            after = arrays[f"{index}.{place}.after"]
            if ctypes.string_at(buffer, after.nbytes) != after.tobytes():
                differing.add(place)
        return [name for name, (place, *_) in call["pointers"].items() if place in differing]
    finally:
        for buffer in buffers:
            _libc.free(buffer)


def main(folder: Path, recording: Path, schedules: list[str], every: int) -> int:
    kernels = load(folder).cuda
    arrays = dict(np.load(recording))
    calls = json.loads(arrays["calls"].tobytes())
    alike: Counter[tuple[Any, ...]] = Counter()
    chosen = []
    for index, call in enumerate(calls):
        kinds = (
            call["kernel"],
            call["shared"],
            *((name, str(kind)) for name, (*_, kind) in call["pointers"].items()),
        )
        if alike[kinds] % every == 0:
            chosen.append((index, call))
        alike[kinds] += 1
    for schedule in schedules:
        os.environ["PXC_EMULATOR_SCHEDULE"] = schedule
        for index, call in chosen:
            where = f"call {index}, {call['kernel']}({call['scalars']}), schedule {schedule}"
            os.environ["PXC_EMULATOR_SHARED"] = call["shared"]
            print(where, file=sys.stderr, flush=True)  # names the call that a sanitizer's report is about
            try:
                differing = replay(kernels, call, arrays, index)
            except RuntimeError as error:
                print(f"FAILED: {where}: {error}")
                return 1
            if differing:
                print(f"DIFFERS: {where}: {', '.join(differing)}")
                return 2
    print(f"{len(chosen)} calls under {len(schedules)} schedules")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Repeat the recorded calls of a build's kernels.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("recording", type=Path)
    parser.add_argument("schedules", nargs="*", default=list(SCHEDULES))
    parser.add_argument("--every", type=int, default=1, metavar="N")
    sys.exit(main(**vars(parser.parse_args())))
