"""Launching a kernel where its tensors are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from pixcontrast_ext.backends import device as devices


def tensors_of(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among arguments, and in records of them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors_of(argument)


def _not_within_a_capture(*_: Any, fn: Any, **__: Any) -> None:
    raise RuntimeError(
        f"the Triton kernel {fn.name.rsplit('.', 1)[-1]} is not compiled yet, and a CUDA graph is being captured,"
        " within which nothing can be; run the step once before the capture, past the warm-up and with"
        " the dtypes, widths and options of the capture"
    )


@contextlib.contextmanager
def _refusing_to_compile() -> Iterator[None]:
    """Within a capture, loading a kernel fails with an error that names neither it nor the remedy."""
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = _not_within_a_capture
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def _kind(argument: Any) -> Any:
    """The part of an argument that Triton compiles a kernel for.

    Types, whether addresses and numbers are multiples of 16, whether a number is 1, and whether it fits int32. Numbers
    beyond int64, of which there are none, are not told apart from the others beyond int32.
    """
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):
        return type(argument), *[_kind(value) for value in argument]
    if isinstance(argument, int):
        return type(argument), argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return type(argument)


# Kernels and what they were compiled to, by kernel, device, kinds of arguments, and options. Triton itself takes some
# 40 us to find one again, as long as a short one runs; what it would do besides, such as to look whether a global or a
# knob has changed, is not done again.
_compiled: dict[Hashable, tuple[Any, CompiledKernel]] = {}


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Enqueue a kernel on the current stream of the device of its tensors; an empty grid enqueues nothing.

    `options` are its constants, by name, and those of Triton. Products and sums are fused as the compiler sees fit,
    whatever its default.
    """
    if 0 in grid:
        return
    devices.gpu.launch(
        next(tensors_of(arguments)).device,
        functools.partial(_run, kernel, grid, options),
        arguments,
    )


def _run(
    kernel: Any,
    grid: tuple[int, ...],
    options: dict[str, Any],
    device: torch.device,
    arguments: tuple[Any, ...],
) -> None:
    key = id(kernel), device, tuple(map(_kind, arguments)), tuple(options.items())
    found = _compiled.get(key)
    if found is not None:
        _, compiled = found
        constants = map(options.__getitem__, kernel.arg_names[len(arguments) :])
        compiled[(*grid, 1, 1)[:3]](*arguments, *constants)
        return
    with _refusing_to_compile() if devices.gpu.captures() else contextlib.nullcontext():
        compiled = kernel[grid](*arguments, enable_fp_fusion=True, **options)
    if isinstance(compiled, CompiledKernel):  # not one that is still being compiled, or interpreted
        _compiled[key] = kernel, compiled
