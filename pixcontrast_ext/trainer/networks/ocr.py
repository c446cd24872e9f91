"""Object-contextual representations, written from arXiv 1909.11065, section 3.2.

A pixel's class is easier to tell from the pixel together with the object it is part of. So the image is divided
softly into one region per class, each region is represented by the mean of its pixels' features, and every
pixel takes in the representations of the regions it resembles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pixcontrast_ext.head import ProjectionHead
from pixcontrast_ext.trainer.networks.backbones import HRNetBackbone, conv_norm_relu, v2_classifier
from pixcontrast_ext.trainer.networks.segmentation import ProjectingModel

_WIDTH, _KEY_WIDTH = 512, 256
"""Channels of pixel and region representations, and of the keys that compare them, as in the paper."""


class ObjectContext(nn.Module):
    """Augments the representation of each pixel with that of the regions it resembles.

    Args:
        width: channels of pixel representations, region representations and of the result.
        key_width: channels in which pixels and regions are compared.
    """

    def __init__(self, width: int = _WIDTH, key_width: int = _KEY_WIDTH) -> None:
        super().__init__()
        self.scale = key_width**-0.5
        self.pixel_key = nn.Sequential(conv_norm_relu(width, key_width), conv_norm_relu(key_width, key_width))
        self.region_key = nn.Sequential(
            conv_norm_relu(width, key_width), conv_norm_relu(key_width, key_width)
        )
        self.region_value = conv_norm_relu(width, key_width)
        self.context = conv_norm_relu(key_width, width)
        self.fuse = nn.Sequential(conv_norm_relu(2 * width, width), nn.Dropout2d(0.05))

    def forward(self, pixels: Tensor, regions: Tensor) -> Tensor:
        """Pixel representations [B, width, h, w] and logits of the soft regions [B, C, h, w] -> [B, width, h, w]."""
        # f_k = sum_i m_ki x_i, the membership m_k being a softmax over the pixels of the image.
        members = regions.flatten(2).softmax(2)
        represented = torch.einsum("bkn,bdn->bdk", members, pixels.flatten(2))[..., None]
        # w_ik = softmax over k of <key(x_i), key(f_k)>, with the scale of dot-product attention.
        pixel_keys, region_keys = self.pixel_key(pixels).flatten(2), self.region_key(represented).flatten(2)
        resembles = (torch.einsum("bdn,bdk->bnk", pixel_keys, region_keys) * self.scale).softmax(2)
        # y_i = context(sum_k w_ik value(f_k)), z_i = fuse([y_i, x_i]).
        values = self.region_value(represented).flatten(2)
        gathered = torch.einsum("bnk,bdk->bdn", resembles, values).unflatten(2, pixels.shape[-2:])
        fused: Tensor = self.fuse(torch.cat([self.context(gathered), pixels], 1))
        return fused


class OCRModel(ProjectingModel):
    """An HRNet with object context. The soft regions are the logits of an auxiliary classifier.

    Args:
        backbone: the HRNet.
        num_classes, embed_dim, head: of the classifiers and of the `ProjectionHead`.
        wide: a 3x3 convolution in the auxiliary classifier, as the contrast's authors have it, and their biases in it
            and in the pixels' representation; otherwise 1x1 and none, as in the code of OCR's authors.
    """

    def __init__(
        self, backbone: HRNetBackbone, num_classes: int, embed_dim: int, head: str, *, wide: bool
    ) -> None:
        super().__init__()
        channels = backbone.channels
        self.backbone = backbone
        self.aux_head = v2_classifier(channels, num_classes)
        if wide:
            self.aux_head[0] = conv_norm_relu(channels, channels, 3, bias=True)
        self.pixels = conv_norm_relu(channels, _WIDTH, 3, bias=wide)
        self.object_context = ObjectContext()
        self.seg_head = nn.Conv2d(_WIDTH, num_classes, 1)
        self.embed_head = ProjectionHead(channels, embed_dim, head)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits "seg" and, in training, "aux", and embeddings "embed" where there is a head, at stride 4.

        Images [B, 3, H, W], RGB in [0, 1]; all maps are [B, ., ceil(H / 4), ceil(W / 4)].
        With a deferred head there is "features" in place of "embed", as in `SegmentationModel`.
        """
        features = self.backbone(images)
        regions = self.aux_head(features)
        seg = self.seg_head(self.object_context(self.pixels(features), regions))
        outputs = {"seg": seg, **self.embedded(features)}
        if self.training:
            outputs["aux"] = regions
        return outputs
