"""The losses of other packages for rows against rows, each called as its documentation says.

Only the first computes this loss, in a matrix of positive pairs x negative pairs. The others compute losses of one
positive a row, against all keys: the same two products, softmax and gradient, so their time can stand beside ours.
"""

import torch
from torch import Tensor


def metric_learning_infonce(
    anchors: Tensor, anchor_labels: Tensor, keys: Tensor, key_labels: Tensor, *, temperature: float
) -> Tensor:
    """pytorch-metric-learning's NTXentLoss: a mean over pairs, so the same where all anchors have as many positives."""
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature, distance=DotProductSimilarity(normalize_embeddings=False))
    value: Tensor = loss(anchors, anchor_labels, ref_emb=keys, ref_labels=key_labels)
    return value


def metric_learning_bytes(num_anchors: int, num_keys: int, num_classes: int) -> int:
    """Of its matrix of positive pairs x negative pairs, in fp32, of which about four exist at a time."""
    positives = num_anchors * num_keys // num_classes
    return 4 * 4 * positives * (num_anchors * num_keys - positives)


def cross_entropy(anchors: Tensor, keys: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """The loss of the three below: anchor i belongs to key targets[i], and to no other."""
    return torch.nn.functional.cross_entropy(anchors @ keys.T / temperature, targets)


def inf_cl_cross_entropy(anchors: Tensor, keys: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """Inf-CL (arXiv 2410.17243) on one device. Computes the keys' gradient as well, whether wanted or not."""
    from inf_cl import cal_flash_loss

    losses: Tensor = cal_flash_loss(anchors, keys, targets, 1 / temperature, head_dim=anchors.shape[1])
    return losses.mean()


def liger_cross_entropy(anchors: Tensor, keys: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """Liger's fused linear cross-entropy, the keys in the place of the vocabulary's weights."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(keys, anchors / temperature, targets)
    return loss


def memeff_cross_entropy(anchors: Tensor, keys: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """The LiT loss of memeff: as many keys as anchors, and anchor i belongs to key i."""
    from memeff import MemoryEfficientLiTLoss

    loss: Tensor = MemoryEfficientLiTLoss(temperature, normalized_inputs=True, stable=False)(anchors, keys)
    return loss
