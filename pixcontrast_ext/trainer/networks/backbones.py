"""Backbones from timm, whose features the paper's networks are built on.

They need the extra `models`, which is imported when a backbone is built and not before: it takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the colours of ImageNet, with which published weights were trained."""


def require_extra() -> None:
    """Raises ImportError, saying what to install, if the extra `models` is missing or does not go with torch."""
    for library in ("torchvision", "timm"):  # in this order, since timm imports torchvision
        try:
            import_module(library)
        except ImportError as error:
            raise ImportError(
                "the networks on ResNet and HRNet need timm and torchvision: "
                f"pip install 'pixcontrast-ext[models]' ({error})"
            ) from error
        except RuntimeError as error:
            raise ImportError(
                f"torchvision is installed, but not the build that goes with torch {torch.__version__}: install "
                f"both from one index ({error})"
            ) from error


class TimmBackbone(nn.Module):
    """Feature maps of a network from timm, with random weights.

    Args:
        name: of the network in timm.
        options: to `timm.create_model`, choosing the feature maps.
    """

    body: Any  # an nn.Module, whose feature_info and call are timm's
    mean: Tensor
    std: Tensor
    channels: int
    """Of the feature map that `forward` returns."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        require_extra()
        self.name, self.options = name, options
        self.body = self._create(pretrained=False)
        for statistic, values in (("mean", _MEAN), ("std", _STD)):
            self.register_buffer(statistic, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def stages(self, images: Tensor) -> list[Tensor]:
        """The feature maps of images [B, 3, H, W], RGB in [0, 1]."""
        maps: list[Tensor] = self.body((images - self.mean) / self.std)
        return maps

    def fetch_weights(self) -> dict[str, Tensor]:
        """State dict of the `body` with the weights timm publishes, from its cache or over the network."""
        return self._create(pretrained=True).state_dict()

    def _create(self, pretrained: bool) -> nn.Module:
        body: nn.Module = import_module("timm").create_model(
            self.name, pretrained=pretrained, features_only=True, **self.options
        )
        return body


class ResNetBackbone(TimmBackbone):
    """A ResNet at stride 8, with dilation in its last two stages.

    `stages` are those two, [B, 1024, h, w] and [B, 2048, h, w]; the features are the last one.

    Args:
        name: of the network in timm, with the stem of its paper.
        deep_stem: take the contrast's authors' stem: three 3x3 convolutions in place of one of 7x7, and a pooling that
            rounds up, after which h = floor(ceil(H / 2) / 4) + 1. Otherwise h = ceil(H / 8).
    """

    def __init__(self, name: str, *, deep_stem: bool = False) -> None:
        super().__init__(f"{name}s" if deep_stem else name, output_stride=8, out_indices=(3, 4))
        self.middle_channels, self.channels = self.body.feature_info.channels()
        self.body.maxpool.ceil_mode = deep_stem

    def forward(self, images: Tensor, *, with_middle: bool = False) -> Any:
        """The features, or with those of the stage before them a pair (middle, features)."""
        middle, features = self.stages(images)
        return (middle, features) if with_middle else features


class HRNetBackbone(TimmBackbone):
    """An HRNetV2: four branches, upsampled to stride 4 and concatenated.

    [B, 3, H, W] -> [B, channels, ceil(H / 4), ceil(W / 4)]. Source: arXiv 1908.07919, section 3.3. It upsamples
    bilinearly, as the segmentation code of its authors does, where timm takes the nearest pixel.
    """

    align_corners = False

    def __init__(self, name: str) -> None:
        super().__init__(name, feature_location="", out_indices=(1, 2, 3, 4))
        self.channels = sum(self.body.feature_info.channels())
        for module in self.body.modules():
            if isinstance(module, nn.Upsample):
                module.mode, module.align_corners = "bilinear", False

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        # The branches add up only where each is twice as large as the next.
        margin = (0, -width % 32, 0, -height % 32)
        normal = F.pad((images - self.mean) / self.std, margin)
        branches = self.body(normal)
        size = branches[0].shape[-2:]
        joined = torch.cat(
            [
                F.interpolate(each, size, mode="bilinear", align_corners=self.align_corners)
                for each in branches
            ],
            1,
        )
        return joined[..., : -(-height // 4), : -(-width // 4)]


def conv_norm_relu(
    inputs: int, outputs: int, kernel: int = 1, dilation: int = 1, *, bias: bool = False
) -> nn.Sequential:
    """A convolution that keeps the size, batch norm and ReLU."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def v2_classifier(channels: int, num_classes: int) -> nn.Sequential:
    """The classifier of HRNetV2's paper: two 1x1 convolutions, features [B, channels, h, w] to logits [B, C, h, w]."""
    return nn.Sequential(conv_norm_relu(channels, channels), nn.Conv2d(channels, num_classes, 1))


def wide_classifier(channels: int, num_classes: int) -> nn.Sequential:
    """The classifier of the contrast's authors: a 3x3 and a 1x1 convolution, with dropout between them."""
    return nn.Sequential(
        conv_norm_relu(channels, channels, 3, bias=True),
        nn.Dropout2d(0.1),
        nn.Conv2d(channels, num_classes, 1, bias=False),
    )
