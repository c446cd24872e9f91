"""What the contrast term adds to a training step: sample, gather, contrast, backward to the map, enqueue.

The baseline is the loops with the dense loss; it gathers all anchors at once, which spares it a dense
gradient of the map per (image, class).
"""

import torch
from torch import Tensor

from pixcontrast_ext import MemoryBank, PixelContrastLoss

from .baselines import loops
from .baselines.dense import dense_infonce
from .harness import Method, Section, Settings, embedding_map, scenes

BATCH, DIM, HEIGHT, WIDTH, NUM_CLASSES, SLOTS = 8, 256, 64, 128, 19, 500
TEMPERATURE = 0.1


def run(settings: Settings) -> Section:
    labels, predictions = scenes(BATCH, HEIGHT, WIDTH, NUM_CLASSES)
    embeddings = embedding_map(BATCH, DIM, HEIGHT, WIDTH).requires_grad_()
    bank = MemoryBank(NUM_CLASSES, DIM, region_slots=SLOTS, pixel_slots=SLOTS)
    criterion = PixelContrastLoss(NUM_CLASSES, temperature=TEMPERATURE, bank=bank)
    looped = loops.Bank(NUM_CLASSES, DIM, SLOTS)
    slots = torch.arange(SLOTS)

    def ours() -> tuple[Tensor, Tensor]:
        loss = criterion(embeddings, labels, predictions)
        return loss.detach(), *torch.autograd.grad(loss, embeddings)

    def baseline() -> tuple[Tensor, Tensor]:
        indices, anchor_labels = loops.sample(labels, predictions)
        anchors = loops.gather(embeddings, indices)
        keys = torch.cat((looped.regions, looped.pixels), dim=1)
        filled = torch.cat([slots < fill[:, None] for fill in (looped.region_fill, looped.pixel_fill)], dim=1)
        classes = torch.arange(NUM_CLASSES)[:, None].expand_as(filled)
        key_labels = torch.where(filled, classes, -1).flatten()
        loss = dense_infonce(anchors, anchor_labels, keys.flatten(0, 1), key_labels, temperature=TEMPERATURE)
        (gradient,) = torch.autograd.grad(loss, embeddings)
        looped.enqueue(embeddings, labels)
        return loss.detach(), gradient

    section = Section(
        f"training step: {BATCH}×{DIM}×{HEIGHT}×{WIDTH} fp32, bank of K {NUM_CLASSES * 2 * SLOTS}",
        unit="GB/s",
    )
    for _ in range(2 * SLOTS // BATCH):
        bank.enqueue(embeddings.detach(), labels)
    looped.regions.copy_(bank.keys[:, :SLOTS])
    looped.pixels.copy_(bank.keys[:, SLOTS:])
    for name in ("region_ptr", "region_fill", "pixel_ptr", "pixel_fill"):
        getattr(looped, name).copy_(getattr(bank, name))
    # Each draws its own anchors, so they agree as two samples of one quantity do.
    (ours_loss, ours_gradient), (loss, gradient) = ours(), baseline()
    section.check("ours: loss beside the baseline's", ((ours_loss - loss) / loss).abs().item(), 0.02)
    section.check(
        "ours: norm of the gradient", (ours_gradient.norm() / gradient.norm() - 1).abs().item(), 0.1
    )

    section.facts.append("work: map read for the enqueue and its dense gradient written once")
    work = 2 * embeddings.nbytes
    section.time([Method("ours", ours, work), Method("loops + dense", baseline, work)], settings.rounds)
    section.ratio("training step: loops + dense / ours", "loops + dense", "ours")
    return section
