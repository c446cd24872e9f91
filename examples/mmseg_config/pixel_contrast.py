"""Decode heads of mmsegmentation with pixel contrast, and a generated data set in place of yours.

Needs torch, mmengine, mmcv, mmsegmentation and pixcontrast-ext. A config names this file in `custom_imports`.
"""

import torch
from mmengine.structures import PixelData
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample
from torch.utils.data import Dataset

import pixcontrast_ext as pc


class WithContrast:
    """Adds the contrast to any decode head of mmsegmentation that ends in `cls_seg`, as nearly all do.

    Args:
        embed_dim: of the embeddings, and of the bank.
        contrast: settings of a `PixelContrastLoss` but for the classes and `ignore_index`, which are the head's own.
    """

    def __init__(self, *, embed_dim, contrast, **settings):
        super().__init__(**settings)
        self.embed = pc.ProjectionHead(self.conv_seg.in_channels, embed_dim)
        contrast = dict(ignore_index=self.ignore_index, **contrast)
        if contrast.get("bank"):
            contrast["bank"] = dict(embed_dim=embed_dim, **contrast["bank"])
        self.contrast = pc.PixelContrastLoss(self.num_classes, **contrast)
        self.features = pc.FeatureTap(self.conv_seg)

    def loss(self, inputs, *others):
        """The losses of the head, and "loss_contrast", which mmengine adds to them and logs apart."""
        *before, batch_data_samples, _ = others  # in a cascade the output of the head before
        logits = self(inputs, *before)
        features = self.features.take()
        losses = self.loss_by_feat(logits, batch_data_samples)
        labels = torch.stack([sample.gt_sem_seg.data[0] for sample in batch_data_samples])
        losses["loss_contrast"] = self.contrast(self.embed(features), labels, logits)
        return losses

    def predict(self, *inputs):
        """That of the head."""
        result = super().predict(*inputs)
        self.features.forget()
        return result


@MODELS.register_module()
class FCNHeadWithContrast(WithContrast, FCNHead):
    """For another head write the same two lines."""


@DATASETS.register_module()
class Scenes(Dataset):
    """Noisy images with a square of each class on a ground of class 0, and their labels."""

    def __init__(self, count, size):
        self.count, self.size = count, size
        self.metainfo = dict(classes=("ground", "one", "two", "three", "four"))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        labels = torch.zeros(self.size, self.size, dtype=torch.long)
        for name in range(1, 5):
            row, column = torch.randint(0, self.size - 20, (2,), generator=generator).tolist()
            labels[row : row + 20, column : column + 20] = name
        colours = torch.linspace(-1, 1, 15).view(3, 5).roll(1, 0)[:, labels]
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels[None]))
        sample.set_metainfo(dict(img_shape=labels.shape, ori_shape=labels.shape))
        return dict(
            inputs=colours + 0.7 * torch.randn(colours.shape, generator=generator), data_samples=sample
        )
