"""Attention with values = keys does the two products and a softmax of the same size: a speed that kernels reach.

It is not a loss. `flash_attention` knows no labels and uses every key; `MaskedAttention` leaves out the keys of the
anchor's own class, which makes it the pass over the negatives.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def flash_attention(anchors: Tensor, keys: Tensor, *, temperature: float) -> Tensor:
    """softmax(anchors @ keys.T / temperature) @ keys, by torch's scaled_dot_product_attention."""
    queries, values = anchors[None, None], keys[None, None]
    return F.scaled_dot_product_attention(queries, values, values, scale=1 / temperature)[0, 0]


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


class MaskedAttention:
    """`flash_attention` over the negatives only, by FlexAttention; its block mask is made once."""

    def __init__(self, anchors: Tensor, anchor_labels: Tensor, keys: Tensor, key_labels: Tensor):
        from torch.nn.attention.flex_attention import create_block_mask

        def negative(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return anchor_labels[query] != key_labels[key]

        self.heads = [rows[None, None] for rows in (anchors, keys, keys)]
        self.mask = create_block_mask(negative, 1, 1, len(anchors), len(keys), device=anchors.device)

    def __call__(self, *, temperature: float) -> Tensor:
        return _compiled_flex()(*self.heads, block_mask=self.mask, scale=1 / temperature)[0, 0]


def plain_attention(anchors: Tensor, keys: Tensor, mask: Tensor | None, *, temperature: float) -> Tensor:
    """The plain form of the two above, in the precision of the rows; mask [A, K] is true where a key takes part."""
    logits = anchors @ keys.T / temperature
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=1) @ keys
