"""The loss as a practitioner writes it in PyTorch: the whole [A, K] logit matrix, masks and autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

BUFFERS = 8  # fp32 matrices of A x K that are alive at the peak of forward and backward, roughly
COMPILED_BUFFERS = 5  # the same, after torch.compile has fused the masks and the softplus


def dense_infonce(
    anchors: Tensor,  # [A, D]
    anchor_labels: Tensor,  # [A]
    keys: Tensor,  # [K, D]
    key_labels: Tensor,  # [K], -1 for unfilled slots
    *,
    temperature: float,
    exclude_self: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """As `pixcontrast_ext.infonce`. Half-precision inputs are multiplied in their own dtype and go on in fp32."""
    logits = anchors @ keys.T
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    logits = logits / temperature
    filled = key_labels >= 0
    same = anchor_labels[:, None] == key_labels
    positives, negatives = same & filled, ~same & filled
    if exclude_self:
        itself = torch.arange(len(anchors), device=anchors.device)[:, None]
        positives = positives & (itself != torch.arange(len(keys), device=keys.device))

    neg_lse = logits.masked_fill(~negatives, float("-inf")).logsumexp(dim=1, keepdim=True)
    pair_losses = F.softplus(neg_lse - logits) * positives
    num_positives = positives.sum(dim=1)
    losses = pair_losses.sum(dim=1) / num_positives.clamp(min=1)
    if reduction == "none":
        return losses
    return losses.sum() / (num_positives > 0).sum().clamp(min=1)
