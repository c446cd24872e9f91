"""SegFormer with pixel contrast in transformers' Trainer.

Needs torch, transformers, accelerate and pixcontrast-ext. `python hf_segformer.py [FOLDER]`, or torchrun: the folder
gets checkpoints, and goes on from its last. `SegformerWithContrast.from_pretrained(...)` works too.
"""

import os
import sys

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import pixcontrast_ext as pc

CLASSES, SIZE, STEPS = 5, 64, 20


class SegformerWithContrast(SegformerForSemanticSegmentation):
    """Head and criterion are submodules, so the Trainer optimises the one and saves both."""

    def __init__(self, config):
        super().__init__(config)
        self.head = pc.ProjectionHead(config.decoder_hidden_size, embed_dim=64)
        settings = dict(warmup_steps=5, bank=dict(embed_dim=64, region_slots=100, pixel_slots=500))
        self.criterion = pc.PixelContrastCrossEntropyLoss(config.num_labels, min_pixels=5, **settings)
        self.features = pc.FeatureTap(self.decode_head.classifier)
        self.accepts_loss_kwargs = False  # a mean, which the Trainer divides when it accumulates gradients
        self.post_init()

    def _init_weights(self, module):  # which a file of weights has nothing for
        if isinstance(module, (pc.MemoryBank, pc.PixelContrastLoss)):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(self, pixel_values, labels=None, **kwargs):
        outputs = super().forward(pixel_values, **kwargs)
        features = self.features.take()
        if labels is not None:  # in evaluation, without gradients, the bank stays as it is
            outputs["loss"] = self.criterion(outputs.logits, self.head(features), labels)
        return outputs


class Scenes:
    """Noisy images with a square of each class on a ground of class 0, and their labels: your data goes here."""

    def __len__(self):
        return 160

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        labels = torch.zeros(SIZE, SIZE, dtype=torch.long)
        for name in range(1, CLASSES):
            row, column = torch.randint(0, SIZE - 20, (2,), generator=generator).tolist()
            labels[row : row + 20, column : column + 20] = name
        colours = torch.linspace(-1, 1, 3 * CLASSES).view(3, CLASSES).roll(1, 0)[:, labels]
        return dict(pixel_values=colours + torch.randn(colours.shape, generator=generator), labels=labels)


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/segformer"
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    sizes = dict(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1] * 4)
    config = SegformerConfig(num_labels=CLASSES, decoder_hidden_size=64, **sizes)
    model = SegformerWithContrast.from_pretrained(last) if last else SegformerWithContrast(config)
    options = dict(logging_steps=5, save_steps=STEPS, per_device_train_batch_size=4, learning_rate=3e-3)
    options |= dict(max_steps=STEPS * (2 if last else 1), report_to=[], ddp_find_unused_parameters=False)
    use_cpu = not torch.cuda.is_available()  # or torchrun's processes train apart
    arguments = TrainingArguments(folder, use_cpu=use_cpu, **options)
    trainer = Trainer(model, arguments, train_dataset=Scenes(), eval_dataset=Scenes())
    trainer.train(resume_from_checkpoint=last)
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
