"""DeepLabV3 (arXiv 1706.05587) with the heads of the contrast's authors, or torchvision's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pixcontrast_ext.head import ProjectionHead
from pixcontrast_ext.trainer.networks.backbones import ResNetBackbone, conv_norm_relu
from pixcontrast_ext.trainer.networks.segmentation import ProjectingModel

_RATES = (12, 24, 36)
_WIDTH = 512
"""Channels of each branch of the pyramid and of what is made of them, in the authors' head."""


class WideASPP(nn.Module):
    """Atrous spatial pyramid pooling with branches of 512 channels, joined by a 3x3 convolution without dropout.

    [B, channels, h, w] -> [B, 512, h, w]. The branches are a 1x1 convolution, 3x3 ones at the three rates, and the
    mean of the image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_norm_relu(channels, _WIDTH),
                *(conv_norm_relu(channels, _WIDTH, 3, rate) for rate in _RATES),
            ]
        )
        self.pooled = conv_norm_relu(channels, _WIDTH)
        self.fuse = conv_norm_relu(5 * _WIDTH, _WIDTH, 3)

    def forward(self, features: Tensor) -> Tensor:
        pooled = self.pooled(features.mean((2, 3), keepdim=True)).expand(-1, -1, *features.shape[2:])
        fused: Tensor = self.fuse(torch.cat([*(branch(features) for branch in self.branches), pooled], 1))
        return fused


def wide_heads(channels: int, middle_channels: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Classifier and auxiliary classifier of the contrast's authors, whose last norm has no ReLU after it."""
    refined = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, bias=False)
    seg_head = nn.Sequential(
        WideASPP(channels), refined, nn.BatchNorm2d(_WIDTH), nn.Conv2d(_WIDTH, num_classes, 1)
    )
    aux_head = nn.Sequential(
        conv_norm_relu(middle_channels, 256, 3, bias=True), nn.Conv2d(256, num_classes, 1)
    )
    return seg_head, aux_head


def torchvision_heads(channels: int, middle_channels: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Those of torchvision: 256 channels, dropout, and a 1x1 convolution that joins the pyramid."""
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    from torchvision.models.segmentation.fcn import FCNHead

    return DeepLabHead(channels, num_classes, atrous_rates=_RATES), FCNHead(middle_channels, num_classes)


def _start_as_authors(*heads: nn.Module) -> None:
    for module in (module for head in heads for module in head.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class DeepLabV3(ProjectingModel):
    """Atrous spatial pyramid pooling at rates 12, 24 and 36 over the last stage of a ResNet at stride 8.

    The embeddings are of that stage too, so that the contrast shapes the backbone. An auxiliary head reads the
    stage before it, in training only.

    Args:
        backbone: the ResNet.
        num_classes, embed_dim, head: of the classifiers and of the `ProjectionHead`.
        wide: the classifiers of the contrast's authors, and their initialisation; otherwise torchvision's.
    """

    def __init__(
        self, backbone: ResNetBackbone, num_classes: int, embed_dim: int, head: str, *, wide: bool
    ) -> None:
        super().__init__()
        heads = wide_heads if wide else torchvision_heads
        self.backbone = backbone
        self.seg_head, self.aux_head = heads(backbone.channels, backbone.middle_channels, num_classes)
        if wide:
            _start_as_authors(self.seg_head, self.aux_head)
        # Last, so that all else starts the same whatever its size.
        self.embed_head = ProjectionHead(backbone.channels, embed_dim, head)
        if wide:
            _start_as_authors(self.embed_head)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits "seg" and, in training, "aux", and embeddings "embed" where there is a head, at stride 8.

        Images [B, 3, H, W], RGB in [0, 1]; all maps have the size that `ResNetBackbone` says. In training the pooled
        branch normalises over the batch alone: one image is a ValueError, unless its ranks share their norms.
        With a deferred head there is "features" in place of "embed", as in `SegmentationModel`.
        """
        if self.training and len(images) < 2 and not self._shares_norms():
            raise ValueError("DeepLabV3 trains on at least two images at a time, got 1: raise --batch-size")
        middle, features = self.backbone(images, with_middle=True)
        outputs = {"seg": self.seg_head(features), **self.embedded(features)}
        if self.training:
            outputs["aux"] = self.aux_head(middle)
        return outputs

    def _shares_norms(self) -> bool:
        return any(isinstance(module, nn.SyncBatchNorm) for module in self.seg_head.modules())
