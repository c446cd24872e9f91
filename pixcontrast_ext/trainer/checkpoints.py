"""Checkpoints that survive a kill at any moment.

A file is written beside its final name, synced, then renamed, so a name that exists is a file that was
finished. The name carries the start of the file's SHA-256 (`step-00000200-3b1f...pt`, the convention of
torch.hub), so one rename publishes content and checksum together, and `torch.load` still reads the file.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import torch

from pixcontrast_ext.trainer.files import rename, replacing, synced

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and says why."""


class CheckpointStore:
    """The checkpoints of one run, the last `keep` of them."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (step_of(path), path.stat().st_mtime_ns))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` (tensors and plain values) as the checkpoint of `step`.

        Those beyond `keep` are dropped, and those of later steps, which a run that is at `step` has abandoned.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        unfinished = self.folder / f"step-{step:08d}.tmp"
        with synced(unfinished) as file:
            torch.save(state, file)
        path = self.folder / f"step-{step:08d}-{_digest(unfinished)}.pt"
        rename(unfinished, path)
        kept = [path, *reversed([old for old in self.paths() if step_of(old) < step])][: self.keep]
        for old in set(self.paths()) - set(kept):
            old.unlink()
        return path

    def save_best(self, state: dict[str, Any]) -> Path:
        """Write `state` as best.pt beside the folder, in place of an earlier one."""
        path = self.folder.parent / "best.pt"
        with replacing(path) as file:
            torch.save(state, file)
        return path

    def load_latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, on the CPU; None if there are none at all.

        A damaged one is refused with a warning that names it, and the one before it is tried.
        Raises CheckpointError if there are checkpoints and every one is damaged.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return path, read_checkpoint(path)
            except CheckpointError as error:
                log.warning("%s; trying the one before it", error)
        if paths:
            raise CheckpointError(f"all {len(paths)} checkpoints in {self.folder} are damaged")
        return None


def holds_run(out: Path) -> bool:
    """Whether a folder has anything that a run which starts there would replace."""
    records = ("config.json", "train.csv", "val.csv", "diagnostics.csv", "best.pt")
    return any((out / name).exists() for name in records) or bool(
        CheckpointStore(out / "checkpoints").paths()
    )


def step_of(path: Path) -> int:
    """The step a checkpoint's name tells, 0 for another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint, on the CPU, and check it against the digest in its name.

    A file under another name (a renamed copy) is read without that check.
    Raises CheckpointError if it is missing, truncated or changed.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    match = _NAME.fullmatch(path.name)
    if match and _digest(path) != match[2]:
        raise CheckpointError(
            f"checkpoint {path} is damaged: its content does not match the checksum in its name"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage leads it into
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    if not isinstance(state, dict) or not {"step", "model", "config"} <= set(state):
        raise CheckpointError(f"checkpoint {path} is not one of this trainer: it lacks step, model or config")
    return state


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]
