"""A loop of accelerate with pixel contrast: any device, any number of processes, mixed precision, accumulation.

Needs torch, accelerate and pixcontrast-ext. `python accelerate_loop.py [FOLDER]`, or `accelerate launch`, or torchrun:
a folder gets a checkpoint, and goes on from the one that it has.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

import pixcontrast_ext as pc

CLASSES, SIZE, BATCH, EPOCHS, ACCUMULATE = 5, 64, 4, 3, 2


class Scenes(Dataset):
    """Noisy images with a square of each class on a ground of class 0, and their labels: your data goes here."""

    def __len__(self):
        return 61  # the last batch is smaller

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        labels = torch.zeros(SIZE, SIZE, dtype=torch.long)
        for name in range(1, CLASSES):
            row, column = torch.randint(0, SIZE - 20, (2,), generator=generator).tolist()
            labels[row : row + 20, column : column + 20] = name
        colours = torch.linspace(-1, 1, 3 * CLASSES).view(3, CLASSES).roll(1, 0)[:, labels]
        return colours + 0.7 * torch.randn(colours.shape, generator=generator), labels


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    torch.manual_seed(0)
    cpu = not torch.cuda.is_available()  # or torchrun's processes train apart
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=ACCUMULATE, mixed_precision="bf16")
    body = [nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    body += [nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    network = nn.Sequential(nn.Sequential(*body), nn.Conv2d(64, CLASSES, 1))  # your network goes here
    model = pc.WithEmbeddings(network, "1", pc.ProjectionHead(64, embed_dim=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(Scenes(), batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # Not prepared: its bank exchanges rows by itself. Warm-up is counted in calls, so in batches.
    criterion = pc.PixelContrastCrossEntropyLoss(
        CLASSES,
        warmup_steps=5 * ACCUMULATE,
        min_pixels=5,
        bank=dict(embed_dim=32, region_slots=100, pixel_slots=500),
    ).to(accelerator.device)
    accelerator.register_for_checkpointing(criterion)
    if folder and (folder / "state").exists():
        accelerator.load_state(folder / "state")
        accelerator.print(f"goes on with {int((criterion.bank.key_labels >= 0).sum())} keys in the bank")
    for epoch in range(EPOCHS):
        for step, (images, labels) in enumerate(loader):
            with accelerator.accumulate(model):
                logits, embeddings = model(images)
                loss, parts = criterion(logits, embeddings, labels, return_parts=True)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if step % 5 == 0:
                text = (f"{name} {part:.3f}" for name, part in parts.items())
                accelerator.print(f"epoch {epoch} step {step} loss {loss:.3f}", *text)
    if folder:
        accelerator.save_state(folder / "state")
    accelerator.end_training()


if __name__ == "__main__":
    main()
