"""A valid call of every op, and the sizes of its tensors, for tests that vary the arguments."""

from __future__ import annotations

from typing import Any

import torch

from pixcontrast_ext import MemoryBank

_GENERATOR = torch.Generator().manual_seed(20210118)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_GENERATOR)


def _integers(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=_GENERATOR, dtype=dtype)


LABELS = _integers(3, 2, 6, 5)
PRIORITY = _integers(99, 2, 6, 5, dtype=torch.int32)
MAP = _normal(2, 4, 6, 5)
INDICES = torch.tensor([0, 7, 59, 7])
ROWS, ROW_LABELS = 0.2 * _normal(7, 4), torch.arange(7, dtype=torch.int32) % 3 - 1
KEYS, KEY_LABELS = 0.2 * _normal(11, 4), torch.arange(11, dtype=torch.int32) % 3 - 1
COLUMN = _normal(7).abs()

# One letter per size; the same letter within an op means the same size.
SIZES = {
    "hard_anchor_sampling": {"labels": "BHW", "predictions": "BHW", "priority": "BHW"},
    "gather": {"embeddings": "BDHW", "indices": "A"},
    "gather_backward": {"grad_rows": "AD", "embeddings": "BDHW", "indices": "A", "inv_norm": "A"},
    "enqueue_collect": {"embeddings": "BDHW", "labels": "BHW", "priority": "BHW"},
    "enqueue_write": {
        "rows": "NCVD",
        "row_labels": "NCV",
        "keys": "CSD",
        "key_labels": "CS",
        "region_ptr": "C",
        "region_fill": "C",
        "pixel_ptr": "C",
        "pixel_fill": "C",
    },
    "infonce_forward": {"anchors": "AD", "anchor_labels": "A", "keys": "KD", "key_labels": "K"},
    "infonce_backward_keys": {
        "anchors": "AD",
        "anchor_labels": "A",
        "keys": "KD",
        "key_labels": "K",
        "neg_lse": "A",
        "pos_weight": "A",
        "grad_scale": "A",
    },
    "infonce_backward_symmetric": {
        "anchors": "AD",
        "anchor_labels": "A",
        "neg_lse": "A",
        "pos_weight": "A",
        "grad_scale": "A",
    },
}
_NEGATIVES = {"negatives": "MD", "negative_labels": "M"}
_KEPT = {"neg_min": "A", "pos_max": "A"}
SIZES |= {
    "mining_counts": SIZES["infonce_forward"] | _NEGATIVES,
    "mining_forward": SIZES["infonce_forward"] | _NEGATIVES | _KEPT,
    "mining_backward_keys": SIZES["infonce_backward_keys"] | _KEPT,
    "mining_backward_symmetric": SIZES["infonce_backward_symmetric"] | _KEPT,
}


def _bank_state() -> list[torch.Tensor]:
    bank = MemoryBank(3, 4, region_slots=2, pixel_slots=5)
    return [buffer.clone() for buffer in bank.buffers()]


def cases(backend: str) -> dict[str, tuple[Any, ...]]:
    """The arguments of a valid call of each op."""
    rows, row_labels = torch.ops.pixcontrast.enqueue_collect(
        MAP, LABELS, PRIORITY, 3, 2, 255, True, torch.float32, backend
    )
    contrast = (ROWS, ROW_LABELS, KEYS, KEY_LABELS)
    negatives, kept = (KEYS[:9].clone(), KEY_LABELS[:9].clone()), (COLUMN - 1, 1 - COLUMN)
    mining = {
        "mining_counts": (*contrast, *negatives, True, backend),
        "mining_forward": (*contrast, *negatives, *kept, 0.1, False, True, backend),
        "mining_backward_keys": (*contrast, COLUMN, COLUMN, COLUMN, *kept, 0.1, False, backend),
        "mining_backward_symmetric": (ROWS, ROW_LABELS, COLUMN, COLUMN, COLUMN, *kept, 0.1, True, backend),
    }
    return mining | {
        "hard_anchor_sampling": (LABELS, LABELS.flip(0), PRIORITY, 3, 20, 4, 1, 255, 2**23, backend),
        "gather": (MAP, INDICES, True, torch.float32, backend),
        "gather_backward": (_normal(4, 4), MAP, INDICES, COLUMN[:4].clone(), True, backend),
        "enqueue_collect": (MAP, LABELS, PRIORITY, 3, 2, 255, True, torch.float32, backend),
        "enqueue_write": (rows, row_labels, *_bank_state(), 2, backend),
        "infonce_forward": (*contrast, 0.1, False, True, backend),
        "infonce_backward_keys": (*contrast, COLUMN, COLUMN, COLUMN, 0.1, False, backend),
        "infonce_backward_symmetric": (ROWS, ROW_LABELS, COLUMN, COLUMN, COLUMN, 0.1, True, backend),
    }
