"""All the randomness of a selection: one int32 per pixel; those of small priority are taken first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pixcontrast_ext.ops import checks, handles, library

_LIMIT = torch.iinfo(torch.int32).max


def draw_priority(labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A priority of the shape of `labels`, from `generator` or torch's own."""
    # Named only if there is one: with a symbolic size, torch.randint knows no argument `generator`, not even None.
    source = {} if generator is None else {"generator": generator}
    return torch.randint(_LIMIT, labels.shape, dtype=torch.int32, device=labels.device, **source)  # type: ignore[call-overload, no-any-return]


def check_priority(priority: Tensor, labels: Tensor) -> None:
    """Raise TypeError or ValueError unless `priority` is int32, of the shape and on the device of `labels`."""
    checks.check_labels("priority", priority, tuple(labels.shape), labels.device)
    if priority.dtype != torch.int32:
        raise TypeError(f"priority must be int32, got {priority.dtype}")


class PriorityStream(handles.Handle):
    """Draws from a generator within a compiled graph too, which could not hold the generator itself."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def draw(self, labels: Tensor) -> Tensor:
        """As `draw_priority`."""
        priority = torch.empty(labels.shape, dtype=torch.int32, device=labels.device)
        torch.ops.pixcontrast.draw_priority(priority, self.number)
        return priority


@contextmanager
def same_draws(stream: PriorityStream | None, device: torch.device) -> Iterator[None]:
    """Whatever is drawn within, of the stream or of torch's own, is drawn again after it."""
    drawn = None if stream is None else stream.generator.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        if stream is not None and drawn is not None:
            stream.generator.set_state(drawn)


def _draw(priority: Tensor, stream: int) -> None:
    priority.copy_(draw_priority(priority, handles.of(stream, PriorityStream).generator))


library.register("draw_priority(Tensor(a!) priority, int stream) -> ()", _draw)
