"""Counting the steps of a warm-up on the host, so that no step waits for the device to know whether it is
over.

The count goes up inside an op. Under torch.compile a plain Python integer would be a constant of the graph,
and every step would compile a new one; here the graph only sees `over`, which changes once.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from pixcontrast_ext import ops

_counters: weakref.WeakValueDictionary[int, WarmUp] = weakref.WeakValueDictionary()
_ids = itertools.count()


class WarmUp:
    """`over` is true once `steps` has reached `limit`."""

    def __init__(self, limit: int, steps: int) -> None:
        self.id = next(_ids)
        self.limit, self.steps = limit, steps
        self.over = steps >= limit
        _counters[self.id] = self

    def advance(self, step: Tensor) -> None:
        """Add 1 to the count, and to `step` [] on the device."""
        torch.ops.pixcontrast.warmup_step(step, self.id)


def _warmup_step(step: Tensor, counter: int) -> None:
    step.add_(1)
    warmup = _counters[counter]
    warmup.steps += 1
    warmup.over = warmup.steps >= warmup.limit


ops.define_mutation("warmup_step(Tensor(a!) step, int counter) -> ()", _warmup_step)
