"""Filling the memory bank, beside loops over images and classes and beside one plain read of the map."""

import torch

from pixcontrast_ext import MemoryBank

from .baselines import loops
from .harness import Method, Section, Settings, draw_priority, embedding_map, relative_error, scenes

BATCH, DIM, HEIGHT, WIDTH, NUM_CLASSES, SLOTS = 8, 256, 64, 128, 19, 1000


def make_bank() -> MemoryBank:
    return MemoryBank(NUM_CLASSES, DIM, region_slots=SLOTS, pixel_slots=SLOTS)


def run(settings: Settings) -> Section:
    labels, _ = scenes(BATCH, HEIGHT, WIDTH, NUM_CLASSES)
    embeddings = embedding_map(BATCH, DIM, HEIGHT, WIDTH)
    priority = draw_priority(labels)
    section = Section(f"enqueue: {BATCH}×{DIM}×{HEIGHT}×{WIDTH} fp32, {NUM_CLASSES} classes", unit="GB/s")

    bank, truth = make_bank(), make_bank()
    bank.enqueue(embeddings, labels, priority=priority)
    truth.enqueue(embeddings, labels, priority=priority, backend="reference")
    section.check("ours: keys", relative_error(bank.keys, truth.keys), 1e-6)
    for name in ("key_labels", "region_ptr", "region_fill", "pixel_ptr", "pixel_fill"):
        differing = (getattr(bank, name) != getattr(truth, name)).sum().item()
        section.check(f"ours: {name} that differ from the reference", differing, 0)

    # The loops draw other pixels, but the regions hold no chance.
    looped = loops.Bank(NUM_CLASSES, DIM, SLOTS)
    looped.enqueue(embeddings, labels)
    section.check("loops: regions", relative_error(looped.regions, truth.keys[:, :SLOTS]), 1e-5)
    section.check("loops: pixel_ptr", (looped.pixel_ptr != truth.pixel_ptr).sum().item(), 0)

    pairs = int(truth.region_fill.sum())
    work = embeddings.nbytes + labels.nbytes
    section.facts.append(f"{pairs} (image, class) pairs; unit embeddings, which ours normalises all the same")
    section.facts.append(f"work: map and labels read once = {work / 1e6:.1f} MB; what is written is small")
    section.time(
        [
            Method("ours", lambda: bank.enqueue(embeddings, labels), work),
            Method("loops", lambda: looped.enqueue(embeddings, labels), work),
            Method("one read of the map", lambda: torch.sum(embeddings, (2, 3)), work),
        ],
        settings.rounds,
    )
    section.ratio("enqueue: loops / ours", "loops", "ours")
    section.ratio("enqueue: ours / one read of the map", "ours", "one read of the map")
    return section
