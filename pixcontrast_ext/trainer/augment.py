"""Random variation of a training batch, on its device: images and labels move together.

Everything is drawn from torch's global generators, which the training loop seeds per step.
"""

from __future__ import annotations

import kornia.augmentation as K
import torch
from kornia.geometry.transform import warp_affine
from torch import Tensor, nn

from pixcontrast_ext.trainer.config import DataConfig
from pixcontrast_ext.trainer.data import IGNORE


class Augment(nn.Module):
    """Recolour, flip, zoom, rotate and crop a batch.

    A crop lies anywhere inside the zoomed image or, where that is smaller, has it anywhere inside. Labels take the
    nearest pixel; what lies outside the image is black and `IGNORE`.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self.crop, self.zoom, self.rotate = config.crop, config.zoom, config.rotate
        jitter = config.jitter
        self.recolour = K.ColorJiggle(jitter, jitter, jitter, 0.0, p=1.0) if jitter else nn.Identity()

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels at the size of the crop, or at their own without one.

        Args:
            images: [B, 3, H, W] float in [0, 1].
            labels: [B, H, W] int64.
            sizes: height and width of each image in the upper left of its [H, W], [B, 2] on the CPU, so that nothing
                waits for the device; the whole unless given.
        """
        batch, canvas = len(images), labels.shape[-2:]
        if sizes is None:
            sizes = torch.tensor(canvas).expand(batch, 2)
        shown = self.crop or (canvas[0], canvas[1])
        transform = self._draw(sizes.cpu().to(images.dtype), shown).to(images.device, non_blocking=True)
        images = warp_affine(self.recolour(images) * _inside(sizes, canvas, images), transform, shown)
        # Outside is filled with zeros, so zero has to mean "no class" while the labels move.
        shifted = torch.where(labels == IGNORE, 0, labels + 1)[:, None].to(images)
        moved = warp_affine(shifted, transform, shown, mode="nearest")[:, 0].round().long()
        return images, torch.where(moved == 0, IGNORE, moved - 1)

    def _draw(self, sizes: Tensor, shown: tuple[int, int]) -> Tensor:
        """Matrices [B, 2, 3] that take pixels (x, y) of images of `sizes` [B, 2] to those of a crop of size `shown`."""
        uniform = torch.rand(5, len(sizes), dtype=sizes.dtype)  # on the CPU: alike on every device
        zoom = self.zoom[0] + (self.zoom[1] - self.zoom[0]) * uniform[0]
        angle = torch.deg2rad(self.rotate * (2 * uniform[1] - 1))
        mirror = torch.where(uniform[2] < 0.5, -1.0, 1.0)
        extent = sizes * zoom[:, None]
        # The zoomed image hangs over, or falls short of, the crop by as much as this, here and there by a random share.
        over = extent - torch.tensor(shown)
        centre = ((extent - 1) / 2 - uniform[3:].T * over).flip(1)
        sine, cosine = zoom * angle.sin(), zoom * angle.cos()
        turn = torch.stack([mirror * cosine, -sine, mirror * sine, cosine], 1).view(-1, 2, 2)
        shift = centre - (turn @ ((sizes.flip(1) - 1) / 2)[..., None])[..., 0]
        return torch.cat([turn, shift[..., None]], 2)


def _inside(sizes: Tensor, canvas: torch.Size, like: Tensor) -> Tensor:
    """1 where an image is and 0 where it was padded, [B, 1, H, W]: padding stays black when it is recoloured."""
    sizes = sizes.to(like.device, non_blocking=True)
    rows, columns = (torch.arange(length, device=like.device) for length in canvas)
    inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None, :]
    return inside[:, None].to(like.dtype)
