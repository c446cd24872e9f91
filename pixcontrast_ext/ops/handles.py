"""Python objects that an op gets by number.

The schema of an op takes tensors and numbers only, and a compiled graph that saw the object itself would be traced
anew whenever something in it changes.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, TypeVar

_objects: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_Kind = TypeVar("_Kind", bound="Handle")


class Handle:
    """An object with a number of its own; so has each of its copies."""

    number: int

    def __init__(self) -> None:
        self.number = next(_numbers)
        _objects[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy or a pickle
        self.__dict__.update(state)
        Handle.__init__(self)


def of(number: int, kind: type[_Kind]) -> _Kind:
    """The object of a kind that a number stands for.

    Raises:
        ValueError: if there is none, or none any more.
    """
    found = _objects.get(number)
    if not isinstance(found, kind):
        raise ValueError(f"{number} is the number of no {kind.__name__}")
    return found
