"""Hard-anchor sampling, alone and with the gather that follows, beside loops over images and classes."""

import torch

from pixcontrast_ext import gather_embeddings, hard_anchor_sampling

from .baselines import loops
from .harness import Method, Section, Settings, draw_priority, embedding_map, scenes

BATCH, DIM, HEIGHT, WIDTH, NUM_CLASSES = 8, 256, 64, 128, 19


def run(settings: Settings) -> Section:
    labels, predictions = scenes(BATCH, HEIGHT, WIDTH, NUM_CLASSES)
    embeddings = embedding_map(BATCH, DIM, HEIGHT, WIDTH)
    section = Section(f"sampling: {BATCH}×{DIM}×{HEIGHT}×{WIDTH} fp32, {NUM_CLASSES} classes", unit="GB/s")

    priority = draw_priority(labels)
    ours = hard_anchor_sampling(labels, predictions, num_classes=NUM_CLASSES, priority=priority)
    truth = hard_anchor_sampling(
        labels, predictions, num_classes=NUM_CLASSES, priority=priority, backend="reference"
    )
    for name in ("indices", "labels", "count"):
        differing = (getattr(ours, name) != getattr(truth, name)).sum().item()
        section.check(f"ours: {name} that differ from the reference", differing, 0)
    count = int(truth.count)

    # The loops choose other pixels, but as many hard and easy ones of each (image, class).
    indices, _ = loops.sample(labels, predictions)
    pools = [
        (
            (chosen // (HEIGHT * WIDTH) * NUM_CLASSES + labels.flatten()[chosen]) * 2
            + (labels.flatten()[chosen] == predictions.flatten()[chosen])
        ).bincount(minlength=BATCH * NUM_CLASSES * 2)
        for chosen in (indices, truth.indices[:count])
    ]
    section.check("loops: anchors by pool", (pools[0] != pools[1]).sum().item(), 0)

    def ours_sample():
        return hard_anchor_sampling(labels, predictions, num_classes=NUM_CLASSES)

    @torch.no_grad()
    def ours_both():
        return gather_embeddings(embeddings, ours_sample().indices)

    @torch.no_grad()
    def loops_both():
        return loops.gather(embeddings, loops.sample(labels, predictions)[0])

    maps = labels.nbytes + predictions.nbytes + priority.nbytes
    rows = 2 * len(truth.indices) * DIM * embeddings.element_size()
    section.facts.append(
        f"{count} anchors of {len(truth.indices)} rows; {(labels == 255).float().mean():.0%} void"
    )
    section.facts.append(
        f"work: labels, predictions and priority read once = {maps / 1e6:.1f} MB; the gather reads and "
        f"writes its rows = {rows / 1e6:.1f} MB. Forward only; ours draws its priority within the time"
    )
    section.time(
        [
            Method("ours: sampling", ours_sample, maps),
            Method("ours: sampling + gather", ours_both, maps + rows),
            Method("loops: sampling", lambda: loops.sample(labels, predictions), maps),
            Method("loops: sampling + gather", loops_both, maps + rows),
        ],
        settings.rounds,
    )
    section.ratio("sampling: loops / ours", "loops: sampling", "ours: sampling")
    section.ratio("sampling + gather: loops / ours", "loops: sampling + gather", "ours: sampling + gather")
    return section
