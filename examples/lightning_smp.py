"""A network of segmentation-models-pytorch with pixel contrast in Lightning.

Needs torch, lightning, segmentation-models-pytorch and pixcontrast-ext. `python lightning_smp.py [FOLDER]`: the folder
gets a checkpoint, and goes on from the one that it has.
"""

import sys
from pathlib import Path

import lightning
import segmentation_models_pytorch as smp
import torch
from torch.utils.data import DataLoader, Dataset

import pixcontrast_ext as pc

CLASSES, SIZE, EPOCHS = 5, 64, 2


class Segmentation(lightning.LightningModule):
    """Model and criterion are submodules, so Lightning moves, saves and restores both."""

    def __init__(self):
        super().__init__()
        network = smp.FPN("resnet18", encoder_weights=None, classes=CLASSES)
        head = pc.ProjectionHead(network.segmentation_head[0].in_channels, embed_dim=64)
        self.model = pc.WithEmbeddings(network, "segmentation_head", head)  # what it receives is at stride 4
        settings = dict(warmup_steps=5, bank=dict(embed_dim=64, region_slots=100, pixel_slots=500))
        self.criterion = pc.PixelContrastCrossEntropyLoss(CLASSES, min_pixels=5, **settings)

    def training_step(self, batch, _):
        """A step whose parts are logged apart."""
        images, labels = batch
        logits, embeddings = self.model(images)
        loss, parts = self.criterion(logits, embeddings, labels, return_parts=True)
        self.log_dict({"loss": loss.detach(), **parts})
        return loss

    def validation_step(self, batch, _):
        """The network alone: no head, no bank."""
        images, labels = batch
        self.log("accuracy", (self.model.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        """The head's weights are among the module's."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Scenes(Dataset):
    """Noisy images with a square of each class on a ground of class 0, and their labels: your data goes here."""

    def __len__(self):
        return 62  # the last batch is smaller

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        labels = torch.zeros(SIZE, SIZE, dtype=torch.long)
        for name in range(1, CLASSES):
            row, column = torch.randint(0, SIZE - 20, (2,), generator=generator).tolist()
            labels[row : row + 20, column : column + 20] = name
        colours = torch.linspace(-1, 1, 3 * CLASSES).view(3, CLASSES).roll(1, 0)[:, labels]
        return colours + 0.7 * torch.randn(colours.shape, generator=generator), labels


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lightning")
    last = folder / "last.ckpt"
    lightning.seed_everything(0)
    epochs = EPOCHS * (2 if last.exists() else 1)
    logger = lightning.pytorch.loggers.CSVLogger(folder)
    trainer = lightning.Trainer(
        max_epochs=epochs, logger=logger, log_every_n_steps=1, enable_checkpointing=False
    )
    loaders = [DataLoader(Scenes(), batch_size=4, shuffle=shuffle) for shuffle in (True, False)]
    trainer.fit(Segmentation(), *loaders, ckpt_path=last if last.exists() else None)
    trainer.save_checkpoint(last)


if __name__ == "__main__":
    main()
