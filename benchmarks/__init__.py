"""Each op timed beside every alternative: ``python -m benchmarks [op ...]``."""

from importlib import import_module
from types import ModuleType

OPS = ("infonce", "mining", "sampling", "gather", "enqueue", "training_step", "network_step")


def load(op: str) -> ModuleType:
    """The module of an op, in which the following names are defined.

    SHAPE: the class of its shapes.
    DTYPES: by device, those it can be timed with.
    BACKENDS: by device, the package's backends that can be timed.
    plan(device): shape and dtypes by name.
    case(shape, dtype, device, backends, name): the methods at one shape.
    """
    return import_module(f".{op}", __package__)
