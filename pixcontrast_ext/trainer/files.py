"""Files that a kill at any moment leaves as they were or complete: written beside, synced, then renamed."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder for the length of the block, or until this process ends in any way.

    Not within another such block for the same folder: the end of either would let the others in. Where the file system
    knows no locks nothing is kept out. Raises FileExistsError, with the number of the process, if another holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Of POSIX's kind, which processes that are forked do not inherit: a run's loaders may outlive it by seconds.
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise FileExistsError(f"{folder} is in use by process {file.read().strip() or '?'}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for the length of the block and then on the disk."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def rename(path: Path, target: Path) -> None:
    """Rename a file within its folder, on the disk too; an earlier `target` is replaced."""
    path.replace(target)
    # A rename reaches the disk with its folder, not with its file.
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """What is written becomes the whole content of `path` when the block ends, and nothing does if it fails."""
    unfinished = path.with_name(f"{path.name}.tmp")
    with synced(unfinished) as file:
        yield file
    rename(unfinished, path)


def write_text(path: Path, text: str) -> None:
    """Write `text` as the whole content of `path`."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as the whole content of `path`. NaN, which JSON does not know, becomes null."""
    write_text(path, json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote; null is NaN."""
    return _with_nan(json.loads(path.read_text()))


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return math.nan if value is None else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
