"""InfoNCE of a backend with both gradients, and the same in fp64 for comparison."""

from __future__ import annotations

import torch

from pixcontrast_ext import infonce
from pixcontrast_ext.backends import native, reference
from tests.support.backends import GPU_BACKENDS


def run(inputs, backend, *, temperature=0.1, exclude_self=False, weights=None):
    """Loss per anchor and both gradients."""
    anchors, anchor_labels, keys, key_labels = inputs
    anchors, keys = anchors.clone().requires_grad_(), keys.clone().requires_grad_()
    loss = infonce(
        anchors, anchor_labels, keys, key_labels,
        temperature=temperature, exclude_self=exclude_self, reduction="none", backend=backend,
    )  # fmt: skip
    loss.backward(torch.ones_like(loss) if weights is None else weights.to(loss.dtype))
    return loss.detach(), anchors.grad, keys.grad


def exact(inputs, *, temperature=0.1, exclude_self=False, weights=None):
    """The same in fp64, by autograd of eq. (1) to (3)."""
    anchors, anchor_labels, keys, key_labels = inputs
    anchors, keys = anchors.double().requires_grad_(), keys.double().requires_grad_()
    loss, _ = reference.infonce_per_anchor(
        anchors, anchor_labels, keys, key_labels, temperature, exclude_self
    )
    loss.backward(torch.ones_like(loss) if weights is None else weights.double())
    return loss.detach(), anchors.grad, keys.grad


def fused_dtype(keys_dtype):
    """What the fused CPU kernels multiply rows of this dtype in; None if torch makes the products."""
    code = native._C.fused_dtype(native.DTYPE_CODES[keys_dtype])
    return None if code < 0 else native.DTYPES[code]


def weight_rounding(backend, dtype):
    """The error that a backend may add to the anchors' gradient by rounding the weights of its second product."""
    if dtype == torch.float32:
        return 1e-6
    on_bf16_words = backend == "cpu" and fused_dtype(dtype) == torch.bfloat16
    return 1e-3 if on_bf16_words or backend in GPU_BACKENDS else 1e-6
