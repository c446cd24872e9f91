"""Going on from another run's checkpoint: several runs that share their first steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pixcontrast_ext.trainer.checkpoints import CheckpointError, CheckpointStore, read_checkpoint


def read_start(path: Path, optimizer: str) -> dict[str, Any]:
    """The state of a checkpoint, or of the newest one of a run.

    Raises CheckpointError if there is none, ValueError if it is of another `--optimizer`.
    """
    if path.is_dir():
        found = CheckpointStore(path / "checkpoints").load_latest()
        if found is None:
            raise CheckpointError(f"run {path} has no checkpoint to branch from")
        state = found[1]
    else:
        state = read_checkpoint(path)
    if (before := state["config"].get("optimizer")) != optimizer:
        raise ValueError(f"--optimizer is {optimizer!r}, but {path} was trained with {before!r}")
    return state


def branch(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], where: Path) -> int:
    """Load another run's weights and its optimiser's state; a projection head may be in only one of the two models.

    Returns its step. Raises ValueError, with `where`, for anything else that does not fit.
    """
    weights = state["model"]
    had_head = any(map(_is_head, weights))
    if model.embed_head is None:
        weights = {name: value for name, value in weights.items() if not _is_head(name)}
    try:
        found = model.load_state_dict(weights, strict=False)
        lacking = [name for name in found.missing_keys if had_head or not _is_head(name)]
        if lacking or found.unexpected_keys:
            raise RuntimeError(f"missing {lacking}, unexpected {found.unexpected_keys}")
        # An optimiser numbers its parameters; those of a head that only one of the two has shift the others.
        before = state["optimizer"]
        numbers = {
            name: number
            for group in before["param_groups"]
            for name, number in zip(group["names"], group["params"], strict=True)
        }
        names = [name for group in optimizer.param_groups for name in group["names"]]
        moved = {
            place: before["state"][numbers[name]]
            for place, name in enumerate(names)
            if numbers.get(name) in before["state"]
        }
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moved})
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where} does not fit this run: {error}") from error
    return int(state["step"])


def _is_head(name: str) -> bool:
    return name.startswith("embed_head.")
