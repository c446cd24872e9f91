"""DeepLabV3 (arXiv 1706.05587) with torchvision's heads."""

from __future__ import annotations

from torch import Tensor, nn

from pixcontrast_ext.head import ProjectionHead
from pixcontrast_ext.trainer.networks.backbones import ResNetBackbone
from pixcontrast_ext.trainer.networks.segmentation import ProjectingModel


class DeepLabV3(ProjectingModel):
    """Atrous spatial pyramid pooling at rates 12, 24 and 36 over the last stage of a ResNet at stride 8.

    The embeddings are of that stage too, so that the contrast shapes the backbone. An auxiliary head reads the
    stage before it, in training only.

    Args:
        backbone: the ResNet.
        num_classes, embed_dim, head: of the classifiers and of the `ProjectionHead`.
    """

    def __init__(self, backbone: ResNetBackbone, num_classes: int, embed_dim: int, head: str) -> None:
        super().__init__()
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead
        from torchvision.models.segmentation.fcn import FCNHead

        self.backbone = backbone
        self.seg_head = DeepLabHead(backbone.channels, num_classes, atrous_rates=(12, 24, 36))
        self.aux_head = FCNHead(backbone.middle_channels, num_classes)
        self.embed_head = ProjectionHead(backbone.channels, embed_dim, head)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits "seg" and, in training, "aux", and embeddings "embed" where there is a head, at stride 8.

        Images [B, 3, H, W], RGB in [0, 1]; all maps are [B, ., ceil(H / 8), ceil(W / 8)]. In training the pooled
        branch normalises over the batch alone: one image is a ValueError, unless its ranks share their norms.
        With a deferred head there is "features" in place of "embed", as in `SegmentationModel`.
        """
        if self.training and len(images) < 2 and not self._shares_norms():
            raise ValueError("DeepLabV3 trains on at least two images at a time, got 1: raise --batch-size")
        middle, features = self.backbone.stages(images)
        outputs = {"seg": self.seg_head(features), **self.embedded(features)}
        if self.training:
            outputs["aux"] = self.aux_head(middle)
        return outputs

    def _shares_norms(self) -> bool:
        return any(isinstance(module, nn.SyncBatchNorm) for module in self.seg_head.modules())
