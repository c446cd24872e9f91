"""How an op is given to torch: a schema, what makes its outputs, and what has a backend fill them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext import backends
from pixcontrast_ext.backends.calls import Backend, Call
from pixcontrast_ext.ops.signature import Limits, Signature

_LIBRARY = torch.library.Library("pixcontrast", "DEF")


def define(
    schema: str,
    tensors: dict[str, str],
    limits: dict[str, Limits],
    call: Callable[..., Call],
    allocate: Callable[..., dict[str, Tensor]],
    fill: str | Callable[[Backend, Any], None],
) -> None:
    """Register an op whose last argument is the backend's name.

    Args:
        schema, tensors, limits: those of a `Signature`.
        call: the record of `backends.calls` that is made of the arguments, which it names alike, and of the outputs.
        allocate: allocate(**arguments) makes the outputs, by name, in the order in which the op returns them. It is
            also the op's fake, so shapes are stated once.
        fill: the backend's function that computes them, or fill(backend, record), which calls it.
    """
    signature = Signature(schema, tensors, limits)
    single = schema.endswith("-> Tensor")

    def run(*args: Any) -> Any:
        found = signature.check(args)
        if signature.writes:
            signature.check_memory(args)
        backend = backends.serving(args[-1], signature.op, *found)
        arguments = dict(zip(signature.names, args, strict=False))
        for name in signature.contiguous:
            arguments[name] = arguments[name].contiguous()
        outputs = allocate(**arguments)
        record = call(**arguments, **outputs)
        # The reference and the CPU backend call matmul.
        with torch.amp.autocast(found.device.type, enabled=False):
            if isinstance(fill, str):
                getattr(backend, fill)(record)
            else:
                fill(backend, record)
        values = tuple(outputs.values())
        return values[0] if single else values or None

    def fake(*args: Any) -> Any:
        signature.check(args)
        outputs = allocate(**dict(zip(signature.names, args, strict=False)))
        values = tuple(outputs.values())
        return values[0] if single else values or None

    register(schema, run, fake)


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any] = lambda *args: None) -> None:
    """Register an op that needs no backend; `fake` makes its outputs where there is no data."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pixcontrast::{name}", fake, lib=_LIBRARY)


def _twice_is_an_error(grad: Tensor) -> Tensor:
    message = "pixcontrast_ext can be differentiated once: its ops have no double backward"
    marked: Tensor = torch._C._functions.DelayedError(message, 1)(grad)
    return marked


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of a Function: differentiating its result raises, instead of leaving out a term.

    `torch.autograd.function.once_differentiable` raises only if the incoming gradient itself requires grad;
    ours depends on the inputs as well.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # enabled: create_graph=True
            return results
        return tuple(None if r is None else _twice_is_an_error(r.requires_grad_()) for r in results)

    return wrapper
