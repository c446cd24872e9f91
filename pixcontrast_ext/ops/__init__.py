"""What this package does, as torch ops: sampling, gather, enqueue, InfoNCE; the public functions stand beside them.

Ops live in the `pixcontrast` namespace and are not differentiable; an autograd Function stands around those that carry
a gradient. Each is given to torch as a signature, an allocator and a backend function that fills what the allocator
made: the first two alone are the op's fake, so shapes are stated once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext import backends
from pixcontrast_ext.ops.signature import Limits, Signature

_LIBRARY = torch.library.Library("pixcontrast", "DEF")


def define(
    schema: str,
    tensors: dict[str, str],
    limits: dict[str, Limits],
    allocate: Callable[..., Any],
    fill: Callable[..., None],
) -> None:
    """Register an op whose last argument is the backend's name.

    `tensors` and `limits` are those of a `Signature`. `allocate(*args)` makes the outputs (None if the op only
    mutates); `fill(module, *args, outputs)` computes them with the backend's module.
    """
    signature = Signature(schema, tensors, limits)

    def run(*args: Any) -> Any:
        call = signature.check(args)
        signature.check_memory(args)
        module = backends.serving(args[-1], signature.op, *call)
        outputs = allocate(*args)
        # The reference and the CPU backend call matmul.
        with torch.amp.autocast(call.device.type, enabled=False):
            fill(module, *args[:-1], outputs)
        return outputs

    def fake(*args: Any) -> Any:
        signature.check(args)
        return allocate(*args)

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


def refuse_recomputation(why: str) -> None:
    """Raise RuntimeError if a backward is running, in which only activation checkpointing calls a loss."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"PixelContrastLoss is recomputed within a backward, as activation checkpointing does, and {why}: its "
            "gradient would be wrong. Keep the loss outside of the checkpointed function."
        )


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype a backend has to know to serve a call: fp64 on either side needs one that knows fp64."""
    return torch.float64 if torch.float64 in dtypes else dtypes[0]


def is_integer(tensor: Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)


def to_int32(name: str, labels: Tensor) -> Tensor:
    """Labels as int32. What does not fit raises on the CPU, and is no class (-1) elsewhere."""
    if labels.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        return labels.int()
    labels = labels.long()
    too_large = labels > torch.iinfo(torch.int32).max
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and too_large.any():
        raise ValueError(f"{name} must fit int32, got {int(labels.max())}")
    return torch.where(too_large, -1, labels.clamp(min=-1)).int()


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise TypeError or ValueError unless `labels` are integers of this shape on this device."""
    if not isinstance(labels, Tensor) or not is_integer(labels):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name} must be an integer tensor, got {got}")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.device != device:
        raise ValueError(f"{name} must be on {device}, got {labels.device}")


def check_embeddings(embeddings: Tensor) -> None:
    """Raise TypeError or ValueError unless this is a [B, D, H, W] floating-point map with D >= 1."""
    if not isinstance(embeddings, Tensor) or not embeddings.dtype.is_floating_point:
        got = embeddings.dtype if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise TypeError(f"embeddings must be a floating-point tensor, got {got}")
    if embeddings.dim() != 4 or embeddings.shape[1] < 1:
        raise ValueError(
            f"embeddings must have shape [B, D, H, W] with D >= 1, got {tuple(embeddings.shape)}"
        )
    if embeddings.shape[2] * embeddings.shape[3] >= 2**32:
        raise ValueError(
            f"embeddings may have fewer than 2**32 pixels an image, got {tuple(embeddings.shape)}"
        )


def check_at_least(minimum: int, **values: int | None) -> None:
    """Raise TypeError or ValueError for the first value that is not an integer of at least `minimum`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")
