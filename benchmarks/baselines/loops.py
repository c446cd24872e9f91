"""Sampling and enqueue as loops over images and classes in Python, the way the paper's authors wrote them.

Where their code is known to be wrong this does the right thing at the same cost: pixels are taken from their
own class, class 0 counts, ring pointers advance by what was written.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample(
    labels: Tensor,  # [B, H, W]
    predictions: Tensor,  # [B, H, W]
    *,
    max_samples: int = 1024,
    max_views: int = 100,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor]:
    """Flat pixel indices and their labels, image by image, hard before easy within a class."""
    batch = labels.shape[0]
    labels, predictions = labels.reshape(batch, -1), predictions.reshape(batch, -1)
    num_pixels = labels.shape[1]

    classes, num_pairs = [], 0
    for image in range(batch):
        present = [c for c in labels[image].unique() if c != ignore_index]
        present = [c for c in present if (labels[image] == c).nonzero().shape[0] > max_views]
        classes.append(present)
        num_pairs += len(present)
    if num_pairs == 0:
        return labels.new_empty(0), labels.new_empty(0)

    n_view = min(max_samples // num_pairs, max_views)
    chosen, chosen_labels = [], []
    for image in range(batch):
        for c in classes[image]:
            own = labels[image] == c
            hard = (own & (predictions[image] != c)).nonzero()[:, 0]
            easy = (own & (predictions[image] == c)).nonzero()[:, 0]
            if len(hard) >= n_view / 2 and len(easy) >= n_view / 2:
                keep_hard = n_view // 2
            elif len(hard) >= n_view / 2:
                keep_hard = n_view - len(easy)
            else:
                keep_hard = len(hard)
            hard = hard[torch.randperm(len(hard), device=hard.device)[:keep_hard]]
            easy = easy[torch.randperm(len(easy), device=easy.device)[: n_view - keep_hard]]
            chosen.append(torch.cat((hard, easy)) + image * num_pixels)
            chosen_labels.append(c.expand(n_view))
    return torch.cat(chosen), torch.cat(chosen_labels)


def gather(embeddings: Tensor, indices: Tensor) -> Tensor:
    """Unit rows [A, D] of a map [B, D, H, W], through a copy of the whole map as [B·H·W, D]."""
    pixels = embeddings.permute(0, 2, 3, 1).contiguous().view(-1, embeddings.shape[1])
    return F.normalize(pixels[indices], dim=1)


def index(embeddings: Tensor, indices: Tensor) -> Tensor:
    """The same rows without the copy, as who knows advanced indexing writes it."""
    num_pixels = embeddings.shape[2] * embeddings.shape[3]
    return F.normalize(embeddings.flatten(2)[indices // num_pixels, :, indices % num_pixels], dim=1)


class Bank:
    """Rings of regions and of pixels: two tensors [C, slots, D] with a pointer per class."""

    def __init__(
        self, num_classes: int, dim: int, slots: int, pixels_per_image: int = 10, device: str = "cpu"
    ):
        self.regions = torch.zeros(num_classes, slots, dim, device=device)
        self.pixels = torch.zeros(num_classes, slots, dim, device=device)
        self.region_ptr, self.pixel_ptr, self.region_fill, self.pixel_fill = torch.zeros(
            4, num_classes, dtype=torch.long, device=device
        )
        self.slots, self.pixels_per_image = slots, pixels_per_image

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, labels: Tensor, ignore_index: int = 255) -> None:
        """Takes a map [B, D, H, W] of unit embeddings, as the authors' head makes them."""
        batch, dim = embeddings.shape[:2]
        flat = embeddings.contiguous().view(batch, dim, -1)
        labels = labels.reshape(batch, -1)
        for image in range(batch):
            for c in labels[image].unique():
                if c == ignore_index:
                    continue
                own = (labels[image] == c).nonzero()[:, 0]
                region = flat[image][:, own].mean(dim=1)
                ptr = int(self.region_ptr[c])
                self.regions[c, ptr] = F.normalize(region, dim=0)
                self.region_ptr[c] = (ptr + 1) % self.slots
                self.region_fill[c] = min(int(self.region_fill[c]) + 1, self.slots)

                own = own[torch.randperm(len(own), device=own.device)[: self.pixels_per_image]]
                pixels = F.normalize(flat[image][:, own].T, dim=1)
                ptr = int(self.pixel_ptr[c])
                slots = torch.arange(ptr, ptr + len(own), device=own.device) % self.slots
                self.pixels[c, slots] = pixels.to(self.pixels.dtype)
                self.pixel_ptr[c] = (ptr + len(own)) % self.slots
                self.pixel_fill[c] = min(int(self.pixel_fill[c]) + len(own), self.slots)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Keys [K, D] and their labels [K], -1 for unfilled slots: regions before pixels, class by class. A copy."""
        num_classes, slots, dim = self.regions.shape
        keys = torch.cat((self.regions, self.pixels), dim=1)
        slot = torch.arange(slots, device=keys.device)
        filled = torch.cat([slot < fill[:, None] for fill in (self.region_fill, self.pixel_fill)], dim=1)
        classes = torch.arange(num_classes, device=keys.device)[:, None].expand_as(filled)
        return keys.view(-1, dim), torch.where(filled, classes, -1).flatten()
