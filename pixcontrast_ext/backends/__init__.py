"""The registry: which backend serves a call.

A backend is a module of this package with what `calls.Backend` lists. Precedence: the argument, then `use_backend`,
then the environment, then the first of the tensor's device that supports the call. A backend asked for by name never
falls back to another; that the reference serves for want of the compiled module is said once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, cast

import torch

from pixcontrast_ext.backends import device as devices
from pixcontrast_ext.backends import native
from pixcontrast_ext.backends.calls import Backend

if TYPE_CHECKING:
    from pixcontrast_ext.backends import cpu, cuda, reference, triton

    _: tuple[Backend, ...] = (cuda, triton, cpu, reference)

NAMES = ("cuda", "triton", "cpu", "reference")
ENVIRONMENT_VARIABLE = "PIXCONTRAST_BACKEND"

# Tried in this order when none is named. CUDA's kernels come first because they need no compiler where they run;
# docs/backends.md says which is faster at what.
_BY_DEVICE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_override: ContextVar[str | None] = ContextVar("pixcontrast_backend", default=None)


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} names the backend {name!r}, expected one of {', '.join(NAMES)}")
    return name


def get(name: str) -> Backend:
    """The module of a backend."""
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


@functools.cache
def _module(name: str) -> Backend | None:
    return get(name) if importlib.util.find_spec(f"{__name__}.{name}") else None


def _reason_off(
    name: str,
    op: str = "",
    dtype: torch.dtype | None = None,
    channels: int | None = None,
    device: torch.device | None = None,
) -> str | None:
    """Why a backend cannot serve a call on tensors of a device, or on any if None."""
    if device is not None and name != "reference":
        taken = "cpu" if name == "cpu" else devices.gpu.type
        if device.type != taken:
            return f"it takes tensors on {taken}, got {device.type}"
    module = _module(name)
    if module is None:
        return "this version has no kernels for it"
    return module.unsupported(op, dtype, channels, device)


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None if it is ready and the reason if it is off."""
    return {name: _reason_off(name) for name in NAMES}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context, calls without a `backend` argument use this one.

    Raises:
        ValueError: if there is no backend of that name, or it is off, with the reason.
    """
    reason = _reason_off(_check_name(name, "use_backend()"))
    if reason is not None:
        raise ValueError(f"backend {name!r} is off: {reason}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def serving(
    name: str,
    op: str,
    device: torch.device,
    dtype: torch.dtype | None,
    channels: int | None,
    source: str = "backend=",
) -> Backend:
    """The module of a backend that serves `op` on tensors of this device, dtype and width.

    Raises:
        ValueError: if there is no such backend, or it cannot serve the call, with the reason.
    """
    backend = _module(_check_name(name, source) if name not in NAMES else name)
    reason = _reason_off(name, op, dtype, channels, device)
    if backend is None or reason is not None:
        raise ValueError(f"backend {name!r} cannot serve {op} on {device.type} tensors of {dtype}: {reason}")
    return backend


def resolve(
    requested: str | None,
    op: str,
    device: torch.device,
    dtype: torch.dtype | None,
    channels: int | None = None,
) -> str:
    """The name of the backend that serves `op` on tensors of this device, dtype and width.

    Raises:
        ValueError: if one is asked for by name and cannot serve the call, with the reason; if the environment
            names an instruction set that this processor lacks.
    """
    named, source = requested, "backend="
    if named is None:
        named, source = _override.get(), "use_backend()"
    if named is None:
        named, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if named is not None:
        serving(named, op, device, dtype, channels, source)
        return named
    passed_over: list[str] = []
    for name in _BY_DEVICE.get(device.type, ("reference",)):
        reason = _reason_off(name, op, dtype, channels, device)
        if reason is None:
            if name == "reference" and native.unavailable in passed_over:
                _warn_of_reference(native.unavailable)
            return name
        if reason == native.wrong_instruction_set:
            raise ValueError(reason)
        passed_over.append(reason)
    raise ValueError(f"no backend serves {op} on {device.type} tensors of {dtype}")


@functools.cache  # once per process
def _warn_of_reference(reason: str) -> None:
    message = (
        f"pixcontrast_ext falls back to its reference backend, several times slower and larger: {reason}"
    )
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def choice(device: str) -> str:
    """Which backend serves calls on tensors of a device type when none is named, and why not those before it."""
    passed_over: list[str] = []
    for name in _BY_DEVICE.get(device, ("reference",)):
        reason = _reason_off(name)
        if reason is None:
            return f"{name} ({'; '.join(passed_over)})" if passed_over else name
        if reason == native.wrong_instruction_set:
            return f"nowhere: {reason}"
        passed_over.append(f"{name} is off: {reason}")
    return f"none ({'; '.join(passed_over)})"


# A constant under torch.compile: a graph keeps the backend that it was traced with. This is what
# torch.compiler.assume_constant_result does, which would import the whole compiler: twice the time of `import torch`.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
