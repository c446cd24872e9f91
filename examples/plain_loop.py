"""A plain PyTorch loop with pixel contrast, complete: ten seconds on a CPU.

Needs torch and pixcontrast-ext. `python plain_loop.py [FOLDER]`: a folder gets a checkpoint, and goes on from the one
that it has. Under torchrun (see ddp_torchrun.sh) every process trains on its own part of each batch.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pixcontrast_ext as pc

CLASSES, SIZE, BATCH, STEPS = 5, 64, 8, 40
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scenes(step, count):
    """Noisy images with a square of each class on a ground of class 0, and their labels: your data goes here."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for index in range(count * (CLASSES - 1)):
        row, column = torch.randint(0, SIZE - 20, (2,), generator=generator).tolist()
        labels[index // (CLASSES - 1), row : row + 20, column : column + 20] = index % (CLASSES - 1) + 1
    colours = torch.linspace(-1, 1, 3 * CLASSES).view(3, CLASSES).roll(1, 0)[:, labels].movedim(0, 1)
    return colours + 0.7 * torch.randn(colours.shape, generator=generator), labels


def network():  # yours goes here: anything that returns logits
    body = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(nn.Sequential(*body), nn.Conv2d(64, CLASSES, 1))


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    rank, ranks = 0, 1
    if "RANK" in os.environ:
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = pc.WithEmbeddings(network(), "1", pc.ProjectionHead(64, embed_dim=32)).to(DEVICE)
    bank = dict(embed_dim=32, region_slots=100, pixel_slots=500)
    criterion = pc.PixelContrastCrossEntropyLoss(CLASSES, warmup_steps=10, min_pixels=5, bank=bank).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    parts_of_state = {"model": model, "criterion": criterion, "optimizer": optimizer}
    if folder and (folder / "last.pt").exists():
        state = torch.load(folder / "last.pt", map_location=DEVICE)
        for name, part in parts_of_state.items():
            part.load_state_dict(state[name])
        print(f"goes on with {int((criterion.bank.key_labels >= 0).sum())} keys in the bank")
    run = DistributedDataParallel(model) if ranks > 1 else model  # the criterion stays outside
    for step in range(STEPS):
        images, labels = (each[rank::ranks].to(DEVICE) for each in scenes(step, BATCH))
        logits, embeddings = run(images)
        loss, parts = criterion(logits, embeddings, labels, return_parts=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 10 == 0 or step == STEPS - 1):
            print(f"step {step} loss {loss:.3f}", *(f"{name} {part:.3f}" for name, part in parts.items()))
    model.eval()
    with torch.no_grad():
        images, labels = (each.to(DEVICE) for each in scenes(-1, BATCH))
        logits = nn.functional.interpolate(model.network(images), size=labels.shape[1:])  # no head, no bank
    if rank == 0:
        print(f"accuracy {(logits.argmax(1) == labels).float().mean():.3f}")
        if folder:
            torch.save({name: part.state_dict() for name, part in parts_of_state.items()}, folder / "last.pt")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
