"""A transformers model around the network, and the program that torchrun starts for `test_transformers.py`.

Argument: the folder for the states.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from tests.support.two_ranks import BATCH, STEPS, Images, Network, save


class Config(PretrainedConfig):
    model_type = "pixcontrast_test"


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.network = Network()
        self.post_init()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss, logits = self.network(images, labels)
        return {"loss": loss, "logits": logits}


class ModelThatResets(Model):
    """transformers calls `_init_weights` on every module for which the file lacks something."""

    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


if __name__ == "__main__":
    folder = sys.argv[1]
    torch.manual_seed(0)
    model = ModelThatResets(Config())
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=0.1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=Images()).train()
    save(model.network, folder, arguments.process_index)
