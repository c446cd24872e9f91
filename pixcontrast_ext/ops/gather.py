"""Reading chosen pixels out of an embedding map, and writing their gradient back."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pixcontrast_ext import backends, ops
from pixcontrast_ext.ops.signature import INT32_MAX


def _allocate(
    embeddings: Tensor, indices: Tensor, normalize: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    norm_dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    return (
        embeddings.new_empty(indices.shape[0], embeddings.shape[1], dtype=dtype),
        embeddings.new_empty(indices.shape[0], dtype=norm_dtype),
    )


def _fill(
    module: ModuleType,
    embeddings: Tensor,
    indices: Tensor,
    normalize: bool,
    dtype: torch.dtype,
    outputs: tuple[Tensor, Tensor],
) -> None:
    if embeddings.numel() == 0:  # no pixel to read: padding rows only
        for output in outputs:
            output.zero_()
        return
    module.gather(embeddings, indices.contiguous(), normalize, *outputs)


def _allocate_backward(
    grad_rows: Tensor, embeddings: Tensor, indices: Tensor, inv_norm: Tensor, normalize: bool, backend: str
) -> Tensor:
    return torch.empty_like(embeddings)  # dense, in the map's memory format


def _fill_backward(
    module: ModuleType,
    grad_rows: Tensor,
    embeddings: Tensor,
    indices: Tensor,
    inv_norm: Tensor,
    normalize: bool,
    grad_embeddings: Tensor,
) -> None:
    if embeddings.numel() > 0:
        module.gather_backward(
            grad_rows.contiguous(),
            embeddings,
            indices.contiguous(),
            inv_norm.contiguous(),
            normalize,
            grad_embeddings,
        )


ops.define(
    "gather(Tensor embeddings, Tensor indices, bool normalize, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    dict(embeddings="[B, D, H, W] T", indices="[A] int64"),
    {"D": (1, None), "A": (0, INT32_MAX)},
    _allocate,
    _fill,
)
ops.define(
    "gather_backward(Tensor grad_rows, Tensor embeddings, Tensor indices, Tensor inv_norm, bool normalize, "
    "str backend) -> Tensor",
    dict(embeddings="[B, D, H, W] T", indices="[A] int64", grad_rows="[A, D] R", inv_norm="[A] sum(T)"),
    {"D": (1, None), "A": (0, INT32_MAX)},
    _allocate_backward,
    _fill_backward,
)


class GatherEmbeddings(torch.autograd.Function):
    """`gather_embeddings` with its gradient; reads the map again in the backward, so it keeps no copy of
    it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, embeddings: Tensor, indices: Tensor, normalize: bool, dtype: torch.dtype, backend: str
    ) -> Tensor:
        rows, inv_norm = torch.ops.pixcontrast.gather(embeddings, indices, normalize, dtype, backend)
        ctx.save_for_backward(embeddings, indices, inv_norm)
        ctx.normalize, ctx.backend = normalize, backend
        return rows

    @staticmethod
    @ops.differentiable_once
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
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
    ops.check_embeddings(embeddings)
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
    widest = ops.widest(embeddings.dtype, dtype)
    name = backends.resolve(backend, "gather_embeddings", embeddings.device, widest)
    rows: Tensor = GatherEmbeddings.apply(embeddings, indices, normalize, dtype, name)
    return rows
