"""Random variation of a training batch: images and labels move together, by kornia.

Everything is drawn from torch's global generator, which the training loop seeds per step.
"""

from __future__ import annotations

from typing import Any

import kornia.augmentation as K
import torch
from kornia.constants import DataKey
from torch import Tensor, nn

from pixcontrast_ext.trainer.config import DataConfig
from pixcontrast_ext.trainer.data import IGNORE


class Augment(nn.Module):
    """Flip, zoom, rotate, shift, crop and recolour a batch.

    `forward(images [B, 3, H, W] float in [0, 1], labels [B, H, W] int64)` returns both, at the crop's
    size if there is one. Labels take the nearest pixel; what lies outside the image is black and `IGNORE`.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        jitter = config.jitter
        # Shifts this large let a zoomed image show any of its parts.
        geometry: list[Any] = [
            K.RandomHorizontalFlip(p=0.5),
            K.RandomAffine(degrees=config.rotate, translate=(0.2, 0.2), scale=config.zoom, p=1.0),
        ]
        if config.crop is not None:
            geometry.append(K.RandomCrop(config.crop, pad_if_needed=True, p=1.0))
        nearest: Any = {"resample": "nearest", "align_corners": False}
        self.move = K.AugmentationSequential(
            *geometry, data_keys=["input", "mask"], extra_args={DataKey.MASK: nearest}
        )
        self.recolour = K.ColorJiggle(jitter, jitter, jitter, 0.0, p=1.0) if jitter else nn.Identity()

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # kornia fills with zeros, so zero has to mean "no class" while the labels move.
        shifted = torch.where(labels == IGNORE, 0, labels + 1)[:, None].float()
        images, shifted = self.move(self.recolour(images), shifted)
        moved = shifted[:, 0].round().long()
        return images, torch.where(moved == 0, IGNORE, moved - 1)
