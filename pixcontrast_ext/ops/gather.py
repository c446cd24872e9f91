"""Reading chosen pixels out of an embedding map, and writing their gradient back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext import backends
from pixcontrast_ext.backends.calls import Backend, Gather, GatherBackward
from pixcontrast_ext.ops import checks, library
from pixcontrast_ext.ops.signature import INT32_MAX


def _allocate(embeddings: Tensor, indices: Tensor, dtype: torch.dtype, **_: Any) -> dict[str, Tensor]:
    size, channels = indices.shape[0], embeddings.shape[1]
    norm_dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    return {
        "rows": embeddings.new_empty(size, channels, dtype=dtype),
        "inv_norm": embeddings.new_empty(size, dtype=norm_dtype),
    }


def _fill(backend: Backend, call: Gather) -> None:
    if call.embeddings.numel() == 0:  # no pixel to read: padding rows only
        call.rows.zero_()
        call.inv_norm.zero_()
    else:
        backend.gather(call)


def _allocate_backward(embeddings: Tensor, **_: Any) -> dict[str, Tensor]:
    return {"grad_embeddings": torch.empty_like(embeddings)}  # dense, in the map's memory format


def _fill_backward(backend: Backend, call: GatherBackward) -> None:
    if call.embeddings.numel() > 0:
        backend.gather_backward(call)


library.define(
    "gather(Tensor embeddings, Tensor indices, bool normalize, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    dict(embeddings="[B, D, H, W] T strided", indices="[A] int64"),
    {"D": (1, None), "A": (0, INT32_MAX)},
    Gather,
    _allocate,
    _fill,
)
library.define(
    "gather_backward(Tensor grad_rows, Tensor embeddings, Tensor indices, Tensor inv_norm, bool normalize, "
    "str backend) -> Tensor",
    dict(
        embeddings="[B, D, H, W] T strided", indices="[A] int64", grad_rows="[A, D] R", inv_norm="[A] sum(T)"
    ),
    {"D": (1, None), "A": (0, INT32_MAX)},
    GatherBackward,
    _allocate_backward,
    _fill_backward,
)


class GatherEmbeddings(torch.autograd.Function):
    """`gather_embeddings` with its gradient; reads the map again in the backward, so it keeps no copy of it."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, indices: Tensor, normalize: bool, dtype: torch.dtype, backend: str
    ) -> Tensor:
        """Rows [A, D] of `dtype`; see `gather_embeddings`."""
        rows, inv_norm = torch.ops.pixcontrast.gather(embeddings, indices, normalize, dtype, backend)
        ctx.save_for_backward(embeddings, indices, inv_norm)
        ctx.normalize, ctx.backend = normalize, backend
        made: Tensor = rows
        return made

    @staticmethod
    @library.differentiable_once
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        """The dense gradient of the map.

        Most of it is zeros. A sparse tensor would spare them, but autograd hands that to the layer below as it is where
        the map has no other consumer, which convolutions refuse, and compiled graphs do not know it.
        """
        embeddings, indices, inv_norm = ctx.saved_tensors
        grad = torch.ops.pixcontrast.gather_backward(
            grad_rows, embeddings, indices, inv_norm, ctx.normalize, ctx.backend
        )
        return grad, None, None, None, None


def gather_embeddings(
    embeddings: Tensor,  # [B, D, H, W]
    indices: Tensor,  # [A]
    *,
    normalize: bool = True,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rows [A, D] of the pixels at `indices`, without permuting or copying the map.

    Replaces `F.normalize(embeddings.permute(0, 2, 3, 1).reshape(-1, D)[indices], dim=1).to(dtype)`, except
    that norms are taken in fp32 and that a pixel of zero norm gives a zero row and a zero gradient.
    Differentiable once.

    Args:
        embeddings: any strides (channels_last too), fp32, fp16 or bf16.
        indices: int64, flat over B * H * W; repeated pixels add up in the gradient. With an empty map all
            rows are zero.
        normalize: scale each row to unit L2 norm.
        dtype: of the rows; None means the map's.
        backend: see `available_backends`.

    Raises:
        TypeError: embeddings or dtype that are not floating point, indices that are not int64.
        ValueError: wrong rank, mixed devices; on the CPU also an index outside the map.
    """
    checks.check_embeddings(embeddings)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be int64, got {got}")
    if indices.dim() != 1:
        raise ValueError(f"indices must have shape [A], got {tuple(indices.shape)}")
    if indices.device != embeddings.device:
        raise ValueError(f"indices must be on {embeddings.device}, got {indices.device}")
    dtype = embeddings.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    widest = torch.float64 if dtype == torch.float64 else embeddings.dtype
    name = backends.resolve(backend, "gather_embeddings", embeddings.device, widest)
    return gather(embeddings, indices, normalize, dtype, name)


def gather(embeddings: Tensor, indices: Tensor, normalize: bool, dtype: torch.dtype, backend: str) -> Tensor:
    """`gather_embeddings` of what has been checked, by a backend that serves it."""
    rows: Tensor = GatherEmbeddings.apply(embeddings, indices, normalize, dtype, backend)  # type: ignore[no-untyped-call]
    return rows
