"""The loss as a loop over chunks of keys in PyTorch, with the anchors' gradient finished in the forward.

What one gets without writing a kernel: no [A, K] matrix, but every step between two products is a pass over a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048
CHUNK_OF_GPU = 32_768
"""Keys at a time; on a GPU as many as keep it busy between two launches."""


class ChunkedInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_labels: Tensor,
        keys: Tensor,
        key_labels: Tensor,
        temperature: float,
        grad_enabled: bool,
    ) -> Tensor:
        wide = anchors.float()
        with_gradient = grad_enabled and ctx.needs_input_grad[0]
        neg_lse = wide.new_full((len(wide), 1), float("-inf"))
        weighted_negatives = torch.zeros_like(wide)  # sum over negatives of exp(s - neg_lse) k
        size = CHUNK_OF_GPU if keys.is_cuda else CHUNK
        chunks = list(zip(keys.split(size), key_labels.split(size), strict=True))

        for chunk, labels in chunks:
            chunk = chunk.float()
            logits = wide @ chunk.T / temperature
            negatives = (anchor_labels[:, None] != labels) & (labels >= 0)
            logits = logits.masked_fill(~negatives, float("-inf"))
            grown = torch.logaddexp(neg_lse, logits.logsumexp(dim=1, keepdim=True))
            if with_gradient:
                shift = grown.nan_to_num(neginf=0.0)  # of an anchor that has met no negative yet
                weighted_negatives *= (neg_lse - shift).exp()
                weighted_negatives.addmm_((logits - shift).exp(), chunk)
            neg_lse = grown

        loss = wide.new_zeros(len(wide), 1)
        weight = wide.new_zeros(len(wide), 1)  # sum over positives of sigma
        count = wide.new_zeros(len(wide), 1)
        weighted_positives = torch.zeros_like(wide)  # sum over positives of sigma k
        for chunk, labels in chunks:
            positives = anchor_labels[:, None] == labels
            if not keys.is_cuda and not positives.any():  # a GPU would wait for the answer
                continue
            chunk = chunk.float()
            gap = neg_lse - wide @ chunk.T / temperature
            sigma = gap.sigmoid() * positives
            loss += (F.softplus(gap) * positives).sum(dim=1, keepdim=True)
            weight += sigma.sum(dim=1, keepdim=True)
            count += positives.sum(dim=1, keepdim=True)
            if with_gradient:
                weighted_positives.addmm_(sigma, chunk)

        per_anchor = 1 / (count.clamp(min=1) * (count > 0).sum().clamp(min=1))
        if with_gradient:
            gradient = (weight * weighted_negatives - weighted_positives) * (per_anchor / temperature)
            ctx.save_for_backward(gradient.to(anchors.dtype))
        return (loss * per_anchor).sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * cotangent, None, None, None, None, None


def chunked_infonce(
    anchors: Tensor, anchor_labels: Tensor, keys: Tensor, key_labels: Tensor, *, temperature: float
) -> Tensor:
    """The mean of `dense_infonce` for keys that have no gradient and anchors that all have a negative."""
    loss: Tensor = ChunkedInfoNCE.apply(  # type: ignore[no-untyped-call]
        anchors, anchor_labels, keys, key_labels, temperature, torch.is_grad_enabled()
    )
    return loss
