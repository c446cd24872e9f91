"""Reading the anchors out of the map with the map's dense gradient, beside indexing it or a copy of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, partial

import torch
from torch import Tensor

from pixcontrast_ext import gather_embeddings, hard_anchor_sampling

from .baselines import loops
from .harness import ELEMENTS, Candidate, Case, Errors, Method, Work, relative_error
from .inputs import draw_priority, embedding_map, scenes
from .shapes import MAPS, Maps

SHAPE = Maps
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
DTYPES = {"cpu": ("fp32", "bf16", "fp16"), "cuda": ("fp32", "bf16", "fp16")}
COUNTED = "rows read and written, and with the backward again; the backward writes the map's dense gradient"
LIMIT = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}


def plan(device: str) -> dict[str, tuple[Maps, tuple[str, ...]]]:
    return {name: (MAPS[name], ("fp32", "bf16")) for name in ("quick", "cityscapes")}


class Inputs:
    def __init__(self, shape: Maps, dtype: str, device: str):
        labels, predictions = scenes(shape.B, shape.H, shape.W, shape.C, device=device)
        embeddings = embedding_map(shape.B, shape.D, shape.H, shape.W, ELEMENTS[dtype], device)
        self.embeddings = embeddings.requires_grad_()
        self.indices = hard_anchor_sampling(
            labels,
            predictions,
            num_classes=shape.C,
            max_samples=shape.A,
            priority=draw_priority(labels),
            backend="reference",
        ).indices
        generator = torch.Generator().manual_seed(4)
        cotangent = torch.randn(shape.A, shape.D, generator=generator)
        self.cotangent = cotangent.to(device, ELEMENTS[dtype])

    def train(self, gather: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        rows = gather(self.embeddings, self.indices)
        (gradient,) = torch.autograd.grad(rows, self.embeddings, self.cotangent)
        return rows.detach(), gradient

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        return self.train(partial(gather_embeddings, backend="reference"))


def method(gather: Callable[[Tensor, Tensor], Tensor], inputs: Inputs, limit: float) -> Method:
    def verify() -> Errors:
        names = ("rows", "gradient of the map")
        return {
            name: (relative_error(found, truth), limit)
            for name, found, truth in zip(names, inputs.train(gather), inputs.truth, strict=True)
        }

    return Method(
        lambda: gather(inputs.embeddings, inputs.indices),
        [inputs.embeddings],
        inputs.cotangent,
        verify=verify,
    )


def case(shape: Maps, dtype: str, device: str, backends: list[str], name: str = "") -> Case:
    inputs = cache(lambda: Inputs(shape, dtype, device))

    def candidate(gather: Callable[[Tensor, Tensor], Tensor]) -> Candidate:
        return Candidate(lambda: method(gather, inputs(), LIMIT[dtype]))

    candidates = {
        f"ours ({backend})": candidate(partial(gather_embeddings, backend=backend)) for backend in backends
    }
    candidates["indexed copy"] = candidate(loops.gather)
    candidates["indexing"] = candidate(loops.index)
    candidates["zeros of the map's size"] = Candidate(
        lambda: Method(both=lambda: torch.zeros_like(inputs().embeddings))
    )
    size = ELEMENTS[dtype].itemsize
    rows, gradient = 2 * shape.A * shape.D * size, shape.B * shape.D * shape.H * shape.W * size
    return Case(
        "gather",
        name or str(shape),
        shape,
        dtype,
        device,
        candidates,
        {"fwd": Work(bytes=rows), "fwd+bwd": Work(bytes=2 * rows + gradient)},
        COUNTED,
        "zeros of the map's size",
    )
