"""Runs the trainer's commands in processes of their own, forked from one that has already imported it.

The imports take longer than the runs.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from pixcontrast_ext.trainer.__main__ import main
from pixcontrast_ext.trainer.files import held
from tools import processes

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pixcontrast_ext.trainer.__main__", "torch._dynamo"])


def start(output: Path, *args: object, **environment: str) -> ForkServerProcess:
    """Starts `python -m pixcontrast_ext.trainer ARGS` on one thread, writing to `output` and `output`.errors."""
    process = _CONTEXT.Process(target=_run, args=(output, [*map(str, args)], environment))
    process.start()
    return process


def errors_of(output: Path) -> Path:
    return output.with_name(output.name + ".errors")


def _run(output: Path, args: list[str], environment: dict[str, str]) -> None:
    for stream, path in ((1, output), (2, errors_of(output))):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(main(args))


def _exit_codes(running: Sequence[ForkServerProcess]) -> list[int | None]:
    """Waits until all have ended, one has failed (the others may be waiting for it), or the limit is reached."""
    end = time.monotonic() + processes.LIMIT
    waiting = [process.sentinel for process in running]
    while waiting and not any(process.exitcode for process in running):
        ended = connection.wait(waiting, end - time.monotonic())
        if not ended:
            break
        waiting = [sentinel for sentinel in waiting if sentinel not in ended]
    return [process.exitcode for process in running]


def start_ranks(folder: Path, world: int, *args: object) -> list[tuple[ForkServerProcess, Path]]:
    """Starts all ranks as torchrun would start them; each writes to a file in `folder`."""
    with socket.create_server(("localhost", 0)) as free:
        address = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(world))
    outputs = [folder / f"rank{rank}.txt" for rank in range(world)]
    return [
        (start(output, *args, RANK=str(rank), LOCAL_RANK=str(rank), **address), output)
        for rank, output in enumerate(outputs)
    ]


def ranks(folder: Path, world: int, *args: object) -> str:
    """The output of all ranks.

    Raises:
        AssertionError: with their output, unless all succeed.
        TimeoutError: with their output, if one hangs.
    """
    running, outputs = zip(*start_ranks(folder, world, *args), strict=True)
    codes = _exit_codes(running)
    for process in running:
        process.kill()
        process.join()
    read = "".join(
        path.read_text() for output in outputs for path in (output, errors_of(output)) if path.exists()
    )
    if None in codes and not any(codes):
        raise processes.overdue(f"one of {world} ranks", read)
    assert codes == [0] * world, f"exit codes {codes}\n{read}"
    return "".join(output.read_text() for output in outputs)


def _hold(folder: Path, begun: Event) -> None:
    with held(folder):
        begun.set()
        time.sleep(processes.LIMIT)


@contextmanager
def holding(folder: Path) -> Iterator[int]:
    """A folder in which another process works, whose number this is."""
    begun = _CONTEXT.Event()
    process = _CONTEXT.Process(target=_hold, args=(folder, begun), daemon=True)
    process.start()
    assert begun.wait(processes.LIMIT)
    try:
        yield process.pid or 0
    finally:
        process.kill()
        process.join()
