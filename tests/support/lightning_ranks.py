"""The script that `test_lightning.py` starts, and Lightning for the second rank. Argument: the folder for states."""

from __future__ import annotations

import sys

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.support.two_ranks import BATCH, RANKS, STEPS, Images, Network, save


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.network(**batch)[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    torch.manual_seed(0)
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=RANKS,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Images(), batch_size=BATCH))
    save(module.network, sys.argv[1], trainer.global_rank)
