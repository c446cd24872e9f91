"""torchvision's DeepLabV3 with pixel contrast: mixed precision, gradient accumulation, and an average of the weights.

Needs torch, torchvision and pixcontrast-ext. `python torchvision_deeplabv3.py [FOLDER]`: a folder gets a checkpoint,
and goes on from the one that it has.
"""

import sys
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

import pixcontrast_ext as pc

CLASSES, SIZE, BATCH, STEPS, ACCUMULATE = 5, 64, 4, 12, 2
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


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    # classifier[4] is the last convolution, with every backbone.
    head = pc.ProjectionHead(network.classifier[-1].in_channels, embed_dim=64)
    model = pc.WithEmbeddings(network, "classifier.4", head).to(DEVICE)
    # Average the model, and leave the criterion out: a bank of averaged keys is none.
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    criterion = pc.PixelContrastCrossEntropyLoss(
        CLASSES,
        warmup_steps=2 * ACCUMULATE,  # calls of the criterion are counted, not steps of the optimizer
        min_pixels=3,  # a square of 20 pixels is one of 2 or 3 at stride 8 or 16
        bank=dict(embed_dim=64, region_slots=100, pixel_slots=200, dtype="bfloat16"),
    ).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    parts_of_state = {"model": model, "average": average, "criterion": criterion, "optimizer": optimizer}
    if folder and (folder / "last.pt").exists():
        state = torch.load(folder / "last.pt", map_location=DEVICE)
        for name, part in parts_of_state.items():
            part.load_state_dict(state[name])
        print(f"goes on with {int((criterion.bank.key_labels >= 0).sum())} keys in the bank")
    for step in range(STEPS):
        for micro in range(ACCUMULATE):
            images, labels = (each.to(DEVICE) for each in scenes(ACCUMULATE * step + micro, BATCH))
            with torch.autocast(DEVICE, torch.bfloat16):
                output, embeddings = model(images)
                loss, parts = criterion(output["out"], embeddings, labels, return_parts=True)
            (loss / ACCUMULATE).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        if step % 4 == 0 or step == STEPS - 1:
            print(f"step {step} loss {loss:.3f}", *(f"{name} {part:.3f}" for name, part in parts.items()))
    average.eval()
    images, labels = (each.to(DEVICE) for each in scenes(-1, BATCH))
    with torch.no_grad():
        logits = average.module.network(images)["out"]  # no head, no bank
    print(f"accuracy {(logits.argmax(1) == labels).float().mean():.3f}")
    if folder:
        torch.save({name: part.state_dict() for name, part in parts_of_state.items()}, folder / "last.pt")


if __name__ == "__main__":
    main()
