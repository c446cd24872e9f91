"""The simplest segmentation model: a backbone with one feature map, which a classifier and a projection head read.

And what it has in common with the others: a head that the loss may call in its place.
"""

from __future__ import annotations

from torch import Tensor, nn

from pixcontrast_ext.head import ProjectionHead


class ProjectingModel(nn.Module):
    """A model with a projection head."""

    embed_head: nn.Module | None
    defers_head = False
    """Whether it leaves the head, in training, to the loss, which projects only the pixels that it uses."""

    def embedded(self, features: Tensor) -> dict[str, Tensor]:
        """The features' embeddings as "embed"; in training, if the head is deferred, the features as "features"."""
        if self.embed_head is None:
            return {}
        if self.training and self.defers_head:
            return {"features": features}
        return {"embed": self.embed_head(features)}


class SegmentationModel(ProjectingModel):
    """A backbone with a classifier and a projection head on the same feature map.

    Args:
        backbone: module with an attribute `channels`, from images [B, 3, H, W], RGB in [0, 1], to features
            [B, channels, h, w]. It normalises its input itself.
        num_classes, embed_dim, head: of the classifier and of the `ProjectionHead`.
        seg_head: another classifier than a 1x1 convolution with dropout, from features to logits.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        embed_dim: int,
        head: str,
        seg_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        channels: int = backbone.channels  # type: ignore[assignment]
        self.backbone = backbone
        if seg_head is None:
            seg_head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))
        self.seg_head = seg_head
        self.embed_head = ProjectionHead(channels, embed_dim, head)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`{"seg": logits [B, C, h, w], "embed": embeddings [B, D, h, w]}`, not upsampled, not normalised.

        Without a head (`drop_embed_head`) there is no "embed"; if it is deferred (`defer_embed_head`), there is in
        training "features", [B, channels, h, w], in its place.
        """
        features = self.backbone(images)
        return {"seg": self.seg_head(features), **self.embedded(features)}
